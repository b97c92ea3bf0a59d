"""Dense copies of paged sequences: units of a cache, as a plan lists them, in their order.

128 units lie on partitions. A unit is some consecutive tokens of a block, whole for one descriptor of a gather. What is
none, and the tokens of a unit that a sequence does not have, becomes zeros: by AND, since stale lanes may be NaN.
"""

import nki
import nki.isa as nisa
import nki.language as nl

P = 128
TILES = 8  # of 128 units, of a turn of the loop on one core


@nki.jit
def gather_units(
    cache,  # (C * N * KH * parts, unit * DS)
    rows,  # (R, C) int32: of the cache, for each side; outside: zeros
    counts,  # (R, 1) float32: tokens of a unit that there are, from its first on
    row_scales,  # (R, C) float32, or None
    token_scales,  # (C * N * KH * parts, unit) float32, or None
    table,  # (1, 256) float32: what a byte of the cache means; None: it is cast
    unit,
):
    """Return keys, and with two sides values, (R, unit * DS): of the cache's dtype, float32 where there are scales."""
    call = _Call(cache, rows, counts, row_scales, token_scales, unit)
    call.lay_out_constants(table)
    count = rows.shape[0]
    cores, core = nl.num_programs(0), nl.program_id(0)
    step = P * TILES * cores
    looped = count // step * step

    def some_tiles(row):
        for k in range(TILES):
            call.gather(row, (k * cores + core) * P, P)

    if looped > 0:
        nl.fori_loop(0, looped, some_tiles, step=step)
    none = nisa.register_alloc(0)
    for start in range(looped, count, P):
        if (start - looped) // P % cores == core:
            call.gather(none, start, min(P, count - start))
    if len(call.dense) == 1:
        return call.dense[0]
    return call.dense[0], call.dense[1]


class _Call(nl.NKIObject):
    """The arrays and sizes of a call."""

    def __init__(self, cache, rows, counts, row_scales, token_scales, unit):
        self.cache, self.rows, self.counts, self.unit = cache, rows, counts, unit
        self.row_scales, self.token_scales, self.table = row_scales, token_scales, None
        self.quantised = row_scales != None or token_scales != None  # noqa: E711
        dtype = nl.float32 if self.quantised else cache.dtype
        self.dense = []
        for _ in range(rows.shape[1]):
            self.dense.append(nl.ndarray((rows.shape[0], cache.shape[1]), dtype=dtype, buffer=nl.shared_hbm))

    def lay_out_constants(self, table):
        self.tokens = nl.ndarray((P, self.unit), dtype=nl.float32)
        nisa.iota(dst=self.tokens, pattern=[[1, self.unit]], offset=0, channel_multiplier=0)
        if table != None:  # noqa: E711
            self.table = nl.ndarray((P, 256), dtype=nl.float32)
            nisa.dma_copy(dst=self.table, src=table.ap(pattern=[[0, P], [1, 256]], offset=0))

    def gather(self, row, first, count):
        """Gather ``count`` units from ``row + first`` on, the former a run-time value."""
        places = nl.ndarray((count, self.rows.shape[1]), dtype=nl.int32)
        nisa.dma_copy(dst=places, src=_taken(self.rows, row, first, count))
        there = nl.ndarray((count, 1), dtype=nl.float32)
        nisa.dma_copy(dst=there, src=_taken(self.counts, row, first, count))
        for side in range(len(self.dense)):
            found = self._fetched(self.cache, places[:, side : side + 1], there)
            if self.row_scales != None:  # noqa: E711
                scale = nl.ndarray((count, self.row_scales.shape[1]), dtype=nl.float32)
                nisa.dma_copy(dst=scale, src=_taken(self.row_scales, row, first, count))
                wide = nl.ndarray(found.shape, dtype=nl.float32)
                own = scale[:, side : side + 1]
                nisa.tensor_scalar(dst=wide, data=self._read(found), op0=nl.multiply, operand0=own)
                found = wide
            elif self.token_scales != None:  # noqa: E711
                scales = self._fetched(self.token_scales, places[:, side : side + 1], there)
                shape = (count, self.unit, found.shape[1] // self.unit)
                wide = nl.ndarray(shape, dtype=nl.float32)
                spread = scales.reshape((count, self.unit, 1)).broadcast(2, shape[2])
                nisa.tensor_tensor(dst=wide, data1=self._read(found).reshape(shape), data2=spread, op=nl.multiply)
                found = wide.reshape(found.shape)
            nisa.dma_copy(dst=_taken(self.dense[side], row, first, count), src=found)

    def _fetched(self, base, places, there):
        """Return rows (P, W) of a tensor in HBM, zeros where there is no row or no token."""
        count, width = places.shape[0], base.shape[1]
        found = nl.ndarray((count, width), dtype=base.dtype)
        zero = 0 if base.dtype == nl.int8 or base.dtype == nl.uint8 else 0.0
        nisa.memset(dst=found, value=zero, engine=nisa.engine.gpsimd)
        source = base.ap(pattern=[[width, count], [1, width]], offset=0, vector_offset=places, indirect_dim=0)
        nisa.dma_copy(dst=found, src=source, oob_mode=nisa.oob_mode.skip)
        if self.unit > 1:
            words = nl.int32
            if base.dtype != nl.float32:
                words = nl.int16 if base.dtype == nl.bfloat16 or base.dtype == nl.float16 else nl.int8
            kept = nl.ndarray((count, self.unit), dtype=words)
            nisa.tensor_scalar(
                dst=kept,
                data=self.tokens[0:count, :],
                op0=nl.less,
                operand0=there,
                op1=nl.multiply,
                operand1=-1.0,
            )
            lanes = width // self.unit
            bits = found.view(words).reshape((count, self.unit, lanes))
            spread = kept.reshape((count, self.unit, 1)).broadcast(2, lanes)
            nisa.tensor_tensor(dst=bits, data1=bits, data2=spread, op=nl.bitwise_and)
        return found

    def _read(self, stored):
        """Return what stored lanes mean, without their scale, in a dtype that the engines know."""
        if self.table == None:  # noqa: E711
            return stored
        places = nl.ndarray(stored.shape, dtype=nl.uint32)
        nisa.tensor_copy(dst=places, src=stored)
        found = nl.ndarray(stored.shape, dtype=nl.float32)
        nisa.nc_n_gather(dst=found, data=self.table[0 : stored.shape[0], :], indices=places)
        return found


def _taken(base, row, first, count):
    """Return ``count`` rows of a tensor in HBM, from ``row + first`` on, the former a run-time value."""
    width = base.shape[1]
    pattern = [[width, count], [1, width]]
    return base.ap(pattern=pattern, offset=first * width, scalar_offset=row, indirect_dim=0)
