"""The second stage of split attention: the partial results of a row's chunks, merged in the order of keys.

Rows (a sequence's query head) lie on partitions, 128 at a time. A turn of the inner loop takes ``CHUNKS`` partial
results of each row, as the plan places them; a negative place holds none and changes nothing.
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
    sums,  # (X * H, DV) float32
    stats,  # (X * H, 2) float32: maximum and sum
    places,  # (G * C, P * CHUNKS) int32: of G groups of rows, C turns of each
    turns,  # (1, 1) int32: of the C turns those that hold a chunk
    sinks,  # (G, P) float32, or None
    like,  # any shape: the dtype of the result
    num_groups,
):
    """Return out (G * P, DV), and lse and maximum (G * P, 2) float32."""
    width = sums.shape[1]
    out = nl.ndarray((num_groups, P * width), dtype=like.dtype, buffer=nl.shared_hbm)
    found = nl.ndarray((num_groups, P * 2), dtype=nl.float32, buffer=nl.shared_hbm)
    turns_of_group = places.shape[0] // num_groups
    cores, core = nl.num_programs(0), nl.program_id(0)
    count = nl.ndarray((1, 1), dtype=nl.int32)
    nisa.dma_copy(dst=count, src=turns)
    inner = nisa.register_alloc()
    nisa.register_load(inner, count)
    group = nl.ndarray((1, 1), dtype=nl.int32)
    turn = nl.ndarray((1, 1), dtype=nl.int32)
    nisa.memset(dst=group, value=core)

    def rows_of_a_group(i):
        state = _State(width)
        state.begin(sinks, group)
        nisa.tensor_scalar(dst=turn, data=group, op0=nl.multiply, operand0=float(turns_of_group))

        def some_chunks(j):
            rows = nl.ndarray((P, CHUNKS), dtype=nl.int32)
            source = places.ap(pattern=[[CHUNKS, P], [1, CHUNKS]], offset=0, scalar_offset=turn, indirect_dim=0)
            nisa.dma_copy(dst=rows, src=source)
            for k in range(CHUNKS):
                state.add(sums, stats, rows[:, k : k + 1])
            nisa.tensor_scalar(dst=turn, data=turn, op0=nl.add, operand0=1.0)

        nl.fori_loop(0, inner, some_chunks)
        state.finish(out, found, group)
        nisa.tensor_scalar(dst=group, data=group, op0=nl.add, operand0=float(cores))

    nl.fori_loop(0, num_groups // cores, rows_of_a_group)
    return out, found


class _State(nl.NKIObject):
    """Maximum, sum and weighted values of 128 rows so far; ``largest`` is the maximum without a sink."""

    def __init__(self, width):
        self.width = width
        self.maximum = nl.ndarray((P, 1), dtype=nl.float32)
        self.largest = nl.ndarray((P, 1), dtype=nl.float32)
        self.total = nl.ndarray((P, 1), dtype=nl.float32)
        self.sums = nl.ndarray((P, width), dtype=nl.float32)

    def begin(self, sinks, group):
        nisa.memset(dst=self.sums, value=0.0)
        nisa.memset(dst=self.largest, value=LEAST)
        if sinks == None:  # noqa: E711
            nisa.memset(dst=self.maximum, value=LEAST)
            nisa.memset(dst=self.total, value=0.0)
            return
        source = sinks.ap(pattern=[[1, P], [1, 1]], offset=0, scalar_offset=group, indirect_dim=0)
        sink = nl.ndarray((P, 1), dtype=nl.float32)
        nisa.dma_copy(dst=sink, src=source)
        nisa.tensor_scalar(dst=self.maximum, data=sink, op0=nl.maximum, operand0=LEAST)
        nisa.tensor_tensor(dst=sink, data1=sink, data2=self.maximum, op=nl.subtract)
        nisa.activation(dst=self.total, op=nl.exp, data=sink)  # 1, or 0 for a sink of -inf

    def add(self, sums, stats, places):
        """Take one partial result of each row."""
        part = nl.ndarray((P, 2), dtype=nl.float32)
        nisa.memset(dst=part[:, 0:1], value=LEAST)
        nisa.memset(dst=part[:, 1:2], value=0.0)
        source = stats.ap(pattern=[[2, P], [1, 2]], offset=0, vector_offset=places, indirect_dim=0)
        nisa.dma_copy(dst=part, src=source, oob_mode=nisa.oob_mode.skip)
        values = nl.ndarray((P, self.width), dtype=nl.float32)
        nisa.memset(dst=values, value=0.0)
        source = sums.ap(pattern=[[self.width, P], [1, self.width]], offset=0, vector_offset=places, indirect_dim=0)
        nisa.dma_copy(dst=values, src=source, oob_mode=nisa.oob_mode.skip)
        nisa.tensor_tensor(dst=self.largest, data1=self.largest, data2=part[:, 0:1], op=nl.maximum)
        before, both = nl.ndarray((P, 1), dtype=nl.float32), nl.ndarray((P, 2), dtype=nl.float32)
        nisa.tensor_copy(dst=before, src=self.maximum)
        nisa.tensor_tensor(dst=self.maximum, data1=before, data2=part[:, 0:1], op=nl.maximum)
        nisa.tensor_tensor(dst=both[:, 0:1], data1=before, data2=self.maximum, op=nl.subtract)
        nisa.tensor_tensor(dst=both[:, 1:2], data1=part[:, 0:1], data2=self.maximum, op=nl.subtract)
        nisa.activation(dst=both, op=nl.exp, data=both)
        old, new = both[:, 0:1], both[:, 1:2]
        weighed = nl.ndarray((P, 1), dtype=nl.float32)
        nisa.tensor_tensor(dst=weighed, data1=part[:, 1:2], data2=new, op=nl.multiply)
        nisa.scalar_tensor_tensor(
            dst=self.total, data=self.total, op0=nl.multiply, operand0=old, op1=nl.add, operand1=weighed
        )
        nisa.tensor_scalar(dst=values, data=values, op0=nl.multiply, operand0=new)
        nisa.scalar_tensor_tensor(
            dst=self.sums, data=self.sums, op0=nl.multiply, operand0=old, op1=nl.add, operand1=values
        )

    def finish(self, out, found, group):
        """Write results; a row that saw no key has zeros, and -inf where there is no sink either."""
        total, factor = nl.ndarray((P, 1), dtype=nl.float32), nl.ndarray((P, 1), dtype=nl.float32)
        nisa.tensor_scalar(dst=total, data=self.total, op0=nl.maximum, operand0=SMALLEST)
        nisa.reciprocal(dst=factor, data=total)
        rows = nl.ndarray((P, self.width), dtype=out.dtype)
        nisa.tensor_scalar(dst=rows, data=self.sums, op0=nl.multiply, operand0=factor)
        pattern = [[self.width, P], [1, self.width]]
        nisa.dma_copy(dst=out.ap(pattern=pattern, offset=0, scalar_offset=group, indirect_dim=0), src=rows)
        stats = nl.ndarray((P, 2), dtype=nl.float32)
        nisa.activation(dst=stats[:, 0:1], op=nl.log, data=total)
        nisa.tensor_tensor(dst=stats[:, 0:1], data1=stats[:, 0:1], data2=self.maximum, op=nl.add)
        nisa.tensor_copy(dst=stats[:, 1:2], src=self.largest)
        nothing = nl.ndarray((P, 2), dtype=nl.uint8)
        nisa.tensor_scalar(dst=nothing, data=stats, op0=nl.less_equal, operand0=LEAST / 2)
        nisa.tensor_copy_predicated(dst=stats, src=float("-inf"), predicate=nothing)
        pattern = [[2, P], [1, 2]]
        nisa.dma_copy(dst=found.ap(pattern=pattern, offset=0, scalar_offset=group, indirect_dim=0), src=stats)
