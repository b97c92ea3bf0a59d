"""The vector engine: elementwise arithmetic in fp32, bit operations, copies, reductions, scans, the eight largest."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import (
    Array,
    Result,
    cast_to,
    close,
    dtype_of,
    f32,
    i32,
    random,
    rejected,
    rejects,
    run,
    same,
    whole,
)

ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}
BITS: dict[str, Callable[[Array, Array], Array]] = {
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
}
TENSOR = "nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.{op}, engine=nisa.engine.vector)"
SCALAR = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.{op}, operand0={operand})"


def in_fp32(op: str, a: Array, b: Any) -> Array:
    return np.asarray(ARITHMETIC[op](a.astype(np.float32), np.asarray(b).astype(np.float32))).astype(np.float32)


@pytest.mark.parametrize("op", ARITHMETIC)
@pytest.mark.parametrize(
    "dtypes",
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16"),
        ("uint8", "int16", "int8"),
        ("int32",) * 3,
    ],
    ids=" ".join,
)
def test_tensor_tensor(op: str, dtypes: tuple[str, str, str]) -> None:
    a, b = whole(7, 13, dtype=dtypes[0], limit=90), whole(7, 13, dtype=dtypes[1], limit=90, seed=1)
    if dtypes[0] == "uint8":
        a = np.abs(a.astype(np.int16)).astype(np.uint8)
    b[:, :4] = a[:, :4].astype(b.dtype)
    same(run(TENSOR.format(op=op), a=a, b=b, dst=Result((7, 13), dtypes[2])), cast_to(in_fp32(op, a, b), dtypes[2]))


def test_rounding_at_the_write_only() -> None:
    a = f32([[0.5, 1.5, 2.5, -0.5, 126.5, 127.5, 1e9, -129.0, 2.4999999]])
    b = np.zeros_like(a)
    for dtype in ("int8", "uint8", "int32", "bfloat16", "float16", "float8_e5m2"):
        same(run(TENSOR.format(op="add"), a=a, b=b, dst=Result(a.shape, dtype)), cast_to(a, dtype))


def test_overflow_is_infinite() -> None:
    a = f32([[70000.0, -3.4028235e38, 3.0]])
    for dtype in ("float16", "bfloat16", "float8_e5m2"):
        got = run(TENSOR.format(op="maximum"), a=a, b=a, dst=Result(a.shape, dtype)).astype(np.float32)
        assert got[0, 1] == -np.inf
        assert np.isinf(got[0, 0]) == (dtype != "bfloat16")


@pytest.mark.parametrize("op", BITS)
@pytest.mark.parametrize("dtype", ["int32", "uint32", "uint8", "int16"])
def test_bits(op: str, dtype: str) -> None:
    a, b = (np.random.default_rng(n).integers(0, 256, (3, 20), np.uint8).view(dtype_of(dtype)) for n in (0, 1))
    body = TENSOR.format(op=op).replace(", engine=nisa.engine.vector", "")
    same(run(body, a=a, b=b, dst=Result(a.shape, dtype)), BITS[op](a, b))
    constant = int(b[0, 0]) if dtype != "uint32" else 0x7FFF
    wanted = BITS[op](a, np.asarray(constant).astype(a.dtype))
    same(run(SCALAR.format(op=op, operand=constant), a=a, dst=Result(a.shape, dtype)), wanted)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "uint8"])
def test_shifts(dtype: str) -> None:
    """A right shift fills with zeros, whatever the sign."""
    a = np.random.default_rng(0).integers(0, 256, (3, 20), np.uint8).view(dtype_of(dtype))
    unsigned = a.view(f"u{a.dtype.itemsize}")
    got = run(SCALAR.format(op="right_shift", operand=3), a=a, dst=Result(a.shape, dtype))
    same(got, (unsigned >> 3).view(a.dtype))
    got = run(SCALAR.format(op="left_shift", operand=5), a=a, dst=Result(a.shape, dtype))
    same(got, (unsigned << 5).astype(unsigned.dtype).view(a.dtype))


def test_whole_numbers_beyond_2_24() -> None:
    """Exact on GpSimd, where int32 goes by itself; refused or rounded through fp32 on the vector engine."""
    a, b = i32([[2**24 + 1, 2**30 + 1]]), i32([[2**24 + 2, 7]])
    body = "nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.add)"
    same(run(body, a=a, b=b, dst=Result((1, 2), "int32")), a + b)
    change = ("op=nl.add", "op=nl.add, engine=nisa.engine.vector")
    rejects(body, "tensor_tensor", ".*", r"2\^24|2\*\*24|16777216|exact", change, a=a, b=b, dst=Result((1, 2), "int32"))


@pytest.mark.parametrize("op", ARITHMETIC)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("int16", "uint8")], ids=" ".join)
def test_tensor_scalar(op: str, reverse: bool, dtypes: tuple[str, str]) -> None:
    a, column = whole(7, 12, dtype=dtypes[0], limit=9), whole(7, 1, limit=9, seed=2)
    for operand, value in (("2.5", np.float32(2.5)), ("c", column)):
        f32 = a.astype(np.float32), np.broadcast_to(value, a.shape)
        wanted = in_fp32(op, *(f32[::-1] if reverse else f32))
        body = SCALAR.format(op=op, operand=operand)[:-1] + f", reverse0={reverse})"
        same(run(body, a=a, c=column, dst=Result((7, 12), dtypes[1])), cast_to(wanted, dtypes[1]))


def test_two_operations_keep_fp32_between() -> None:
    a = random(5, 9, dtype="bfloat16")
    body = SCALAR.format(op="add", operand="1000.0")[:-1] + ", op1=nl.subtract, operand1=c, reverse1=True)"
    c = random(5, 1, seed=1)
    wanted = c - (a.astype(np.float32) + np.float32(1000))
    same(run(body, a=a, c=c, dst=Result((5, 9), "bfloat16")), cast_to(wanted, "bfloat16"))


@pytest.mark.parametrize(
    ("op", "function"),
    [("abs", np.abs), ("rsqrt", lambda x: 1 / np.sqrt(x)), ("reciprocal", lambda x: 1 / x)],
)
def test_unary(op: str, function: Callable[[Array], Array]) -> None:
    a = np.abs(random(4, 6)) + 1
    close(run(SCALAR.format(op=op, operand="None"), a=a, dst=Result((4, 6))), function(a.astype(np.float64)))


@pytest.mark.parametrize(("op", "function"), [("square", np.square), ("relu", lambda x: np.maximum(x, 0))])
def test_unary_of_trn3(op: str, function: Callable[[Array], Array]) -> None:
    a = random(4, 6)
    body = SCALAR.format(op=op, operand="None")
    close(run(body, generation="trn3", a=a, dst=Result((4, 6))), function(a))
    older = {"generation": "trn2"}
    rejects(body, "tensor_scalar", "op0", "trn3|v4|generation", older, generation="trn3", a=a, dst=Result((4, 6)))


@pytest.mark.parametrize("reverse", [(False, False), (True, False), (False, True), (True, True)])
def test_scalar_tensor_tensor(reverse: tuple[bool, bool]) -> None:
    a, b, c = random(6, 11), random(6, 11, dtype="bfloat16", seed=1), random(6, 1, seed=2)
    body = (
        "nisa.scalar_tensor_tensor(dst=dst, data=a, op0=nl.subtract, operand0=c, op1=nl.subtract, operand1=b, "
        f"reverse0={reverse[0]}, reverse1={reverse[1]})"
    )
    first = c - a if reverse[0] else a - c
    wanted = b.astype(np.float32) - first if reverse[1] else first - b.astype(np.float32)
    same(run(body, a=a, b=b, c=c, psum=("b",), dst=Result((6, 11))), wanted)


@pytest.mark.parametrize(("axis", "axes"), [("3", (3,)), ("(2, 3)", (2, 3)), ("(1, 2, 3)", (1, 2, 3)), ("[3]", (3,))])
@pytest.mark.parametrize("op", ["add", "maximum", "minimum", "multiply"])
def test_tensor_reduce(op: str, axis: str, axes: tuple[int, ...]) -> None:
    a = whole(5, 3, 2, 4, limit=2)
    function = {"add": np.add, "maximum": np.maximum, "minimum": np.minimum, "multiply": np.multiply}[op]
    for negate in (False, True):
        wanted = function.reduce(a, axis=axes, keepdims=True) * np.float32(-1 if negate else 1)
        body = f"nisa.tensor_reduce(dst=dst, op=nl.{op}, data=a, axis={axis}, negate={negate}, keepdims=True)"
        same(run(body, a=a, dst=Result(wanted.shape)), wanted)


@pytest.mark.parametrize("op", ["bitwise_or", "bitwise_and", "bitwise_xor"])
def test_reduction_of_bits(op: str) -> None:
    a = np.random.default_rng(0).integers(-(2**31), 2**31, (4, 6), np.int64).astype(np.int32)
    wanted = {"bitwise_or": np.bitwise_or, "bitwise_and": np.bitwise_and, "bitwise_xor": np.bitwise_xor}[op].reduce(
        a, 1
    )
    body = f"nisa.tensor_reduce(dst=dst, op=nl.{op}, data=a, axis=1)"
    same(run(body, a=a, dst=Result((4, 1), "int32")), wanted[:, None])


@pytest.mark.parametrize(("op0", "op1"), [("multiply", "add"), ("add", "maximum"), ("subtract", "subtract")])
@pytest.mark.parametrize("reverse", [(False, False), (True, True)])
def test_scan(op0: str, op1: str, reverse: tuple[bool, bool]) -> None:
    a, b, start = whole(4, 9, limit=2), whole(4, 9, limit=2, seed=1), whole(4, 1, seed=2)
    carry, columns = start[:, 0], []
    for i in range(9):
        first = in_fp32(op0, *((carry, a[:, i]) if reverse[0] else (a[:, i], carry)))
        carry = in_fp32(op1, *((b[:, i], first) if reverse[1] else (first, b[:, i])))
        columns.append(carry)
    body = (
        f"nisa.tensor_tensor_scan(dst=dst, data0=a, data1=b, initial=s, op0=nl.{op0}, op1=nl.{op1}, "
        f"reverse0={reverse[0]}, reverse1={reverse[1]})"
    )
    same(run(body, a=a, b=b, s=start, dst=Result((4, 9))), np.stack(columns, 1))


def test_reciprocal() -> None:
    a = random(4, 7, dtype="bfloat16") * 8 + 20
    got = run("nisa.reciprocal(dst=dst, data=a)", a=a.astype(dtype_of("bfloat16")), dst=Result((4, 7)))
    close(got, 1 / a.astype(dtype_of("bfloat16")).astype(np.float64))


@pytest.mark.parametrize("columns", [1, 7, 512])
def test_statistics(columns: int) -> None:
    a = random(5, columns)
    got = run("nisa.bn_stats(dst=dst, data=a)", a=a, dst=Result((5, 6)))
    parts = [a[:, start::2].astype(np.float64) for start in (0, 1)]
    for part, stats in zip(parts, (got[:, :3], got[:, 3:]), strict=True):
        count = part.shape[1]
        close(stats[:, 0], np.full(5, count))
        if count:
            close(stats[:, 1], part.mean(1))
            close(stats[:, 2], part.var(1) * count)


def test_statistics_together() -> None:
    a = random(5, 48)
    body = """
stats = nl.ndarray((5, 4, 6), nl.float32)
for part in range(4):
    nisa.bn_stats(dst=stats[:, part], data=a[:, part * 12:part * 12 + 12])
nisa.bn_aggr(dst=dst, data=stats)
"""
    close(run(body, a=a, dst=Result((5, 2))), np.stack([a.mean(1), a.astype(np.float64).var(1)], 1))


A, B, C = random(4, 8), random(4, 8, seed=1), random(4, 1)
ADD = "nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.add)"
TWO = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.add, operand0=1.0, op1=nl.multiply, operand1=c)"
INT: dict[str, Any] = {"a": A.astype(np.int32), "b": B.astype(np.int32), "dst": Result((4, 8), "int32")}
REDUCE = "nisa.tensor_reduce(dst=dst[:, 0:1], op=nl.add, data=a, axis=1)"
OR = ADD.replace("add", "bitwise_or")
THREE = "nisa.scalar_tensor_tensor(dst, a, nl.add, 1.0, op1=nl.add, operand1=b)"
REDUCE_TWO = "nisa.tensor_reduce(dst=dst[:, 0:1], op=nl.add, data=a.reshape((4, 2, 4)), axis=(1, 2))"
SCAN = "nisa.tensor_tensor_scan(dst=dst, data0=a, data1=b, initial=0.0, op0=nl.add, op1=nl.add)"
STRICT_VECTOR = [
    rejected("tensor_tensor", "data2|data1|dst", "element|size|count|free", ("data2=b", "data2=b[:, 0:7]"), ADD),
    rejected("tensor_tensor", "data2|data1|dst", "partition", ("data2=b", "data2=b[0:3]"), ADD),
    rejected("tensor_tensor", "data2|data1|dst", "", ("data2=b", "data2=c"), ADD),
    rejected("tensor_tensor", "op", "", ("nl.add", "nl.abs"), ADD),
    rejected("tensor_tensor", "op", "", ("nl.add", "nl.exp"), ADD),
    rejected("tensor_tensor", "engine", "", ("nl.add", "nl.add, engine=nisa.engine.scalar"), ADD),
    rejected("tensor_tensor", ".*", "integer|int", {"b": B}, OR, **INT),
    rejected("tensor_tensor", ".*", "dtype|width|same", {"b": INT["b"].astype(np.int16)}, OR, **INT),
    rejected("tensor_tensor", "data2|data1", "number|tile|tensor", ("data2=b", "data2=1.0"), ADD),
    rejected("tensor_scalar", "operand1", "float32|fp32", {"c": C.astype(dtype_of("bfloat16"))}, TWO),
    rejected("tensor_scalar", "operand1", "", ("operand1=c", "operand1=b"), TWO),
    rejected("tensor_scalar", "operand1", "", (", operand1=c", ""), TWO),
    rejected("tensor_scalar", "operand1|op1", "", (", op1=nl.multiply", ""), TWO),
    rejected("tensor_scalar", "op0|op1", "", ("op0=nl.add, operand0=1.0", "op0=nl.left_shift, operand0=1"), TWO),
    rejected("tensor_scalar", "operand0", "", ("operand0=1.0", "operand0=a"), TWO),
    rejected("tensor_scalar", "engine|op0|op1", "", ("=c)", "=c, engine=nisa.engine.gpsimd)"), TWO),
    rejected("tensor_scalar", "engine|op0|op1", "", ("=c)", "=c, engine=nisa.engine.scalar)"), TWO),
    rejected("scalar_tensor_tensor", "op1|op0", "", ("op1=nl.add", "op1=nl.bitwise_or"), THREE),
    rejected("tensor_reduce", "axis", "", ("axis=1", "axis=0"), REDUCE),
    rejected("tensor_reduce", "axis", "", ("axis=1", "axis=-1"), REDUCE),
    rejected("tensor_reduce", "axis", "", ("axis=(1, 2)", "axis=1"), REDUCE_TWO),
    rejected("tensor_reduce", "op", "", ("nl.add", "nl.less"), REDUCE),
    rejected("tensor_reduce", "dst", "", ("0:1", "0:2"), REDUCE),
    rejected("bn_stats", "data", "512", {"a": random(4, 513)}, "nisa.bn_stats(dst=dst[:, 0:6], data=a)"),
    rejected("bn_stats", "dst", "6", ("0:6", "0:5"), "nisa.bn_stats(dst=dst[:, 0:6], data=a)"),
    rejected("bn_aggr", "data", "3", ("a[:, 0:6]", "a[:, 0:7]"), "nisa.bn_aggr(dst=dst[:, 0:2], data=a[:, 0:6])"),
    rejected("bn_aggr", "dst", "2", ("0:2]", "0:3]"), "nisa.bn_aggr(dst=dst[:, 0:2], data=a[:, 0:6])"),
    rejected("tensor_tensor_scan", "op0", "", ("nl.add, op1", "nl.rsqrt, op1"), SCAN),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT_VECTOR)
def test_strict_vector(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body, instruction, operand, rule, but, **{"a": A, "b": B, "c": C, "dst": Result((4, 8), fill=0.0), **setup})
