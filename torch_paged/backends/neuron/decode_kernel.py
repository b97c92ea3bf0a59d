"""Decode: one query token per sequence, tokens on partitions.

A turn of a loop computes tiles of 128 units of keys (``plan``), 4 chunks of any sequences, gathered whole. Per kv head,
each column of tokens is transposed by the tensor engine and multiplied by the queries of the tile's four sequences; a
token keeps the product of its own. Maximum and sum of a chunk go over the tokens of a unit on the vector engine, over
its 32 partitions by way of the tensor engine. Then weights and values are multiplied, contracted over the tokens.
Maximum, sum and weighted values of a chunk go to HBM, and a second kernel merges them in the order of keys (``merge``).

Values of keys that are not seen are ANDed with zeros: a weight of 0 does not hide a NaN.
"""

import nki
import nki.isa as nisa
import nki.language as nl

P = 128
UNITS = 32  # of a chunk
SLOTS = 4  # chunks of a tile
TILES = 8  # of a turn of the loop
MERGED = 8  # chunks of a turn of the second stage
BANK_BYTES = 2048
LEAST = -1e30  # a maximum below which no logit counts: finite, so that a difference of two of them is no NaN


@nki.jit
def attend_chunks(
    query,  # (B * H, D)
    cache,  # (2 * N * KH * parts, unit * DS)
    units,  # (X * UNITS, 2) int32
    bounds,  # (X * UNITS, 2) float32
    distances,  # (X * UNITS, 1) float32, of a unit's first token from the query
    query_rows,  # (X * H, 1) int32
    turns,  # (1, 2) int32: of TILES tiles, of one tile more
    slopes,  # (1, H) float32, or None
    head_scales,  # (1, 2 * KH) float32, or None
    token_scales,  # (2 * N * KH * parts, unit) float32, or None
    table,  # (1, 256) of the queries' dtype: what a byte of the cache means; None: it is cast
    num_kv_heads,
    parts,
    unit,
    value_dim,
    softmax_scale,
    soft_cap,
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
        units.reshape((num_tiles, P * 2)),
        bounds.reshape((num_tiles, P * 2)),
        distances.reshape((num_tiles, P)),
        query_rows.reshape((num_tiles, SLOTS * num_heads)),
        sums,
        stats,
        num_heads,
        num_kv_heads,
        parts,
        unit,
        value_dim,
        softmax_scale,
        soft_cap,
    )
    call.lay_out_constants(slopes, head_scales, table)
    cores, core = nl.num_programs(0), nl.program_id(0)
    counts = nl.ndarray((1, 2), dtype=nl.int32)
    nisa.dma_copy(dst=counts, src=turns)
    many, more = nisa.register_alloc(), nisa.register_alloc()
    nisa.register_load(many, counts[:, 0:1])
    nisa.register_load(more, counts[:, 1:2])
    first = nl.ndarray((1, 1), dtype=nl.int32)  # tile of a turn, of core 0
    nisa.memset(dst=first, value=0)

    def many_tiles(turn):
        for k in range(TILES):
            call.attend(first, k * cores + core, k % 2)
        nisa.tensor_scalar(dst=first, data=first, op0=nl.add, operand0=float(TILES * cores))

    def one_tile(turn):
        call.attend(first, core, 0)
        nisa.tensor_scalar(dst=first, data=first, op0=nl.add, operand0=float(cores))

    nl.fori_loop(0, many, many_tiles)
    nl.fori_loop(0, more, one_tile)
    return sums, stats


def _spread(row):
    """Return a row of HBM on every partition."""
    if row == None:  # noqa: E711
        return None
    found = nl.ndarray((P, row.shape[1]), dtype=row.dtype)
    nisa.dma_copy(dst=found, src=row.ap(pattern=[[0, P], [1, row.shape[1]]], offset=0))
    return found


class _Call(nl.NKIObject):
    """The arrays and sizes of a call, and what every tile reads."""

    def __init__(
        self,
        query,
        cache,
        token_scales,
        units,
        bounds,
        distances,
        query_rows,
        sums,
        stats,
        num_heads,
        num_kv_heads,
        parts,
        unit,
        value_dim,
        softmax_scale,
        soft_cap,
    ):
        self.query, self.cache, self.units, self.bounds, self.distances = query, cache, units, bounds, distances
        self.token_scales, self.query_rows, self.sums, self.stats = token_scales, query_rows, sums, stats
        self.num_heads, self.num_kv_heads, self.parts, self.unit = num_heads, num_kv_heads, parts, unit
        self.group = num_heads // num_kv_heads
        self.head_dim, self.stored_dim, self.value_dim = query.shape[1], cache.shape[1] // unit, value_dim
        self.softmax_scale, self.soft_cap = softmax_scale, soft_cap
        self.dtype = query.dtype

    def lay_out_constants(self, slopes, head_scales, table):
        self.column_slots = nl.ndarray((P, SLOTS), dtype=nl.float32)  # [p, slot]: p is of the slot
        nisa.memset(dst=self.column_slots, value=0.0)
        for slot in range(SLOTS):
            nisa.memset(dst=self.column_slots[slot * UNITS : (slot + 1) * UNITS, slot : slot + 1], value=1.0)
        turned = nl.ndarray((SLOTS, P), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=self.column_slots)
        self.row_slots = nl.ndarray((SLOTS, P), dtype=nl.float32)
        nisa.tensor_copy(dst=self.row_slots, src=turned)
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

    def attend(self, first, tile, buffer):
        """Attend to a tile, the one that is so many behind the turn's first."""
        rows = self._rows(first, tile)
        seen = self._seen(first, tile)
        logits = nl.ndarray((P, self.num_kv_heads, self.unit, self.group), dtype=nl.float32)
        queries = self._queries(first, tile)
        for head in range(self.num_kv_heads):
            self._logits(logits, queries, rows, head)
        if self.soft_cap != 0.0:
            nisa.activation(dst=logits, op=nl.tanh, data=logits, scale=1.0 / self.soft_cap)
            nisa.tensor_scalar(dst=logits, data=logits, op0=nl.multiply, operand0=self.soft_cap)
        if self.slopes != None:  # noqa: E711
            self._subtract_alibi(logits, first, tile)
        visible = nl.ndarray((P, self.unit), dtype=nl.uint8)
        nisa.tensor_copy(dst=visible, src=seen)
        predicate = visible.reshape((P, 1, self.unit, 1)).broadcast(1, self.num_kv_heads).broadcast(3, self.group)
        selected = nl.ndarray(logits.shape, dtype=nl.float32)
        nisa.select_reduce(dst=selected, predicate=predicate, on_true=logits, on_false=nl.fp32.min)
        heads_at_a_time = max(1, P // self.group)
        for head in range(0, self.num_kv_heads, heads_at_a_time):
            stop = min(self.num_kv_heads, head + heads_at_a_time)
            self._softmax(selected, head, stop, self.weights[buffer], visible, rows, first, tile)
        for head in range(self.num_kv_heads):
            self._weigh_values(self.weights[buffer], seen, rows, head, first, tile)

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
        """Return (P, unit) float32: 1 for the tokens that the query sees."""
        bounds = nl.ndarray((P, 2), dtype=nl.float32)
        nisa.dma_copy(dst=bounds, src=self._of_tile(self.bounds, [[2, P], [1, 2]], 0, first, tile))
        low, seen = nl.ndarray((P, self.unit), dtype=nl.float32), nl.ndarray((P, self.unit), dtype=nl.float32)
        nisa.tensor_scalar(dst=low, data=self.tokens, op0=nl.greater_equal, operand0=bounds[:, 0:1])
        nisa.scalar_tensor_tensor(
            dst=seen, data=self.tokens, op0=nl.less, operand0=bounds[:, 1:2], op1=nl.multiply, operand1=low
        )
        return seen

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
            part = nl.ndarray((size, self.head_dim), dtype=self.dtype)
            nisa.memset(dst=part, value=0.0)
            pattern = [[self.head_dim, size], [1, self.head_dim]]
            source = self.query.ap(pattern=pattern, offset=0, vector_offset=places, indirect_dim=0)
            nisa.dma_copy(dst=part, src=source, oob_mode=nisa.oob_mode.skip)
            for i in range(len(found)):
                lanes = found[i].shape[0]
                turned = nl.ndarray((lanes, size), dtype=self.dtype, buffer=nl.psum)
                nisa.nc_transpose(dst=turned, data=part[:, i * P : i * P + lanes])
                flat = found[i].reshape((lanes, rows))
                nisa.tensor_copy(dst=flat[:, start : start + size], src=turned)
        return found

    def _gathered(self, rows, side, head):
        """Return the units of a side and head (P, unit, DS) in the dtype of the queries."""
        stored = self._fetched(self.cache, rows[:, side, head : head + 1])
        found = stored
        if self.table != None:  # noqa: E711
            places = nl.ndarray(stored.shape, dtype=nl.uint32)
            nisa.tensor_copy(dst=places, src=stored)
            found = nl.ndarray(stored.shape, dtype=self.dtype)
            nisa.nc_n_gather(dst=found, data=self.table, indices=places)
        elif stored.dtype != self.dtype:
            found = nl.ndarray(stored.shape, dtype=self.dtype)
            nisa.tensor_copy(dst=found, src=stored)
        return found.reshape((P, self.unit, self.stored_dim))

    def _fetched(self, base, rows):
        """Return rows (P, W) of a tensor in HBM, zeros where there is none."""
        width = base.shape[1]
        found = nl.ndarray((P, width), dtype=base.dtype)
        zero = 0 if base.dtype == nl.int8 or base.dtype == nl.uint8 else 0.0
        nisa.memset(dst=found, value=zero, engine=nisa.engine.gpsimd)
        source = base.ap(pattern=[[width, P], [1, width]], offset=0, vector_offset=rows, indirect_dim=0)
        nisa.dma_copy(dst=found, src=source, oob_mode=nisa.oob_mode.skip)
        return found

    def _logits(self, logits, queries, rows, head):
        """Multiply the keys of a kv head by the queries, and keep the products with a token's own sequence."""
        keys = self._gathered(rows, 0, head)
        turned = []
        for i in range(len(queries)):
            turned.append(self._turned(keys, i * P, queries[i].shape[0]))
        columns = SLOTS * self.group
        tokens = max(1, BANK_BYTES // 4 // columns)
        for start in range(0, self.unit, tokens):
            count = min(tokens, self.unit - start)
            products = nl.ndarray((P, count, SLOTS, self.group), dtype=nl.float32, buffer=nl.psum)
            for j in range(count):
                for i in range(len(queries)):
                    moving = queries[i][:, :, head * self.group : (head + 1) * self.group]
                    nisa.nc_matmul(
                        dst=products[:, j, :, :],
                        stationary=turned[i][:, start + j, :],
                        moving=moving,
                        accumulate=i > 0,
                    )
            for slot in range(SLOTS):
                own = slice(slot * UNITS, (slot + 1) * UNITS)
                mine, data = logits[own, head, start : start + count, :], products[own, :, slot, :]
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
        if self.token_scales != None:  # noqa: E711
            scales = self._fetched(self.token_scales, rows[:, 0, head : head + 1])
            wide = scales.reshape((P, self.unit, 1)).broadcast(2, self.group)
            mine = logits[:, head, :, :]
            nisa.tensor_tensor(dst=mine, data1=mine, data2=wide, op=nl.multiply)

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

    def _softmax(self, logits, head, stop, weights, visible, rows, first, tile):
        """Write the weights of some kv heads to their slots, and their maximum and sum to HBM."""
        heads = (stop - head) * self.group
        mine = logits[:, head:stop, :, :]
        largest = nl.ndarray((P, heads), dtype=nl.float32)
        nisa.tensor_reduce(dst=largest, op=nl.maximum, data=mine.permute((0, 1, 3, 2)), axis=3)
        turned = nl.ndarray((heads, SLOTS, UNITS), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned.reshape((heads, P)), data=largest)
        stats = nl.ndarray((heads, SLOTS, 2), dtype=nl.float32)
        maximum = nl.ndarray((heads, SLOTS), dtype=nl.float32)
        nisa.tensor_reduce(dst=maximum, op=nl.maximum, data=turned, axis=2)
        nisa.tensor_scalar(dst=maximum, data=maximum, op0=nl.maximum, operand0=LEAST)
        nisa.tensor_copy(dst=stats[:, :, 0], src=maximum)
        back = nl.ndarray((SLOTS, heads), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=back, data=maximum)
        by_slot = nl.ndarray((SLOTS, heads), dtype=nl.float32)
        nisa.tensor_copy(dst=by_slot, src=back)
        spread = nl.ndarray((P, heads), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=spread, stationary=self.row_slots, moving=by_slot, accumulate=False)
        wide = spread.reshape((P, stop - head, 1, self.group)).broadcast(2, self.unit)
        exponents = nl.ndarray(mine.shape, dtype=nl.float32)
        nisa.tensor_tensor(dst=exponents, data1=mine, data2=wide, op=nl.subtract)
        nisa.activation(dst=exponents, op=nl.exp, data=exponents)
        totals = nl.ndarray((P, heads), dtype=nl.float32)
        nisa.tensor_reduce(dst=totals, op=nl.add, data=exponents.permute((0, 1, 3, 2)), axis=3)
        total = nl.ndarray((heads, SLOTS), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=total, stationary=totals, moving=self.column_slots, accumulate=False)
        nisa.tensor_copy(dst=stats[:, :, 1], src=total)
        pattern = [[2, heads], [self.num_heads * 2, SLOTS], [1, 2]]
        nisa.dma_copy(dst=self._of_tile(self.stats, pattern, head * self.group * 2, first, tile), src=stats)
        if self.token_scales != None:  # noqa: E711
            for i in range(stop - head):
                scales = self._fetched(self.token_scales, rows[:, 1, head + i : head + i + 1])
                kept = nl.ndarray((P, self.unit), dtype=nl.float32)
                nisa.select_reduce(dst=kept, predicate=visible, on_true=scales, on_false=0.0)
                wide = kept.reshape((P, self.unit, 1)).broadcast(2, self.group)
                scaled = exponents[:, i, :, :]
                nisa.tensor_tensor(dst=scaled, data1=scaled, data2=wide, op=nl.multiply)
        for slot in range(SLOTS):
            own = slice(slot * UNITS, (slot + 1) * UNITS)
            nisa.tensor_copy(dst=weights[own, head:stop, :, slot, :], src=exponents[own, :, :, :])

    def _weigh_values(self, weights, seen, rows, head, first, tile):
        """Multiply the weights of a kv head by its values, and write the sums to HBM."""
        values = self._gathered(rows, 1, head)
        words = nl.int32 if self.dtype == nl.float32 else nl.int16
        bits = nl.ndarray((P, self.unit), dtype=words)
        nisa.tensor_scalar(dst=bits, data=seen, op0=nl.multiply, operand0=-1.0)
        kept = values.view(words)
        mask = bits.reshape((P, self.unit, 1)).broadcast(2, self.stored_dim)
        nisa.tensor_tensor(dst=kept, data1=kept, data2=mask, op=nl.bitwise_and)
        slots = SLOTS
        while slots * self.group > P:
            slots //= 2
        for slot in range(0, SLOTS, slots):
            size = slots * self.group
            product = nl.ndarray((size, self.value_dim), dtype=nl.float32, buffer=nl.psum)
            for j in range(self.unit):
                nisa.nc_matmul(
                    dst=product,
                    stationary=weights[:, head, j, slot : slot + slots, :],
                    moving=values[:, j, 0 : self.value_dim],
                    accumulate=j > 0,
                )
            sums = nl.ndarray((size, self.value_dim), dtype=nl.float32)
            if self.head_scales == None:  # noqa: E711
                nisa.tensor_copy(dst=sums, src=product)
            else:
                place = self.num_kv_heads + head
                scale = self.head_scales[0:size, place : place + 1]
                nisa.tensor_scalar(dst=sums, data=product, op0=nl.multiply, operand0=scale)
            pattern = [[self.num_heads * self.value_dim, slots], [self.value_dim, self.group], [1, self.value_dim]]
            offset = (slot * self.num_heads + head * self.group) * self.value_dim
            nisa.dma_copy(dst=self._of_tile(self.sums, pattern, offset, first, tile), src=sums)
