"""Where numbers stop being exact, and how much one instruction takes (SDK 2.32, architecture guides)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Array, Result, i32, random, rejected, rejects, run, same, whole

LARGE = 2**24
FITS, BEYOND = i32([[LARGE - 2, 5], [-LARGE + 2, 0]]), i32([[LARGE + 1, 5], [-LARGE + 2, 0]])
INT = Result((2, 2), "int32")
EXACT = r"2\*\*24|2\^24|16777216"
ONE = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.add, operand0=1.0)"


@pytest.mark.parametrize(
    "body",
    [
        ONE,
        "nisa.tensor_scalar(dst=dst, data=a, op0=nl.multiply, operand0=1.0)",
        "nisa.tensor_tensor(dst=dst, data1=a, data2=a, op=nl.minimum, engine=nisa.engine.vector)",
        "nisa.scalar_tensor_tensor(dst=dst, data=a, op0=nl.multiply, operand0=0.5, op1=nl.maximum, operand1=a)",
        "nisa.tensor_reduce(dst=dst[:, 0:1], op=nl.maximum, data=a, axis=1)",
        "nisa.tensor_partition_reduce(dst=dst[0:1], op=nl.max, data=a)",
        "nisa.activation(dst=dst, op=nl.copy, data=a, scale=0.5)",
        "nisa.tensor_copy(dst=f, src=a)",
        "nisa.dma_copy(dst=f, src=a)",
        "nisa.dma_compute(dst=dst, srcs=[a], reduce_op=nl.add)",
    ],
    ids=lambda body: str(body).partition("(")[0],
)
def test_arithmetic_is_fp32(body: str) -> None:
    """Numbers of 32 bits go through fp32, so those that it cannot hold are refused, not rounded."""
    instruction = body[5 : body.index("(")]
    tiles: dict[str, Any] = {"a": FITS, "dst": Result((2, 2), "int32", fill=0), "f": Result((2, 2), fill=0.0)}
    rejects(body, instruction, ".*", EXACT, {"a": BEYOND}, **tiles)


@pytest.mark.parametrize(
    "body",
    [
        "nisa.tensor_copy(dst=dst, src=a)",
        "nisa.dma_copy(dst=dst, src=a)",
        "nisa.tensor_tensor(dst=dst, data1=a, data2=a, op=nl.maximum)",
        "nisa.tensor_tensor(dst=dst, data1=a, data2=a, op=nl.bitwise_or)",
        "nisa.tensor_scalar(dst=dst, data=a, op0=nl.bitwise_or, operand0=0)",
        "nisa.nc_stream_shuffle(dst=dst, src=a, shuffle_mask=[0, 1] + [255] * 30)",
        "nisa.tensor_copy_predicated(dst=dst, src=a, predicate=ones)",
    ],
)
def test_paths_that_keep_bits(body: str) -> None:
    a = i32([[2**31 - 1, LARGE + 1], [-(2**31), -LARGE - 3]])
    same(run(body, a=a, ones=np.ones((2, 2), np.uint8), dst=Result((2, 2), "int32", fill=0)), a)


def test_results_are_exact_too() -> None:
    rejects(ONE, "tensor_scalar", ".*", EXACT, ("operand0=1.0", "operand0=100.0"), a=FITS, dst=INT)
    total = "nisa.tensor_reduce(dst=dst, op=nl.add, data=a, axis=1)"
    result = Result((2, 1), "int32")
    rejects(
        total, "tensor_reduce", ".*", EXACT, {"a": FITS + i32([[0, 9], [0, 0]])}, a=FITS - i32([[9], [0]]), dst=result
    )


def test_psum_takes_whole_numbers_to_the_vector_engine() -> None:
    body = "nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.add)"
    tiles: dict[str, Any] = {"a": BEYOND, "b": i32([[1, 1], [1, 1]]), "dst": INT}
    same(run(body, **tiles), BEYOND + 1)
    rejects(body, "tensor_tensor", ".*", EXACT, {"psum": ("a",)}, **tiles)


@pytest.mark.parametrize("value", ["0.0", "1.0"])
def test_a_fill_before_products(value: str) -> None:
    """A product without `accumulate` overwrites what a fill left; that is certain for zeros only."""
    body = f"""
nisa.memset(dst=dst, value={value})
nisa.nc_matmul(dst=dst, stationary=a, moving=b)
nisa.nc_matmul(dst=dst, stationary=a, moving=b)
"""
    a, b = whole(5, 6), whole(5, 12)
    tiles: dict[str, Any] = {"a": a, "b": b, "dst": Result((6, 12), memory="psum")}
    if value == "0.0":
        same(run(body, **tiles), 2 * a.T @ b)
    else:
        first = body.replace("moving=b)\nnisa", "moving=b)  # !\nnisa")
        zeros = first.replace("value=1.0", "value=0.0")
        rejects(zeros, "nc_matmul", "dst|accumulate", "", ("value=0.0", "value=1.0"), **tiles)


def test_other_engines_write_across_banks() -> None:
    body = "nisa.tensor_copy(dst=wide, src=a)\nnisa.tensor_scalar(dst=dst, data=wide, op0=nl.add, operand0=1.0)"
    a = random(4, 1500)
    made = "wide = nl.ndarray((4, 1500), nl.float32, buffer=nl.psum)\n"
    same(run(made + body, a=a, dst=Result((4, 1500))), a + np.float32(1))


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


COPY = "nisa.tensor_copy(dst=dst, src=a)"
FILL = "b = nl.ndarray((1, {n}), nl.uint8)\nnisa.memset(dst=b, value=0)\n" + COPY
STEP = "b = nl.ndarray((1, 2, {n}), nl.uint8)\nnisa.memset(dst=b[:, :, 0], value=0)\n" + COPY
MAX8 = "nisa.max8(dst=dst[:, 0:8], src=w)\n"
FIND = "nisa.nc_find_index8(dst=i, data=w, vals=a[:, 0:8])\n" + COPY
FOUND: dict[str, Any] = {"i": Result((1, 8), "uint32"), "a": zeros(1, 8), "dst": Result((1, 8))}
LIMITS = [
    rejected("memset", "dst", "65536", ("65536", "65537"), FILL.format(n=65536)),
    rejected("memset", "dst", "32767|step|stride", ("32767", "32768"), STEP.format(n=32767)),
    rejected("max8", "src", "16384", {"w": zeros(1, 16385)}, MAX8, w=zeros(1, 16384)),
    rejected("nc_find_index8", "data", "16384", {"w": zeros(1, 16385)}, FIND, w=zeros(1, 16384), **FOUND),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), LIMITS)
def test_limits(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body, instruction, operand, rule, but, **{"a": zeros(1, 8), "dst": Result((1, 8), fill=0.0), **setup})
