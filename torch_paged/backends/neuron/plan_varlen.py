"""The plan of packed ragged queries, laid out by torch ops on the device (``plan`` is that of decode).

A *row* is a query token and a member of its group; some rows of neighbouring members are a *unit*, which takes a
partition. A *tile* is ``PARTITIONS`` units of one sequence, or a multiple; all kv heads have the same tiles. Most rows
of a long sequence are in wide tiles, which turn keys once for many rows, the rest in middle ones, and the rest of that
in narrow ones of a row a unit. Sums of a row are the same in each of them.

A row sees an interval of key positions, so that a tile needs one too, cut into *chunks* of ``CHUNK_KEYS`` keys of a
source, from its first key: the softmax of a row moves on by whole chunks, so that a sequence is cut in the same way in
any batch. A chunk is four *steps* of ``STEP_KEYS`` keys, of which a tile's last one computes those alone that it needs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_paged.backends.neuron.plan import NOTHING, PARTITIONS

KEY_UNIT = 8
"""Tokens of a descriptor, as many as the smallest block has; prefill computes longer than it fetches."""
GATHER_KEYS = PARTITIONS * KEY_UNIT
CHUNK_GATHERS = 2
CHUNK_KEYS = CHUNK_GATHERS * GATHER_KEYS
STEP_KEYS = 512
"""Keys whose products with 128 rows fill a bank of PSUM."""
BODIES = ((4, False), (3, False), (2, False), (1, False), (3, True), (2, True), (1, True))
"""Loop bodies of the kernel: steps of a chunk, and whether earlier rows of a tile see less of the last step. All chunks
of a tile but the last take the first one."""
NEW_REST, CACHE_REST = 3, 2
"""Most steps of a last chunk that does not take the first body: units of the cache do not fill partitions by thirds."""
FAR = 2**31 - 1


@dataclass(frozen=True)
class TileShape:
    """The shape of a tile.

    Attributes:
        member_rows: of a unit; divides the group.
        unit_tiles: ``PARTITIONS`` units each.
    """

    member_rows: int
    unit_tiles: int

    @property
    def units(self) -> int:
        """Units of a tile."""
        return PARTITIONS * self.unit_tiles

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.units * self.member_rows


NARROW = TileShape(1, 1)


@dataclass(frozen=True)
class VarlenSizes:
    """What a plan of packed queries depends on beside lengths, tables and positions.

    Attributes:
        num_tokens: T.
        num_new_keys: Tk; 0: no keys beside the cache.
        num_blocks: N; 0: no cache.
        num_heads: H.
        num_kv_heads: KH.
        block_size: S.
        wide, middle: shapes of tiles; None: there are none of these.
        mask_heads: heads that have a mask of their own; None: no mask.
        mask_columns: C.
        causal: as the op takes it.
        sliding_window: as the op takes it.
        attention_chunk: as the op takes it.
        cores: that share the work.
    """

    num_tokens: int
    num_new_keys: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    block_size: int
    wide: TileShape | None
    middle: TileShape | None
    mask_heads: int | None
    mask_columns: int
    causal: bool
    sliding_window: int | None
    attention_chunk: int | None
    cores: int

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.num_heads // self.num_kv_heads

    def mask_chunks(self, columns: int) -> tuple[int, int]:
        """Return the chunks of a token in the masks of the sources, with so many columns in the block tables."""
        keys = columns * self.block_size, self.num_new_keys
        most, least = (max(1, -(-min(self.mask_columns, count) // CHUNK_KEYS)) for count in keys)
        return most, least


@dataclass(frozen=True)
class VarlenTiles:
    """Tiles of one shape; ``X`` tiles of ``U`` units. Sources are the cache (0) and the new keys (1).

    Attributes:
        query_units: (X, U) int32: row of a unit of kv head 0 in (T * H / member rows, ..); ``NOTHING``: none.
        member_units: (X, U) int32: the unit's place in its group; ``NOTHING``: none, or of a padding token.
        rows: (X, U * 6) float32: for each unit and source the key positions that it sees, from and to (exclusive), and
            its own, all counted from the tile's first chunk of the source.
        ends: (X, 2) int32: for each source the position behind the keys that the tile sees, counted likewise.
        starts: (X, 2) int32: row of ``key_units``, and new key, with which the tile's first chunk begins.
        mask_rows: (X, 2 * U) int32: for each source the row of a unit's first chunk in its mask, seen as rows of chunks
            of a token, of the first head; None without a mask.
        turns: (X, 2 * (len(BODIES) + 1)) int32: for each source how often each of ``BODIES`` runs, and the chunks; of
            all tiles that the cores compute at the same time.
        count: (1,) int32: tiles of a core.
    """

    query_units: Tensor
    member_units: Tensor
    rows: Tensor
    ends: Tensor
    starts: Tensor
    mask_rows: Tensor | None
    turns: Tensor
    count: Tensor


@dataclass(frozen=True)
class VarlenPlan:
    """The tiles of packed queries.

    Attributes:
        wide, middle: tiles of these shapes, or None.
        narrow: the others.
        counts: (1, 4) int32: wide, middle and narrow tiles of a core; 1 where some block id that is needed holds no
            keys.
        key_units: (B * gathers + CHUNK_GATHERS, PARTITIONS) int32: rows of ``GATHER_KEYS`` keys of a sequence in the
            cache, seen as rows of ``KEY_UNIT`` tokens of a head, of head 0; ``NOTHING``: no keys. None without a cache.
    """

    wide: VarlenTiles | None
    middle: VarlenTiles | None
    narrow: VarlenTiles
    counts: Tensor
    key_units: Tensor | None


@dataclass(frozen=True)
class _Batch:
    """Lengths and what tokens see; the last sequence is that of the padding tokens.

    Attributes:
        begins: (B + 1,) the first token of a sequence.
        rows: (B + 1,) rows of a sequence.
        contexts: (B + 1,) its keys in the cache.
        first_new: (B + 1,) its first new key.
        low, high: (T,) key positions that a token sees, from and to (exclusive).
        position: (T,) its own.
        columns: M.
    """

    begins: Tensor
    rows: Tensor
    contexts: Tensor
    first_new: Tensor
    low: Tensor
    high: Tensor
    position: Tensor
    columns: int


def diagonal_keys(unit_tile: int, tokens: int) -> int:
    """Return how many keys of the last step a row tile of so many tokens sees where the step begins with the tile."""
    seen = (unit_tile + 1) * tokens
    return 128 if seen <= 128 else 256 if seen <= 256 else STEP_KEYS  # sums of a power of two keep their bits


def varlen_plan(
    cu_seqlens_q: Tensor,  # (B + 1,)
    contexts: Tensor,  # (B,): keys in the cache
    new_begins: Tensor,  # (B + 1,): of the keys beside it
    block_tables: Tensor,  # (B, M)
    query_positions: Tensor | None,  # (T,); None: the last of their sequence's keys
    sizes: VarlenSizes,
) -> VarlenPlan:
    """Return the plan of packed queries; lengths are cut to what tokens, keys and tables hold."""
    device, num_tokens = cu_seqlens_q.device, sizes.num_tokens
    begins = cu_seqlens_q.clamp(0, num_tokens).to(torch.int32).cummax(0).values
    begins = pad(begins, (0, 1), value=num_tokens)  # padding tokens are a sequence without keys
    lens = begins.diff()
    contexts = contexts.clamp(0, block_tables.shape[1] * sizes.block_size).to(torch.int32)
    contexts = pad(contexts, (0, 1))
    first_new = new_begins.clamp(0, sizes.num_new_keys).to(torch.int32)
    new_lens = pad(first_new.diff().clamp(min=0), (0, 1))
    kv_lens = contexts + new_lens

    token = torch.arange(num_tokens, dtype=torch.int32, device=device)
    owner = (token[:, None] >= begins[1:-1]).sum(1)  # (T,): a padding token's is B
    if query_positions is not None:
        position = query_positions.to(torch.int32)
    else:
        position = (kv_lens - lens - begins[:-1])[owner] + token
    last = kv_lens.clamp(max=sizes.mask_columns) if sizes.mask_heads is not None else kv_lens
    low, high = _interval(position, last[owner], sizes)
    seen = low < high
    nothing = torch.zeros_like(kv_lens)
    low_of_seq = (nothing + FAR).scatter_reduce(0, owner, torch.where(seen, low, FAR), "amin")[:-1]
    high_of_seq = nothing.scatter_reduce(0, owner, torch.where(seen, high, 0), "amax")[:-1]

    key_units, missing = None, torch.zeros(1, dtype=torch.int32, device=device)
    if sizes.num_blocks and block_tables.shape[1]:
        key_units, missing = _key_units(block_tables, contexts[:-1], low_of_seq, high_of_seq, sizes)
    rows = lens * sizes.group
    batch = _Batch(begins[:-1], rows, contexts, first_new, low, high, position, block_tables.shape[1])
    first_rows, most, counts = torch.zeros_like(rows), None, []
    found: dict[TileShape | None, VarlenTiles | None] = {None: None}
    for shape in (sizes.wide, sizes.middle, NARROW):
        if shape is None:
            counts.append(torch.zeros_like(missing))
            continue
        left = (rows - first_rows).clamp(min=0)
        spare = shape.rows - 1 if shape == NARROW else shape.rows // 2 - 1  # a rest of up to a half is for smaller ones
        tiles = (left + spare) // shape.rows
        found[shape] = mine = _tiles(batch, first_rows, tiles, most, shape, sizes)
        counts.append(mine.count)
        first_rows, most = first_rows + tiles * shape.rows, shape.rows // 2
    return VarlenPlan(found[sizes.wide], found[sizes.middle], mine, torch.stack((*counts, missing), 1), key_units)


def _tiles(
    batch: _Batch, first_rows: Tensor, counts: Tensor, most_rows: int | None, shape: TileShape, sizes: VarlenSizes
) -> VarlenTiles:
    """Return the tiles of one shape.

    Args:
        batch: the sequences.
        first_rows: (B + 1,) the row of a sequence with which its first tile begins.
        counts: (B + 1,) how many tiles it has.
        most_rows: that a sequence has in them; None: all.
        shape: of a tile.
        sizes: of the call.
    """
    device, num_seqs, num_tokens, cores = counts.device, counts.shape[0], sizes.num_tokens, sizes.cores
    group_units = sizes.group // shape.member_rows
    ends = counts.cumsum(0, dtype=torch.int32)
    most = num_tokens * sizes.group // shape.rows + num_seqs
    if most_rows is not None:
        most = min(most, num_seqs * -(-most_rows // shape.rows))
    most = -(-most // cores) * cores
    tile = torch.arange(most, dtype=torch.int32, device=device)
    seq = (tile[:, None] >= ends).sum(1)
    live = seq < num_seqs
    seq = seq.clamp(max=num_seqs - 1)
    row = first_rows[seq] + (tile - (ends - counts)[seq]) * shape.rows
    unit = row[:, None] // shape.member_rows + torch.arange(shape.units, dtype=torch.int32, device=device)
    used = live[:, None] & (unit * shape.member_rows < batch.rows[seq][:, None])  # (X, U)
    place = (batch.begins[seq][:, None] + unit // group_units).clamp(0, num_tokens - 1)
    member = unit % group_units
    query_units = torch.where(used, place * (sizes.num_kv_heads * group_units) + member, NOTHING)
    member_units = torch.where(used & (seq < num_seqs - 1)[:, None], member, NOTHING)

    low, high, position = batch.low[place], batch.high[place], batch.position[place].float()
    seeing = used & (low < high)
    low, high = torch.where(seeing, low, 0), torch.where(seeing, high, 0)
    begin, end = torch.where(seeing, low, FAR).amin(1), high.amax(1)
    context = batch.contexts[seq]
    # Of both sources at once, since every operation takes its time: (2, X), of units (2, X, U).
    origin = torch.stack((torch.zeros_like(context), context))
    begin = torch.stack((begin, (begin - context).clamp(min=0)))
    end = torch.stack((torch.minimum(end, context), end - context))
    stop = torch.stack((torch.minimum(high, context[:, None]), high))
    first = torch.where(end > begin, begin, 0) // CHUNK_KEYS
    chunks = torch.where(end > begin, -(-end // CHUNK_KEYS) - first, 0)
    end = end - first * CHUNK_KEYS
    start = (origin + first * CHUNK_KEYS)[:, :, None]
    stop = stop - start
    rows = torch.stack((low - start, stop, position - start), -1)  # (2, X, U, 3)
    last = (chunks - 1) * CHUNK_KEYS
    steps = -((last - end) // STEP_KEYS)  # of the last chunk
    least = [diagonal_keys(n, PARTITIONS // group_units) for n in range(shape.unit_tiles)]
    reach = (stop - last[:, :, None]).reshape(2, most, shape.unit_tiles, -1).amax(3)
    beyond = torch.stack([reach[:, :, n] - keys for n, keys in enumerate(least)]).amax(0)
    turns = _turns(chunks, steps, beyond, cores)

    gathers = -(-batch.columns * sizes.block_size // GATHER_KEYS)
    new_starts = batch.first_new[seq] + first[1] * CHUNK_KEYS
    starts = torch.stack((seq * gathers + first[0] * CHUNK_GATHERS, new_starts), -1)
    mask_rows = None
    if sizes.mask_heads is not None:
        mask_token = place
        if sizes.mask_heads > sizes.num_kv_heads:
            mask_token = place + member * (shape.member_rows * num_tokens)
        chunks_of = sizes.mask_chunks(batch.columns)
        mask_rows = [mask_token * chunks_of[source] + first[source][:, None] for source in range(2)]
    return VarlenTiles(
        query_units=query_units.to(torch.int32),
        member_units=member_units.to(torch.int32),
        rows=rows.permute(1, 2, 0, 3).reshape(most, -1).to(torch.float32),
        ends=end.T.to(torch.int32).contiguous(),
        starts=starts.to(torch.int32),
        mask_rows=None if mask_rows is None else torch.cat(mask_rows, 1).to(torch.int32),
        turns=turns.to(torch.int32),
        count=((ends[-1:] + cores - 1) // cores).to(torch.int32),
    )


def _interval(position: Tensor, last: Tensor, sizes: VarlenSizes) -> tuple[Tensor, Tensor]:
    """Return the key positions that a query at a position sees, from and to (exclusive); no sum leaves 32 bits."""
    window, chunk = sizes.sliding_window, sizes.attention_chunk
    low, high = torch.zeros_like(position), last
    if sizes.causal or chunk is not None:
        high = torch.where(position >= last, last, position + 1)
    if window is not None and window <= FAR:
        low = torch.where(position >= window, position - window + 1, 0)
        high = torch.where(position >= last - window, high, torch.minimum(high, position + window))
    if chunk is not None and chunk <= FAR:
        low = torch.maximum(low, position - position % chunk)
    return low, high


def _turns(chunks: Tensor, steps: Tensor, beyond: Tensor, cores: int) -> Tensor:
    """Return how often each body runs for tiles, (X, sources * (len(BODIES) + 1)).

    Args:
        chunks: (2, X) of each source and tile.
        steps: (2, X) that are needed of the last chunk.
        beyond: (2, X) how far the last key that a unit tile sees of the last chunk lies behind what it computes of the
            diagonal's step, the most of a tile.
        cores: that compute as many tiles at the same time, by the same bodies.
    """
    if cores > 1:  # all of them take the steps of the tile that needs the most

        def of_all_cores(x: Tensor) -> Tensor:
            return x.reshape(2, -1, cores).amax(2).repeat_interleave(cores, 1)
    else:

        def of_all_cores(x: Tensor) -> Tensor:
            return x

    source = torch.arange(2, dtype=torch.int32, device=chunks.device)[:, None]
    most_rest = source * (NEW_REST - CACHE_REST) + CACHE_REST
    whole = of_all_cores(chunks - ((chunks > 0) & (steps <= most_rest)).to(torch.int32))
    last = chunks > whole
    rest = of_all_cores(torch.where(last, steps, 0))
    computed = (rest - 1) * STEP_KEYS
    crossing = of_all_cores((last & (beyond > computed)).to(torch.int32))
    code = 2 * rest + (1 - crossing) * source
    bodies = [code == 2 * steps_left + diagonal for steps_left, diagonal in BODIES[1:]]
    turns = torch.stack((whole, *(body.to(torch.int32) for body in bodies), of_all_cores(chunks)), 2)
    return turns.permute(1, 0, 2).reshape(chunks.shape[1], -1)


def _key_units(
    block_tables: Tensor, contexts: Tensor, low: Tensor, high: Tensor, sizes: VarlenSizes
) -> tuple[Tensor, Tensor]:
    """Return the rows of units of keys, and (1,) whether an entry that is needed holds no block.

    Args:
        block_tables: (B, M).
        contexts: (B,), within the tables.
        low: (B,) the first key position that a query of the sequence sees.
        high: (B,) the position behind the last.
        sizes: of the call.
    """
    columns = block_tables.shape[1]
    units = -(-columns * sizes.block_size // GATHER_KEYS) * PARTITIONS
    position = torch.arange(units, dtype=torch.int32, device=block_tables.device) * KEY_UNIT
    block = block_tables[:, (position // sizes.block_size).clamp(max=columns - 1)]  # (B, units)
    end = torch.minimum(contexts, high)[:, None]
    needed = (position < end) & (position + KEY_UNIT > low[:, None])
    held = (block >= 0) & (block < sizes.num_blocks)
    parts = sizes.block_size // KEY_UNIT
    rows = block * (sizes.num_kv_heads * parts) + position % sizes.block_size // KEY_UNIT
    rows = torch.where(needed & held, rows, NOTHING).reshape(-1, PARTITIONS).to(torch.int32)
    missing = (needed & ~held).any().reshape(1).to(torch.int32)
    return pad(rows, (0, 0, 0, CHUNK_GATHERS), value=NOTHING), missing
