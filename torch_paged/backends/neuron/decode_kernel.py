"""Decode: one query token per sequence, tokens on partitions.

A turn of a loop computes tiles of 128 units of keys (``plan``), 4 chunks of any sequences, gathered whole. Per kv head,
each column of tokens is transposed by the tensor engine and multiplied by the queries of the tile's four sequences; a
token keeps the product of its own. Maximum and sum of a chunk go over the tokens of a unit on the vector engine, and
over its 32 partitions after a transposition. Then weights and values are multiplied, contracted over the tokens.
Maximum, sum and weighted values of a chunk go to HBM, and a second kernel merges them in the order of keys
(``merge_kernel``).

Values of keys outside the bounds are ANDed with zeros: a weight of 0 does not hide a NaN. A value within them that is
not finite reaches every row of its tile, whether the row sees it or not: then all tiles are computed once more, such
values as 0, and each row gets the infinities of the values that it sees.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from torch_paged.backends.neuron.plan import CHUNK_UNITS as UNITS
from torch_paged.backends.neuron.plan import PARTITIONS as P
from torch_paged.backends.neuron.plan import TILE_CHUNKS as SLOTS
from torch_paged.backends.neuron.plan import turn_tiles

BANK_BYTES = 2048
BUFFERS = 4  # for units of a side on their way from HBM
LEAST = -1e30  # a maximum below which no logit counts: finite, so that a difference of two of them is no NaN
LARGEST = 3.4028234663852886e38  # finite float32


@nki.jit
def attend_chunks(
    query,  # (B * H, D)
    cache,  # (C * N * KH * parts, unit * DS), C sides
    units,  # (X * UNITS, 2) int32
    bounds,  # (X * UNITS, 2) float32
    distances,  # (X * UNITS, 1) float32
    query_rows,  # (X * H, 1) int32
    turns,  # (1, n + 1) int32
    slopes,  # (1, H) float32, or None
    mask,  # (B * mask units, mask heads * unit) uint8, or None; mask heads are 1, KH or H
    mask_rows,  # (X * UNITS, 1) int32, or None
    head_scales,  # (1, 2 * KH) float32, or None
    token_scales,  # (C * N * KH * parts, unit) float32, or None
    table,  # (1, 256): what a byte of the cache means, as it is multiplied; None: it is cast
    num_kv_heads,
    parts,  # units of a block
    unit,
    value_dim,
    softmax_scale,
    soft_cap,
    latent,  # values are the first lanes of the keys
):
    """Return per chunk and head the weighted values (X, H, DV), and maximum and sum (X, H, 2), both float32."""
    num_slots = units.shape[0] // UNITS
    num_tiles = num_slots // SLOTS
    num_heads = query_rows.shape[0] // num_slots
    sums = nl.ndarray((num_tiles, SLOTS * num_heads * value_dim), dtype=nl.float32, buffer=nl.shared_hbm)
    stats = nl.ndarray((num_tiles, SLOTS * num_heads * 2), dtype=nl.float32, buffer=nl.shared_hbm)
    call = _Call(
        query,
        cache,
        token_scales,
        mask,
        units.reshape((num_tiles, P * 2)),
        bounds.reshape((num_tiles, P * 2)),
        distances.reshape((num_tiles, P)),
        query_rows.reshape((num_tiles, SLOTS * num_heads)),
        None if mask == None else mask_rows.reshape((num_tiles, P)),  # noqa: E711
        sums,
        stats,
        num_heads,
        num_kv_heads,
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
    sizes = turn_tiles(num_kv_heads)
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
        for k in range(size):
            call.attend(first, k * cores + core, k % 2, again)
        nisa.tensor_scalar(dst=first, data=first, op0=nl.add, operand0=float(size * cores))

    nl.fori_loop(0, turns, some_tiles)


def _spread(row):
    """Return a row of HBM on every partition."""
    if row == None:  # noqa: E711
        return None
    found = nl.ndarray((P, row.shape[1]), dtype=row.dtype)
    nisa.dma_copy(dst=found, src=row.ap(pattern=[[0, P], [1, row.shape[1]]], offset=0))
    return found


def _clear(buffer):
    nisa.memset(dst=buffer, value=0 if buffer.dtype == nl.int8 or buffer.dtype == nl.uint8 else 0.0)


class _Call(nl.NKIObject):
    """The arrays and sizes of a call, and what every tile reads."""

    def __init__(
        self,
        query,
        cache,
        token_scales,
        mask,
        units,
        bounds,
        distances,
        query_rows,
        mask_rows,
        sums,
        stats,
        num_heads,
        num_kv_heads,
        parts,
        unit,
        value_dim,
        softmax_scale,
        soft_cap,
        latent,
    ):
        self.query, self.cache, self.units, self.bounds, self.distances = query, cache, units, bounds, distances
        self.token_scales, self.query_rows, self.sums, self.stats = token_scales, query_rows, sums, stats
        self.mask, self.mask_rows, self.latent = mask, mask_rows, latent
        self.num_heads, self.num_kv_heads, self.parts, self.unit = num_heads, num_kv_heads, parts, unit
        self.group = num_heads // num_kv_heads
        self.head_dim, self.stored_dim, self.value_dim = query.shape[1], cache.shape[1] // unit, value_dim
        self.softmax_scale, self.soft_cap = softmax_scale, soft_cap
        self.dtype = query.dtype
        if query.dtype == nl.float16 and token_scales != None:  # noqa: E711
            self.dtype = nl.float32  # a weight times its value's scale may be too small for float16
        self.slots = SLOTS  # whose weights are multiplied at once
        while self.slots > 1 and self.slots * self.group > P:
            self.slots //= 2
        self.products = self.num_kv_heads * (SLOTS // self.slots) * -(-self.group // P)

    def lay_out_constants(self, slopes, head_scales, table):
        self.tokens = nl.ndarray((P, self.unit), dtype=nl.float32)
        nisa.iota(dst=self.tokens, pattern=[[1, self.unit]], offset=0, channel_multiplier=0)
        self.head_rows = nl.ndarray((P, 2, self.num_kv_heads), dtype=nl.int32)
        nisa.iota(dst=self.head_rows, pattern=[[0, 2], [self.parts, self.num_kv_heads]], offset=0, channel_multiplier=0)
        self.slopes, self.head_scales, self.table = _spread(slopes), _spread(head_scales), _spread(table)
        self.weights = []  # zero but in a token's own slot; of two tiles that follow each other
        for _ in range(2):
            shape = (P, self.num_kv_heads, self.unit, SLOTS, self.group)
            weights = nl.ndarray(shape, dtype=self.dtype)
            nisa.memset(dst=weights, value=0.0)
            self.weights.append(weights)
        self.spoilt = nl.ndarray((P, self.products), dtype=nl.float32)  # 1: not finite in some tile
        nisa.memset(dst=self.spoilt, value=0.0)
        self.buffers = []  # of keys, of values; where nothing is read they hold what they held before
        for _ in range(1 if self.latent else 2):
            buffers = []
            for _ in range(max(BUFFERS, 2 * self.num_kv_heads) if self.latent else BUFFERS):
                buffer = nl.ndarray((P, self.cache.shape[1]), dtype=self.cache.dtype)
                _clear(buffer)
                buffers.append(buffer)
            self.buffers.append(buffers)

    def attend(self, first, tile, buffer, again):
        """Attend to a tile, the one that is so many behind the turn's first; ``again``: with values not finite."""
        rows = self._rows(first, tile)
        seen = self._seen(first, tile)
        shown = self._shown(seen, first, tile)
        logits = nl.ndarray((P, self.num_kv_heads, self.unit, self.group), dtype=nl.float32)
        queries = self._queries(first, tile)
        keys = []
        for head in range(self.num_kv_heads):
            units = self._gathered(rows, 0, head, buffer, seen if self.latent else None)
            self._logits(logits, queries, units, rows, head)
            keys.append(units if self.latent else None)
        if self.soft_cap != 0.0:
            nisa.activation(dst=logits, op=nl.tanh, data=logits, scale=1.0 / self.soft_cap)
            nisa.tensor_scalar(dst=logits, data=logits, op0=nl.multiply, operand0=self.soft_cap)
        if self.slopes != None:  # noqa: E711
            self._subtract_alibi(logits, first, tile)
        selected = nl.ndarray(logits.shape, dtype=nl.float32)
        nisa.select_reduce(dst=selected, predicate=shown, on_true=logits, on_false=nl.fp32.min)
        heads_at_a_time = max(1, P // self.group)
        for head in range(0, self.num_kv_heads, heads_at_a_time):
            heads = slice(head, min(self.num_kv_heads, head + heads_at_a_time))
            for member in range(0, self.group, P):
                members = slice(member, min(self.group, member + P))
                self._softmax(selected, heads, members, self.weights[buffer], shown, rows, first, tile)
        checks = nl.ndarray((P, self.products), dtype=nl.float32)
        nisa.memset(dst=checks, value=0.0)
        for head in range(self.num_kv_heads):
            values = keys[head] if self.latent else self._gathered(rows, 1, head, buffer, seen)
            self._weigh_values(values, self.weights[buffer], shown, checks, head, first, tile, again)
        if not again:
            nisa.tensor_scalar(dst=checks, data=checks, op0=nl.multiply, operand0=0.0, op1=nl.not_equal, operand1=0.0)
            nisa.tensor_tensor(dst=self.spoilt, data1=self.spoilt, data2=checks, op=nl.maximum)

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

    def _of_tile(self, base, pattern, offset, first, tile):
        """Return a part of a tile's row of a tensor in HBM."""
        start = tile * base.shape[1] + offset
        return base.ap(pattern=pattern, offset=start, scalar_offset=first, indirect_dim=0)

    def _rows(self, first, tile):
        """Return the rows of the cache of a tile's units (P, 2, KH), negative where nothing is read."""
        of_first_head = nl.ndarray((P, 2), dtype=nl.int32)
        nisa.dma_copy(dst=of_first_head, src=self._of_tile(self.units, [[2, P], [1, 2]], 0, first, tile))
        rows = nl.ndarray((P, 2, self.num_kv_heads), dtype=nl.int32)
        wide = of_first_head.reshape((P, 2, 1)).broadcast(2, self.num_kv_heads)
        nisa.tensor_tensor(dst=rows, data1=wide, data2=self.head_rows, op=nl.add)  # of int32: exact
        return rows

    def _seen(self, first, tile):
        """Return (P, unit) float32: 1 for the tokens within the bounds of their sequence."""
        bounds = nl.ndarray((P, 2), dtype=nl.float32)
        nisa.dma_copy(dst=bounds, src=self._of_tile(self.bounds, [[2, P], [1, 2]], 0, first, tile))
        low, seen = nl.ndarray((P, self.unit), dtype=nl.float32), nl.ndarray((P, self.unit), dtype=nl.float32)
        nisa.tensor_scalar(dst=low, data=self.tokens, op0=nl.greater_equal, operand0=bounds[:, 0:1])
        nisa.scalar_tensor_tensor(
            dst=seen, data=self.tokens, op0=nl.less, operand0=bounds[:, 1:2], op1=nl.multiply, operand1=low
        )
        return seen

    def _shown(self, seen, first, tile):
        """Return (P, KH, unit, G) uint8, a view: 1 for the tokens that a query head sees."""
        shape = (P, self.num_kv_heads, self.unit, self.group)
        if self.mask == None:  # noqa: E711
            shown = nl.ndarray((P, 1, self.unit, 1), dtype=nl.uint8)
            nisa.tensor_copy(dst=shown.reshape((P, self.unit)), src=seen)
        else:
            rows = nl.ndarray((P, 1), dtype=nl.int32)
            nisa.dma_copy(dst=rows, src=self._of_tile(self.mask_rows, [[1, P], [1, 1]], 0, first, tile))
            asked = self._fetched(self.mask, rows)
            heads = self.mask.shape[1] // self.unit
            shown = nl.ndarray((P, heads, self.unit), dtype=nl.uint8)
            nisa.tensor_tensor(
                dst=shown,
                data1=asked.reshape((P, heads, self.unit)),
                data2=seen.reshape((P, 1, self.unit)).broadcast(1, heads),
                op=nl.multiply,
            )
            if heads == self.num_heads:
                shown = shown.reshape((P, self.num_kv_heads, self.group, self.unit)).permute((0, 1, 3, 2))
            else:
                shown = shown.reshape((P, heads, self.unit, 1))
        for dim in (1, 3):
            if shown.shape[dim] != shape[dim]:
                shown = shown.broadcast(dim, shape[dim])
        return shown

    def _queries(self, first, tile):
        """Return the queries of a tile, turned: for each 128 lanes (lanes, SLOTS, H)."""
        rows = SLOTS * self.num_heads
        found = []
        for lane in range(0, self.head_dim, P):
            shape = (min(P, self.head_dim - lane), SLOTS, self.num_heads)
            found.append(nl.ndarray(shape, dtype=self.dtype))
        for start in range(0, rows, P):
            size = min(P, rows - start)
            places = nl.ndarray((size, 1), dtype=nl.int32)
            nisa.dma_copy(dst=places, src=self._of_tile(self.query_rows, [[1, size], [1, 1]], start, first, tile))
            part = nl.ndarray((size, self.head_dim), dtype=self.query.dtype)
            nisa.memset(dst=part, value=0.0)
            pattern = [[self.head_dim, size], [1, self.head_dim]]
            source = self.query.ap(pattern=pattern, offset=0, vector_offset=places, indirect_dim=0)
            nisa.dma_copy(dst=part, src=source, oob_mode=nisa.oob_mode.skip)
            part = self._cast(part, nisa.engine.vector)
            for i in range(len(found)):
                lanes = found[i].shape[0]
                turned = nl.ndarray((lanes, size), dtype=self.dtype, buffer=nl.psum)
                nisa.nc_transpose(dst=turned, data=part[:, i * P : i * P + lanes])
                flat = found[i].reshape((lanes, rows))
                nisa.tensor_copy(dst=flat[:, start : start + size], src=turned)
        return found

    def _gathered(self, rows, side, head, buffer, seen):
        """Return the units of a side and head (P, unit, DS), as they are multiplied; values not seen are 0.

        ``seen`` is None for keys, whose products with queries are selected.
        """
        buffers = self.buffers[side]
        stored = buffers[(buffer * self.num_kv_heads + head) % len(buffers)]
        self._fetch(stored, self.cache, rows[:, side, head : head + 1])
        if seen != None and stored.dtype != nl.int8:  # noqa: E711
            self._hide(stored, seen)
        if self.table == None:  # noqa: E711
            found = self._cast(stored, nisa.engine.gpsimd if side == 0 else nisa.engine.vector)
        else:
            places = nl.ndarray(stored.shape, dtype=nl.uint32)
            nisa.tensor_copy(dst=places, src=stored)
            found = nl.ndarray(stored.shape, dtype=self.dtype)
            nisa.nc_n_gather(dst=found, data=self.table, indices=places)
        return found.reshape((P, self.unit, self.stored_dim))

    def _hide(self, stored, seen):
        """AND what is stored of tokens that are not seen with zeros, in the largest words that rows consist of."""
        units = stored.reshape((P, self.unit, self.stored_dim))
        words = units.view(nl.int8)
        for dtype in (nl.int16, nl.int32):
            if words.shape[2] % 2 == 0:
                words = units.view(dtype)
            else:
                break
        bits = nl.ndarray((P, self.unit), dtype=words.dtype)
        nisa.tensor_scalar(dst=bits, data=seen, op0=nl.multiply, operand0=-1.0)
        mask = bits.reshape((P, self.unit, 1)).broadcast(2, words.shape[2])
        nisa.tensor_tensor(dst=words, data1=words, data2=mask, op=nl.bitwise_and)

    def _cast(self, stored, engine):
        if stored.dtype == self.dtype:
            return stored
        found = nl.ndarray(stored.shape, dtype=self.dtype)
        nisa.tensor_copy(dst=found, src=stored, engine=engine)
        return found

    def _fetched(self, base, rows):
        """Return rows (P, W) of a tensor in HBM, zeros where there is none."""
        found = nl.ndarray((P, base.shape[1]), dtype=base.dtype)
        _clear(found)
        self._fetch(found, base, rows)
        return found

    def _fetch(self, found, base, rows):
        """Write rows of a tensor in HBM to (P, W), where there is one."""
        width = base.shape[1]
        source = base.ap(pattern=[[width, P], [1, width]], offset=0, vector_offset=rows, indirect_dim=0)
        nisa.dma_copy(dst=found, src=source, oob_mode=nisa.oob_mode.skip)

    def _logits(self, logits, queries, keys, rows, head):
        """Multiply the keys of a kv head by the queries, and keep the products with a token's own sequence."""
        turned = []
        for i in range(len(queries)):
            turned.append(self._turned(keys, i * P, queries[i].shape[0]))
        for member in range(0, self.group, P):
            self._multiply_keys(logits, queries, turned, head, member, min(P, self.group - member))
        if self.token_scales != None:  # noqa: E711
            scales = self._fetched(self.token_scales, rows[:, 0, head : head + 1])
            wide = scales.reshape((P, self.unit, 1)).broadcast(2, self.group)
            mine = logits[:, head, :, :]
            nisa.tensor_tensor(dst=mine, data1=mine, data2=wide, op=nl.multiply)

    def _multiply_keys(self, logits, queries, turned, head, member, size):
        """Write the logits of some members of a group."""
        tokens = max(1, BANK_BYTES // 4 // (SLOTS * size))
        query_heads = slice(head * self.group + member, head * self.group + member + size)
        for start in range(0, self.unit, tokens):
            count = min(tokens, self.unit - start)
            products = nl.ndarray((P, count, SLOTS, size), dtype=nl.float32, buffer=nl.psum)
            for j in range(count):
                for i in range(len(queries)):
                    nisa.nc_matmul(
                        dst=products[:, j, :, :],
                        stationary=turned[i][:, start + j, :],
                        moving=queries[i][:, :, query_heads],
                        accumulate=i > 0,
                    )
            for slot in range(SLOTS):
                own = slice(slot * UNITS, (slot + 1) * UNITS)
                mine = logits[own, head, start : start + count, member : member + size]
                data = products[own, :, slot, :]
                if self.head_scales == None:  # noqa: E711
                    nisa.tensor_scalar(dst=mine, data=data, op0=nl.multiply, operand0=self.softmax_scale)
                else:
                    nisa.tensor_scalar(
                        dst=mine,
                        data=data,
                        op0=nl.multiply,
                        operand0=self.softmax_scale,
                        op1=nl.multiply,
                        operand1=self.head_scales[own, head : head + 1],
                    )

    def _turned(self, keys, lane, lanes):
        """Return some lanes of keys (P, unit, DS) as (lanes, unit, P)."""
        found = nl.ndarray((lanes, self.unit, P), dtype=self.dtype)
        at_a_time = BANK_BYTES // P // (4 if self.dtype == nl.float32 else 2)
        for start in range(0, self.unit, at_a_time):
            count = min(at_a_time, self.unit - start)
            turned = nl.ndarray((lanes, count, P), dtype=self.dtype, buffer=nl.psum)
            for j in range(count):
                nisa.nc_transpose(dst=turned[:, j, :], data=keys[:, start + j, lane : lane + lanes])
            nisa.tensor_copy(dst=found[:, start : start + count, :], src=turned, engine=nisa.engine.scalar)
        return found

    def _subtract_alibi(self, logits, first, tile):
        distance = nl.ndarray((P, 1), dtype=nl.float32)
        nisa.dma_copy(dst=distance, src=self._of_tile(self.distances, [[1, P], [1, 1]], 0, first, tile))
        distances = nl.ndarray((P, self.unit), dtype=nl.float32)
        nisa.tensor_scalar(
            dst=distances, data=self.tokens, op0=nl.subtract, operand0=distance, reverse0=True
        )  # of the unit's tokens
        wide = distances.reshape((P, 1, self.unit, 1)).broadcast(1, self.num_kv_heads).broadcast(3, self.group)
        slopes = self.slopes.reshape((P, self.num_kv_heads, 1, self.group)).broadcast(2, self.unit)
        biases = nl.ndarray(logits.shape, dtype=nl.float32)
        nisa.tensor_tensor(dst=biases, data1=slopes, data2=wide, op=nl.multiply)
        nisa.tensor_tensor(dst=logits, data1=logits, data2=biases, op=nl.subtract)

    def _softmax(self, logits, heads, members, weights, shown, rows, first, tile):
        """Write the weights of up to 128 query heads to their slots, and their maximum and sum to HBM."""
        mine = logits[:, heads, :, members]
        kv_heads, size = mine.shape[1], mine.shape[3]
        count = kv_heads * size
        largest = nl.ndarray((P, count), dtype=nl.float32)
        nisa.tensor_reduce(dst=largest, op=nl.maximum, data=mine.permute((0, 1, 3, 2)), axis=3)
        turned = nl.ndarray((count, SLOTS, UNITS), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned.reshape((count, P)), data=largest)
        stats = nl.ndarray((count, SLOTS, 2), dtype=nl.float32)
        maximum = nl.ndarray((count, SLOTS), dtype=nl.float32)
        nisa.tensor_reduce(dst=maximum, op=nl.maximum, data=turned, axis=2)
        nisa.tensor_scalar(dst=maximum, data=maximum, op0=nl.maximum, operand0=LEAST)
        nisa.tensor_copy(dst=stats[:, :, 0], src=maximum)
        by_unit = nl.ndarray((count, SLOTS, UNITS), dtype=nl.float32)
        nisa.tensor_copy(dst=by_unit, src=maximum.reshape((count, SLOTS, 1)).broadcast(2, UNITS))
        spread = nl.ndarray((P, count), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=spread, data=by_unit.reshape((count, P)))
        wide = spread.reshape((P, kv_heads, 1, size)).broadcast(2, self.unit)
        exponents = nl.ndarray(mine.shape, dtype=nl.float32)
        nisa.tensor_tensor(dst=exponents, data1=mine, data2=wide, op=nl.subtract)
        nisa.activation(dst=exponents, op=nl.exp, data=exponents)
        totals = nl.ndarray((P, count), dtype=nl.float32)
        nisa.tensor_reduce(dst=totals, op=nl.add, data=exponents.permute((0, 1, 3, 2)), axis=3)
        turned_totals = nl.ndarray((count, SLOTS, UNITS), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned_totals.reshape((count, P)), data=totals)
        nisa.tensor_reduce(dst=stats[:, :, 1], op=nl.add, data=turned_totals, axis=2)
        pattern = [[2, count], [self.num_heads * 2, SLOTS], [1, 2]]
        offset = (heads.start * self.group + members.start) * 2
        nisa.dma_copy(dst=self._of_tile(self.stats, pattern, offset, first, tile), src=stats)
        if self.token_scales != None:  # noqa: E711
            exponents = self._scaled(exponents, shown[:, heads, :, members], rows, heads)
        for slot in range(SLOTS):
            own = slice(slot * UNITS, (slot + 1) * UNITS)
            nisa.tensor_copy(dst=weights[own, heads, :, slot, members], src=exponents[own, :, :, :])

    def _scaled(self, exponents, shown, rows, heads):
        """Return weights times the scales of their values; 0 where a query does not see the key, NaN or not."""
        for i in range(exponents.shape[1]):
            head = heads.start + i
            scales = self._fetched(self.token_scales, rows[:, 0 if self.latent else 1, head : head + 1])
            wide = scales.reshape((P, self.unit, 1)).broadcast(2, exponents.shape[3])
            mine = exponents[:, i, :, :]
            nisa.tensor_tensor(dst=mine, data1=mine, data2=wide, op=nl.multiply)
        found = nl.ndarray(exponents.shape, dtype=nl.float32)
        nisa.select_reduce(dst=found, predicate=shown, on_true=exponents, on_false=0.0)
        return found

    def _weigh_values(self, values, weights, shown, checks, head, first, tile, again):
        """Multiply the weights of a kv head by its values (P, unit, DS), and write the sums to HBM."""
        if again:
            above, below, values = self._parted(values)
        sums = []
        for slot in range(0, SLOTS, self.slots):
            for member in range(0, self.group, P):
                columns = weights[:, head, :, slot : slot + self.slots, member : min(self.group, member + P)]
                product = self._product(columns, values)
                place = head * (self.products // self.num_kv_heads) + len(sums)
                found = nl.ndarray(product.shape, dtype=nl.float32)
                scale = self.num_kv_heads + head
                nisa.activation(
                    dst=found,
                    op=nl.copy,
                    data=product,
                    scale=1.0 if self.head_scales == None else self.head_scales[0 : found.shape[0], scale : scale + 1],  # noqa: E711
                    reduce_op=nl.add,
                    reduce_res=checks[0 : found.shape[0], place : place + 1],
                    reduce_cmd=nisa.reduce_cmd.reset_reduce,
                )
                sums.append(found)
        if again:
            for slot in range(SLOTS):
                own = slice(slot * UNITS, (slot + 1) * UNITS)
                nisa.tensor_copy(dst=weights[own, head, :, slot, :], src=shown[own, head, :, :])
        place = 0
        for slot in range(0, SLOTS, self.slots):
            for member in range(0, self.group, P):
                columns = weights[:, head, :, slot : slot + self.slots, member : min(self.group, member + P)]
                if again:
                    self._add_infinities(sums[place], self._product(columns, above), float("inf"))
                    self._add_infinities(sums[place], self._product(columns, below), float("-inf"))
                members = columns.shape[3]
                pattern = [
                    [self.num_heads * self.value_dim, self.slots],
                    [self.value_dim, members],
                    [1, self.value_dim],
                ]
                offset = (slot * self.num_heads + head * self.group + member) * self.value_dim
                nisa.dma_copy(dst=self._of_tile(self.sums, pattern, offset, first, tile), src=sums[place])
                place += 1

    def _product(self, columns, values):
        """Return columns (P, unit, slots, members) times values (P, unit, DS), contracted over the tokens."""
        rows = columns.shape[2] * columns.shape[3]
        product = nl.ndarray((rows, self.value_dim), dtype=nl.float32, buffer=nl.psum)
        for j in range(self.unit):
            nisa.nc_matmul(
                dst=product,
                stationary=columns[:, j, :, :],
                moving=values[:, j, 0 : self.value_dim],
                accumulate=j > 0,
            )
        return product

    def _parted(self, values):
        """Return values that are not finite as 1: those above all numbers and below, NaN in both; and the others."""
        dtype = nl.float32 if self.dtype == nl.float32 else nl.bfloat16
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
