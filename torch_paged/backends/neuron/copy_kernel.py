"""Copies of rows within a tensor, all read before the first is written.

Rows wait in SBUF between the two, 128 on partitions; those of a longer call, which a loop moves, wait in HBM.
"""

import nki
import nki.isa as nisa
import nki.language as nl

P = 128
TILES = 8  # of 128 rows, of a turn of the loop on one core


@nki.jit
def copy_rows(
    base,  # (R, W), written
    sources,  # (K, 1) int32, all of them rows of base
    targets,  # (K, 1) int32; one outside is not written
):
    """Copy rows."""
    count, width = sources.shape[0], base.shape[1]
    cores, core = nl.num_programs(0), nl.program_id(0)
    step = P * TILES * cores
    looped = count // step * step
    waiting = None
    if looped > 0:
        waiting = nl.ndarray((looped, width), dtype=base.dtype, buffer=nl.private_hbm)

    def fetch(row):
        for k in range(TILES):
            first = (k * cores + core) * P
            found = _gathered(base, _rows(sources, row, first, P))
            nisa.dma_copy(dst=_taken(waiting, row, first, P), src=found)

    def put(row):
        for k in range(TILES):
            first = (k * cores + core) * P
            found = nl.ndarray((P, width), dtype=base.dtype)
            nisa.dma_copy(dst=found, src=_taken(waiting, row, first, P))
            _scatter(base, _rows(targets, row, first, P), found)

    none = nisa.register_alloc(0)
    starts, kept = [], []
    for start in range(looped, count, P):
        if (start - looped) // P % cores == core:
            starts.append(start)
            kept.append(_gathered(base, _rows(sources, none, start, min(P, count - start))))
    if looped > 0:
        nl.fori_loop(0, looped, fetch, step=step)
    if cores > 1:
        nisa.core_barrier(data=base, cores=(0, 1))
    for i in range(len(kept)):
        _scatter(base, _rows(targets, none, starts[i], kept[i].shape[0]), kept[i])
    if looped > 0:
        nl.fori_loop(0, looped, put, step=step)


def _taken(base, row, first, count):
    """Return ``count`` rows of a tensor in HBM, from ``row + first`` on, the former a run-time value."""
    width = base.shape[1]
    pattern = [[width, count], [1, width]]
    return base.ap(pattern=pattern, offset=first * width, scalar_offset=row, indirect_dim=0)


def _rows(numbers, row, first, count):
    """Return ``count`` row numbers, one on each partition."""
    found = nl.ndarray((count, 1), dtype=nl.int32)
    nisa.dma_copy(dst=found, src=_taken(numbers, row, first, count))
    return found


def _gathered(base, rows):
    count, width = rows.shape[0], base.shape[1]
    found = nl.ndarray((count, width), dtype=base.dtype)
    source = base.ap(pattern=[[width, count], [1, width]], offset=0, vector_offset=rows, indirect_dim=0)
    nisa.dma_copy(dst=found, src=source)
    return found


def _scatter(base, rows, data):
    count, width = data.shape
    place = base.ap(pattern=[[width, count], [1, width]], offset=0, vector_offset=rows, indirect_dim=0)
    nisa.dma_copy(dst=place, src=data, oob_mode=nisa.oob_mode.skip)
