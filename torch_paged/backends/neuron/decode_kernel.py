"""Decode: one query token per sequence, tokens on partitions.

A turn of a loop computes tiles of 128 units of keys (``plan``), 2 chunks of any sequences, gathered whole; tiles of few
kv heads together. Per kv head, each column of tokens is transposed by the tensor engine and multiplied by the queries
of both sequences; a token keeps the product of its own. Maximum and sum of a chunk go over the tokens of a unit on the
vector engine, and over its 64 partitions after a transposition. Then values and weights are multiplied, contracted over
the tokens: the values are the stationary matrix, as the weights have fewer columns. At the end of a turn the weighted
values are transposed, and go to HBM in a row of all kv heads for each member of a group: few and long descriptors. So
do maxima and sums. A second kernel merges the chunks in the order of keys (``merge_kernel``).

Heads of 32 or 64 lanes: the keys of two tokens are transposed and multiplied at once, by queries that are zero in the
lanes of the other token, and the values of two tokens.

Values of keys outside the bounds are overwritten: a weight of 0 does not hide a NaN. A value within them that is
not finite reaches every row of its tile, whether the row sees it or not, and a key that is not finite the other token
of its pair: then all tiles are computed once more, with such values as 0 and pairs apart, and each row gets the
infinities of the values that it sees.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from torch_paged.backends.neuron.plan import CHUNK_UNITS as UNITS
from torch_paged.backends.neuron.plan import PARTITIONS as P
from torch_paged.backends.neuron.plan import TILE_CHUNKS as SLOTS
from torch_paged.backends.neuron.plan import turn_tiles

BANK_BYTES = 2048
GANG_KV_HEADS, GANG_HEADS = 8, 64  # of tiles that are computed together: an instruction costs as much as 60 elements
BUFFERS = 4  # for units of a side on their way from HBM
LEAST = -1e30  # a maximum below which no logit counts: finite, so that a difference of two of them is no NaN
LARGEST = 3.4028234663852886e38  # finite float32
HANDED_ON = ("attend_chunks",)  # results of capacity: merge_chunks reads the rows that the plan's tiles wrote


@nki.jit
def attend_chunks(
    query,  # (B * query parts, H / query parts * D)
    cache,  # (C * N * KH * parts, unit * DS), C sides
    units,  # (P, X / SLOTS, 5 or 6) int32
    query_rows,  # (X / SLOTS, SLOTS) int32
    turns,  # (1, n + 1) int32
    slopes,  # (1, H) float32, or None
    mask,  # (B * mask units, mask heads * unit) uint8, or None; mask heads are 1, KH or H
    head_scales,  # (1, 2 * KH) float32, or None
    token_scales,  # (C * N * KH * parts, unit) float32, or None
    table,  # (1, 256): what a byte of the cache means, as it is multiplied; None: it is cast
    num_heads,
    num_kv_heads,
    head_dim,
    parts,  # units of a block
    unit,
    value_dim,
    softmax_scale,
    soft_cap,
    latent,  # values are the first lanes of the keys, of a single kv head
):
    """Return per chunk and member of a group, for all kv heads, weighted values, and maxima and sums, float32.

    (X * G, KH * DV) and (X * G, KH * 2), as (X / SLOTS, ..).
    """
    num_tiles = units.shape[1]
    sums = nl.ndarray((num_tiles, SLOTS * num_heads * value_dim), dtype=nl.float32, buffer=nl.shared_hbm)
    stats = nl.ndarray((num_tiles, SLOTS * num_heads * 2), dtype=nl.float32, buffer=nl.shared_hbm)
    call = _Call(
        query,
        cache,
        token_scales,
        mask,
        units,
        query_rows,
        sums,
        stats,
        num_heads,
        num_kv_heads,
        head_dim,
        parts,
        unit,
        value_dim,
        softmax_scale,
        soft_cap,
        latent,
    )
    call.lay_out_constants(slopes, head_scales, table)
    cores = nl.num_programs(0)
    counts = nl.ndarray(turns.shape, dtype=nl.int32)
    nisa.dma_copy(dst=counts, src=turns)
    first = nl.ndarray((1, 1), dtype=nl.int32)  # tile of a turn, of core 0
    nisa.memset(dst=first, value=0)
    sizes = turn_tiles(num_kv_heads, num_heads)
    for i in range(len(sizes)):
        if sizes[i] * cores <= num_tiles:  # else a turn would reach behind the tiles
            _attend_tiles(call, first, counts[:, i : i + 1], sizes[i], False)

    spoilt = call.spoilt_on_any_core()
    tiles = nl.ndarray((1, 1), dtype=nl.int32)
    nisa.tensor_tensor(dst=tiles, data1=counts[:, len(sizes) : len(sizes) + 1], data2=spoilt, op=nl.multiply)
    nisa.memset(dst=first, value=0)
    _attend_tiles(call, first, tiles, 1, True)
    return sums, stats


def _attend_tiles(call, first, count, size, again):
    """Attend in ``count`` turns of ``size`` tiles of each core, from ``first`` on."""
    cores, core = nl.num_programs(0), nl.program_id(0)
    turns = nisa.register_alloc()
    nisa.register_load(turns, count)

    def some_tiles(turn):
        part = _Turn(call, first, core * size, size)
        if again and cores > 1:  # the other core may have written what this one writes now
            nisa.core_barrier(data=call.sums, cores=(0, 1))
            nisa.core_barrier(data=call.stats, cores=(0, 1))
        for tile in range(0, size, part.gang):
            _Gang(part, tile).attend(again)
        part.give(again)
        nisa.tensor_scalar(dst=first, data=first, op0=nl.add, operand0=float(size * cores))

    nl.fori_loop(0, turns, some_tiles)


def _spread(row):
    """Return a row of HBM on every partition."""
    if row == None:  # noqa: E711
        return None
    found = nl.ndarray((P, row.shape[1]), dtype=row.dtype)
    nisa.dma_copy(dst=found, src=row.ap(pattern=[[0, P], [1, row.shape[1]]], offset=0))
    return found


def _clear(buffer, engine):
    zero = 0 if buffer.dtype == nl.int8 or buffer.dtype == nl.uint8 else 0.0
    nisa.memset(dst=buffer, value=zero, engine=engine)


class _Call(nl.NKIObject):
    """The arrays and sizes of a call, and what all turns share on chip."""

    def __init__(
        self,
        query,
        cache,
        token_scales,
        mask,
        units,
        query_rows,
        sums,
        stats,
        num_heads,
        num_kv_heads,
        head_dim,
        parts,
        unit,
        value_dim,
        softmax_scale,
        soft_cap,
        latent,
    ):
        self.query, self.cache, self.token_scales, self.mask = query, cache, token_scales, mask
        self.units, self.query_rows, self.sums, self.stats = units, query_rows, sums, stats
        self.num_heads, self.num_kv_heads, self.parts, self.unit = num_heads, num_kv_heads, parts, unit
        self.group, self.head_dim = num_heads // num_kv_heads, head_dim
        self.stored_dim, self.value_dim = cache.shape[1] // unit, value_dim
        self.softmax_scale, self.soft_cap, self.latent = softmax_scale, soft_cap, latent
        self.dtype = query.dtype
        if query.dtype == nl.float16 and token_scales != None:  # noqa: E711
            self.dtype = nl.float32  # a weight times its value's scale may be too small for float16
        self.columns = SLOTS * self.group  # rows of a tile
        self.pair = 2 if head_dim in (32, 64) and unit > 1 else 1  # tokens whose keys are turned at once, as lanes
        self.value_pair = 2 if value_dim in (32, 64) and unit > 1 and 8 * self.columns <= BANK_BYTES else 1
        self.gang = 1  # tiles that are computed together
        while not latent and 2 * self.gang * num_kv_heads <= GANG_KV_HEADS and 2 * self.gang * num_heads <= GANG_HEADS:
            self.gang *= 2

    def lay_out_constants(self, slopes, head_scales, table):
        self.tokens = nl.ndarray((P, self.unit), dtype=nl.float32)
        nisa.iota(dst=self.tokens, pattern=[[1, self.unit]], offset=0, channel_multiplier=0)
        self.head_rows = nl.ndarray((P, 2, self.num_kv_heads), dtype=nl.int32)
        nisa.iota(dst=self.head_rows, pattern=[[0, 2], [self.parts, self.num_kv_heads]], offset=0, channel_multiplier=0)
        query_parts = self.num_heads * self.head_dim // self.query.shape[1]
        self.part_rows = nl.ndarray((P, query_parts), dtype=nl.int32)
        nisa.iota(dst=self.part_rows, pattern=[[1, query_parts]], offset=0, channel_multiplier=0)
        self.slopes, self.head_scales, self.table = _spread(slopes), _spread(head_scales), _spread(table)
        self.logit_scales = None
        if head_scales != None:  # noqa: E711
            self.logit_scales = nl.ndarray((P, self.num_kv_heads), dtype=nl.float32)
            of_keys = self.head_scales[:, 0 : self.num_kv_heads]
            nisa.tensor_scalar(dst=self.logit_scales, data=of_keys, op0=nl.multiply, operand0=self.softmax_scale)
        self.spoilt = nl.ndarray((P, self.num_kv_heads), dtype=nl.float32)  # 1: not finite in some tile
        nisa.memset(dst=self.spoilt, value=0.0)
        self.weights = []  # zero but in a token's own slot; of two gangs that follow each other
        for _ in range(2):
            shape = (P, self.gang * self.num_kv_heads, self.unit, SLOTS, self.group)
            weights = nl.ndarray(shape, dtype=self.dtype)
            _clear(weights, nisa.engine.vector)
            self.weights.append(weights)
        # Where nothing is read, what comes from HBM finds in these what they held before.
        self.query_buffer = nl.ndarray((P, self.query.shape[1]), dtype=self.query.dtype)
        _clear(self.query_buffer, nisa.engine.vector)
        if self.pair > 1:  # a head's queries in the lanes of each token, zeros in the others
            heads = self.query.shape[1] // self.head_dim
            self.query_pairs = nl.ndarray((P, heads, self.pair, self.pair, self.head_dim), dtype=self.query.dtype)
            _clear(self.query_pairs, nisa.engine.gpsimd)
        self.buffers = []  # of keys, of values
        for side in range(1 if self.latent else 2):
            buffers = []
            for _ in range(BUFFERS):
                buffer = nl.ndarray((P, self.cache.shape[1]), dtype=self.cache.dtype)
                _clear(buffer, nisa.engine.vector if side == 0 else nisa.engine.gpsimd)
                buffers.append(buffer)
            self.buffers.append(buffers)

    def spoilt_on_any_core(self):
        """Return (1, 1) int32: 1 where some product of weights and values was not finite."""
        by_row = nl.ndarray((P, 1), dtype=nl.float32)
        nisa.tensor_reduce(dst=by_row, op=nl.maximum, data=self.spoilt, axis=1)
        turned = nl.ndarray((1, P), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=by_row)
        found = nl.ndarray((1, 1), dtype=nl.int32)
        nisa.tensor_reduce(dst=found, op=nl.maximum, data=turned, axis=1)
        cores, core = nl.num_programs(0), nl.program_id(0)
        if cores == 1:
            return found
        shared = nl.ndarray((1, cores), dtype=nl.int32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=shared[:, core : core + 1], src=found)
        nisa.core_barrier(data=shared, cores=(0, 1))
        by_core = nl.ndarray((1, cores), dtype=nl.int32)
        nisa.dma_copy(dst=by_core, src=shared)
        of_any = nl.ndarray((1, 1), dtype=nl.int32)
        nisa.tensor_reduce(dst=of_any, op=nl.maximum, data=by_core, axis=1)
        return of_any

    def cast(self, stored, engine):
        if stored.dtype == self.dtype:
            return stored
        found = nl.ndarray(stored.shape, dtype=self.dtype)
        nisa.tensor_copy(dst=found, src=stored, engine=engine)
        return found

    def fetched(self, base, rows):
        """Return rows (P, W) of a tensor in HBM, zeros where there is none."""
        found = nl.ndarray((P, base.shape[1]), dtype=base.dtype)
        _clear(found, nisa.engine.gpsimd)
        self.fetch(found, base, rows)
        return found

    def fetch(self, found, base, rows):
        """Write rows of a tensor in HBM to (rows, W), where there is one."""
        width = base.shape[1]
        source = base.ap(pattern=[[width, found.shape[0]], [1, width]], offset=0, vector_offset=rows, indirect_dim=0)
        nisa.dma_copy(dst=found, src=source, oob_mode=nisa.oob_mode.skip)

    def turned(self, keys, lane, lanes):
        """Return some lanes of keys (P, unit, DS) as (pair * lanes, unit / pair, P)."""
        pairs = self.unit // self.pair
        found = nl.ndarray((self.pair * lanes, pairs, P), dtype=self.dtype)
        at_a_time = BANK_BYTES // P // _bytes(self.dtype)
        for start in range(0, pairs, at_a_time):
            count = min(at_a_time, pairs - start)
            turned = nl.ndarray((self.pair * lanes, count, P), dtype=self.dtype, buffer=nl.psum)
            for j in range(count):
                tokens = slice((start + j) * self.pair, (start + j + 1) * self.pair)
                nisa.nc_transpose(dst=turned[:, j, :], data=keys[:, tokens, lane : lane + lanes])
            nisa.tensor_copy(dst=found[:, start : start + count, :], src=turned, engine=nisa.engine.scalar)
        return found

    def softmax_blocks(self, gang):
        """Return up to 128 query heads of a gang at a time: slices of (tiles * KH) and of the members of a group."""
        blocks, heads, at_a_time = [], gang * self.num_kv_heads, max(1, P // self.group)
        for head in range(0, heads, at_a_time):
            for member in range(0, self.group, P):
                mine = slice(head, min(heads, head + at_a_time))
                blocks.append((mine, slice(member, min(self.group, member + P))))
        return blocks

    def product(self, values, lane, lanes, weights):
        """Return some lanes of values (P, unit, DS) times weights (P, unit, columns), contracted over the tokens.

        (lanes, columns), of the first and of the second ones of pairs of tokens; what is multiplied across is dropped.
        """
        pair, columns = self.value_pair, weights.shape[2]
        product = nl.ndarray((pair * lanes, pair, columns), dtype=nl.float32, buffer=nl.psum)
        for j in range(0, self.unit, pair):
            nisa.nc_matmul(
                dst=product,
                stationary=values[:, j : j + pair, lane : lane + lanes],
                moving=weights[:, j : j + pair, :],
                accumulate=j > 0,
            )
        found = []
        for i in range(pair):
            found.append(product[i * lanes : (i + 1) * lanes, i, :])
        return found


def _bytes(dtype):
    return 4 if dtype == nl.float32 else 2


class _Turn(nl.NKIObject):
    """What the tiles of a turn fetch and give at once, ``gang`` of them computed together."""

    def __init__(self, call, first, start, size):
        """Fetch what belongs to ``size`` tiles from the one that is ``start`` behind the first on."""
        self.call, self.first, self.start, self.size = call, first, start, size
        self.gang = min(size, call.gang)
        words = call.units.shape[2]
        self.units = nl.ndarray((P, size, words), dtype=nl.int32)
        pattern = [[call.units.shape[1] * words, P], [1, size * words]]
        source = call.units.ap(pattern=pattern, offset=start * words, scalar_offset=first, indirect_dim=1)
        nisa.dma_copy(dst=self.units.reshape((P, size * words)), src=source)
        self.rows = nl.ndarray((P, size, 2, call.num_kv_heads), dtype=nl.int32)  # negative where nothing is read
        wide = self.units[:, :, 0:2].reshape((P, size, 2, 1)).broadcast(3, call.num_kv_heads)
        of_heads = call.head_rows.reshape((P, 1, 2, call.num_kv_heads)).broadcast(1, size)
        nisa.tensor_tensor(dst=self.rows, data1=wide, data2=of_heads, op=nl.add)  # of int32: exact
        self.numbers = nl.ndarray((P, size, 3), dtype=nl.float32)  # bounds and distance
        nisa.tensor_copy(dst=self.numbers, src=self.units[:, :, 2:5])
        self._compare_bounds()
        self.queries = []  # for each 128 lanes (pair * lanes, pair, H, slots)
        for lane in range(0, call.head_dim, P):
            shape = (call.pair * min(P, call.head_dim - lane), call.pair, call.num_heads, size * SLOTS)
            self.queries.append(nl.ndarray(shape, dtype=call.dtype))
        for slot in range(0, size * SLOTS, P):
            self._fetch_queries(slot, min(P, size * SLOTS - slot))
        self.stats = []  # for up to 128 query heads of a gang maxima and sums
        for heads, members in call.softmax_blocks(self.gang):
            count = (heads.stop - heads.start) * (members.stop - members.start)
            self.stats.append(nl.ndarray((count, 2, size // self.gang, SLOTS), dtype=nl.float32))
        self.sums = []  # for each 128 lanes of values (value_pair * lanes, KH, rows): weighted values
        for lane in range(0, call.value_dim, P):
            lanes = call.value_pair * min(P, call.value_dim - lane)
            shape = (lanes, call.num_kv_heads, size * call.columns)
            self.sums.append(nl.ndarray(shape, dtype=nl.float32))

    def _compare_bounds(self):
        """Note which tokens are within the bounds: for each kv head 1, and 1 for the others."""
        call, size = self.call, self.size
        tokens = call.tokens.reshape((P, 1, call.unit)).broadcast(1, size)
        low, high = (
            nl.ndarray((P, size, call.unit), dtype=nl.float32),
            nl.ndarray((P, size, call.unit), dtype=nl.float32),
        )
        bounds = []
        for i in range(2):
            bounds.append(self.numbers[:, :, i : i + 1].broadcast(2, call.unit))
        nisa.tensor_tensor(dst=low, data1=tokens, data2=bounds[0], op=nl.greater_equal)
        nisa.tensor_tensor(dst=high, data1=tokens, data2=bounds[1], op=nl.less)
        nisa.tensor_tensor(dst=low, data1=low, data2=high, op=nl.multiply)
        self.hidden = nl.ndarray((P, size, call.unit), dtype=nl.uint8)
        nisa.tensor_scalar(dst=self.hidden, data=low, op0=nl.equal, operand0=0.0)
        self.seen = nl.ndarray((P, size, call.num_kv_heads, call.unit), dtype=nl.uint8)
        wide = low.reshape((P, size, 1, call.unit)).broadcast(2, call.num_kv_heads)
        nisa.tensor_copy(dst=self.seen, src=wide, engine=nisa.engine.gpsimd)

    def _fetch_queries(self, slot, count):
        call = self.call
        of_first_part = nl.ndarray((count, 1), dtype=nl.int32)
        source = call.query_rows.ap(
            pattern=[[1, count], [1, 1]], offset=self.start * SLOTS + slot, scalar_offset=self.first, indirect_dim=0
        )
        nisa.dma_copy(dst=of_first_part, src=source)
        parts = call.part_rows.shape[1]
        rows = nl.ndarray((count, parts), dtype=nl.int32)
        wide = of_first_part.broadcast(1, parts)
        nisa.tensor_tensor(dst=rows, data1=wide, data2=call.part_rows[0:count, :], op=nl.add)  # of int32: exact
        heads = call.num_heads // parts
        at_a_time = max(1, BANK_BYTES // (count * _bytes(call.query.dtype)))
        for part in range(parts):
            found = call.query_buffer[0:count, :]
            call.fetch(found, call.query, rows[:, part : part + 1])
            if call.pair > 1:
                for k in range(call.pair):
                    mine = call.query_pairs[0:count, :, k, k, :]
                    source = found.reshape((count, heads, call.head_dim))
                    nisa.tensor_copy(dst=mine, src=source, engine=nisa.engine.gpsimd)
            for k in range(call.pair):
                for head in range(0, heads, at_a_time):
                    some = min(at_a_time, heads - head)
                    place = slice(part * heads + head, part * heads + head + some)
                    for i in range(len(self.queries)):
                        lanes = self.queries[i].shape[0]
                        turned = nl.ndarray((lanes, some, count), dtype=call.query.dtype, buffer=nl.psum)
                        for j in range(some):
                            if call.pair > 1:
                                mine = call.query_pairs[0:count, head + j, k, :, :]
                            else:
                                lane = (head + j) * call.head_dim + i * P
                                mine = found[:, lane : lane + lanes]
                            nisa.nc_transpose(dst=turned[:, j, :], data=mine)
                        nisa.tensor_copy(dst=self.queries[i][:, k, place, slot : slot + count], src=turned)

    def give(self, again):
        """Write what the turn found, a row of all kv heads for each member of a group: few and long descriptors."""
        call = self.call
        self._give_stats()
        spoilt = nl.ndarray((P, call.num_kv_heads), dtype=nl.float32)
        nisa.memset(dst=spoilt, value=0.0)
        width = call.num_kv_heads * call.value_dim
        for row in range(0, self.size * call.columns, P):
            count = min(P, self.size * call.columns - row)
            found = nl.ndarray((count, call.num_kv_heads, call.value_dim), dtype=nl.float32)
            for head in range(call.num_kv_heads):
                turned = nl.ndarray((count, call.value_pair * call.value_dim), dtype=nl.float32, buffer=nl.psum)
                for i in range(len(self.sums)):
                    mine = self.sums[i][:, head, row : row + count]
                    nisa.nc_transpose(dst=turned[:, i * P : i * P + mine.shape[0]], data=mine)
                total = turned
                if call.value_pair > 1:
                    total = nl.ndarray((count, call.value_dim), dtype=nl.float32)
                    nisa.tensor_copy(dst=total, src=turned[:, 0 : call.value_dim])
                    second = turned[:, call.value_dim : 2 * call.value_dim]
                    nisa.tensor_tensor(dst=total, data1=total, data2=second, op=nl.add)
                nisa.activation(
                    dst=found[:, head, :],
                    op=nl.copy,
                    data=total,
                    reduce_op=nl.add,
                    reduce_res=spoilt[0:count, head : head + 1],
                    reduce_cmd=nisa.reduce_cmd.reset_reduce,
                )
            pattern = [[width, count], [1, width]]
            nisa.dma_copy(dst=self._part(call.sums, pattern, row * width), src=found)
            if not again:
                nisa.tensor_scalar(
                    dst=spoilt, data=spoilt, op0=nl.multiply, operand0=0.0, op1=nl.not_equal, operand1=0.0
                )
                nisa.tensor_tensor(dst=call.spoilt, data1=call.spoilt, data2=spoilt, op=nl.maximum)

    def _give_stats(self):
        call, gang, gangs = self.call, self.gang, self.size // self.gang
        width = 2 * call.num_heads
        blocks = call.softmax_blocks(gang)
        at_a_time = P // SLOTS
        for start in range(0, gangs, at_a_time):
            some = min(at_a_time, gangs - start)
            found = nl.ndarray((some * SLOTS, gang, call.group, call.num_kv_heads, 2), dtype=nl.float32)
            for i in range(len(blocks)):
                heads, members = blocks[i]
                kv_heads, size = (heads.stop - heads.start) // gang, members.stop - members.start
                for k in range(2):
                    turned = nl.ndarray((some * SLOTS, gang, kv_heads, size), dtype=nl.float32, buffer=nl.psum)
                    nisa.nc_transpose(dst=turned, data=self.stats[i][:, k, start : start + some, :])
                    head = heads.start if gang == 1 else 0
                    mine = found[:, :, members, head : head + kv_heads, k]
                    nisa.tensor_copy(dst=mine, src=turned.permute((0, 1, 3, 2)))
            of_gang = gang * SLOTS * width
            pattern = [[of_gang, some], [width, SLOTS], [SLOTS * width, gang], [1, width]]
            nisa.dma_copy(dst=self._part(call.stats, pattern, start * of_gang), src=found)

    def _part(self, base, pattern, offset):
        """Return a part of what the turn gives."""
        return base.ap(
            pattern=pattern, offset=self.start * base.shape[1] + offset, scalar_offset=self.first, indirect_dim=0
        )


class _Gang(nl.NKIObject):
    """Tiles of a turn that are computed together: their kv heads follow each other."""

    def __init__(self, turn, tile):
        call = turn.call
        self.call, self.turn, self.tile = call, turn, tile
        self.heads = turn.gang * call.num_kv_heads
        self.weights = call.weights[tile // turn.gang % 2][:, 0 : self.heads, :, :, :]
        self.shown = self._shown()

    def _shown(self):
        """Return (P, heads, unit, G) uint8, a view: 1 for the tokens that a query head sees."""
        call, turn = self.call, self.turn
        tiles = slice(self.tile, self.tile + turn.gang)
        seen = turn.seen[:, tiles, :, :].reshape((P, self.heads, call.unit))
        if call.mask == None:  # noqa: E711
            return seen.reshape((P, self.heads, call.unit, 1)).broadcast(3, call.group)
        mask_heads = call.mask.shape[1] // call.unit
        per_head = call.group if mask_heads == call.num_heads else 1
        shown = nl.ndarray((P, self.heads, per_head, call.unit), dtype=nl.uint8)
        for k in range(turn.gang):
            asked = call.fetched(call.mask, turn.units[:, self.tile + k, 5:6])
            asked = asked.reshape((P, mask_heads // per_head, per_head, call.unit))
            if mask_heads == 1:
                asked = asked.broadcast(1, call.num_kv_heads)
            mine = slice(k * call.num_kv_heads, (k + 1) * call.num_kv_heads)
            wide = seen[:, mine, :].reshape((P, call.num_kv_heads, 1, call.unit)).broadcast(2, per_head)
            nisa.tensor_tensor(dst=shown[:, mine, :, :], data1=asked, data2=wide, op=nl.multiply)
        shown = shown.permute((0, 1, 3, 2))
        return shown if per_head == call.group else shown.broadcast(3, call.group)

    def attend(self, again):
        call = self.call
        logits = nl.ndarray((P, self.heads, call.unit, call.group), dtype=nl.float32)
        for head in range(self.heads):
            keys = self._gathered(0, head, call.latent)
            self._multiply_keys(logits, keys, head, again)
        if call.soft_cap != 0.0:
            nisa.activation(dst=logits, op=nl.tanh, data=logits, scale=1.0 / call.soft_cap)
            nisa.tensor_scalar(dst=logits, data=logits, op0=nl.multiply, operand0=call.soft_cap)
        if call.slopes != None:  # noqa: E711
            for k in range(self.turn.gang):
                mine = slice(k * call.num_kv_heads, (k + 1) * call.num_kv_heads)
                self._subtract_alibi(logits[:, mine, :, :], self.tile + k)
        selected = nl.ndarray(logits.shape, dtype=nl.float32)
        nisa.select_reduce(dst=selected, predicate=self.shown, on_true=logits, on_false=nl.fp32.min)
        blocks = call.softmax_blocks(self.turn.gang)
        for i in range(len(blocks)):
            heads, members = blocks[i]
            self._softmax(selected, heads, members, self.turn.stats[i][:, :, self.tile // self.turn.gang, :])
        for head in range(self.heads):
            values = keys if call.latent else self._gathered(1, head, True)
            if again:
                self._weigh_any_values(values, head)
            else:
                self._weigh_values(values, head)

    def _place(self, head):
        """Return the tile and the kv head of one of the gang's heads."""
        return self.tile + head // self.call.num_kv_heads, head % self.call.num_kv_heads

    def _rows(self, side, head):
        """Return the rows of the units of a side and head, (P, 1)."""
        tile, kv_head = self._place(head)
        return self.turn.rows[:, tile, side, kv_head : kv_head + 1]

    def _gathered(self, side, head, hide):
        """Return the units of a side and head (P, unit, DS), as they are multiplied; ``hide``: 0 where not seen."""
        call = self.call
        buffers = call.buffers[side]
        stored = buffers[(self.tile * call.num_kv_heads + head) % len(buffers)]
        call.fetch(stored, call.cache, self._rows(side, head))
        if hide and stored.dtype != nl.int8:
            self._hide(stored, head)
        if call.table == None:  # noqa: E711
            found = call.cast(stored, nisa.engine.gpsimd if side == 0 else nisa.engine.vector)
        else:
            places = nl.ndarray(stored.shape, dtype=nl.uint32)
            nisa.tensor_copy(dst=places, src=stored)
            found = nl.ndarray(stored.shape, dtype=call.dtype)
            nisa.nc_n_gather(dst=found, data=call.table, indices=places)
        return found.reshape((P, call.unit, call.stored_dim))

    def _hide(self, stored, head):
        """Overwrite tokens that are not seen with zeros, in the largest words that their rows consist of."""
        call = self.call
        words = stored.reshape((P, call.unit, call.stored_dim)).view(nl.uint8)
        for dtype in (nl.uint16, nl.uint32):
            if words.shape[2] % 2 == 0:
                words = words.view(dtype)
            else:
                break
        hidden = self.turn.hidden[:, self._place(head)[0], :]
        predicate = hidden.reshape((P, call.unit, 1)).broadcast(2, words.shape[2])
        nisa.tensor_copy_predicated(dst=words, src=0, predicate=predicate)

    def _multiply_keys(self, logits, keys, head, again):
        """Write the logits of a kv head: the products with a token's own sequence."""
        call = self.call
        turned = []
        for i in range(len(self.turn.queries)):
            turned.append(call.turned(keys, i * P, self.turn.queries[i].shape[0] // call.pair))
        if again and call.pair > 1:  # a key that is not finite has to leave the other one of its pair alone
            for k in range(call.pair):
                lanes = slice(k * call.head_dim, (k + 1) * call.head_dim)
                apart = nl.ndarray(turned[0].shape, dtype=call.dtype)
                _clear(apart, nisa.engine.gpsimd)
                nisa.tensor_copy(dst=apart[lanes, :, :], src=turned[0][lanes, :, :])
                self._write_logits(logits, [apart], head, k, call.pair)
        else:
            self._write_logits(logits, turned, head, 0, 1)
        if call.token_scales != None:  # noqa: E711
            scales = call.fetched(call.token_scales, self._rows(0, head))
            wide = scales.reshape((P, call.unit, 1)).broadcast(2, call.group)
            mine = logits[:, head, :, :]
            nisa.tensor_tensor(dst=mine, data1=mine, data2=wide, op=nl.multiply)

    def _write_logits(self, logits, turned, head, first, step):
        """Write the logits of every so many tokens from one on."""
        call = self.call
        kv_head = self._place(head)[1]
        for member in range(0, call.group, P):
            size = min(P, call.group - member)
            tokens = BANK_BYTES // 4 // (SLOTS * size)
            tokens -= tokens % call.pair
            for start in range(0, call.unit, tokens):
                products = self._products(turned, head, member, size, start, min(tokens, call.unit - start))
                for slot in range(SLOTS):
                    own = slice(slot * UNITS, (slot + 1) * UNITS)
                    end = start + products.shape[1]
                    mine = logits[own, head, start + first : end : step, member : member + size]
                    data = products[own, first : products.shape[1] : step, :, slot]
                    scale = call.softmax_scale
                    if call.logit_scales != None:  # noqa: E711
                        scale = call.logit_scales[own, kv_head : kv_head + 1]
                    nisa.activation(dst=mine, op=nl.copy, data=data, scale=scale)

    def _products(self, turned, head, member, members, start, count):
        """Return some tokens of a unit times some members of both slots (P, tokens, members, SLOTS)."""
        products = nl.ndarray((P, count, members, SLOTS), dtype=nl.float32, buffer=nl.psum)
        tile, kv_head = self._place(head)
        slots, first = slice(tile * SLOTS, (tile + 1) * SLOTS), kv_head * self.call.group + member
        pair = self.call.pair
        for j in range(0, count, pair):
            for i in range(len(turned)):
                nisa.nc_matmul(
                    dst=products[:, j : j + pair, :, :],
                    stationary=turned[i][:, (start + j) // pair, :],
                    moving=self.turn.queries[i][:, :, first : first + members, slots],
                    accumulate=i > 0,
                )
        return products

    def _subtract_alibi(self, logits, tile):
        call = self.call
        distances = nl.ndarray((P, call.unit), dtype=nl.float32)
        nisa.tensor_scalar(
            dst=distances,
            data=call.tokens,
            op0=nl.subtract,
            operand0=self.turn.numbers[:, tile, 2:3],
            reverse0=True,
        )
        wide = distances.reshape((P, 1, call.unit, 1)).broadcast(1, call.num_kv_heads).broadcast(3, call.group)
        slopes = call.slopes.reshape((P, call.num_kv_heads, 1, call.group)).broadcast(2, call.unit)
        biases = nl.ndarray(logits.shape, dtype=nl.float32)
        nisa.tensor_tensor(dst=biases, data1=slopes, data2=wide, op=nl.multiply)
        nisa.tensor_tensor(dst=logits, data1=logits, data2=biases, op=nl.subtract)

    def _softmax(self, logits, heads, members, stats):
        """Write the weights of up to 128 query heads to their slots, and their maxima and sums (count, 2, SLOTS)."""
        call = self.call
        mine = logits[:, heads, :, members]
        kv_heads, size = mine.shape[1], mine.shape[3]
        count = kv_heads * size
        largest = nl.ndarray((P, count), dtype=nl.float32)
        nisa.tensor_reduce(dst=largest, op=nl.maximum, data=mine.permute((0, 1, 3, 2)), axis=3)
        turned = nl.ndarray((count, SLOTS, UNITS), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned.reshape((count, P)), data=largest)
        maximum = stats[:, 0, :]
        nisa.tensor_reduce(dst=maximum, op=nl.maximum, data=turned, axis=2)
        nisa.tensor_scalar(dst=maximum, data=maximum, op0=nl.maximum, operand0=LEAST)
        by_unit = maximum.reshape((count, SLOTS, 1)).broadcast(2, UNITS)
        spread = nl.ndarray((P, count), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=spread, data=by_unit)
        wide = spread.reshape((P, kv_heads, 1, size)).broadcast(2, call.unit)
        exponents = nl.ndarray(mine.shape, dtype=nl.float32)
        nisa.tensor_tensor(dst=exponents, data1=mine, data2=wide, op=nl.subtract)
        nisa.activation(dst=exponents, op=nl.exp, data=exponents)
        totals = nl.ndarray((P, count), dtype=nl.float32)
        nisa.tensor_reduce(dst=totals, op=nl.add, data=exponents.permute((0, 1, 3, 2)), axis=3)
        turned_totals = nl.ndarray((count, SLOTS, UNITS), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned_totals.reshape((count, P)), data=totals)
        nisa.tensor_reduce(dst=stats[:, 1, :], op=nl.add, data=turned_totals, axis=2)
        if call.token_scales != None:  # noqa: E711
            exponents = self._scaled(exponents, self.shown[:, heads, :, members], heads)
        for slot in range(SLOTS):
            own = slice(slot * UNITS, (slot + 1) * UNITS)
            nisa.tensor_copy(
                dst=self.weights[own, heads, :, slot, members],
                src=exponents[own, :, :, :],
                engine=nisa.engine.gpsimd,
            )

    def _scaled(self, exponents, shown, heads):
        """Return weights times the scales of their values; 0 where a query does not see the key, NaN or not."""
        call = self.call
        for i in range(exponents.shape[1]):
            scales = call.fetched(call.token_scales, self._rows(1, heads.start + i))
            wide = scales.reshape((P, call.unit, 1)).broadcast(2, exponents.shape[3])
            mine = exponents[:, i, :, :]
            nisa.tensor_tensor(dst=mine, data1=mine, data2=wide, op=nl.multiply)
        found = nl.ndarray(exponents.shape, dtype=nl.float32)
        nisa.select_reduce(dst=found, predicate=shown, on_true=exponents, on_false=0.0)
        return found

    def _weigh_values(self, values, head):
        """Multiply the weights of a kv head by its values (P, unit, DS)."""
        call = self.call
        of_values = call.num_kv_heads + self._place(head)[1]
        for i in range(len(self.turn.sums)):
            for start in range(0, call.columns, BANK_BYTES // 4):
                mine = self._sums(i, head, start)
                lanes = mine.shape[0] // call.value_pair
                products = call.product(values, i * P, lanes, self._columns(head, start))
                for k in range(call.value_pair):
                    own, scale = slice(k * lanes, (k + 1) * lanes), 1.0
                    if call.head_scales != None:  # noqa: E711
                        scale = call.head_scales[own, of_values : of_values + 1]
                    nisa.activation(dst=mine[own, :], op=nl.copy, data=products[k], scale=scale)

    def _columns(self, head, start):
        """Return the weights of a kv head (P, unit, columns) of the tile's rows from one on, a bank at most."""
        call = self.call
        weights = self.weights[:, head, :, :, :].reshape((P, call.unit, call.columns))
        return weights[:, :, start : min(call.columns, start + BANK_BYTES // 4)]

    def _sums(self, i, head, start):
        """Return where the weighted values of the same rows lie, of up to 128 lanes."""
        call = self.call
        tile, kv_head = self._place(head)
        end = min(call.columns, start + BANK_BYTES // 4)
        return self.turn.sums[i][:, kv_head, tile * call.columns + start : tile * call.columns + end]

    def _weigh_any_values(self, values, head):
        """Do the same with values that may not be finite: these are 0, then each row gets those that it sees."""
        call = self.call
        above, below, finite = self._parted(values)
        self._weigh_values(finite, head)
        for slot in range(SLOTS):
            own = slice(slot * UNITS, (slot + 1) * UNITS)
            nisa.tensor_copy(dst=self.weights[own, head, :, slot, :], src=self.shown[own, head, :, :])
        for i in range(len(self.turn.sums)):
            for start in range(0, call.columns, BANK_BYTES // 4):
                mine, shown = self._sums(i, head, start), self._columns(head, start)
                lanes = mine.shape[0] // call.value_pair
                for counted, infinity in ((above, float("inf")), (below, float("-inf"))):
                    products = call.product(counted, i * P, lanes, shown)
                    for k in range(call.value_pair):
                        self._add_infinities(mine[k * lanes : (k + 1) * lanes, :], products[k], infinity)

    def _parted(self, values):
        """Return values that are not finite as 1: those above all numbers and below, NaN in both; and the others."""
        dtype = nl.float32 if self.call.dtype == nl.float32 else nl.bfloat16
        above, below = nl.ndarray(values.shape, dtype=dtype), nl.ndarray(values.shape, dtype=dtype)
        nisa.tensor_scalar(dst=above, data=values, op0=nl.less_equal, operand0=LARGEST, op1=nl.equal, operand1=0.0)
        nisa.tensor_scalar(dst=below, data=values, op0=nl.greater_equal, operand0=-LARGEST, op1=nl.equal, operand1=0.0)
        spoilt = nl.ndarray(values.shape, dtype=nl.uint8)
        nisa.tensor_tensor(dst=spoilt, data1=above, data2=below, op=nl.maximum)
        finite = nl.ndarray(values.shape, dtype=values.dtype)
        nisa.tensor_copy(dst=finite, src=values)
        nisa.tensor_copy_predicated(dst=finite, src=0.0, predicate=spoilt)
        return above, below, finite

    def _add_infinities(self, sums, counts, infinity):
        """Add an infinity where a row sees some."""
        some = nl.ndarray(sums.shape, dtype=nl.uint8)
        nisa.tensor_scalar(dst=some, data=counts, op0=nl.greater, operand0=0.0)
        added = nl.ndarray(sums.shape, dtype=nl.float32)
        nisa.memset(dst=added, value=0.0)
        nisa.tensor_copy_predicated(dst=added, src=infinity, predicate=some)
        nisa.tensor_tensor(dst=sums, data1=sums, data2=added, op=nl.add)
