"""What a kernel computes in a step, laid out by torch ops on the device: from lengths and tables alone, for all layers.

Decode: a *unit* is some consecutive tokens of a block, what one descriptor of a gather fetches. A *chunk* is
``CHUNK_UNITS`` units of a sequence, counted from its first key, so that a sequence is cut in the same way in any batch.
A *tile* is ``TILE_CHUNKS`` chunks of any sequences, one unit a partition. Shapes depend on shapes alone; how many
tiles there are is a value, the trip count of the kernel's loops.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

PARTITIONS = 128
CHUNK_UNITS = 64
TILE_CHUNKS = PARTITIONS // CHUNK_UNITS
TURN_KV_HEADS, TURN_HEADS = 256, 2048
"""Kv heads and query heads of all tiles in a turn of the longest loop: the end of a turn costs as much as a few."""
QUERY_BYTES = 8192
"""Of a sequence's queries that are fetched at once."""
MERGES = 8
"""Chunks of a row that are merged at once."""
MERGED_VALUES = 2048
"""Values of a row of merged heads at most: half of PSUM."""
LONG_ROW = 4
"""Heads of a row that takes longer to compute than to fetch."""
DESCRIPTOR_BYTES = 4096
"""Bytes of a unit where blocks are large enough, or up to twice as many: DMA engines lose little with them."""
UNIT_TOKENS = 32
"""Tokens of a unit at most, however narrow they are."""

NOTHING = -(2**30)
"""A row that is none, whatever small number a kernel adds to it."""


@dataclass(frozen=True)
class DecodeSizes:
    """What a plan of decode depends on beside lengths and tables.

    Attributes:
        sides: keys and values apart (2), or values in the lanes of the keys (1).
        num_blocks: N.
        num_heads: H.
        num_kv_heads: KH.
        value_dim: DV.
        block_size: S.
        unit: tokens of a unit, see ``unit_tokens``.
        mask_units: units of a row of the mask; None: no mask.
        sliding_window: as the op takes it.
        attention_chunk: as the op takes it.
        query_parts: into which the queries of a sequence are cut, see ``query_parts``.
        cores: that share the work.
    """

    sides: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    value_dim: int
    block_size: int
    unit: int
    mask_units: int | None
    sliding_window: int | None
    attention_chunk: int | None
    query_parts: int
    cores: int

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class DecodePlan:
    """The tiles of a decode step; ``X`` slots for chunks, ``TILE_CHUNKS`` of which are a tile.

    Attributes:
        units: (PARTITIONS, tiles, 5 or 6) int32, of each unit of each tile:

            - 0, 1: row of its keys and values in the cache, seen as rows of a unit of a head, of head 0; ``NOTHING``:
              nothing is read;
            - 2, 3: the tokens that the query sees, from and to (exclusive);
            - 4: from its first token to the query, in tokens;
            - 5, with a mask: its row in the mask, seen as rows of a unit of a sequence; ``NOTHING``: all False.
        query_rows: (X / TILE_CHUNKS, TILE_CHUNKS) int32: row of a chunk's queries in (B * query parts, ..), of part 0;
            ``NOTHING``: no one's chunk.
        turns: (1, n + 1) int32: turns of the loops over ``turn_tiles`` tiles of a core, and all tiles of a core.
        places: (groups * C, PARTITIONS * MERGES) int32: where among (X * parts, see ``merge_parts``) the partial
            results of rows (B * parts) are, in the order of keys: for each group of ``PARTITIONS`` rows C times
            ``MERGES``, the first and some turns of ``turn_merges``; ``NOTHING`` behind the last.
        merge_turns: (1, 1) int32: how many turns are needed behind the first ``MERGES``.
    """

    units: Tensor
    query_rows: Tensor
    turns: Tensor
    places: Tensor
    merge_turns: Tensor


def unit_tokens(block_size: int, stored_row_bytes: int, row_bytes: int, head_bytes: int) -> int:
    """Return how many tokens a unit has: a power of two that divides the block size.

    Args:
        block_size: S, a power of two.
        stored_row_bytes: of a row of a head in the cache.
        row_bytes: of a row of a head as it is multiplied.
        head_bytes: of a number for each query head, as it is multiplied; all heads' weights lie on chip at once.
    """
    tokens = min(block_size, UNIT_TOKENS)
    while tokens > 1 and (
        tokens * stored_row_bytes >= 2 * DESCRIPTOR_BYTES
        or tokens * row_bytes > 2 * DESCRIPTOR_BYTES
        or tokens * head_bytes > DESCRIPTOR_BYTES
    ):
        tokens //= 2
    return tokens


def query_parts(num_heads: int, row_bytes: int) -> int:
    """Return in how many parts of whole heads the queries of a sequence are fetched.

    Args:
        num_heads: H.
        row_bytes: of a query head.
    """
    heads = num_heads
    while heads > 1 and (num_heads % heads or heads * row_bytes > QUERY_BYTES):
        heads -= 1
    return num_heads // heads


def turn_tiles(num_kv_heads: int, num_heads: int) -> tuple[int, ...]:
    """Return how many tiles of a core the turns of the loops over tiles take: powers of two, 1 the last."""
    sizes: tuple[int, ...] = (1,)
    while 2 * sizes[0] * num_kv_heads <= TURN_KV_HEADS and 2 * sizes[0] * num_heads <= TURN_HEADS:
        sizes = (2 * sizes[0],) + sizes  # noqa: RUF005 (NKI's parser takes no star)
    return sizes


def merge_parts(num_seqs: int, num_heads: int, value_dim: int, cores: int) -> int:
    """Return in how many rows of whole heads the results of a sequence are merged.

    As many as fill the partitions: half of them where the rows are short, as a descriptor costs the same then.

    Args:
        num_seqs: B.
        num_heads: H.
        value_dim: DV.
        cores: that share the rows.
    """
    found = num_heads
    for parts in range(num_heads, 0, -1):
        heads = num_heads // parts
        if num_heads % parts == 0 and (heads == 1 or heads * value_dim <= MERGED_VALUES):
            found = parts
            if num_seqs * parts <= PARTITIONS * cores // (1 if heads >= LONG_ROW else 2):
                break
    return found


def turn_merges(heads: int) -> int:
    """Return how many times ``MERGES`` chunks of rows of so many heads a turn of the merging loop takes."""
    return min(4, max(1, 8 // heads))


def merge_groups(num_rows: int, cores: int) -> int:
    """Return how many ``PARTITIONS`` rows the merging kernel computes; each core as many."""
    return -(-num_rows // (PARTITIONS * cores)) * cores


def decode_plan(
    block_tables: Tensor,  # (B, M) int32
    context_lens: Tensor,  # (B,) int32
    sizes: DecodeSizes,
) -> DecodePlan:
    """Return the plan of a decode step.

    Args:
        block_tables: ids outside of ``[0, N)`` hold no keys.
        context_lens: clamped to what the tables hold.
        sizes: what else the plan depends on.
    """
    num_seqs, columns = block_tables.shape
    device, block_size, unit = block_tables.device, sizes.block_size, sizes.unit
    chunk, capacity = CHUNK_UNITS * unit, columns * block_size
    end = context_lens.clamp(0, capacity)
    begin = torch.zeros_like(end)
    most = -(-capacity // chunk)
    if sizes.sliding_window is not None:
        begin = (end - min(sizes.sliding_window, capacity)).clamp(min=0)
        most = min(most, -(-sizes.sliding_window // chunk) + 1)
    if sizes.attention_chunk is not None:
        position = (end - 1).clamp(min=0)
        begin = torch.maximum(begin, position - position % min(sizes.attention_chunk, capacity))
        most = min(most, -(-sizes.attention_chunk // chunk) + 1)
    first = begin // chunk
    counts = torch.where(end > begin, (end + chunk - 1) // chunk - first, 0)
    ends = counts.cumsum(0, dtype=torch.int32)  # (B,)

    turn_slots = TILE_CHUNKS * sizes.cores
    num_slots = -(-num_seqs * most // turn_slots) * turn_slots
    slot = torch.arange(num_slots, dtype=torch.int32, device=device)
    seq = (slot[:, None] >= ends).sum(1)  # (X,)
    live = seq < num_seqs
    seq = seq.clamp(max=num_seqs - 1)
    index = first[seq] + slot - (ends - counts)[seq]
    unit_index = index[:, None] * CHUNK_UNITS + torch.arange(CHUNK_UNITS, dtype=torch.int32, device=device)
    position = unit_index * unit  # (X, CHUNK_UNITS)
    seen_from, seen_to = begin[seq][:, None] - position, end[seq][:, None] - position
    block = block_tables[seq[:, None], (position // block_size).clamp(0, columns - 1)]
    used = live[:, None] & (seen_from < unit) & (seen_to > 0) & (block >= 0) & (block < sizes.num_blocks)
    head_rows = sizes.num_kv_heads * (block_size // unit)
    row = block * head_rows + position % block_size // unit
    rows = torch.stack((row, row + (sizes.sides - 1) * sizes.num_blocks * head_rows), -1)
    bounds = torch.stack((seen_from.clamp(0, unit), seen_to.clamp(0, unit)), -1)
    words = [torch.where(used[..., None], rows, NOTHING), torch.where(used[..., None], bounds, 0)]
    words.append(torch.where(used, seen_to - 1, 0)[..., None])
    if sizes.mask_units is not None:
        masked = used & (unit_index < sizes.mask_units)
        words.append(torch.where(masked, seq[:, None] * sizes.mask_units + unit_index, NOTHING)[..., None])
    units = torch.cat(words, -1).to(torch.int32)
    left = tiles = (ends[-1:] + turn_slots - 1) // turn_slots
    turns = []
    for count in turn_tiles(sizes.num_kv_heads, sizes.num_heads):
        turns.append(left // count)
        left = left % count
    parts = merge_parts(num_seqs, sizes.num_heads, sizes.value_dim, sizes.cores)
    per_turn = MERGES * turn_merges(sizes.num_heads // parts)
    merge_turns = ((counts.amax() - MERGES).clamp(min=0) + per_turn - 1) // per_turn
    return DecodePlan(
        units=units.reshape(-1, PARTITIONS, units.shape[-1]).transpose(0, 1).contiguous(),
        query_rows=torch.where(live, seq * sizes.query_parts, NOTHING).reshape(-1, TILE_CHUNKS).to(torch.int32),
        turns=torch.stack((*turns, tiles), 1).to(torch.int32),
        places=_places(counts, ends, MERGES + -(-max(0, most - MERGES) // per_turn) * per_turn, parts, sizes.cores),
        merge_turns=merge_turns.reshape(1, 1).to(torch.int32),
    )


def _places(counts: Tensor, ends: Tensor, most: int, parts: int, cores: int) -> Tensor:
    """Return where the partial results of each row are, as the merging kernel reads them."""
    index = torch.arange(most, dtype=torch.int32, device=counts.device)
    slots = (ends - counts)[:, None] + index  # (B, C)
    part = torch.arange(parts, dtype=torch.int32, device=counts.device)
    rows = slots[:, None, :] * parts + part[:, None]  # (B, parts, C)
    rows = torch.where((index < counts[:, None])[:, None, :], rows, NOTHING).flatten(0, 1)
    groups = merge_groups(rows.shape[0], cores)
    rows = pad(rows, (0, 0, 0, groups * PARTITIONS - rows.shape[0]), value=NOTHING)
    rows = rows.reshape(groups, PARTITIONS, -1, MERGES).transpose(1, 2)
    return rows.reshape(-1, PARTITIONS * MERGES).to(torch.int32)
