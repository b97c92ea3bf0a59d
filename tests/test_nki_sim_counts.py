"""What the simulator counts of each engine: instructions, elements of a partition, bytes, descriptors of DMA."""

from typing import Any

import nki
import numpy as np
import pytest
from nki_sim_kernels import Array, load, random, strict_only, target

pytestmark = strict_only
ENGINES = ("tensor", "vector", "scalar", "gpsimd", "dma")


def counts(source: str, *arguments: Array, lnc: int = 1) -> list[dict[str, Any]]:
    """Return for each core what its engines did."""
    with target("trn2", lnc):
        run = nki.simulate(load(source).kernel)
        run(*arguments)
    return [core.counters for core in run.cores]


def kernel(*lines: str) -> str:
    """Return a kernel with a few tiles, ready for the lines."""
    text = """
@nki.jit
def kernel(x, idx):
    a = nl.zeros((64, 96), nl.float32)
    b = nl.zeros((64, 96), nl.bfloat16)
    at = nl.zeros((64, 1), nl.int32)
    p = nl.zeros((96, 512), nl.float32, buffer=nl.psum)
    out = nl.ndarray((64, 96), nl.float32, buffer=nl.shared_hbm)
    {}
    return out
"""
    return text.format("\n    ".join([*lines, "nisa.dma_copy(dst=out, src=a)"]))


X, IDX = random(640, 96), np.arange(64, dtype=np.int32)[:, None] * 7


def added(*lines: str) -> dict[str, tuple[int, int, int, int]]:
    """Return what the lines add to the engines: instructions, elements, bytes, descriptors."""
    after = counts(kernel(*lines), X, IDX)[0]
    before = counts(kernel(), X, IDX)[0]
    work = {}
    for engine in ENGINES:
        new, old = after[engine], before[engine]
        work[engine] = (
            new.instructions - old.instructions,
            new.elements - old.elements,
            new.bytes - old.bytes,
            new.descriptors - old.descriptors,
        )
    return {engine: numbers for engine, numbers in work.items() if any(numbers)}


@pytest.mark.parametrize(
    ("line", "engine", "elements"),
    [
        ("nisa.tensor_tensor(dst=a, data1=a, data2=a, op=nl.add)", "vector", 96),
        ("nisa.tensor_tensor(dst=a[0:7], data1=a[0:7], data2=a[0:7], op=nl.add)", "vector", 96),
        ("nisa.tensor_tensor(dst=at, data1=at, data2=at, op=nl.add)", "gpsimd", 1),
        ("nisa.tensor_scalar(dst=a[:, 0:50], data=a[:, 0:50], op0=nl.add, operand0=1.0)", "vector", 50),
        ("nisa.tensor_copy(dst=b, src=a, engine=nisa.engine.scalar)", "scalar", 96),
        ("nisa.tensor_reduce(dst=a[:, 0:1], op=nl.add, data=a, axis=1)", "vector", 96),
        ("nisa.activation(dst=a, op=nl.exp, data=a)", "scalar", 96),
        ("nisa.iota(dst=at, pattern=[[0, 1]], channel_multiplier=1)", "gpsimd", 1),
        ("nisa.memset(dst=a, value=0.0, engine=nisa.engine.gpsimd)", "gpsimd", 96),
        (
            "nisa.nc_matmul(dst=p, stationary=b, moving=nl.zeros((64, 512), nl.bfloat16), accumulate=False)",
            "tensor",
            512,
        ),
        ("nisa.nc_matmul(dst=p[:, 0:96], stationary=b, moving=b, accumulate=False)", "tensor", 96),
        ("nisa.nc_transpose(dst=a[0:32, 0:32], data=a[0:32, 0:32], engine=nisa.engine.vector)", "vector", 32),
    ],
)
def test_engines(line: str, engine: str, elements: int) -> None:
    """An engine's elements are those of one partition, which is what its time follows."""
    work = added(line)
    if "nl.zeros((64, 512)" in line:
        work = {name: values for name, values in work.items() if name == engine}
    assert set(work) == {engine}
    assert work[engine][:2] == (1, elements)
    assert work[engine][3] == 0
    twice = added(line, line)
    assert twice[engine][:2] == (2, 2 * elements)


@pytest.mark.parametrize(
    ("line", "elements", "size", "descriptors"),
    [
        ("nisa.dma_copy(dst=a, src=x[0:64])", 64 * 96, 4, 64),
        ("nisa.dma_copy(dst=a[0:5], src=x[0:5])", 5 * 96, 4, 5),
        ("nisa.dma_copy(dst=a[:, 0:48], src=x[0:64, 0:96:2])", 64 * 48, 4, 64 * 48),
        ("nisa.dma_copy(dst=a[:, 0:48], src=x[0:64, 48:96])", 64 * 48, 4, 64),
        ("nisa.dma_copy(dst=a, src=x.ap(pattern=[[96, 64], [1, 96]], offset=0, vector_offset=at))", 64 * 96, 4, 64),
        ("nisa.dma_copy(dst=at, src=idx)", 64, 4, 64),
        ("nisa.dma_copy(dst=x[0:64], src=x[64:128])", 64 * 96, 4, None),
    ],
)
def test_dma(line: str, elements: int, size: int, descriptors: int | None) -> None:
    """A descriptor moves what is contiguous on both sides."""
    work = added(line)
    assert set(work) == {"dma"}
    assert work["dma"][:3] == (1, elements, elements * size)
    if descriptors is None:
        assert 1 <= work["dma"][3] <= 64
    else:
        assert work["dma"][3] == descriptors


def test_skipped_rows_move_nothing() -> None:
    line = (
        "nisa.dma_copy(dst=a, src=x.ap(pattern=[[96, 64], [1, 96]], offset=0, vector_offset=at), "
        "oob_mode=nisa.oob_mode.skip)"
    )
    whole = added("nisa.dma_copy(dst=at, src=idx)", line)
    half = added("nisa.dma_copy(dst=at, src=idx)", "nisa.memset(dst=at[32:64], value=-1)", line)
    assert whole["dma"][2] - half["dma"][2] == 32 * 96 * 4
    assert whole["dma"][3] - half["dma"][3] == 32


LOOP = """
@nki.jit
def kernel(x):
    out = nl.ndarray((4, 8), nl.float32, buffer=nl.shared_hbm)
    a = nl.zeros((4, 8), nl.float32)

    def body(i):
        nisa.tensor_scalar(dst=a, data=a, op0=nl.add, operand0=1.0)

    nl.fori_loop(0, {trips}, body)
    nisa.dma_copy(dst=out, src=a)
    return out
"""


def test_every_trip_counts() -> None:
    def vector(trips: int) -> int:
        return int(counts(LOOP.format(trips=trips), random(1, 1))[0]["vector"].instructions)

    assert vector(9) - vector(2) == 7


def test_each_core_counts_for_itself() -> None:
    source = """
@nki.jit
def kernel(x):
    out = nl.ndarray((2, 4, 8), nl.float32, buffer=nl.shared_hbm)
    a = nl.zeros((4, 8), nl.float32)
    for again in range(3 * nl.program_id(0) + 1):
        nisa.tensor_scalar(dst=a, data=a, op0=nl.add, operand0=1.0)
    nisa.dma_copy(dst=out[nl.program_id(0)], src=a)
    return out
"""
    first, second = counts(source, random(1, 1), lnc=2)
    assert second["vector"].instructions - first["vector"].instructions == 3
    assert first["dma"].bytes == second["dma"].bytes == 4 * 8 * 4


def test_tally() -> None:
    """The same work is told apart from other work of its instruction, and sums up to what the engines did."""
    line = "nisa.tensor_scalar(dst=a[:, 0:{n}], data=a[:, 0:{n}], op0=nl.add, operand0=1.0)"
    source = kernel(line.format(n=50), line.format(n=50), line.format(n=51))
    with target("trn2", 1):
        run = nki.simulate(load(source).kernel)
        run(X, IDX)
    core = run.cores[0]
    times = {key[2]: number for key, number in core.tally.items() if key[:2] == ("vector", "tensor_scalar")}
    assert times == {50: 2, 51: 1}
    for engine in ENGINES:
        own = [(key, number) for key, number in core.tally.items() if key[0] == engine]
        assert sum(number for _, number in own) == core.counters[engine].instructions
        assert sum(number * key[3] for key, number in own) == core.counters[engine].bytes
        assert sum(number * key[4] for key, number in own) == core.counters[engine].descriptors


def test_a_run_starts_at_nothing() -> None:
    first, second = (counts(LOOP.format(trips=1), random(1, 1)) for _ in range(2))
    assert first == second
