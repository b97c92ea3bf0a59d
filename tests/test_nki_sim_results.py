"""What a kernel hands back: memory that it wrote, in dtypes that the chip has."""

from functools import partial
from typing import Any

import ml_dtypes
import nki
import numpy as np
import pytest
import torch
from nki_sim_kernels import (
    Array,
    Result,
    call,
    f32,
    load,
    random,
    refused_with,
    rejected,
    rejects,
    rejects_kernel,
    run,
    same,
    strict_only,
    target,
)

pytestmark = strict_only
X = random(4, 6)
COPY = """
@nki.jit
def kernel(x):
    out = nl.ndarray((4, 6), nl.float32, buffer=nl.shared_hbm)
    rest = nl.ndarray((4, 6), nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=rest[0:4, 0:6], src=x)
    nisa.dma_copy(dst=out[0:3], src=x[0:3])
    nisa.dma_copy(dst=out[3:4, 0:6], src=x[3:4, 0:6])
    return rest, out  # !
"""


@pytest.mark.parametrize(
    "change",
    [
        ("    nisa.dma_copy(dst=out[3:4, 0:6], src=x[3:4, 0:6])\n", ""),
        ("out[3:4, 0:6], src=x[3:4, 0:6]", "out[3:4, 0:5], src=x[3:4, 0:5]"),
        ("    rest = nl.ndarray((4, 6)", "    rest = nl.ndarray((4, 7)"),
    ],
)
def test_all_elements_are_written(change: tuple[str, str]) -> None:
    rejects_kernel(COPY, "kernel", "results", "no instruction wrote", change, X)


def test_the_tensor_is_named() -> None:
    source = COPY.replace("buffer=nl.shared_hbm)\n    rest", "buffer=nl.shared_hbm, name='mine')\n    rest")
    same(call(source, X)[1], X)
    broken = source.replace("out[3:4, 0:6], src=x[3:4, 0:6]", "out[2:3], src=x[3:4]")
    words = r"elements of mine\[4, 6\] .* of nki_sim_kernel_\d+\.py:9 that no instruction wrote"
    refused_with(lambda: call(broken, X), "kernel", "results", words, None)


CORES = """
@nki.jit
def kernel(x):
    out = nl.ndarray((2, 6), nl.float32, buffer=nl.shared_hbm)
    core = nl.program_id(0)
    nisa.dma_copy(dst=out[core : core + 1], src=x[core : core + 1])
    return out  # !
"""


def test_cores_write_together() -> None:
    x = random(2, 6)
    same(call(CORES, x, lnc=2), x)
    broken = CORES.replace("core : core + 1]", "core : core + 1, 0:5]")
    refused_with(lambda: call(broken, x, lnc=2), "kernel", "results", "no instruction wrote", None)


FIRST = """
HANDED_ON = ("kernel",)


@nki.jit
def kernel(x):
    out = nl.ndarray((4, 6), nl.{dtype}, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out[0:3], src=x[0:3])
    return out
"""
SECOND = """
@nki.jit
def kernel(x):
    out = nl.ndarray((2, 3), x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=x.reshape((8, 3))[{rows}])  # !
    return out
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("by_torch", [False, True])
def test_what_another_kernel_reads_was_written(by_torch: bool, dtype: str) -> None:
    """Rows of capacity may stay as they are where a kernel says so: nothing but what was written may be read."""
    x = random(4, 6, dtype=dtype)
    given: Any = torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype)) if by_torch else x
    handed = call(FIRST.format(dtype=dtype), given)
    for view in (handed, handed.reshape(8, 3), handed.reshape(2, 2, 6), handed.reshape(-1, 3, 2)):
        got = call(SECOND.format(rows="4:6"), view)
        same(got.float().numpy() if by_torch else got.astype(np.float32), x[2].reshape(2, 3).astype(np.float32))
        for rows in ("5:7", "6:8"):
            refused_with(partial(call, SECOND.format(rows=rows), view), "dma_copy", "src", "not written", 10)


def test_a_part_of_what_was_handed_on() -> None:
    handed = call(FIRST.format(dtype="float32"), X)
    source = SECOND.format(rows="0:2").replace("(8, 3)", "(-1, 3)")
    call(source, handed[:2])
    call(source, handed[:, :3][:3])
    refused_with(lambda: call(source, handed[3:]), "dma_copy", "src", "not written", None)


def test_only_the_kernel_that_is_named() -> None:
    source = FIRST.format(dtype="float32").replace('("kernel",)', '("other",)')
    refused_with(lambda: call(source, X), "kernel", "results", "no instruction wrote", None)


E4M3 = "t = nl.ndarray((2, 3), nl.float8_e4m3fn)\nnisa.tensor_copy(dst=t, src=a)\nnisa.tensor_copy(dst=dst, src=t)"
VIEW = "nisa.tensor_copy(dst=dst, src=b.view(nl.float8_e4m3fn))"
PATTERN = "nisa.tensor_copy(dst=dst, src=b.ap([[3, 2], [1, 3]], offset=0, dtype=nl.float8_e4m3fn))"
TILES: dict[str, Any] = {"a": f32([[1, 2, 3], [4, 5, 6]]), "b": np.zeros((2, 3), np.uint8), "dst": Result((2, 3))}
OLDER: dict[str, Any] = {"generation": "trn2"}


@pytest.mark.parametrize(
    ("body", "instruction", "operand", "rule", "but", "setup"),
    [
        rejected("ndarray", "dtype", "generation 3", OLDER, E4M3, generation="trn3"),
        rejected("view", "dtype", "generation 3", OLDER, VIEW, generation="trn3"),
        rejected("ap", "dtype", "generation 3", OLDER, PATTERN, generation="trn3"),
    ],
)
def test_float8_e4m3fn_comes_with_trn3(
    body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]
) -> None:
    """The compiler's error NCC_EVRF051."""
    rejects(body, instruction, operand, rule, but, **{**TILES, **setup})


def test_arguments_of_float8_e4m3fn_come_with_trn3() -> None:
    x: Array = np.ones((2, 3), ml_dtypes.float8_e4m3fn)
    body = "nisa.dma_copy(dst=dst, src=x)"
    same(run(body, hbm={"x": x}, generation="trn3", dst=Result((2, 3), "float8_e4m3fn")), x)
    kernel = load("@nki.jit\ndef kernel(x):\n    nl.ndarray((2, 3), nl.uint8)\n").kernel
    with target("trn3", 1):
        nki.simulate(kernel)(x)
    with target("trn2", 1):
        refused_with(lambda: nki.simulate(kernel)(x), "kernel", "x", "generation 3", None)
        nki.simulate(kernel)(x.view(np.uint8))
