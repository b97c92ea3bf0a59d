"""Writing tokens to their slots, as they are or quantised.

128 tokens lie on partitions, some heads of them in a row. A token's row of a head is one descriptor of a scatter; a row
number outside of the cache writes nothing. Lanes behind the token's own are written as zeros.

A quantised lane is the quotient of lane and scale, rounded to nearest even as float32 division rounds it, then rounded
to the format. The engines have no division: a product with the reciprocal is corrected by its remainder, which products
of halves of a fraction give exactly. Scales are brought to about 1 first, so that nothing underflows.
"""

import nki
import nki.isa as nisa
import nki.language as nl

P = 128
TILES = 8  # of 128 tokens, of a turn of the loop on one core
QUANTISED_TILES = 2  # the same, where a tile takes many instructions
WIDTH = 2048  # lanes of a partition at a time
SIGN = -(2**31)
MAGNITUDE = 2**31 - 1
UPPER_HALF = -(2**12)  # of the bits of a fraction
MOST = 2.0**17  # a quotient above all formats, below which products are finite
SMALLEST, LARGEST = 2.0**-149, 3.4028234663852886e38  # of the positive float32 numbers
FIRST_OF_TOP = 248.0  # from here on a magnitude rounds to e4m3fn's top exponent, which e4m3 does not have
NAN = 0x7F  # in both formats of 8 bits


@nki.jit
def write_tokens(
    key,  # (T, KH * D)
    value,  # (T, KH * DV), or None
    cache,  # (C * N * KH * S, DS), written: of the keys' dtype, int8, float8_e5m2, or uint8: bytes of float8_e4m3fn
    rows,  # (T, C * KH) int32: row of the cache for each token, side and head
    scales,  # (1, C) or (1, C * KH) float32, or None
    token_scales,  # (C * N * KH * S, 1) float32, written, or None
    num_kv_heads,
):
    """Write tokens; with ``scales`` divided by them, with ``token_scales`` by scales of their own."""
    num_tokens = key.shape[0]
    cores, core = nl.num_programs(0), nl.program_id(0)
    call = _Call(cache, rows, token_scales, num_kv_heads)
    call.add_side(key)
    if value != None:  # noqa: E711
        call.add_side(value)
    if scales != None:  # noqa: E711
        call.take_scales(scales)
    tiles = QUANTISED_TILES if call.quantised else TILES
    step = P * tiles * cores
    looped = num_tokens // step * step

    def some_tiles(token):
        for k in range(tiles):
            call.write(token, (k * cores + core) * P, P)

    if looped > 0:
        nl.fori_loop(0, looped, some_tiles, step=step)
    none = nisa.register_alloc(0)
    for start in range(looped, num_tokens, P):
        if (start - looped) // P % cores == core:
            call.write(none, start, min(P, num_tokens - start))


class _Call(nl.NKIObject):
    """The arrays and sizes of a call."""

    def __init__(self, cache, rows, token_scales, num_kv_heads):
        self.cache, self.rows, self.token_scales, self.num_kv_heads = cache, rows, token_scales, num_kv_heads
        self.sides = []
        self.divisor = None
        self.quantised = token_scales != None  # noqa: E711
        self.qmax = 448.0
        if cache.dtype == nl.int8:
            self.qmax = 127.0
        elif cache.dtype == nl.float8_e5m2:
            self.qmax = 57344.0

    def add_side(self, new):
        self.sides.append(new)

    def take_scales(self, scales):
        """Lay out what a division by given scales needs, on all partitions."""
        self.quantised = True
        width = scales.shape[1]
        spread = nl.ndarray((P, width), dtype=nl.float32)
        nisa.dma_copy(dst=spread, src=scales.ap(pattern=[[0, P], [1, width]], offset=0))
        # Nobody has looked at them: by one that is not positive and finite, quotients would be NaN, which int8 has not.
        missing = nl.ndarray((P, width), dtype=nl.uint8)
        nisa.tensor_tensor(dst=missing, data1=spread, data2=spread, op=nl.not_equal)
        nisa.tensor_copy_predicated(dst=spread, src=1.0, predicate=missing)
        nisa.tensor_scalar(dst=spread, data=spread, op0=nl.maximum, operand0=SMALLEST, op1=nl.minimum, operand1=LARGEST)
        self.divisor = _Divisor(spread)

    def write(self, token, first, count):
        """Write ``count`` tokens from ``token + first`` on, the former a run-time value."""
        places = nl.ndarray((count, self.rows.shape[1]), dtype=nl.int32)
        nisa.dma_copy(dst=places, src=_taken(self.rows, token, first, count, 0, self.rows.shape[1]))
        for side in range(len(self.sides)):
            new = self.sides[side]
            lanes = new.shape[1] // self.num_kv_heads
            at_a_time = min(self.num_kv_heads, max(1, WIDTH // self.cache.shape[1]))
            for head in range(0, self.num_kv_heads, at_a_time):
                heads = min(at_a_time, self.num_kv_heads - head)
                source = _taken(new, token, first, count, head * lanes, heads * lanes)
                place = side * self.num_kv_heads + head
                self._write_heads(source, places, place, side, heads, lanes)

    def _write_heads(self, source, places, place, side, heads, lanes):
        """Write some heads of a tile of tokens."""
        count, stored_dim = source.shape[0], self.cache.shape[1]
        stored = nl.ndarray((count, heads, stored_dim), dtype=self.cache.dtype)
        if lanes < stored_dim:
            zero = 0 if self.cache.dtype == nl.int8 or self.cache.dtype == nl.uint8 else 0.0
            nisa.memset(dst=stored[:, :, lanes:stored_dim], value=zero)
        if self.quantised:
            new = nl.ndarray((count, heads * lanes), dtype=source.dtype)
            nisa.dma_copy(dst=new, src=source)
            self._quantise(stored[:, :, 0:lanes], new.reshape((count, heads, lanes)), places, place, side)
        else:
            nisa.dma_copy(dst=stored[:, :, 0:lanes], src=source)
        for i in range(heads):
            _scatter(self.cache, places[:, place + i : place + i + 1], stored[:, i, :])

    def _quantise(self, stored, new, places, place, side):
        """Write the formatted quotients of lanes and scales, and scales where they are the tokens' own."""
        count, heads, lanes = new.shape
        shape = (count, heads * lanes)
        rest = nl.ndarray(shape, dtype=nl.float32)
        nisa.tensor_copy(dst=rest, src=new.reshape(shape))
        missing = nl.ndarray(shape, dtype=nl.uint8)
        nisa.tensor_tensor(dst=missing, data1=rest, data2=rest, op=nl.not_equal)
        nisa.tensor_copy_predicated(dst=rest, src=0.0, predicate=missing)
        signs = nl.ndarray(shape, dtype=nl.int32)
        bits = rest.view(nl.int32)
        nisa.tensor_scalar(dst=signs, data=bits, op0=nl.bitwise_and, operand0=SIGN)
        nisa.tensor_scalar(dst=bits, data=bits, op0=nl.bitwise_and, operand0=MAGNITUDE)
        if self.token_scales == None:  # noqa: E711
            divisor, column, shared = self.divisor, place, 1
            if self.divisor.inverse.shape[1] == len(self.sides):
                column, shared = side, heads
        else:
            scales = self._scales(rest.reshape((count, heads, lanes)))
            for i in range(heads):
                _scatter(self.token_scales, places[:, place + i : place + i + 1], scales[:, i : i + 1])
            divisor, column, shared = _Divisor(scales), 0, 1
        quotient = nl.ndarray(shape, dtype=nl.float32)
        divisor.divide(quotient, rest, lanes * shared, column)
        nisa.tensor_scalar(dst=quotient, data=quotient, op0=nl.minimum, operand0=self.qmax)
        _format(stored, quotient.reshape(new.shape), signs.reshape(new.shape), missing.reshape(new.shape))

    def _scales(self, magnitudes):
        """Return the largest magnitude over qmax for each token and head, 1 where it is 0.

        A scale that is no normal number, below 2**-126, is rounded twice: it may be one unit off.
        """
        shape = (magnitudes.shape[0], magnitudes.shape[1])
        largest, scales = nl.ndarray(shape, dtype=nl.float32), nl.ndarray(shape, dtype=nl.float32)
        nisa.tensor_reduce(dst=largest, op=nl.maximum, data=magnitudes, axis=2)
        nisa.tensor_scalar(dst=largest, data=largest, op0=nl.minimum, operand0=LARGEST)
        to_one, back = _powers(largest)
        nisa.tensor_tensor(dst=largest, data1=largest, data2=to_one, op=nl.multiply)
        nisa.tensor_scalar(dst=scales, data=largest, op0=nl.multiply, operand0=1.0 / self.qmax)
        high, low = _halves(scales)
        _take_off(largest, high, self.qmax)
        _take_off(largest, low, self.qmax)
        nisa.scalar_tensor_tensor(
            dst=scales, data=largest, op0=nl.multiply, operand0=1.0 / self.qmax, op1=nl.add, operand1=scales
        )
        nisa.tensor_tensor(dst=scales, data1=scales, data2=back, op=nl.multiply)
        nothing = nl.ndarray(shape, dtype=nl.uint8)
        nisa.tensor_scalar(dst=nothing, data=scales, op0=nl.equal, operand0=0.0)
        nisa.tensor_copy_predicated(dst=scales, src=1.0, predicate=nothing)
        return scales


class _Divisor(nl.NKIObject):
    """Positive numbers (P, F) times powers of two that bring them to about 1: their inverses, their halves."""

    def __init__(self, numbers):
        shape = numbers.shape
        self.power, _back = _powers(numbers)
        self.inverse, near_one = nl.ndarray(shape, dtype=nl.float32), nl.ndarray(shape, dtype=nl.float32)
        nisa.tensor_tensor(dst=near_one, data1=numbers, data2=self.power, op=nl.multiply)
        nisa.reciprocal(dst=self.inverse, data=near_one)
        self.high, self.low = _halves(near_one)

    def divide(self, quotient, rest, width, column):
        """Write the quotients of ``rest`` (P, F), which is used up: ``width`` lanes by each number from a column on."""
        count = rest.shape[0]
        for i in range(rest.shape[1] // width):
            own, place = slice(i * width, (i + 1) * width), slice(column + i, column + i + 1)
            nisa.tensor_scalar(
                dst=rest[:, own], data=rest[:, own], op0=nl.multiply, operand0=self.power[0:count, place]
            )
            nisa.tensor_scalar(
                dst=quotient[:, own],
                data=rest[:, own],
                op0=nl.multiply,
                operand0=self.inverse[0:count, place],
                op1=nl.minimum,
                operand1=MOST,
            )
        high, low = _halves(quotient)
        for i in range(rest.shape[1] // width):
            own, place = slice(i * width, (i + 1) * width), slice(column + i, column + i + 1)
            _take_off(rest[:, own], high[:, own], self.high[0:count, place])
            _take_off(rest[:, own], high[:, own], self.low[0:count, place])
            _take_off(rest[:, own], low[:, own], self.high[0:count, place])
            _take_off(rest[:, own], low[:, own], self.low[0:count, place])
            nisa.scalar_tensor_tensor(
                dst=quotient[:, own],
                data=rest[:, own],
                op0=nl.multiply,
                operand0=self.inverse[0:count, place],
                op1=nl.add,
                operand1=quotient[:, own],
            )


def _powers(numbers):
    """Return powers of two that bring positive numbers to about 1, and those that bring them back."""
    shape = numbers.shape
    exponents, bits = nl.ndarray(shape, dtype=nl.int32), nl.ndarray(shape, dtype=nl.int32)
    nisa.tensor_scalar(dst=exponents, data=numbers.view(nl.int32), op0=nl.right_shift, operand0=23)
    nisa.tensor_scalar(dst=exponents, data=exponents, op0=nl.maximum, operand0=1.0, op1=nl.minimum, operand1=252.0)
    nisa.tensor_scalar(dst=bits, data=exponents, op0=nl.subtract, operand0=254.0, reverse0=True)
    for part in (bits, exponents):
        nisa.tensor_scalar(dst=part, data=part, op0=nl.left_shift, operand0=23)
    return bits.view(nl.float32), exponents.view(nl.float32)


def _halves(numbers):
    """Return numbers with the lower half of their fractions cut off, and what was cut off."""
    high, low = nl.ndarray(numbers.shape, dtype=nl.float32), nl.ndarray(numbers.shape, dtype=nl.float32)
    nisa.tensor_scalar(dst=high.view(nl.int32), data=numbers.view(nl.int32), op0=nl.bitwise_and, operand0=UPPER_HALF)
    nisa.tensor_tensor(dst=low, data1=numbers, data2=high, op=nl.subtract)
    return high, low


def _take_off(rest, data, factor):
    """Subtract ``data * factor`` from ``rest``."""
    nisa.scalar_tensor_tensor(
        dst=rest, data=data, op0=nl.multiply, operand0=factor, op1=nl.subtract, operand1=rest, reverse1=True
    )


def _format(stored, magnitudes, signs, missing):
    """Round magnitudes up to qmax to the format of ``stored`` (P, heads, lanes); what is missing is NaN, 0 in int8."""
    top = nl.ndarray(magnitudes.shape, dtype=nl.float32)
    if stored.dtype == nl.uint8:  # e4m3fn: e4m3 of half the magnitude, and then one more in the exponent
        factor = nl.ndarray(magnitudes.shape, dtype=nl.float32)
        nisa.tensor_scalar(
            dst=top, data=magnitudes, op0=nl.greater_equal, operand0=FIRST_OF_TOP, op1=nl.multiply, operand1=8.0
        )
        nisa.tensor_scalar(dst=factor, data=top, op0=nl.multiply, operand0=-1.0 / 16, op1=nl.add, operand1=1.0)
        nisa.tensor_tensor(dst=magnitudes, data1=magnitudes, data2=factor, op=nl.multiply)
    numbers = magnitudes.view(nl.int32)
    nisa.tensor_tensor(dst=numbers, data1=numbers, data2=signs, op=nl.bitwise_or)
    if stored.dtype == nl.uint8:
        nisa.tensor_copy(dst=stored.view(nl.float8_e4m3), src=magnitudes)
        nisa.tensor_tensor(dst=stored, data1=stored, data2=top, op=nl.add)
    else:
        nisa.tensor_copy(dst=stored, src=magnitudes)
    if stored.dtype != nl.int8:
        nisa.tensor_copy_predicated(dst=stored.view(nl.uint8), src=NAN, predicate=missing)


def _taken(base, token, first, count, lane, lanes):
    """Return some lanes of ``count`` rows of a tensor in HBM, from row ``token + first`` on, ``token`` at run time."""
    width = base.shape[1]
    return base.ap(
        pattern=[[width, count], [1, lanes]], offset=first * width + lane, scalar_offset=token, indirect_dim=0
    )


def _scatter(base, rows, data):
    """Write data (P, W) to rows (P, 1) of a tensor in HBM; rows outside are not written."""
    count, width = data.shape
    place = base.ap(pattern=[[width, count], [1, width]], offset=0, vector_offset=rows, indirect_dim=0)
    nisa.dma_copy(dst=place, src=data, oob_mode=nisa.oob_mode.skip)
