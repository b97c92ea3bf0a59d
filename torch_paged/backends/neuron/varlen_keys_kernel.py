"""Where the keys of packed queries come from: the cache, by rows of units; new tokens beside it, by their numbers."""

import nki.isa as nisa
import nki.language as nl

from torch_paged.backends.neuron.plan_varlen import (
    BODIES,
    CHUNK_GATHERS,
    CHUNK_KEYS,
    KEY_UNIT,
    STEP_KEYS,
)

P = 128
LEAST_FACTOR = 1e-14  # of what is selected: fp32.min times it is still no logit, and products times it are about 0
NEW_BYTES = 2048  # of a new token that are fetched at once, from heads that follow each other


def _spread(row):
    """Return a row of HBM on every partition."""
    found = nl.ndarray((P, row.shape[1]), dtype=row.dtype)
    nisa.dma_copy(dst=found, src=row.ap(pattern=[[0, P], [1, row.shape[1]]], offset=0))
    return found


def _constant(value):
    found = nl.ndarray((P, 1), dtype=nl.int32)
    nisa.memset(dst=found, value=value)
    return found


def _clamp(rows, bound, op):
    """Bound int32 rows; what is compared as integers keeps its bits."""
    wide = nl.ndarray(rows.shape, dtype=nl.int32)
    nisa.memset(dst=wide, value=bound, engine=nisa.engine.gpsimd)
    nisa.tensor_tensor(dst=rows, data1=rows, data2=wide, op=op)


class Walk(nl.NKIObject):
    """Where a tile is among the keys of a source; all positions are counted from the chunk that comes next."""

    def __init__(self, call, source, first, core):
        self.call, self.source = call, source
        tiles, number = call.unit_tiles, source.number
        self.bounds = nl.ndarray((P, tiles, 3), dtype=nl.float32)  # seen from, seen to, own position
        pattern = [[6, P], [6 * P, tiles], [1, 3]]
        nisa.dma_copy(dst=self.bounds, src=call.of_tile(call.rows, pattern, 3 * number, first, core))
        self.end = nl.ndarray((1, 1), dtype=nl.int32)  # behind the last key that a row of the tile sees
        nisa.dma_copy(dst=self.end, src=call.of_tile(call.ends, [[1, 1], [1, 1]], number, first, core))
        self.start = nl.ndarray((P, 1), dtype=nl.int32)
        nisa.dma_copy(dst=self.start, src=call.of_tile(call.starts, [[0, P], [1, 1]], number, first, core))
        if source.mask != None:  # noqa: E711
            self.mask_rows = nl.ndarray((P, tiles), dtype=nl.int32)
            pattern = [[1, P], [P, tiles]]
            nisa.dma_copy(
                dst=self.mask_rows, src=call.of_tile(call.mask_rows, pattern, number * tiles * P, first, core)
            )

    def advance(self):
        """Go to the next chunk; behind the last one that a tile needs, to keys that it does not see."""
        for places in (self.bounds, self.end):
            nisa.tensor_scalar(dst=places, data=places, op0=nl.subtract, operand0=float(CHUNK_KEYS))
        nisa.tensor_scalar(
            dst=self.start,
            data=self.start,
            op0=nl.add,
            operand0=float(self.source.stride),
            op1=nl.minimum,
            operand1=float(self.source.end),
        )
        if self.source.mask != None:  # noqa: E711
            one = self.source.one.broadcast(1, self.call.unit_tiles)
            nisa.tensor_tensor(dst=self.mask_rows, data1=self.mask_rows, data2=one, op=nl.add)

    def distances(self, steps):
        """Return (P, unit tiles, keys) float32: how far each key is from a row."""
        keys = steps * STEP_KEYS
        found = nl.ndarray((P, self.call.unit_tiles, keys), dtype=nl.float32)
        for n in range(self.call.unit_tiles):
            own, places = self.bounds[:, n, 2:3], self.call.places[:, 0:keys]
            nisa.activation(dst=found[:, n, :], op=nl.abs, data=places, scale=-1.0, bias=own)
        return found

    def shown(self, steps, head, n, member):
        """Return (P, keys) uint8: what the mask shows to the rows of a head."""
        source, keys = self.source, steps * STEP_KEYS
        rows = nl.ndarray((P, 1), dtype=nl.int32)
        column = head * self.call.member_rows + member
        head_row = source.mask_head_rows[:, column : column + 1]
        nisa.tensor_tensor(dst=rows, data1=self.mask_rows[:, n : n + 1], data2=head_row, op=nl.add)
        _clamp(rows, 0, nl.maximum)
        _clamp(rows, source.mask.shape[0] - 1, nl.minimum)
        found = nl.ndarray((P, keys), dtype=nl.uint8)
        pattern = [[CHUNK_KEYS, P], [1, keys]]
        mine = source.mask.ap(pattern=pattern, offset=0, vector_offset=rows, indirect_dim=0)
        nisa.dma_copy(dst=found, src=mine)
        return found


def _lay_out_mask(source):
    """Lay out what finds the rows of a source's mask."""
    call = source.call
    source.one = _constant(1)
    if source.mask == None:  # noqa: E711
        return
    rows = source.mask.shape[0] // call.mask_heads
    by_head, by_member = 0, 0
    if call.mask_heads > call.num_kv_heads:
        by_head, by_member = rows * call.group, rows
    elif call.mask_heads == call.num_kv_heads:
        by_head = rows
    source.mask_head_rows = nl.ndarray((P, call.num_kv_heads * call.member_rows), dtype=nl.int32)
    nisa.iota(dst=source.mask_head_rows, pattern=[[by_head, call.num_kv_heads], [by_member, call.member_rows]])


class Cache(nl.NKIObject):
    """Keys in the cache."""

    def __init__(self, call, cache, key_units, mask, token_scales, table):
        self.call, self.cache, self.key_units, self.mask = call, cache, key_units, mask
        self.token_scales, self.table = token_scales, None
        if table != None:  # noqa: E711
            self.table = _spread(table)
        self.number, self.stride, self.end = 0, CHUNK_GATHERS, key_units.shape[0] - CHUNK_GATHERS
        self.stored_dim = cache.shape[1] // KEY_UNIT

    def lay_out_constants(self, head_scales, sides, parts):
        """Lay out rows of heads, and scales; with one side, values lie in the lanes of keys."""
        call, heads = self.call, self.call.num_kv_heads
        _lay_out_mask(self)
        self.sides = sides
        self.head_rows = nl.ndarray((P, sides, heads), dtype=nl.int32)
        side = self.cache.shape[0] // sides
        nisa.iota(dst=self.head_rows, pattern=[[side, sides], [parts, heads]])
        self.value_scales, self.scales, self.negated = None, None, None
        if head_scales == None:  # noqa: E711
            return
        stored = _spread(head_scales)
        self.value_scales = stored[:, heads : 2 * heads]
        self.scales, self.negated = nl.ndarray((P, heads), dtype=nl.float32), nl.ndarray((P, heads), dtype=nl.float32)
        nisa.tensor_scalar(dst=self.scales, data=stored[:, 0:heads], op0=nl.multiply, operand0=call.scale)
        if not call.early:
            nisa.tensor_scalar(dst=self.scales, data=self.scales, op0=nl.maximum, operand0=LEAST_FACTOR)
        nisa.tensor_scalar(dst=self.negated, data=self.scales, op0=nl.multiply, operand0=-1.0)

    def layout(self, steps):
        """Return the partitions that hold keys of so many steps, their units of keys, and the keys of a unit."""
        parts = min(P, steps * STEP_KEYS // KEY_UNIT)
        return (parts, steps * STEP_KEYS // (parts * KEY_UNIT), KEY_UNIT)

    def takes(self, body):
        """Return whether one of ``BODIES`` runs: units do not fill partitions by thirds, or by less than a step."""
        steps, diagonal = BODIES[body]
        return steps != 3 and not diagonal

    def scale(self, head):
        """Return the factor of a head's products, a number or (P, 1)."""
        return self.call.scale if self.scales == None else self.scales[:, head : head + 1]  # noqa: E711

    def late_scale(self, head):
        """Return the factor of what is selected."""
        return self.call.late_scale if self.call.early else self.scale(head)

    def negated_scale(self, head):
        """Return the negated factor of what is selected."""
        if self.call.early or self.scales == None:  # noqa: E711
            return -self.late_scale(head)
        return self.negated[:, head : head + 1]

    def value_scale(self, head):
        """Return the factor of a head's values (P, 1), or None."""
        return None if self.value_scales == None else self.value_scales[:, head : head + 1]  # noqa: E711

    def chunk(self, walk, steps, again):
        """Return the rows of a chunk's units (parts, sides * KH, gathers), negative for those that hold no keys."""
        parts, gathers, _ = self.layout(steps)
        units = nl.ndarray((parts, 1, gathers), dtype=nl.int32)
        start = walk.start[0:1, :]
        mine = self.key_units.ap(pattern=[[1, parts], [P, gathers]], offset=0, scalar_offset=start, indirect_dim=0)
        nisa.dma_copy(dst=units, src=mine)
        heads = self.call.num_kv_heads
        columns = self.sides * heads
        rows = nl.ndarray((parts, columns, gathers), dtype=nl.int32)
        of_heads = self.head_rows.reshape((P, columns, 1))[0:parts, :, :].broadcast(2, gathers)
        nisa.tensor_tensor(dst=rows, data1=units.broadcast(1, columns), data2=of_heads, op=nl.add)  # of int32: exact
        if self.sides == 2:  # keys that no row sees may be any; where values lie in their lanes, they may not
            _clamp(rows[:, 0:heads, :], 0, nl.maximum)
        return rows

    def valid(self, walk, steps):
        """Return (P, units of the chunk) uint8: 1 for units that hold keys, on every partition."""
        parts, gathers, _ = self.layout(steps)
        units = nl.ndarray((P, gathers * parts), dtype=nl.int32)
        start = walk.start[0:1, :]
        pattern = [[0, P], [1, gathers * parts]]
        mine = self.key_units.ap(pattern=pattern, offset=0, scalar_offset=start, indirect_dim=0)
        nisa.dma_copy(dst=units, src=mine)
        nisa.tensor_scalar(dst=units, data=units, op0=nl.right_shift, operand0=31)
        found = nl.ndarray(units.shape, dtype=nl.uint8)
        nisa.tensor_scalar(dst=found, data=units, op0=nl.multiply, operand0=-1.0, op1=nl.add, operand1=1.0)
        return found

    def fetch(self, rows, head):
        """Return keys and values of a head (parts, gathers * KEY_UNIT, DS) in the dtype of the queries."""
        heads = self.call.num_kv_heads
        keys = self._gathered(rows[:, head, :], self.sides == 1, nisa.engine.scalar)
        if self.sides == 1:
            return (keys, keys)
        return (keys, self._gathered(rows[:, heads + head, :], True, nisa.engine.gpsimd))

    def _gathered(self, rows, zeroed, engine):
        call, count = self.call, rows.shape[1] * KEY_UNIT
        stored = self._fetched(self.cache, rows, zeroed)
        found, shape = stored, (rows.shape[0], count, self.stored_dim)
        if self.table != None:  # noqa: E711
            places = nl.ndarray(stored.shape, dtype=nl.uint32)
            nisa.tensor_copy(dst=places, src=stored, engine=engine)
            found = nl.ndarray(stored.shape, dtype=call.dtype)
            nisa.nc_n_gather(dst=found, data=self.table[0 : rows.shape[0], :], indices=places)
        if self.token_scales != None:  # noqa: E711
            scales = self._fetched(self.token_scales, rows, zeroed)
            wide = scales.reshape((rows.shape[0], count, 1)).broadcast(2, self.stored_dim)
            scaled = nl.ndarray(shape, dtype=call.dtype)
            nisa.tensor_tensor(dst=scaled, data1=found.reshape(shape), data2=wide, op=nl.multiply)
            return scaled
        if found.dtype != call.dtype:
            found = nl.ndarray(stored.shape, dtype=call.dtype)
            nisa.tensor_copy(dst=found, src=stored, engine=engine)
        return found.reshape(shape)

    def _fetched(self, base, rows, zeroed):
        """Return rows of a tensor in HBM (parts, gathers, W), zeros where there is none."""
        (parts, gathers), width = rows.shape, base.shape[1]
        found = nl.ndarray((parts, gathers, width), dtype=base.dtype)
        if zeroed:
            zero = 0 if base.dtype == nl.int8 or base.dtype == nl.uint8 else 0.0
            nisa.memset(dst=found, value=zero, engine=nisa.engine.gpsimd)
        for g in range(gathers):
            pattern = [[width, parts], [1, width]]
            mine = base.ap(pattern=pattern, offset=0, vector_offset=rows[:, g : g + 1], indirect_dim=0)
            nisa.dma_copy(dst=found[:, g, :], src=mine, oob_mode=nisa.oob_mode.skip)
        return found


class _Tokens(nl.NKIObject):
    """New tokens of a chunk, and what was fetched of them: some heads that follow each other."""

    def __init__(self, rows, heads):
        self.rows, self.heads = rows, heads
        self.keys, self.values = None, None


class NewKeys(nl.NKIObject):
    """Keys beside the cache."""

    def __init__(self, call, key, value, mask):
        self.call, self.key, self.mask = call, key, mask
        self.value, self.latent = value, value == None  # noqa: E711
        self.number, self.stride, self.end = 1, CHUNK_KEYS, key.shape[0]
        heads, size = call.num_kv_heads, 4 if call.dtype == nl.float32 else 2
        self.heads = heads  # that are fetched at once
        while heads % self.heads or (self.heads > 1 and self.heads * key.shape[1] // heads * size > NEW_BYTES):
            self.heads -= 1

    def lay_out_constants(self):
        """Lay out the numbers of a chunk's tokens."""
        _lay_out_mask(self)
        self.tokens = nl.ndarray((P, CHUNK_KEYS // P), dtype=nl.int32)
        nisa.iota(dst=self.tokens, pattern=[[P, CHUNK_KEYS // P]], channel_multiplier=1)

    def layout(self, steps):
        """Return the partitions that hold keys of so many steps, their units of keys, and the keys of a unit."""
        return (P, steps * STEP_KEYS // P, 1)

    def takes(self, body):
        """Return whether one of ``BODIES`` runs: all of them do."""
        return True

    def scale(self, head):
        """Return the factor of a head's products."""
        return self.call.scale

    def late_scale(self, head):
        """Return the factor of what is selected."""
        return self.call.late_scale if self.call.early else self.call.scale

    def negated_scale(self, head):
        """Return the negated factor of what is selected."""
        return -self.late_scale(head)

    def value_scale(self, head):
        """Return None: values are as they are."""
        return

    def chunk(self, walk, steps, again):
        """Return the tokens of a chunk, the last token in place of those behind it."""
        count = steps * STEP_KEYS // P
        rows = nl.ndarray((P, count), dtype=nl.int32)
        start = walk.start.broadcast(1, count)
        nisa.tensor_tensor(dst=rows, data1=self.tokens[:, 0:count], data2=start, op=nl.add)
        _clamp(rows, self.key.shape[0] - 1, nl.minimum)
        heads = 1 if again else self.heads  # what is not finite takes room on chip
        return _Tokens(rows, heads)

    def valid(self, walk, steps):
        """Return None: all tokens hold keys."""
        return

    def fetch(self, tokens, head):
        """Return keys and values of a head (parts, gathers * KEY_UNIT, lanes)."""
        if head % tokens.heads == 0:
            tokens.keys = self._fetched(self.key, tokens, head)
            tokens.values = tokens.keys
            if not self.latent:
                tokens.values = self._fetched(self.value, tokens, head)
        return (self._of_head(tokens.keys, tokens, head), self._of_head(tokens.values, tokens, head))

    def _fetched(self, base, tokens, head):
        rows, (parts, count) = tokens.rows, tokens.rows.shape
        width = base.shape[1] // self.call.num_kv_heads * tokens.heads
        found = nl.ndarray((parts, count, width), dtype=base.dtype)
        for k in range(count):
            pattern, offset = [[base.shape[1], parts], [1, width]], head // tokens.heads * width
            mine = base.ap(pattern=pattern, offset=offset, vector_offset=rows[:, k : k + 1], indirect_dim=0)
            nisa.dma_copy(dst=found[:, k, :], src=mine)
        return found

    def _of_head(self, fetched, tokens, head):
        width = fetched.shape[2] // tokens.heads
        place = head % tokens.heads * width
        return fetched[:, :, place : place + width]
