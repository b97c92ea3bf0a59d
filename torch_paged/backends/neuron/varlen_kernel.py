"""Packed ragged queries: rows (a token and a member of its group) on partitions, softmax online over chunks of keys.

A turn of the outer loop computes a tile of rows of one sequence, of all kv heads (``plan_varlen``); an inner loop, with
the trip count of the plan, a chunk of up to 2048 keys: first those in the cache, then those beside it. Per kv head the
units of the chunk are gathered whole, with the tokens of a unit beside each other on a partition; keys are turned by
the tensor engine into the order of their positions, once for all rows of the tile. Products of 512 keys fill a bank of
PSUM; ``range_select`` keeps those between the bounds of a row, which length, causality, window and chunk make, and
finds the largest. The scalar engine takes exponentials of the whole chunk, with their sums. Weights are turned back, so
that keys lie on partitions, and multiplied by the values. Maximum, sum and weighted values of rows stay in SBUF.

Values behind the keys of a tile are zeros: a weight of 0 does not hide a NaN. A value that is not finite, and seen by
some rows alone, spoils all rows of its tile; where a result is not finite, all tiles are computed again: values that
are not finite as zeros, and added as infinities, of both signs for NaN, to the rows that see them.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from torch_paged.backends.neuron.plan_varlen import BODIES, CHUNK_KEYS, KEY_UNIT, STEP_KEYS, diagonal_keys
from torch_paged.backends.neuron.varlen_keys_kernel import Cache, NewKeys, Walk

P = 128
LEAST = -1e24  # a maximum below which no logit counts; its product with any scale that is folded stays above fp32.min
SMALLEST = 2.0**-60  # less than the sum of any row that sees a key, and within the logarithm's range
LEAST_SCALE = 1e-6  # of the logits: smaller ones, and those that are not positive, are multiplied before the selection
AHEAD_BYTES = 8192  # of a partition: keys of a head that are fetched while those of another are attended to
BANK_BYTES = 2048  # of a partition, in PSUM
LOGIT_KEYS = 1024  # that one instruction selects from
HUGE = 2.0**100  # its square overflows


@nki.jit
def attend_tiles(
    query,  # (T * H, D)
    cache,  # (sides * N * KH * parts, KEY_UNIT * DS), or None
    key_units,  # (gathers, P) int32, or None
    new_key,  # (Tk, KH * D), or None
    new_value,  # (Tk, KH * DN), or None
    wide_query_units,  # (X, U) int32, U units in a tile; None with all that is wide
    wide_member_units,  # (X, U) int32
    wide_rows,  # (X, U * 6) float32
    wide_ends,  # (X, 2) int32
    wide_starts,  # (X, 2) int32
    wide_turns,  # (X, 2 * (len(BODIES) + 1)) int32
    wide_mask_rows,  # (X, 2 * U) int32, or None
    middle_query_units,  # None with all that is middle
    middle_member_units,
    middle_rows,
    middle_ends,
    middle_starts,
    middle_turns,
    middle_mask_rows,
    query_units,
    member_units,
    rows,
    ends,
    starts,
    turns,
    mask_rows,
    counts,  # (1, 4) int32
    mask,  # (mask heads * T * chunks, CHUNK_KEYS) uint8, or None
    new_mask,  # the same for new keys
    sinks,  # (H, 1) float32, or None
    slopes,  # (H, 1) float32, or None
    head_scales,  # (1, 2 * KH) float32, or None
    token_scales,  # (sides * N * KH * parts, KEY_UNIT) float32, or None
    table,  # (1, 256) of the queries' dtype: what a byte of the cache means; None: it is cast
    num_heads,
    num_kv_heads,
    sides,
    parts,
    wide_member_rows,  # of a unit of a wide tile
    middle_member_rows,
    mask_heads,
    value_dim,
    softmax_scale,
    soft_cap,
):
    """Return out (T * H, DV) in the queries' dtype, lse and maximum (T * H, 2) float32."""
    out = nl.ndarray((query.shape[0], value_dim), dtype=query.dtype, buffer=nl.shared_hbm)
    found = nl.ndarray((query.shape[0], 2), dtype=nl.float32, buffer=nl.shared_hbm)
    cores, core = nl.num_programs(0), nl.program_id(0)
    numbers = nl.ndarray((1, 4), dtype=nl.int32)
    nisa.dma_copy(dst=numbers, src=counts)
    spoilt = nl.ndarray((P, 1), dtype=nl.float32)  # 1: not finite in some tile
    nisa.memset(dst=spoilt, value=0.0)
    sizes = (num_heads, num_kv_heads, mask_heads, value_dim, softmax_scale, soft_cap)
    narrow = (query_units, member_units, rows, ends, starts, turns, mask_rows)
    shapes = [(2, 1, narrow)]
    if middle_query_units != None:  # noqa: E711
        middle = (
            middle_query_units,
            middle_member_units,
            middle_rows,
            middle_ends,
            middle_starts,
            middle_turns,
            middle_mask_rows,
        )
        shapes.append((1, middle_member_rows, middle))
    if wide_query_units != None:  # noqa: E711
        wide = (wide_query_units, wide_member_units, wide_rows, wide_ends, wide_starts, wide_turns, wide_mask_rows)
        shapes.append((0, wide_member_rows, wide))
    calls = []
    for number, width, plan in shapes:
        call = _Call(query, sinks, slopes, out, found, spoilt, width, plan, sizes)
        call.lay_out_constants()
        if cache != None:  # noqa: E711
            source = Cache(call, cache, key_units, mask, token_scales, table)
            source.lay_out_constants(head_scales, sides, parts)
            call.sources.append(source)
        if new_key != None:  # noqa: E711
            source = NewKeys(call, new_key, new_value, new_mask)
            source.lay_out_constants()
            call.sources.append(source)
        calls.append((call, numbers[:, number : number + 1]))
    for call, tiles in calls:
        _attend(call, tiles, cores, core, False)
    again = _of_any_core(spoilt, cores, core)
    nisa.tensor_tensor(dst=again, data1=again, data2=numbers[:, 3:4], op=nl.maximum)
    for call, tiles in calls:
        tiles_again = nl.ndarray((1, 1), dtype=nl.int32)
        nisa.tensor_tensor(dst=tiles_again, data1=again, data2=tiles, op=nl.multiply)
        _attend(call, tiles_again, cores, core, True)
    return out, found


def _attend(call, tiles, cores, core, again):
    """Compute all tiles of a shape; ``again``: with values that are not finite."""
    first = nl.ndarray((1, 1), dtype=nl.int32)  # tile of core 0
    nisa.memset(dst=first, value=0)
    turns = nisa.register_alloc()
    nisa.register_load(turns, tiles)

    def some_tile(turn):
        call.attend(first, core, again)
        nisa.tensor_scalar(dst=first, data=first, op0=nl.add, operand0=float(cores))

    nl.fori_loop(0, turns, some_tile)


def _of_any_core(flags, cores, core):
    """Return (1, 1) int32: the largest of (P, 1) flags, of all cores."""
    turned = nl.ndarray((1, P), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_transpose(dst=turned, data=flags)
    found = nl.ndarray((1, 1), dtype=nl.int32)
    nisa.tensor_reduce(dst=found, op=nl.maximum, data=turned, axis=1)
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


def _of_a_bank(dtype, count):
    """Return the first one and the number of each of the parts of some transposes that fill a bank of PSUM."""
    found, most = [], BANK_BYTES // (P * (4 if dtype == nl.float32 else 2))
    for k in range(0, count, most):
        found.append((k, min(most, count - k)))
    return found


class _Call(nl.NKIObject):
    """The arrays and sizes of a call, and what every tile of a shape reads."""

    def __init__(self, query, sinks, slopes, out, found, spoilt, member_rows, plan, sizes):
        self.query_units, self.member_units, self.rows, self.ends, self.starts, self.turns, self.mask_rows = plan
        self.num_heads, self.num_kv_heads, self.mask_heads, self.value_dim, softmax_scale, soft_cap = sizes
        self.member_rows, self.head_dim, self.dtype, self.spoilt = member_rows, query.shape[1], query.dtype, spoilt
        self.group = self.num_heads // self.num_kv_heads
        self.group_units = self.group // member_rows
        self.unit_tiles = self.query_units.shape[1] // P
        self.row_tiles = self.unit_tiles * member_rows  # of a kv head
        self.tokens = P // self.group_units  # of a row tile
        self.columns = self.num_kv_heads * self.row_tiles  # of the state
        self.query, self.out, self.found = self._by_unit(query), self._by_unit(out), self._by_unit(found)
        self.sinks, self.slopes = self._by_unit(sinks), self._by_unit(slopes)
        self.soft_cap = soft_cap
        size = 4 if query.dtype == nl.float32 else 2
        self.ahead = CHUNK_KEYS // P * self.head_dim * size <= AHEAD_BYTES
        self.sources = []
        # Logits that are more than the product times a positive scale are computed before the selection.
        self.early = soft_cap != 0.0 or slopes != None or softmax_scale < LEAST_SCALE  # noqa: E711
        self.scale = softmax_scale if soft_cap == 0.0 else softmax_scale / soft_cap  # of the product
        self.late_scale = soft_cap if soft_cap != 0.0 and slopes == None else 1.0  # noqa: E711

    def lay_out_constants(self):
        self.head_units = nl.ndarray((P, self.num_kv_heads), dtype=nl.int32)
        nisa.iota(dst=self.head_units, pattern=[[self.group_units, self.num_kv_heads]])
        if self.slopes != None:  # noqa: E711
            self.places = nl.ndarray((P, CHUNK_KEYS), dtype=nl.float32)
            nisa.iota(dst=self.places, pattern=[[1, CHUNK_KEYS]])
        self.huge = nl.ndarray((P, STEP_KEYS), dtype=nl.float32)
        nisa.memset(dst=self.huge, value=HUGE)

    def engine_of_weights(self, number):
        """Return the engine that copies turned weights; where few rows share keys, they keep the scalar engine busy."""
        eighths = 3 + 5 // self.row_tiles
        return nisa.engine.vector if number * eighths % 8 < eighths else nisa.engine.scalar

    def _by_unit(self, base):
        """Return rows of HBM, (rows, width), as rows of units; None stays None."""
        if base == None:  # noqa: E711
            return None
        return base.reshape((base.shape[0] // self.member_rows, base.shape[1] * self.member_rows))

    def of_tile(self, base, pattern, offset, first, core):
        """Return a part of a tile's row of a tensor in HBM."""
        start = core * base.shape[1] + offset
        return base.ap(pattern=pattern, offset=start, scalar_offset=first, indirect_dim=0)

    def attend(self, first, core, again):
        """Compute a tile; ``again``: with values that are not finite."""
        state = _State(self)
        state.begin(first, core)
        numbers = nl.ndarray((1, self.turns.shape[1]), dtype=nl.int32)
        pattern = [[1, 1], [1, self.turns.shape[1]]]
        nisa.dma_copy(dst=numbers, src=self.of_tile(self.turns, pattern, 0, first, core))
        for source in self.sources:
            walk = Walk(self, source, first, core)
            column, bodies = source.number * (len(BODIES) + 1), len(BODIES)
            if again:
                column, bodies = column + bodies, 1
            for body in range(bodies):
                if not source.takes(body):
                    continue
                steps, diagonal = BODIES[body]
                state.add_chunks(walk, steps, diagonal, again, numbers[:, column + body : column + body + 1])
        state.finish()


class _State(nl.NKIObject):
    """Rows of a tile so far: for each row tile of 128 a column of ``lowest`` (the negated maximum), sum and values."""

    def __init__(self, call):
        self.call = call
        columns = call.columns
        self.lowest = nl.ndarray((P, columns), dtype=nl.float32)
        self.lowest_key = self.lowest  # without a sink
        if call.sinks != None:  # noqa: E711
            self.lowest_key = nl.ndarray((P, columns), dtype=nl.float32)
        self.total = nl.ndarray((P, columns), dtype=nl.float32)
        self.sums = nl.ndarray((P, columns, call.value_dim), dtype=nl.float32)
        self.units = nl.ndarray((P, call.unit_tiles, call.num_kv_heads), dtype=nl.int32)
        self.queries = []  # (lanes, columns, P)
        for lane in range(0, call.head_dim, P):
            shape = (min(P, call.head_dim - lane), columns, P)
            self.queries.append(nl.ndarray(shape, dtype=call.dtype))

    def begin(self, first, core):
        call = self.call
        nisa.memset(dst=self.sums, value=0.0, engine=nisa.engine.gpsimd)
        self._load_units(self.units, call.query_units, first, core)
        for head in range(call.num_kv_heads):
            for n in range(call.unit_tiles):
                self._load_queries(head, n)
        members = None
        if call.sinks != None or call.slopes != None:  # noqa: E711
            members = nl.ndarray(self.units.shape, dtype=nl.int32)
            self._load_units(members, call.member_units, first, core)
        if call.slopes != None:  # noqa: E711
            self.slopes = nl.ndarray((P, call.columns), dtype=nl.float32)
            self._load_members(self.slopes, call.slopes, members, 0.0)
            nisa.tensor_scalar(dst=self.slopes, data=self.slopes, op0=nl.multiply, operand0=-1.0)
        nisa.memset(dst=self.lowest_key, value=-LEAST)
        if call.sinks == None:  # noqa: E711
            nisa.memset(dst=self.total, value=0.0)
            return
        self._load_members(self.lowest, call.sinks, members, LEAST)
        nisa.tensor_scalar(dst=self.total, data=self.lowest, op0=nl.greater, operand0=LEAST)
        nisa.tensor_scalar(
            dst=self.lowest, data=self.lowest, op0=nl.maximum, operand0=LEAST, op1=nl.multiply, operand1=-1.0
        )

    def _load_units(self, units, base, first, core):
        """Load rows of units, of all kv heads."""
        call = self.call
        of_first_head = nl.ndarray((P, call.unit_tiles), dtype=nl.int32)
        pattern = [[1, P], [P, call.unit_tiles]]
        nisa.dma_copy(dst=of_first_head, src=call.of_tile(base, pattern, 0, first, core))
        wide = of_first_head.reshape((P, call.unit_tiles, 1)).broadcast(2, call.num_kv_heads)
        heads = call.head_units.reshape((P, 1, call.num_kv_heads)).broadcast(1, call.unit_tiles)
        nisa.tensor_tensor(dst=units, data1=wide, data2=heads, op=nl.add)  # of int32: exact

    def _load_members(self, dst, base, members, otherwise):
        """Load what the members of a group have of their own."""
        call = self.call
        nisa.memset(dst=dst, value=otherwise)
        pattern = [[call.member_rows, P], [1, call.member_rows]]
        for head in range(call.num_kv_heads):
            for n in range(call.unit_tiles):
                rows = members[:, n, head : head + 1]
                column = head * call.row_tiles + n * call.member_rows
                source = base.ap(pattern=pattern, offset=0, vector_offset=rows, indirect_dim=0)
                mine = dst[:, column : column + call.member_rows]
                nisa.dma_copy(dst=mine, src=source, oob_mode=nisa.oob_mode.skip)

    def _load_queries(self, head, n):
        """Load the queries of 128 units, and turn them."""
        call = self.call
        count, width = call.member_rows, call.query.shape[1]
        part = nl.ndarray((P, count, call.head_dim), dtype=call.dtype)
        nisa.memset(dst=part, value=0.0, engine=nisa.engine.gpsimd)
        rows = self.units[:, n, head : head + 1]
        source = call.query.ap(pattern=[[width, P], [1, width]], offset=0, vector_offset=rows, indirect_dim=0)
        nisa.dma_copy(dst=part.reshape((P, width)), src=source, oob_mode=nisa.oob_mode.skip)
        column = head * call.row_tiles + n * count
        for i in range(len(self.queries)):
            lanes = self.queries[i].shape[0]
            turned = nl.ndarray((lanes, count, P), dtype=call.dtype, buffer=nl.psum)
            for t in range(count):
                nisa.nc_transpose(dst=turned[:, t, :], data=part[:, t, i * P : i * P + lanes])
            nisa.tensor_copy(dst=self.queries[i][:, column : column + count, :], src=turned)

    def add_chunks(self, walk, steps, diagonal, again, count):
        """Attend to so many chunks of a source that follow each other."""
        turns = nisa.register_alloc()
        nisa.register_load(turns, count)

        def some_keys(turn):
            self.add(walk, steps, diagonal, again)

        nl.fori_loop(0, turns, some_keys)

    def add(self, walk, steps, diagonal, again):
        """Attend to the next chunk of a source; ``diagonal``: earlier rows see less of its last step."""
        call, source = self.call, walk.source
        chunk = source.chunk(walk, steps, again)
        end = nisa.register_alloc()
        nisa.register_load(end, walk.end)
        valid = source.valid(walk, steps) if again else None
        distances = None if call.slopes == None else walk.distances(steps)  # noqa: E711
        shared = []
        if source.mask != None and call.mask_heads == 1:  # noqa: E711
            for n in range(call.unit_tiles):
                shared.append(walk.shown(steps, 0, n, 0))
        waiting, fetched = None, None
        for head in range(call.num_kv_heads):
            if fetched == None:  # noqa: E711
                fetched = source.fetch(chunk, head)
            keys, values = fetched
            fetched = None
            if head + 1 < call.num_kv_heads and call.ahead and not again:
                fetched = source.fetch(chunk, head + 1)
            turned = self._turn_keys(keys, source.layout(steps))
            values = self._clean(values, end, source.layout(steps), again)
            for n in range(call.unit_tiles):
                shown = shared[n] if shared else None
                if source.mask != None and call.mask_heads == call.num_kv_heads and not shared:  # noqa: E711
                    shown = walk.shown(steps, head, n, 0)
                for t in range(call.member_rows):
                    if source.mask != None and call.mask_heads > call.num_kv_heads:  # noqa: E711
                        shown = walk.shown(steps, head, n, t)
                    predicate = _both(shown, valid, steps)
                    column = head * call.row_tiles + n * call.member_rows + t
                    keys = (steps - 1) * STEP_KEYS + diagonal_keys(n, call.tokens) if diagonal else steps * STEP_KEYS
                    item = self._weights(walk, head, n, column, turned, distances, predicate, keys, again)
                    if waiting != None:  # noqa: E711
                        self._weigh(waiting, source)
                    waiting = (column, head, item, values)
            if again or not call.ahead:  # so much lies on chip at once
                self._weigh(waiting, source)
                waiting = None
        if waiting != None:  # noqa: E711
            self._weigh(waiting, source)
        walk.advance()

    def _turn_keys(self, keys, layout):
        """Return keys (parts, gathers * unit, ..), for each 128 lanes, as (lanes, keys), in order."""
        call, found = self.call, []
        parts, gathers, unit = layout
        for i in range(len(self.queries)):
            lanes = self.queries[i].shape[0]
            turned = nl.ndarray((lanes, gathers, parts, unit), dtype=call.dtype)
            for k, count in _of_a_bank(keys.dtype, gathers * unit):
                product = nl.ndarray((lanes, count, parts), dtype=call.dtype, buffer=nl.psum)
                for j in range(count):
                    nisa.nc_transpose(dst=product[:, j, :], data=keys[:, k + j, i * P : i * P + lanes])
                place, width = k % unit, min(count, unit)
                units = slice(k // unit, k // unit + count // width)
                ordered = turned[:, units, :, place : place + width].permute((0, 1, 3, 2))
                product = product.reshape((lanes, count // width, width, parts))
                nisa.tensor_copy(dst=ordered, src=product, engine=nisa.engine.scalar)
            found.append(turned.reshape((lanes, gathers * parts * unit)))
        return found

    def _clean(self, values, end, layout, again):
        """Return values, zeros behind the keys of the tile; ``again``: finite, and what is to be added to them."""
        call = self.call
        parts, gathers, unit = layout
        values = values[:, :, 0 : call.value_dim]
        nisa.affine_select(
            dst=values,
            pattern=[[-parts * unit, gathers], [-1, unit], [0, call.value_dim]],
            channel_multiplier=-unit,
            on_true_tile=values,
            on_false_value=0.0,
            cmp_op=nl.greater,
            offset=end,
        )
        if not again:
            return (values, None, None)
        words = nl.int32 if call.dtype == nl.float32 else nl.int16
        strange, sign = nl.ndarray(values.shape, dtype=nl.float32), nl.ndarray(values.shape, dtype=nl.float32)
        nisa.tensor_tensor(dst=strange, data1=values, data2=values, op=nl.not_equal)  # NaN
        infinities = []
        for factor in (1.0, -1.0):
            nisa.tensor_scalar(
                dst=sign, data=values, op0=nl.multiply, operand0=factor, op1=nl.greater, operand1=-nl.fp32.min
            )
            found = nl.ndarray(values.shape, dtype=nl.bfloat16)
            nisa.scalar_tensor_tensor(dst=sign, data=sign, op0=nl.add, operand0=0.0, op1=nl.maximum, operand1=strange)
            nisa.tensor_scalar(dst=found, data=sign, op0=nl.multiply, operand0=factor * HUGE)
            infinities.append(found)
        bits = nl.ndarray(values.shape, dtype=words)
        nisa.tensor_scalar(dst=strange, data=values, op0=nl.multiply, operand0=0.0)
        nisa.tensor_scalar(dst=bits, data=strange, op0=nl.equal, operand0=0.0, op1=nl.multiply, operand1=-1.0)
        finite = nl.ndarray(values.shape, dtype=call.dtype)
        nisa.tensor_tensor(dst=finite.view(words), data1=values.view(words), data2=bits, op=nl.bitwise_and)
        return (finite, infinities[0], infinities[1])

    def _weights(self, walk, head, n, column, turned, distances, predicate, keys, again):
        """Return the weights of a chunk's keys for 128 rows, the factor of what came before, and what is visible."""
        call, source = self.call, walk.source
        low, high = walk.bounds[:, n, 0:1], walk.bounds[:, n, 1:2]
        selected = nl.ndarray((P, keys), dtype=nl.float32)
        largest = nl.ndarray((P, 1), dtype=nl.float32)
        scale, products = source.scale(head), []
        for first in range(0, keys, LOGIT_KEYS):
            width = min(keys - first, LOGIT_KEYS)
            logits = nl.ndarray((P, width), dtype=nl.float32, buffer=nl.psum)
            for k in range(0, width, STEP_KEYS):
                last = min(k + STEP_KEYS, width)
                for i in range(len(turned)):
                    stationary, moving = self.queries[i][:, column, :], turned[i][:, first + k : first + last]
                    nisa.nc_matmul(dst=logits[:, k:last], stationary=stationary, moving=moving, accumulate=i > 0)
            if call.early:
                logits = self._scaled(logits, scale, column, distances, n, first)
            products.append((first, logits))
        for first, logits in products:  # with no other instruction between them that finds a maximum
            last = first + logits.shape[1]
            command = nisa.reduce_cmd.reset_reduce if first == 0 else nisa.reduce_cmd.reduce
            nisa.range_select(
                dst=selected[:, first:last],
                on_true_tile=logits,
                comp_op0=nl.greater_equal,
                comp_op1=nl.less,
                bound0=low,
                bound1=high,
                reduce_cmd=command if predicate == None else nisa.reduce_cmd.idle,  # noqa: E711
                reduce_res=largest if predicate == None and last == keys else None,  # noqa: E711
                reduce_op=nl.maximum,
                range_start=first,
            )
        if predicate != None:  # noqa: E711
            nisa.select_reduce(
                dst=selected,
                predicate=predicate[:, 0:keys],
                on_true=selected,
                on_false=nl.fp32.min,
                reduce_res=largest,
                reduce_cmd=nisa.reduce_cmd.reset_reduce,
                reduce_op=nl.maximum,
            )
        late, negated = source.late_scale(head), source.negated_scale(head)
        before = self.lowest[:, column : column + 1]
        lowest, factor = nl.ndarray((P, 1), dtype=nl.float32), nl.ndarray((P, 1), dtype=nl.float32)
        nisa.tensor_scalar(dst=lowest, data=largest, op0=nl.multiply, operand0=negated, op1=nl.minimum, operand1=before)
        nisa.activation(dst=factor, op=nl.exp, data=before, scale=-1.0, bias=lowest)
        nisa.tensor_copy(dst=before, src=lowest, engine=nisa.engine.gpsimd)
        if call.sinks != None:  # noqa: E711
            key = self.lowest_key[:, column : column + 1]
            nisa.tensor_scalar(dst=key, data=largest, op0=nl.multiply, operand0=negated, op1=nl.minimum, operand1=key)
        parts, _, unit = source.layout(keys // STEP_KEYS)
        weights = nl.ndarray((P, keys), dtype=call.dtype)
        part, whole = nl.ndarray((P, 1), dtype=nl.float32), P
        while 2 * whole <= keys:
            whole = 2 * whole
        # Halves of a power of two are added as the whole is, so that keys that a row does not see change no bit.
        for first, last in ((0, whole), (whole, keys)):
            if first < last:
                nisa.activation(
                    dst=weights[:, first:last],
                    op=nl.exp,
                    data=selected[:, first:last],
                    bias=lowest,
                    scale=late,
                    reduce_op=nl.add,
                    reduce_res=part if last == keys else None,
                    reduce_cmd=nisa.reduce_cmd.reset_reduce if first == 0 else nisa.reduce_cmd.reduce,
                )
        weights = weights.reshape((P, keys // (parts * unit), parts, unit))
        total = self.total[:, column : column + 1]
        gpsimd = nisa.engine.gpsimd  # has time for what lies in SBUF
        nisa.tensor_tensor(dst=total, data1=total, data2=factor, op=nl.multiply, engine=gpsimd)
        nisa.tensor_tensor(dst=total, data1=total, data2=part, op=nl.add, engine=gpsimd)
        visible = self._visible(low, high, predicate, weights.shape) if again else None
        return (weights, factor, visible)

    def _scaled(self, products, scale, column, distances, n, first):
        """Return logits (P, keys), from a key on, where they are no positive multiple of the products."""
        call = self.call
        logits = nl.ndarray(products.shape, dtype=nl.float32)
        operator = nl.copy if call.soft_cap == 0.0 else nl.tanh
        nisa.activation(dst=logits, op=operator, data=products, scale=scale)
        if call.slopes != None:  # noqa: E711
            if call.soft_cap != 0.0:
                nisa.tensor_scalar(dst=logits, data=logits, op0=nl.multiply, operand0=call.soft_cap)
            nisa.scalar_tensor_tensor(
                dst=logits,
                data=distances[:, n, first : first + products.shape[1]],
                op0=nl.multiply,
                operand0=self.slopes[:, column : column + 1],
                op1=nl.add,
                operand1=logits,
            )
        return logits

    def _visible(self, low, high, predicate, shape):
        """Return bfloat16 of the shape of weights: ``HUGE`` where a row sees a key, else 0."""
        keys = shape[1] * shape[2] * shape[3]
        found = nl.ndarray(shape, dtype=nl.bfloat16)
        for first in range(0, keys, STEP_KEYS):
            within = nl.ndarray((P, STEP_KEYS), dtype=nl.float32)
            nisa.range_select(
                dst=within,
                on_true_tile=self.call.huge,
                comp_op0=nl.greater_equal,
                comp_op1=nl.less,
                bound0=low,
                bound1=high,
                reduce_cmd=nisa.reduce_cmd.idle,
                range_start=first,
            )
            mine = found.reshape((P, keys))[:, first : first + STEP_KEYS]
            nisa.tensor_scalar(dst=mine, data=within, op0=nl.maximum, operand0=0.0)
            if predicate != None:  # noqa: E711
                shown = predicate[:, first : first + STEP_KEYS]
                nisa.tensor_tensor(dst=mine, data1=mine, data2=shown, op=nl.multiply)
        return found

    def _weigh(self, item, source):
        """Multiply weights and values, and add them to what came before."""
        column, head, (weights, factor, visible), (values, positive, negative) = item
        product = self._product(weights, values, column)
        sums = self.sums[:, column, :]
        scale = source.value_scale(head)
        if scale != None:  # noqa: E711
            scaled = nl.ndarray(product.shape, dtype=nl.float32)
            nisa.activation(dst=scaled, op=nl.copy, data=product, scale=scale)
            product = scaled
        nisa.scalar_tensor_tensor(dst=sums, data=sums, op0=nl.multiply, operand0=factor, op1=nl.add, operand1=product)
        if visible != None:  # noqa: E711
            for infinities in (positive, negative):
                product = self._product(visible, infinities, column)
                nisa.tensor_tensor(dst=sums, data1=sums, data2=product, op=nl.add)

    def _product(self, weights, values, column):
        """Return weights (P rows, gathers, parts, unit) times values (parts, gathers * unit, DV) in PSUM."""
        product = nl.ndarray((P, values.shape[2]), dtype=nl.float32, buffer=nl.psum)
        places = _of_a_bank(weights.dtype, weights.shape[1] * weights.shape[3])
        ahead = self._turn_weights(weights, places[0], column * len(places))
        for i in range(len(places)):
            turned = ahead
            if i + 1 < len(places):
                ahead = self._turn_weights(weights, places[i + 1], column * len(places) + i + 1)
            k, count = places[i]
            for j in range(count):
                stationary, moving = turned[:, j, :], values[:, k + j, :]
                nisa.nc_matmul(dst=product, stationary=stationary, moving=moving, accumulate=k + j > 0)
        return product

    def _turn_weights(self, weights, place, number):
        """Return the weights of some tokens of each unit as (parts, count, P rows)."""
        (k, count), unit = place, weights.shape[3]
        shape = (weights.shape[2], count, P)
        product = nl.ndarray(shape, dtype=weights.dtype, buffer=nl.psum)
        for j in range(count):
            nisa.nc_transpose(dst=product[:, j, :], data=weights[:, (k + j) // unit, :, (k + j) % unit])
        turned = nl.ndarray(shape, dtype=weights.dtype)
        nisa.tensor_copy(dst=turned, src=product, engine=self.call.engine_of_weights(number))
        return turned

    def finish(self):
        """Write results; a row that saw no key has zeros, and -inf where there is no sink either."""
        call = self.call
        total, factor = nl.ndarray(self.total.shape, dtype=nl.float32), nl.ndarray(self.total.shape, dtype=nl.float32)
        nisa.tensor_scalar(dst=total, data=self.total, op0=nl.maximum, operand0=SMALLEST)
        nisa.reciprocal(dst=factor, data=total)
        stats = nl.ndarray((P, call.columns, 2), dtype=nl.float32)
        nisa.activation(dst=total, op=nl.log, data=total)
        nisa.tensor_tensor(dst=stats[:, :, 0], data1=total, data2=self.lowest, op=nl.subtract)
        nisa.tensor_scalar(dst=stats[:, :, 1], data=self.lowest_key, op0=nl.multiply, operand0=-1.0)
        nothing = nl.ndarray(stats.shape, dtype=nl.uint8)
        nisa.tensor_scalar(dst=nothing, data=stats, op0=nl.less_equal, operand0=LEAST / 2)
        nisa.tensor_copy_predicated(dst=stats, src=float("-inf"), predicate=nothing)
        checks = nl.ndarray((P, call.columns), dtype=nl.float32)
        width = call.member_rows * call.value_dim
        for head in range(call.num_kv_heads):
            for n in range(call.unit_tiles):
                rows = self.units[:, n, head : head + 1]
                result = nl.ndarray((P, call.member_rows, call.value_dim), dtype=call.dtype)
                first = head * call.row_tiles + n * call.member_rows
                for t in range(call.member_rows):
                    column = slice(first + t, first + t + 1)
                    nisa.activation(  # a zero of either sign gives 0.0, so that steps without keys change no bit
                        dst=result[:, t, :],
                        op=nl.copy,
                        data=self.sums[:, first + t, :],
                        scale=factor[:, column],
                        bias=0.0,
                        reduce_op=nl.add,
                        reduce_res=checks[:, column],
                        reduce_cmd=nisa.reduce_cmd.reset_reduce,
                    )
                dst = call.out.ap(pattern=[[width, P], [1, width]], offset=0, vector_offset=rows, indirect_dim=0)
                nisa.dma_copy(dst=dst, src=result.reshape((P, width)), oob_mode=nisa.oob_mode.skip)
                pattern = [[2 * call.member_rows, P], [1, 2 * call.member_rows]]
                dst = call.found.ap(pattern=pattern, offset=0, vector_offset=rows, indirect_dim=0)
                part = stats[:, first : first + call.member_rows, :]
                nisa.dma_copy(dst=dst, src=part, oob_mode=nisa.oob_mode.skip)
        nisa.tensor_scalar(dst=checks, data=checks, op0=nl.multiply, operand0=0.0, op1=nl.not_equal, operand1=0.0)
        spoilt = nl.ndarray((P, 1), dtype=nl.float32)
        nisa.tensor_reduce(dst=spoilt, op=nl.maximum, data=checks, axis=1)
        nisa.tensor_tensor(dst=call.spoilt, data1=call.spoilt, data2=spoilt, op=nl.maximum)


def _both(shown, valid, steps):
    """Return (P, keys) uint8: what the mask shows and the cache holds; None: everything."""
    if valid == None:  # noqa: E711
        return shown
    found = nl.ndarray((P, steps * STEP_KEYS), dtype=nl.uint8)
    units = valid.shape[1]
    wide = valid.reshape((P, units, 1)).broadcast(2, KEY_UNIT)
    mine = found.reshape((P, units, KEY_UNIT))
    if shown == None:  # noqa: E711
        nisa.tensor_copy(dst=mine, src=wide)
    else:
        nisa.tensor_tensor(dst=mine, data1=wide, data2=shown.reshape((P, units, KEY_UNIT)), op=nl.multiply)
    return found
