"""The second stage of split attention: the partial results of a row's chunks, merged in the order of keys.

Rows lie on partitions, 128 at a time: a sequence's query heads of all kv heads that are the same member of their group.
A turn of the inner loop takes ``CHUNKS`` partial results of each row, as the plan places them; a negative place holds
none and changes nothing.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from torch_paged.backends.neuron.plan import PARTITIONS as P
from torch_paged.backends.neuron.plan import TURN_MERGES as CHUNKS

LEAST = -1e30  # a maximum below which no logit counts
SMALLEST = 2.0**-60  # less than the sum of any row that sees a key, and within the logarithm's range


@nki.jit
def merge_chunks(
    partials,  # (X * G, KH * DV + 2 * KH) float32: weighted values, maxima, sums
    places,  # (groups * C, P * CHUNKS) int32: of groups of rows, C turns of each
    turns,  # (1, 1) int32: of the C turns those that hold a chunk
    sinks,  # (groups, P * KH) float32, or None
    like,  # any shape: the dtype of the result
    num_groups,
    num_kv_heads,
):
    """Return out (groups, P * KH * DV), and lse and maximum (groups, P * 2 * KH) float32."""
    value_dim = partials.shape[1] // num_kv_heads - 2
    out = nl.ndarray((num_groups, P * num_kv_heads * value_dim), dtype=like.dtype, buffer=nl.shared_hbm)
    found = nl.ndarray((num_groups, P * 2 * num_kv_heads), dtype=nl.float32, buffer=nl.shared_hbm)
    cores, core = nl.num_programs(0), nl.program_id(0)
    count = nl.ndarray((1, 1), dtype=nl.int32)
    nisa.dma_copy(dst=count, src=turns)
    inner = nisa.register_alloc()
    nisa.register_load(inner, count)
    group = nl.ndarray((1, 1), dtype=nl.int32)
    nisa.memset(dst=group, value=core)
    if num_groups == cores:
        _merge_rows(partials, places, inner, sinks, group, num_groups, num_kv_heads, out, found)
        return out, found

    def rows_of_a_group(i):
        _merge_rows(partials, places, inner, sinks, group, num_groups, num_kv_heads, out, found)
        nisa.tensor_scalar(dst=group, data=group, op0=nl.add, operand0=float(cores))

    nl.fori_loop(0, num_groups // cores, rows_of_a_group)
    return out, found


def _merge_rows(partials, places, turns, sinks, group, num_groups, num_kv_heads, out, found):
    """Merge all chunks of the rows of a group."""
    state = _State(num_kv_heads, partials.shape[1] // num_kv_heads - 2)
    state.begin(sinks, group)
    turn = nl.ndarray((1, 1), dtype=nl.int32)
    nisa.tensor_scalar(dst=turn, data=group, op0=nl.multiply, operand0=float(places.shape[0] // num_groups))

    def some_chunks(j):
        rows = nl.ndarray((P, CHUNKS), dtype=nl.int32)
        source = places.ap(pattern=[[CHUNKS, P], [1, CHUNKS]], offset=0, scalar_offset=turn, indirect_dim=0)
        nisa.dma_copy(dst=rows, src=source)
        for k in range(CHUNKS):
            state.add(partials, rows[:, k : k + 1])
        nisa.tensor_scalar(dst=turn, data=turn, op0=nl.add, operand0=1.0)

    nl.fori_loop(0, turns, some_chunks)
    state.finish(out, found, group)


class _State(nl.NKIObject):
    """Maximum, sum and weighted values of 128 rows so far; ``largest`` is the maximum without a sink."""

    def __init__(self, heads, value_dim):
        self.heads, self.value_dim = heads, value_dim
        self.maximum = nl.ndarray((P, heads), dtype=nl.float32)
        self.largest = nl.ndarray((P, heads), dtype=nl.float32)
        self.total = nl.ndarray((P, heads), dtype=nl.float32)
        self.sums = nl.ndarray((P, heads, value_dim), dtype=nl.float32)

    def begin(self, sinks, group):
        nisa.memset(dst=self.sums, value=0.0)
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

    def add(self, partials, places):
        """Take one partial result of each row."""
        width = partials.shape[1]
        part = nl.ndarray((P, width), dtype=nl.float32)
        nisa.memset(dst=part, value=0.0, engine=nisa.engine.gpsimd)
        values = self.heads * self.value_dim
        maximum, total = part[:, values : values + self.heads], part[:, values + self.heads : width]
        nisa.memset(dst=maximum, value=LEAST)
        source = partials.ap(pattern=[[width, P], [1, width]], offset=0, vector_offset=places, indirect_dim=0)
        nisa.dma_copy(dst=part, src=source, oob_mode=nisa.oob_mode.skip)
        nisa.tensor_tensor(dst=self.largest, data1=self.largest, data2=maximum, op=nl.maximum)
        before, both = nl.ndarray((P, self.heads), dtype=nl.float32), nl.ndarray((P, 2, self.heads), dtype=nl.float32)
        nisa.tensor_copy(dst=before, src=self.maximum)
        nisa.tensor_tensor(dst=self.maximum, data1=before, data2=maximum, op=nl.maximum)
        nisa.tensor_tensor(dst=both[:, 0, :], data1=before, data2=self.maximum, op=nl.subtract)
        nisa.tensor_tensor(dst=both[:, 1, :], data1=maximum, data2=self.maximum, op=nl.subtract)
        nisa.activation(dst=both, op=nl.exp, data=both)
        old, new = both[:, 0, :], both[:, 1, :]
        weighed = nl.ndarray((P, self.heads), dtype=nl.float32)
        nisa.tensor_tensor(dst=weighed, data1=total, data2=new, op=nl.multiply)
        nisa.tensor_tensor(dst=self.total, data1=self.total, data2=old, op=nl.multiply)
        nisa.tensor_tensor(dst=self.total, data1=self.total, data2=weighed, op=nl.add)
        for head in range(self.heads):
            mine = part[:, head * self.value_dim : (head + 1) * self.value_dim]
            nisa.activation(dst=mine, op=nl.copy, data=mine, scale=new[:, head : head + 1])
            nisa.scalar_tensor_tensor(
                dst=self.sums[:, head, :],
                data=self.sums[:, head, :],
                op0=nl.multiply,
                operand0=old[:, head : head + 1],
                op1=nl.add,
                operand1=mine,
            )

    def finish(self, out, found, group):
        """Write results; a row that saw no key has zeros, and -inf where there is no sink either."""
        total, factor = nl.ndarray((P, self.heads), dtype=nl.float32), nl.ndarray((P, self.heads), dtype=nl.float32)
        nisa.tensor_scalar(dst=total, data=self.total, op0=nl.maximum, operand0=SMALLEST)
        nisa.reciprocal(dst=factor, data=total)
        rows = nl.ndarray((P, self.heads, self.value_dim), dtype=out.dtype)
        for head in range(self.heads):
            nisa.tensor_scalar(
                dst=rows[:, head, :], data=self.sums[:, head, :], op0=nl.multiply, operand0=factor[:, head : head + 1]
            )
        width = self.heads * self.value_dim
        pattern = [[width, P], [1, width]]
        nisa.dma_copy(dst=out.ap(pattern=pattern, offset=0, scalar_offset=group, indirect_dim=0), src=rows)
        stats = nl.ndarray((P, 2, self.heads), dtype=nl.float32)
        nisa.activation(dst=stats[:, 0, :], op=nl.log, data=total)
        nisa.tensor_tensor(dst=stats[:, 0, :], data1=stats[:, 0, :], data2=self.maximum, op=nl.add)
        nisa.tensor_copy(dst=stats[:, 1, :], src=self.largest)
        nothing = nl.ndarray((P, 2, self.heads), dtype=nl.uint8)
        nisa.tensor_scalar(dst=nothing, data=stats, op0=nl.less_equal, operand0=LEAST / 2)
        nisa.tensor_copy_predicated(dst=stats, src=float("-inf"), predicate=nothing)
        pattern = [[2 * self.heads, P], [1, 2 * self.heads]]
        nisa.dma_copy(dst=found.ap(pattern=pattern, offset=0, scalar_offset=group, indirect_dim=0), src=stats)
