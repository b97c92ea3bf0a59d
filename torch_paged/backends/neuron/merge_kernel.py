"""The second stage of split attention: the partial results of a row's chunks, merged in the order of keys.

Rows lie on partitions, 128 at a time: some heads of a sequence (``merge_parts``), members of groups outside, kv heads
inside. ``CHUNKS`` partial results of each row are merged at once, as the plan places them; a negative place holds none
and changes nothing. The first ones are no turn of the loop, as most rows need no others.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from torch_paged.backends.neuron.plan import MERGES as CHUNKS
from torch_paged.backends.neuron.plan import PARTITIONS as P
from torch_paged.backends.neuron.plan import turn_merges

LEAST = -1e30  # a maximum below which no logit counts
SMALLEST = 2.0**-60  # less than the sum of any row that sees a key, and within the logarithm's range
UNROLLED = 4  # groups of a core that need no loop


@nki.jit
def merge_chunks(
    sums,  # (X * parts, heads * DV) float32: weighted values
    stats,  # (X * parts, heads * 2) float32: maxima and sums
    places,  # (groups * C, P * CHUNKS) int32: of groups of rows, C of each
    turns,  # (1, 1) int32: of ``turn_merges`` of the C those that hold a chunk, the first of the C apart
    sinks,  # (groups, P * heads) float32, or None
    like,  # any shape: the dtype of the result
    num_groups,
):
    """Return out (groups, P * heads * DV), and lse and maximum (groups, P * heads * 2) float32."""
    out = nl.ndarray((num_groups, P * sums.shape[1]), dtype=like.dtype, buffer=nl.shared_hbm)
    found = nl.ndarray((num_groups, P * stats.shape[1]), dtype=nl.float32, buffer=nl.shared_hbm)
    cores, core = nl.num_programs(0), nl.program_id(0)
    inner = None
    if places.shape[0] > num_groups:
        count = nl.ndarray((1, 1), dtype=nl.int32)
        nisa.dma_copy(dst=count, src=turns)
        inner = nisa.register_alloc()
        nisa.register_load(inner, count)
    group = nl.ndarray((1, 1), dtype=nl.int32)
    nisa.memset(dst=group, value=core)

    def rows_of_a_group(i):
        _merge_rows(sums, stats, places, inner, sinks, group, out, found)
        nisa.tensor_scalar(dst=group, data=group, op0=nl.add, operand0=float(cores))

    if num_groups // cores <= UNROLLED:
        for i in range(num_groups // cores):
            rows_of_a_group(i)
    else:
        nl.fori_loop(0, num_groups // cores, rows_of_a_group)
    return out, found


def _merge_rows(sums, stats, places, turns, sinks, group, out, found):
    """Merge all chunks of the rows of a group."""
    heads = stats.shape[1] // 2
    state = _State(heads, sums.shape[1] // heads)
    state.begin(sinks, group)
    row = nl.ndarray((1, 1), dtype=nl.int32)
    nisa.tensor_scalar(dst=row, data=group, op0=nl.multiply, operand0=float(places.shape[0] // out.shape[0]))
    state.take(sums, stats, _rows(places, row), True)

    def some_chunks(j):
        for _ in range(turn_merges(heads)):
            nisa.tensor_scalar(dst=row, data=row, op0=nl.add, operand0=1.0)
            state.take(sums, stats, _rows(places, row), False)

    if places.shape[0] > out.shape[0]:
        nl.fori_loop(0, turns, some_chunks)
    state.finish(out, found, group)


def _rows(places, row):
    """Return a row of places as (P, CHUNKS)."""
    found = nl.ndarray((P, CHUNKS), dtype=nl.int32)
    source = places.ap(pattern=[[CHUNKS, P], [1, CHUNKS]], offset=0, scalar_offset=row, indirect_dim=0)
    nisa.dma_copy(dst=found, src=source)
    return found


def _fetch(found, base, rows):
    """Write rows of a tensor in HBM to (P, W), where there is one."""
    width = base.shape[1]
    source = base.ap(pattern=[[width, P], [1, width]], offset=0, vector_offset=rows, indirect_dim=0)
    nisa.dma_copy(dst=found, src=source, oob_mode=nisa.oob_mode.skip)


class _State(nl.NKIObject):
    """Maximum, sum and weighted values of 128 rows so far; ``largest`` is the maximum without a sink."""

    def __init__(self, heads, value_dim):
        self.heads, self.value_dim = heads, value_dim
        self.maximum = nl.ndarray((P, heads), dtype=nl.float32)
        self.largest = nl.ndarray((P, heads), dtype=nl.float32)
        self.total = nl.ndarray((P, heads), dtype=nl.float32)
        self.sums = nl.ndarray((P, heads, value_dim), dtype=nl.float32)

    def begin(self, sinks, group):
        nisa.memset(dst=self.largest, value=LEAST)
        if sinks == None:  # noqa: E711
            nisa.memset(dst=self.maximum, value=LEAST)
            nisa.memset(dst=self.total, value=0.0)
            return
        pattern = [[self.heads, P], [1, self.heads]]
        source = sinks.ap(pattern=pattern, offset=0, scalar_offset=group, indirect_dim=0)
        sink = nl.ndarray((P, self.heads), dtype=nl.float32)
        nisa.dma_copy(dst=sink, src=source)
        nisa.tensor_scalar(dst=self.maximum, data=sink, op0=nl.maximum, operand0=LEAST)
        nisa.tensor_tensor(dst=sink, data1=sink, data2=self.maximum, op=nl.subtract)
        nisa.activation(dst=self.total, op=nl.exp, data=sink)  # 1, or 0 for a sink of -inf

    def take(self, sums, stats, places, first):
        """Take some partial results of each row; ``first``: there are no weighted values yet."""
        factors = self._rescale(stats, places)
        added = nl.ndarray(self.sums.shape, dtype=nl.float32, buffer=nl.psum)
        for k in range(CHUNKS):
            part = nl.ndarray((P, self.heads * self.value_dim), dtype=nl.float32)
            nisa.memset(dst=part, value=0.0, engine=nisa.engine.gpsimd)
            _fetch(part, sums, places[:, k : k + 1])
            for head in range(self.heads):
                mine, factor = added[:, head, :], factors[:, k, head : head + 1]
                values = part[:, head * self.value_dim : (head + 1) * self.value_dim]
                if k == 0:
                    nisa.tensor_scalar(dst=mine, data=values, op0=nl.multiply, operand0=factor)
                else:
                    nisa.scalar_tensor_tensor(
                        dst=mine, data=values, op0=nl.multiply, operand0=factor, op1=nl.add, operand1=mine
                    )
        if first:
            nisa.activation(dst=self.sums, op=nl.copy, data=added)
            return
        for head in range(self.heads):
            mine, old = self.sums[:, head, :], factors[:, CHUNKS, head : head + 1]
            nisa.scalar_tensor_tensor(
                dst=mine, data=mine, op0=nl.multiply, operand0=old, op1=nl.add, operand1=added[:, head, :]
            )

    def _rescale(self, stats, places):
        """Take maxima and sums; return what values of each chunk, and at last those so far, are multiplied by."""
        found = nl.ndarray((P, CHUNKS, self.heads, 2), dtype=nl.float32)
        maxima, totals = found[:, :, :, 0], found[:, :, :, 1]
        nisa.memset(dst=maxima, value=LEAST)
        nisa.memset(dst=totals, value=0.0)
        for k in range(CHUNKS):
            _fetch(found[:, k, :, :].reshape((P, 2 * self.heads)), stats, places[:, k : k + 1])
        most = nl.ndarray((P, self.heads), dtype=nl.float32)
        nisa.tensor_reduce(dst=most, op=nl.maximum, data=maxima.permute((0, 2, 1)), axis=2)
        nisa.tensor_tensor(dst=self.largest, data1=self.largest, data2=most, op=nl.maximum)
        factors = nl.ndarray((P, CHUNKS + 1, self.heads), dtype=nl.float32)
        before, old, new = nl.ndarray(most.shape, dtype=nl.float32), factors[:, CHUNKS, :], factors[:, 0:CHUNKS, :]
        nisa.tensor_copy(dst=before, src=self.maximum)
        nisa.tensor_tensor(dst=self.maximum, data1=before, data2=most, op=nl.maximum)
        wide = self.maximum.reshape((P, 1, self.heads)).broadcast(1, CHUNKS)
        nisa.tensor_tensor(dst=new, data1=maxima, data2=wide, op=nl.subtract)
        nisa.tensor_tensor(dst=old, data1=before, data2=self.maximum, op=nl.subtract)
        nisa.activation(dst=factors, op=nl.exp, data=factors)
        weighed, added = nl.ndarray(new.shape, dtype=nl.float32), nl.ndarray(most.shape, dtype=nl.float32)
        nisa.tensor_tensor(dst=weighed, data1=totals, data2=new, op=nl.multiply)
        nisa.tensor_reduce(dst=added, op=nl.add, data=weighed.permute((0, 2, 1)), axis=2)
        nisa.tensor_tensor(dst=self.total, data1=self.total, data2=old, op=nl.multiply)
        nisa.tensor_tensor(dst=self.total, data1=self.total, data2=added, op=nl.add)
        return factors

    def finish(self, out, found, group):
        """Write results; a row that saw no key has zeros, and -inf where there is no sink either."""
        total, factor = nl.ndarray((P, self.heads), dtype=nl.float32), nl.ndarray((P, self.heads), dtype=nl.float32)
        nisa.tensor_scalar(dst=total, data=self.total, op0=nl.maximum, operand0=SMALLEST)
        nisa.reciprocal(dst=factor, data=total)
        rows = nl.ndarray((P, self.heads, self.value_dim), dtype=out.dtype)
        for head in range(self.heads):
            scale = factor[:, head : head + 1]
            nisa.activation(dst=rows[:, head, :], op=nl.copy, data=self.sums[:, head, :], scale=scale)
        width = self.heads * self.value_dim
        pattern = [[width, P], [1, width]]
        nisa.dma_copy(dst=out.ap(pattern=pattern, offset=0, scalar_offset=group, indirect_dim=0), src=rows)
        stats = nl.ndarray((P, self.heads, 2), dtype=nl.float32)
        nisa.activation(dst=stats[:, :, 0], op=nl.log, data=total)
        nisa.tensor_tensor(dst=stats[:, :, 0], data1=stats[:, :, 0], data2=self.maximum, op=nl.add)
        nisa.tensor_copy(dst=stats[:, :, 1], src=self.largest)
        nothing = nl.ndarray((P, self.heads, 2), dtype=nl.uint8)
        nisa.tensor_scalar(dst=nothing, data=stats, op0=nl.less_equal, operand0=LEAST / 2)
        nisa.tensor_copy_predicated(dst=stats, src=float("-inf"), predicate=nothing)
        pattern = [[2 * self.heads, P], [1, 2 * self.heads]]
        nisa.dma_copy(dst=found.ap(pattern=pattern, offset=0, scalar_offset=group, indirect_dim=0), src=stats)
