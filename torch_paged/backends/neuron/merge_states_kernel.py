"""Attention over the union of parts of the keys, from what each part gave: rows on partitions, parts in order.

A row is a token's query head; a partition holds some consecutive ones. Maximum, sum and weighted values go from one
``CHUNK`` of parts to the next in SBUF, in float32. A part that saw no key weighs nothing, and its values, which may be
NaN, are ANDed with zeros.
"""

import nki
import nki.isa as nisa
import nki.language as nl

P = 128
CHUNK = 8  # parts of a turn of the loop
NOTHING = -1e30  # the lse of a part that saw no key, finite so that a difference of two is no NaN
LEAST = NOTHING / 2  # a maximum below all others, which NOTHING is far below in turn
SMALLEST = 2.0**-60  # less than the sum of any row that sees a key, and within the logarithm's range


@nki.jit
def merge_states(
    outs,  # (P * R, D)
    lses,  # (P * R, 1) float32
    sinks,  # (R, 1) float32, or None
    num_parts,
    rows_each,  # rows of a partition
):
    """Return out (R, D) of the parts' dtype and lse (R, 1) float32."""
    num_rows, width = outs.shape[0] // num_parts, outs.shape[1]
    out = nl.ndarray((num_rows, width), dtype=outs.dtype, buffer=nl.shared_hbm)
    lse = nl.ndarray((num_rows, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    cores, core = nl.num_programs(0), nl.program_id(0)
    call = _Call(outs, lses, sinks, num_parts, out, lse)
    tile = P * rows_each
    step = tile * cores
    looped = num_rows // step * step

    def a_tile(row):
        call.merge(row, [(core * tile, P, rows_each)])

    if looped > 0:
        first = nisa.register_alloc(0)  # a bound in a register makes the index one, which NKI 0.7 has as a scalar else
        nl.fori_loop(first, looped, a_tile, step=step)
    pieces = []
    for start in range(looped, num_rows, tile):
        if (start - looped) // tile % cores == core:
            rest = min(tile, num_rows - start)
            full = rest // rows_each
            if full > 0:
                pieces.append((start, full, rows_each))
            if rest % rows_each > 0:
                pieces.append((start + full * rows_each, 1, rest % rows_each))
    call.merge(nisa.register_alloc(0), pieces)
    return out, lse


class _Call(nl.NKIObject):
    """The arrays and sizes of a call."""

    def __init__(self, outs, lses, sinks, num_parts, out, lse):
        self.outs, self.lses, self.sinks, self.num_parts, self.out, self.lse = outs, lses, sinks, num_parts, out, lse
        self.num_rows, self.width = out.shape
        self.chunk_rows = nl.ndarray((1, 1), dtype=nl.int32)
        nisa.memset(dst=self.chunk_rows, value=CHUNK * self.num_rows)

    def merge(self, row, pieces):
        """Merge some pieces of rows; a piece is its first row, counted from a register, its partitions, rows of each.

        A core without pieces goes through the loop of the other one.
        """
        states = []
        for i in range(len(pieces)):
            states.append(_State(pieces[i][1], pieces[i][2], self.width))
            states[i].begin(self.sinks, row, pieces[i][0])
        chunks = self.num_parts // CHUNK
        place = nl.ndarray((1, 1), dtype=nl.int32)
        nisa.register_store(dst=place, src=row)

        def a_chunk(turn):
            for i in range(len(pieces)):
                states[i].add(self.outs, self.lses, place, pieces[i][0], CHUNK, self.num_rows)
            nisa.tensor_tensor(dst=place, data1=place, data2=self.chunk_rows, op=nl.add)

        if chunks > 0:
            nl.fori_loop(0, chunks, a_chunk)
        done = chunks * CHUNK
        for i in range(len(pieces)):
            if done < self.num_parts:
                first = done * self.num_rows + pieces[i][0]
                states[i].add(self.outs, self.lses, row, first, self.num_parts - done, self.num_rows)
            states[i].finish(self.out, self.lse, row, pieces[i][0])


class _State(nl.NKIObject):
    """Maximum, sum and weighted values of a tile's rows so far."""

    def __init__(self, count, each, width):
        self.count, self.each, self.width = count, each, width
        self.maximum = nl.ndarray((count, each), dtype=nl.float32)
        self.total = nl.ndarray((count, each), dtype=nl.float32)
        self.sums = nl.ndarray((count, each, width), dtype=nl.float32)

    def begin(self, sinks, row, first):
        nisa.memset(dst=self.sums, value=0.0)
        if sinks == None:  # noqa: E711
            nisa.memset(dst=self.maximum, value=LEAST)
            nisa.memset(dst=self.total, value=0.0)
            return
        nisa.dma_copy(dst=self.maximum, src=_rows(sinks, row, first, self.count, self.each))
        nisa.tensor_scalar(dst=self.maximum, data=self.maximum, op0=nl.maximum, operand0=LEAST)
        nisa.memset(dst=self.total, value=1.0)

    def add(self, outs, lses, row, first, parts, num_rows):
        """Take some parts' results, of rows ``row + first`` and so on."""
        count, each, width = self.count, self.each, self.width
        found = nl.ndarray((count, parts, each), dtype=nl.float32)
        for part in range(parts):
            source = _rows(lses, row, part * num_rows + first, count, each)
            nisa.dma_copy(dst=found[:, part, :], src=source)
        nisa.tensor_scalar(dst=found, data=found, op0=nl.maximum, operand0=NOTHING)
        words = nl.int32 if outs.dtype == nl.float32 else nl.int16
        seen = nl.ndarray((count, parts, each), dtype=words)
        nisa.tensor_scalar(dst=seen, data=found, op0=nl.greater, operand0=LEAST, op1=nl.multiply, operand1=-1.0)
        weights = nl.ndarray((count, parts + 1, each), dtype=nl.float32)  # the last are those of what was merged before
        nisa.tensor_copy(dst=weights[:, parts, :], src=self.maximum)
        for part in range(parts):
            nisa.tensor_tensor(dst=self.maximum, data1=self.maximum, data2=found[:, part, :], op=nl.maximum)
        for part in range(parts + 1):
            lse = weights[:, part, :] if part == parts else found[:, part, :]
            nisa.tensor_tensor(dst=weights[:, part, :], data1=lse, data2=self.maximum, op=nl.subtract)
        nisa.activation(dst=weights, op=nl.exp, data=weights)
        nisa.tensor_tensor(dst=self.total, data1=self.total, data2=weights[:, parts, :], op=nl.multiply)
        nisa.tensor_tensor(dst=self.sums, data1=self.sums, data2=self._wide(weights, parts), op=nl.multiply)
        for part in range(parts):
            nisa.tensor_tensor(dst=self.total, data1=self.total, data2=weights[:, part, :], op=nl.add)
            values = nl.ndarray((count, each, width), dtype=outs.dtype)
            nisa.dma_copy(
                dst=values.reshape((count, each * width)), src=_rows(outs, row, part * num_rows + first, count, each)
            )
            bits = values.view(words)
            nisa.tensor_tensor(dst=bits, data1=bits, data2=self._wide(seen, part), op=nl.bitwise_and)
            weighed = nl.ndarray((count, each, width), dtype=nl.float32)
            nisa.tensor_tensor(dst=weighed, data1=values, data2=self._wide(weights, part), op=nl.multiply)
            nisa.tensor_tensor(dst=self.sums, data1=self.sums, data2=weighed, op=nl.add)

    def _wide(self, numbers, part):
        """Return the numbers (P, parts, each) of a part for all lanes."""
        return numbers[:, part, :].reshape((self.count, self.each, 1)).broadcast(2, self.width)

    def finish(self, out, lse, row, first):
        """Write results; a row that saw no key has zeros, and -inf where there is no sink either."""
        count, each, width = self.count, self.each, self.width
        factor = nl.ndarray((count, 1, each), dtype=nl.float32)
        found = nl.ndarray((count, each), dtype=nl.float32)
        nisa.tensor_scalar(dst=self.total, data=self.total, op0=nl.maximum, operand0=SMALLEST)
        nisa.reciprocal(dst=factor[:, 0, :], data=self.total)
        rows = nl.ndarray((count, each, width), dtype=out.dtype)
        nisa.tensor_tensor(dst=rows, data1=self.sums, data2=self._wide(factor, 0), op=nl.multiply)
        nisa.dma_copy(dst=_rows(out, row, first, count, each), src=rows.reshape((count, each * width)))
        nisa.activation(dst=found, op=nl.log, data=self.total)
        nisa.tensor_tensor(dst=found, data1=found, data2=self.maximum, op=nl.add)
        nothing = nl.ndarray((count, each), dtype=nl.uint8)
        nisa.tensor_scalar(dst=nothing, data=self.maximum, op0=nl.less_equal, operand0=LEAST)
        nisa.tensor_copy_predicated(dst=found, src=float("-inf"), predicate=nothing)
        nisa.dma_copy(dst=_rows(lse, row, first, count, each), src=found)


def _rows(base, row, first, count, each):
    """Return rows of a tensor in HBM from ``row + first`` on, ``each`` for each of ``count`` partitions."""
    width = base.shape[1]
    pattern = [[each * width, count], [1, each * width]]
    return base.ap(pattern=pattern, offset=first * width, scalar_offset=row, indirect_dim=0)
