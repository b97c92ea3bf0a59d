"""Two cores of one launch: their ids, the tensors that they share, barriers and exchanges (SDK 2.32)."""

from typing import Any

import nki
import numpy as np
import pytest
from nki_sim_kernels import STRICT, call, load, random, refused_with, rejects_kernel, same, strict_only, target

HALVES = """
@nki.jit
def kernel(x):
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    rows = x.shape[0] // nl.num_programs(0)
    first = nl.program_id(0) * rows
    tile = nl.ndarray((rows, x.shape[1]), x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x[first:first + rows])
    nisa.activation(dst=tile, op=nl.copy, data=tile, scale=nl.program_id(0) + 1.0)
    nisa.dma_copy(dst=out[first:first + rows], src=tile)
    return out
"""


@pytest.mark.parametrize("generation", ["trn2", "trn3"])
@pytest.mark.parametrize("lnc", [1, 2])
def test_ids(generation: str, lnc: int) -> None:
    x = random(8, 5)
    scale = np.repeat(np.arange(1, lnc + 1, dtype=np.float32), 8 // lnc)[:, None]
    same(call(HALVES, x, generation=generation, lnc=lnc), x * scale)


@pytest.mark.parametrize("cores", [1, 2])
def test_brackets(cores: int) -> None:
    kernel, x = load(HALVES).kernel, random(8, 5)
    scale = np.repeat(np.arange(1, cores + 1, dtype=np.float32), 8 // cores)[:, None]
    with target("trn2", cores):
        same(nki.simulate(kernel[cores])(x), x * scale)


@strict_only
@pytest.mark.parametrize("grid", [3, 4, (1, 2), (2, 1), 0])
def test_other_grids(grid: Any) -> None:
    kernel = load(HALVES).kernel
    with target("trn2", 2), pytest.raises(Exception, match=r"(?i)LNC|grid|1 or 2|core"):
        nki.simulate(kernel[grid])(random(8, 5))


@strict_only
def test_brackets_against_the_environment() -> None:
    kernel = load(HALVES).kernel
    with target("trn2", 1), pytest.raises(Exception, match=r"(?i)LNC|NEURON_LOGICAL_NC_CONFIG"):
        nki.simulate(kernel[2])(random(8, 5))


EXCHANGE = """
@nki.jit
def kernel(x):
    out = nl.ndarray((2, 4, 5), x.dtype, buffer=nl.shared_hbm)
    me = nl.program_id(0)
    mine = nl.ndarray((4, 5), x.dtype, buffer=nl.sbuf)
    theirs = nl.ndarray((4, 5), x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=mine, src=x[me])
    nisa.sendrecv(src=mine, dst=theirs, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=0)
    nisa.dma_copy(dst=out[me], src=theirs)
    return out
"""


def test_exchange() -> None:
    x = random(2, 4, 5)
    same(call(EXCHANGE, x, lnc=2), x[::-1])
    by_gpsimd = EXCHANGE.replace("pipe_id=0)", "pipe_id=0, dma_engine=nisa.dma_engine.gpsimd_dma)")
    same(call(by_gpsimd, x, lnc=2), x[::-1])


BARRIER = """
@nki.jit
def kernel(x):
    out = nl.ndarray((2, 4, 5), x.dtype, buffer=nl.shared_hbm)
    between = nl.ndarray((2, 4, 5), x.dtype, buffer=nl.shared_hbm)
    me = nl.program_id(0)
    tile = nl.ndarray((4, 5), x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x[me])
    nisa.dma_copy(dst=between[me], src=tile)
    nisa.core_barrier(data=between, cores=(0, 1))
    other = nl.ndarray((4, 5), x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=other, src=between[1 - me])
    nisa.dma_copy(dst=out[me], src=other)
    return out
"""


def test_barrier() -> None:
    x = random(2, 4, 5)
    same(call(BARRIER, x, lnc=2), x[::-1])


X = random(2, 4, 5)


@pytest.mark.parametrize(
    ("source", "instruction", "operand", "change"),
    [
        (BARRIER, "core_barrier", "cores", ("(0, 1)", "(0, 2)")),
        (BARRIER, "core_barrier", "cores", ("(0, 1)", "(0,)")),
        (BARRIER, "core_barrier", "data", ("data=between", "data=tile")),
        (BARRIER, "core_barrier", "engine", ("cores=(0, 1)", "cores=(0, 1), engine=3")),
        (
            EXCHANGE,
            "sendrecv",
            "src|dst",
            ("theirs = nl.ndarray((4, 5), x.dtype", "theirs = nl.ndarray((4, 5), nl.int32"),
        ),
        (EXCHANGE, "sendrecv", "src|dst", ("src=mine", "src=mine[:, 0:4]")),
        (EXCHANGE, "sendrecv", "src", ("src=mine", "src=x[me]")),
        (EXCHANGE, "sendrecv", "send_to_rank", ("send_to_rank=1 - me", "send_to_rank=2")),
        (EXCHANGE, "sendrecv", ".*", ("pipe_id=0", "pipe_id=me")),
        (EXCHANGE, "sendrecv", "dma_engine", ("pipe_id=0", "pipe_id=0, dma_engine=2")),
    ],
)
def test_strict(source: str, instruction: str, operand: str, change: tuple[str, str]) -> None:
    rejects_kernel(source, instruction, operand, "", change, X, lnc=2)


@strict_only
def test_exchange_needs_two_cores() -> None:
    source = EXCHANGE.replace("1 - me", "0")
    refused_with(lambda: call(source, X, lnc=1), "sendrecv", ".*", "LNC|core", None)


def test_gpsimd_exchanges_little() -> None:
    """At most 1024 bytes to a partition in 32-bit elements, 256 in 8-bit ones."""
    for dtype, fits in (("float32", 256), ("bfloat16", 256), ("uint8", 256)):
        source = EXCHANGE.replace("(4, 5)", f"(4, {fits})").replace("(2, 4, 5)", f"(2, 4, {fits})")
        source = source.replace("pipe_id=0)", "pipe_id=0, dma_engine=nisa.dma_engine.gpsimd_dma)")
        x = random(2, 4, fits, dtype=dtype)
        same(call(source, x, lnc=2), x[::-1])


@strict_only
def test_gpsimd_exchanges_no_more() -> None:
    source = EXCHANGE.replace("(4, 5)", "(4, 257)").replace("(2, 4, 5)", "(2, 4, 257)")
    x = random(2, 4, 257)
    same(call(source, x, lnc=2), x[::-1])
    source = source.replace("pipe_id=0)", "pipe_id=0, dma_engine=nisa.dma_engine.gpsimd_dma)")
    refused_with(lambda: call(source, x, lnc=2), "sendrecv", "src|dst|dma_engine", "1024|byte", None)


def test_reading_without_a_barrier() -> None:
    source = BARRIER.replace("src=between[1 - me])", "src=between[1 - me])  # !")
    change = ("nisa.core_barrier(data=between, cores=(0, 1))", "pass_over = 1")
    rejects_kernel(source, "dma_copy", "src", "barrier|core|written", change, X, lnc=2)


def test_overwriting_what_the_other_core_reads() -> None:
    """Between a read by one core and a write by the other lies a barrier, too."""
    last = "    nisa.dma_copy(dst=out[me], src=other)\n"
    barrier = "    nisa.core_barrier(data=between, cores=(0, 1))\n"
    again = BARRIER.replace(last, last + barrier + "    nisa.dma_copy(dst=between[me], src=other)  # !\n")
    same(call(again, X, lnc=2), X[::-1])
    once = again.replace(last + barrier, last)
    assert once.count("core_barrier") == 1
    if STRICT:
        refused_with(lambda: call(once, X, lnc=2), "dma_copy", "dst|src", "core", None)


def test_a_barrier_in_a_loop() -> None:
    source = """
@nki.jit
def kernel(x):
    out = nl.ndarray((2, 4, 5), x.dtype, buffer=nl.shared_hbm)
    between = nl.ndarray((2, 4, 5), x.dtype, buffer=nl.shared_hbm)
    me = nl.program_id(0)
    tile = nl.ndarray((4, 5), x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x[me])

    def body(i):
        nisa.dma_copy(dst=between[me], src=tile)
        nisa.core_barrier(data=between, cores=(0, 1))
        nisa.dma_copy(dst=tile, src=between[1 - me])
        nisa.core_barrier(data=between, cores=(0, 1))

    nl.fori_loop(0, 3, body)
    nisa.dma_copy(dst=out[me], src=tile)
    return out
"""
    same(call(source, X, lnc=2), X[::-1])


def test_writing_the_same_elements() -> None:
    source = BARRIER.replace("src=tile)", "src=tile)  # !")
    rejects_kernel(source, "dma_copy", "dst", "core|barrier", ("dst=between[me]", "dst=between[0]"), X, lnc=2)


TRIPS = """
@nki.jit
def kernel(x):
    out = nl.ndarray((2, 4, 5), x.dtype, buffer=nl.shared_hbm)
    me = nl.program_id(0)
    tile = nl.ndarray((4, 5), x.dtype, buffer=nl.sbuf)

    def body(i):
        nisa.dma_copy(dst=tile, src=x[me])

    nl.fori_loop(0, 2, body)  # !
    nisa.dma_copy(dst=out[me], src=tile)
    return out
"""


def test_trips_that_differ() -> None:
    rejects_kernel(TRIPS, "fori_loop", ".*", "core|trip|control", ("0, 2, body", "0, 2 + me, body"), X, lnc=2)


@strict_only
def test_a_barrier_of_one_core() -> None:
    source = BARRIER.replace("    nisa.core_barrier", "    if me < 2:\n        nisa.core_barrier")
    same(call(source, X, lnc=2), X[::-1])
    broken = source.replace("me < 2", "me < 1")
    refused_with(lambda: call(broken, X, lnc=2), "core_barrier|dma_copy", ".*", "core|control|barrier", None)


def test_shared_tensors_agree() -> None:
    change = ("between = nl.ndarray((2, 4, 5)", "between = nl.ndarray((2 + nl.program_id(0), 4, 5)")
    source = BARRIER.replace("buffer=nl.shared_hbm)\n    me", "buffer=nl.shared_hbm)  # !\n    me")
    rejects_kernel(source, "ndarray", ".*", "core", change, X, lnc=2)


def test_private_memories() -> None:
    """HBM of a core is its own, and so are its on-chip tensors."""
    shared = "between = nl.ndarray((2, 4, 5), x.dtype, buffer=nl.shared_hbm)"
    source = BARRIER.replace(shared, shared.replace("shared_hbm", "hbm")).replace("data=between", "data=out")
    own = source.replace("between[1 - me])", "between[me])  # !")
    same(call(own, X, lnc=2), X)
    rejects_kernel(own, "dma_copy", "src", "written|initiali", ("src=between[me]", "src=between[1 - me]"), X, lnc=2)
