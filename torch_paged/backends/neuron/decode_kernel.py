"""Decode: one query token per sequence, tokens on partitions.

A turn of a loop computes tiles of 128 units of keys (``plan``), 2 chunks of any sequences, gathered whole. Per kv head,
each column of tokens is transposed by the tensor engine and multiplied by the queries of both sequences; a token keeps
the product of its own. Maximum and sum of a chunk go over the tokens of a unit on the vector engine, and over its 64
partitions after a transposition. Then weights and values are multiplied, contracted over the tokens. Weighted values,
maximum and sum of a chunk go to HBM, in a row of all kv heads for each member of a group: few and long descriptors. A
second kernel merges the rows in the order of keys (``merge_kernel``).

Values of keys outside the bounds are overwritten: a weight of 0 does not hide a NaN. A value within them that is
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
    query,  # (B * query parts, H / query parts * D)
    cache,  # (C * N * KH * parts, unit * DS), C sides
    units,  # (P, X / SLOTS, 5 or 6) int32
    query_rows,  # (X, 1) int32
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
    """Return per chunk and member of a group weighted values, maxima and sums of all kv heads, float32.

    (X * G, KH * DV + 2 * KH), as (X / SLOTS, ..).
    """
    num_tiles, group = units.shape[1], num_heads // num_kv_heads
    width = num_kv_heads * (value_dim + 2)
    partials = nl.ndarray((num_tiles, SLOTS * group * width), dtype=nl.float32, buffer=nl.shared_hbm)
    call = _Call(
        query,
        cache,
        token_scales,
        mask,
        units,
        query_rows,
        partials,
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
    return partials


def _attend_tiles(call, first, count, size, again):
    """Attend in ``count`` turns of ``size`` tiles of each core, from ``first`` on."""
    cores, core = nl.num_programs(0), nl.program_id(0)
    turns = nisa.register_alloc()
    nisa.register_load(turns, count)

    def some_tiles(turn):
        part = _Turn(call, first, core * size, size)
        for k in range(size):
            part.attend(k, again)
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
    """The arrays and sizes of a call, and what all turns share on chip."""

    def __init__(
        self,
        query,
        cache,
        token_scales,
        mask,
        units,
        query_rows,
        partials,
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
        self.units, self.query_rows, self.partials = units, query_rows, partials
        self.num_heads, self.num_kv_heads, self.parts, self.unit = num_heads, num_kv_heads, parts, unit
        self.group, self.head_dim = num_heads // num_kv_heads, head_dim
        self.stored_dim, self.value_dim = cache.shape[1] // unit, value_dim
        self.softmax_scale, self.soft_cap, self.latent = softmax_scale, soft_cap, latent
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
        query_parts = self.num_heads * self.head_dim // self.query.shape[1]
        self.part_rows = nl.ndarray((P, query_parts), dtype=nl.int32)
        nisa.iota(dst=self.part_rows, pattern=[[1, query_parts]], offset=0, channel_multiplier=0)
        self.slopes, self.head_scales, self.table = _spread(slopes), _spread(head_scales), _spread(table)
        self.spoilt = nl.ndarray((P, self.products), dtype=nl.float32)  # 1: not finite in some tile
        nisa.memset(dst=self.spoilt, value=0.0)
        self.weights = []  # zero but in a token's own slot; of two tiles that follow each other
        for _ in range(2):
            shape = (P, self.num_kv_heads, self.unit, SLOTS, self.group)
            weights = nl.ndarray(shape, dtype=self.dtype)
            nisa.memset(dst=weights, value=0.0)
            self.weights.append(weights)
        # Where nothing is read, what comes from HBM finds in these what they held before.
        self.query_buffer = nl.ndarray((P, self.query.shape[1]), dtype=self.query.dtype)
        _clear(self.query_buffer)
        self.buffers = []  # of keys, of values
        for _ in range(1 if self.latent else 2):
            buffers = []
            for _ in range(BUFFERS):
                buffer = nl.ndarray((P, self.cache.shape[1]), dtype=self.cache.dtype)
                _clear(buffer)
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
        _clear(found)
        self.fetch(found, base, rows)
        return found

    def fetch(self, found, base, rows):
        """Write rows of a tensor in HBM to (rows, W), where there is one."""
        width = base.shape[1]
        source = base.ap(pattern=[[width, found.shape[0]], [1, width]], offset=0, vector_offset=rows, indirect_dim=0)
        nisa.dma_copy(dst=found, src=source, oob_mode=nisa.oob_mode.skip)

    def turned(self, keys, lane, lanes):
        """Return some lanes of keys (P, unit, DS) as (lanes, unit, P)."""
        found = nl.ndarray((lanes, self.unit, P), dtype=self.dtype)
        at_a_time = BANK_BYTES // P // _bytes(self.dtype)
        for start in range(0, self.unit, at_a_time):
            count = min(at_a_time, self.unit - start)
            turned = nl.ndarray((lanes, count, P), dtype=self.dtype, buffer=nl.psum)
            for j in range(count):
                nisa.nc_transpose(dst=turned[:, j, :], data=keys[:, start + j, lane : lane + lanes])
            nisa.tensor_copy(dst=found[:, start : start + count, :], src=turned, engine=nisa.engine.scalar)
        return found

    def product(self, weights, values):
        """Return weights (P, unit, slots, members) times values (P, unit, DS), contracted over the tokens."""
        rows = weights.shape[2] * weights.shape[3]
        product = nl.ndarray((rows, self.value_dim), dtype=nl.float32, buffer=nl.psum)
        for j in range(self.unit):
            nisa.nc_matmul(
                dst=product,
                stationary=weights[:, j, :, :],
                moving=values[:, j, 0 : self.value_dim],
                accumulate=j > 0,
            )
        return product


def _bytes(dtype):
    return 4 if dtype == nl.float32 else 2


class _Turn(nl.NKIObject):
    """What the tiles of a turn fetch at once."""

    def __init__(self, call, first, start, size):
        """Fetch what belongs to ``size`` tiles from the one that is ``start`` behind the first on."""
        self.call, self.first, self.start = call, first, start
        words = call.units.shape[2]
        self.units = nl.ndarray((P, size, words), dtype=nl.int32)
        pattern = [[call.units.shape[1] * words, P], [1, size * words]]
        source = call.units.ap(pattern=pattern, offset=start * words, scalar_offset=first, indirect_dim=1)
        nisa.dma_copy(dst=self.units.reshape((P, size * words)), src=source)
        self.numbers = nl.ndarray((P, size, 3), dtype=nl.float32)  # bounds and distance
        nisa.tensor_copy(dst=self.numbers, src=self.units[:, :, 2:5])
        self.queries = []  # for each 128 lanes (lanes, H, slots)
        for lane in range(0, call.head_dim, P):
            shape = (min(P, call.head_dim - lane), call.num_heads, size * SLOTS)
            self.queries.append(nl.ndarray(shape, dtype=call.dtype))
        for slot in range(0, size * SLOTS, P):
            self._fetch_queries(slot, min(P, size * SLOTS - slot))

    def _fetch_queries(self, slot, count):
        call = self.call
        of_first_part = nl.ndarray((count, 1), dtype=nl.int32)
        rows_of_tile = call.query_rows.reshape((call.query_rows.shape[0] // SLOTS, SLOTS))
        source = rows_of_tile.ap(
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
            for head in range(0, heads, at_a_time):
                some = min(at_a_time, heads - head)
                for i in range(len(self.queries)):
                    lanes = self.queries[i].shape[0]
                    turned = nl.ndarray((lanes, some, count), dtype=call.query.dtype, buffer=nl.psum)
                    for j in range(some):
                        lane = (head + j) * call.head_dim + i * P
                        nisa.nc_transpose(dst=turned[:, j, :], data=found[:, lane : lane + lanes])
                    place = part * heads + head
                    nisa.tensor_copy(dst=self.queries[i][:, place : place + some, slot : slot + count], src=turned)

    def attend(self, tile, again):
        """Attend to a tile of the turn; ``again``: with values that are not finite."""
        _Tile(self, tile).attend(again)


class _Tile(nl.NKIObject):
    """A tile of a turn: which keys its rows see, logits and weights."""

    def __init__(self, turn, tile):
        call = turn.call
        self.call, self.turn, self.tile = call, turn, tile
        self.rows = nl.ndarray((P, 2, call.num_kv_heads), dtype=nl.int32)  # negative where nothing is read
        wide = turn.units[:, tile, 0:2].reshape((P, 2, 1)).broadcast(2, call.num_kv_heads)
        nisa.tensor_tensor(dst=self.rows, data1=wide, data2=call.head_rows, op=nl.add)  # of int32: exact
        self.weights = call.weights[tile % 2]
        seen, low = nl.ndarray((P, call.unit), dtype=nl.uint8), nl.ndarray((P, call.unit), dtype=nl.float32)
        bounds = turn.numbers[:, tile, :]
        nisa.tensor_scalar(dst=low, data=call.tokens, op0=nl.greater_equal, operand0=bounds[:, 0:1])
        nisa.scalar_tensor_tensor(
            dst=seen, data=call.tokens, op0=nl.less, operand0=bounds[:, 1:2], op1=nl.multiply, operand1=low
        )
        self.hidden = nl.ndarray((P, call.unit), dtype=nl.uint8)
        nisa.tensor_scalar(dst=self.hidden, data=seen, op0=nl.equal, operand0=0.0)
        self.shown = self._shown(seen)

    def _shown(self, seen):
        """Return (P, KH, unit, G) uint8, a view: 1 for the tokens that a query head sees."""
        call = self.call
        shape = (P, call.num_kv_heads, call.unit, call.group)
        if call.mask == None:  # noqa: E711
            shown = seen.reshape((P, 1, call.unit, 1))
        else:
            asked = call.fetched(call.mask, self.turn.units[:, self.tile, 5:6])
            heads = call.mask.shape[1] // call.unit
            shown = nl.ndarray((P, heads, call.unit), dtype=nl.uint8)
            nisa.tensor_tensor(
                dst=shown,
                data1=asked.reshape((P, heads, call.unit)),
                data2=seen.reshape((P, 1, call.unit)).broadcast(1, heads),
                op=nl.multiply,
            )
            if heads == call.num_heads:
                shown = shown.reshape((P, call.num_kv_heads, call.group, call.unit)).permute((0, 1, 3, 2))
            else:
                shown = shown.reshape((P, heads, call.unit, 1))
        for dim in (1, 3):
            if shown.shape[dim] != shape[dim]:
                shown = shown.broadcast(dim, shape[dim])
        return shown

    def attend(self, again):
        call = self.call
        logits = nl.ndarray((P, call.num_kv_heads, call.unit, call.group), dtype=nl.float32)
        for head in range(call.num_kv_heads):
            keys = self._gathered(0, head, call.latent)
            self._multiply_keys(logits, keys, head)
        if call.soft_cap != 0.0:
            nisa.activation(dst=logits, op=nl.tanh, data=logits, scale=1.0 / call.soft_cap)
            nisa.tensor_scalar(dst=logits, data=logits, op0=nl.multiply, operand0=call.soft_cap)
        if call.slopes != None:  # noqa: E711
            self._subtract_alibi(logits)
        selected = nl.ndarray(logits.shape, dtype=nl.float32)
        nisa.select_reduce(dst=selected, predicate=self.shown, on_true=logits, on_false=nl.fp32.min)
        stats = nl.ndarray((SLOTS, call.group, 2, call.num_kv_heads), dtype=nl.float32)
        heads_at_a_time = max(1, P // call.group)
        for head in range(0, call.num_kv_heads, heads_at_a_time):
            heads = slice(head, min(call.num_kv_heads, head + heads_at_a_time))
            for member in range(0, call.group, P):
                self._softmax(selected, heads, slice(member, min(call.group, member + P)), stats)
        width = call.num_kv_heads * (call.value_dim + 2)
        pattern = [[call.group * width, SLOTS], [width, call.group], [1, 2 * call.num_kv_heads]]
        nisa.dma_copy(dst=self._partials(pattern, call.num_kv_heads * call.value_dim), src=stats)

        blocks = []  # slots and members whose weights are multiplied at once
        for slot in range(0, SLOTS, call.slots):
            for member in range(0, call.group, P):
                blocks.append((slice(slot, slot + call.slots), slice(member, min(call.group, member + P))))
        sums = []
        for block in blocks:
            rows = call.slots * (block[1].stop - block[1].start)
            sums.append(nl.ndarray((rows, call.num_kv_heads, call.value_dim), dtype=nl.float32))
        checks = nl.ndarray((P, call.products), dtype=nl.float32)
        nisa.memset(dst=checks, value=0.0)
        for head in range(call.num_kv_heads):
            values = keys if call.latent else self._gathered(1, head, True)
            if again:
                self._weigh_any_values(values, head, blocks, sums, checks)
            else:
                self._weigh_values(values, head, blocks, sums, checks)
        if not again:
            nisa.tensor_scalar(dst=checks, data=checks, op0=nl.multiply, operand0=0.0, op1=nl.not_equal, operand1=0.0)
            nisa.tensor_tensor(dst=call.spoilt, data1=call.spoilt, data2=checks, op=nl.maximum)
        for i in range(len(blocks)):
            slots, members = blocks[i]
            count = members.stop - members.start
            pattern = [[call.group * width, call.slots], [width, count], [1, call.num_kv_heads * call.value_dim]]
            offset = (slots.start * call.group + members.start) * width
            nisa.dma_copy(dst=self._partials(pattern, offset), src=sums[i])

    def _partials(self, pattern, offset):
        """Return a part of what the tile gives."""
        base = self.call.partials
        start = (self.turn.start + self.tile) * base.shape[1] + offset
        return base.ap(pattern=pattern, offset=start, scalar_offset=self.turn.first, indirect_dim=0)

    def _gathered(self, side, head, hide):
        """Return the units of a side and head (P, unit, DS), as they are multiplied; ``hide``: 0 where not seen."""
        call = self.call
        buffers = call.buffers[side]
        stored = buffers[(self.tile * call.num_kv_heads + head) % len(buffers)]
        call.fetch(stored, call.cache, self.rows[:, side, head : head + 1])
        if hide and stored.dtype != nl.int8:
            self._hide(stored)
        if call.table == None:  # noqa: E711
            found = call.cast(stored, nisa.engine.gpsimd if side == 0 else nisa.engine.vector)
        else:
            places = nl.ndarray(stored.shape, dtype=nl.uint32)
            nisa.tensor_copy(dst=places, src=stored)
            found = nl.ndarray(stored.shape, dtype=call.dtype)
            nisa.nc_n_gather(dst=found, data=call.table, indices=places)
        return found.reshape((P, call.unit, call.stored_dim))

    def _hide(self, stored):
        """Overwrite tokens that are not seen with zeros, in the largest words that their rows consist of."""
        call = self.call
        words = stored.reshape((P, call.unit, call.stored_dim)).view(nl.uint8)
        for dtype in (nl.uint16, nl.uint32):
            if words.shape[2] % 2 == 0:
                words = words.view(dtype)
            else:
                break
        predicate = self.hidden.reshape((P, call.unit, 1)).broadcast(2, words.shape[2])
        nisa.tensor_copy_predicated(dst=words, src=0, predicate=predicate)

    def _multiply_keys(self, logits, keys, head):
        """Write the logits of a kv head: the products with a token's own sequence."""
        call = self.call
        turned = []
        for i in range(len(self.turn.queries)):
            turned.append(call.turned(keys, i * P, self.turn.queries[i].shape[0]))
        for member in range(0, call.group, P):
            size = min(P, call.group - member)
            tokens = max(1, BANK_BYTES // 4 // (SLOTS * size))
            for start in range(0, call.unit, tokens):
                products = self._products(
                    turned, head * call.group + member, size, start, min(tokens, call.unit - start)
                )
                for slot in range(SLOTS):
                    own = slice(slot * UNITS, (slot + 1) * UNITS)
                    mine = logits[own, head, start : start + products.shape[1], member : member + size]
                    data = products[own, :, :, slot]
                    if call.head_scales == None:  # noqa: E711
                        nisa.tensor_scalar(dst=mine, data=data, op0=nl.multiply, operand0=call.softmax_scale)
                    else:
                        nisa.tensor_scalar(
                            dst=mine,
                            data=data,
                            op0=nl.multiply,
                            operand0=call.softmax_scale,
                            op1=nl.multiply,
                            operand1=call.head_scales[own, head : head + 1],
                        )
        if call.token_scales != None:  # noqa: E711
            scales = call.fetched(call.token_scales, self.rows[:, 0, head : head + 1])
            wide = scales.reshape((P, call.unit, 1)).broadcast(2, call.group)
            mine = logits[:, head, :, :]
            nisa.tensor_tensor(dst=mine, data1=mine, data2=wide, op=nl.multiply)

    def _products(self, turned, head, heads, start, count):
        """Return some tokens of a unit times some query heads of both slots (P, tokens, heads, SLOTS)."""
        products = nl.ndarray((P, count, heads, SLOTS), dtype=nl.float32, buffer=nl.psum)
        slot = self.tile * SLOTS
        for j in range(count):
            for i in range(len(turned)):
                nisa.nc_matmul(
                    dst=products[:, j, :, :],
                    stationary=turned[i][:, start + j, :],
                    moving=self.turn.queries[i][:, head : head + heads, slot : slot + SLOTS],
                    accumulate=i > 0,
                )
        return products

    def _subtract_alibi(self, logits):
        call = self.call
        distances = nl.ndarray((P, call.unit), dtype=nl.float32)
        nisa.tensor_scalar(
            dst=distances,
            data=call.tokens,
            op0=nl.subtract,
            operand0=self.turn.numbers[:, self.tile, 2:3],
            reverse0=True,
        )
        wide = distances.reshape((P, 1, call.unit, 1)).broadcast(1, call.num_kv_heads).broadcast(3, call.group)
        slopes = call.slopes.reshape((P, call.num_kv_heads, 1, call.group)).broadcast(2, call.unit)
        biases = nl.ndarray(logits.shape, dtype=nl.float32)
        nisa.tensor_tensor(dst=biases, data1=slopes, data2=wide, op=nl.multiply)
        nisa.tensor_tensor(dst=logits, data1=logits, data2=biases, op=nl.subtract)

    def _softmax(self, logits, heads, members, stats):
        """Write the weights of up to 128 query heads to their slots, and their maxima and sums."""
        call = self.call
        mine = logits[:, heads, :, members]
        kv_heads, size = mine.shape[1], mine.shape[3]
        count = kv_heads * size
        largest = nl.ndarray((P, count), dtype=nl.float32)
        nisa.tensor_reduce(dst=largest, op=nl.maximum, data=mine.permute((0, 1, 3, 2)), axis=3)
        turned = nl.ndarray((count, SLOTS, UNITS), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned.reshape((count, P)), data=largest)
        maximum = nl.ndarray((count, SLOTS), dtype=nl.float32)
        nisa.tensor_reduce(dst=maximum, op=nl.maximum, data=turned, axis=2)
        nisa.tensor_scalar(dst=maximum, data=maximum, op0=nl.maximum, operand0=LEAST)
        by_unit = nl.ndarray((count, SLOTS, UNITS), dtype=nl.float32)
        nisa.tensor_copy(dst=by_unit, src=maximum.reshape((count, SLOTS, 1)).broadcast(2, UNITS))
        spread = nl.ndarray((P, count), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=spread, data=by_unit.reshape((count, P)))
        wide = spread.reshape((P, kv_heads, 1, size)).broadcast(2, call.unit)
        exponents = nl.ndarray(mine.shape, dtype=nl.float32)
        nisa.tensor_tensor(dst=exponents, data1=mine, data2=wide, op=nl.subtract)
        nisa.activation(dst=exponents, op=nl.exp, data=exponents)
        totals = nl.ndarray((P, count), dtype=nl.float32)
        nisa.tensor_reduce(dst=totals, op=nl.add, data=exponents.permute((0, 1, 3, 2)), axis=3)
        turned_totals = nl.ndarray((count, SLOTS, UNITS), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned_totals.reshape((count, P)), data=totals)
        total = nl.ndarray((count, SLOTS), dtype=nl.float32)
        nisa.tensor_reduce(dst=total, op=nl.add, data=turned_totals, axis=2)
        of_slots = nl.ndarray((SLOTS, 2, kv_heads, size), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=of_slots[:, 0, :, :], data=maximum)
        nisa.nc_transpose(dst=of_slots[:, 1, :, :], data=total)
        nisa.tensor_copy(dst=stats[:, members, :, heads], src=of_slots.permute((0, 3, 1, 2)))
        if call.token_scales != None:  # noqa: E711
            exponents = self._scaled(exponents, self.shown[:, heads, :, members], heads)
        for slot in range(SLOTS):
            own = slice(slot * UNITS, (slot + 1) * UNITS)
            nisa.tensor_copy(dst=self.weights[own, heads, :, slot, members], src=exponents[own, :, :, :])

    def _scaled(self, exponents, shown, heads):
        """Return weights times the scales of their values; 0 where a query does not see the key, NaN or not."""
        call = self.call
        for i in range(exponents.shape[1]):
            head = heads.start + i
            scales = call.fetched(call.token_scales, self.rows[:, 1, head : head + 1])
            wide = scales.reshape((P, call.unit, 1)).broadcast(2, exponents.shape[3])
            mine = exponents[:, i, :, :]
            nisa.tensor_tensor(dst=mine, data1=mine, data2=wide, op=nl.multiply)
        found = nl.ndarray(exponents.shape, dtype=nl.float32)
        nisa.select_reduce(dst=found, predicate=shown, on_true=exponents, on_false=0.0)
        return found

    def _weigh_values(self, values, head, blocks, sums, checks):
        """Multiply the weights of a kv head by its values (P, unit, DS)."""
        call = self.call
        for i in range(len(blocks)):
            slots, members = blocks[i]
            product = call.product(self.weights[:, head, :, slots, members], values)
            rows = product.shape[0]
            place, scale = head * len(blocks) + i, 1.0
            if call.head_scales != None:  # noqa: E711
                of_values = call.num_kv_heads + head
                scale = call.head_scales[0:rows, of_values : of_values + 1]
            nisa.activation(
                dst=sums[i][:, head, :],
                op=nl.copy,
                data=product,
                scale=scale,
                reduce_op=nl.add,
                reduce_res=checks[0:rows, place : place + 1],
                reduce_cmd=nisa.reduce_cmd.reset_reduce,
            )

    def _weigh_any_values(self, values, head, blocks, sums, checks):
        """Do the same with values that may not be finite: these are 0, then each row gets those that it sees."""
        call = self.call
        above, below, finite = self._parted(values)
        self._weigh_values(finite, head, blocks, sums, checks)
        for slot in range(SLOTS):
            own = slice(slot * UNITS, (slot + 1) * UNITS)
            nisa.tensor_copy(dst=self.weights[own, head, :, slot, :], src=self.shown[own, head, :, :])
        for i in range(len(blocks)):
            slots, members = blocks[i]
            shown = self.weights[:, head, :, slots, members]
            self._add_infinities(sums[i][:, head, :], call.product(shown, above), float("inf"))
            self._add_infinities(sums[i][:, head, :], call.product(shown, below), float("-inf"))

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
