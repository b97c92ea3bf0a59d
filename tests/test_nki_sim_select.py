"""Selection: by a predicate, by an affine expression of the position, by bounds of a row (SDK 2.32)."""

import operator
from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Result, cast_to, dtype_of, f32, random, rejected, rejects, run, same, whole

FP32_MIN = np.float32(-3.4028235e38)
COMPARISONS = {
    "equal": operator.eq,
    "not_equal": operator.ne,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "less": operator.lt,
    "less_equal": operator.le,
}


@pytest.mark.parametrize("predicate", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_copy_predicated(predicate: str, dtype: str) -> None:
    a, b = random(6, 11, dtype=dtype), random(6, 11, dtype=dtype, seed=1)
    p = whole(6, 11, limit=1) > 0
    p_in = (p * 2).astype(predicate)
    body = "nisa.tensor_copy(dst=dst, src=b)\nnisa.tensor_copy_predicated(dst=dst, src=a, predicate=p)"
    same(run(body, a=a, b=b, p=p_in, dst=Result(a.shape, dtype)), np.where(p, a, b))


@pytest.mark.parametrize("reverse", [False, True])
def test_copy_predicated_of_a_number(reverse: bool) -> None:
    b, p = random(6, 11), (whole(6, 11, limit=1) > 0).astype(np.uint8)
    body = f"nisa.tensor_copy_predicated(dst=b, src=-7.5, predicate=p, reverse_pred={reverse})\n"
    wanted = np.where(p.astype(bool) != reverse, np.float32(-7.5), b)
    same(run(body + "nisa.tensor_copy(dst=dst, src=b)", b=b, p=p, dst=Result(b.shape)), wanted)


@pytest.mark.parametrize("op", COMPARISONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_affine_select(op: str, dtype: str) -> None:
    a = random(9, 4, 6, dtype=dtype)
    body = (
        "nisa.affine_select(dst=dst, pattern=[[3, 4], [-2, 6]], channel_multiplier=-1, on_true_tile=a, "
        f"on_false_value=-5.0, cmp_op=nl.{op}, offset=4)"
    )
    p, i, j = np.ogrid[:9, :4, :6]
    keep = COMPARISONS[op](4 - p + 3 * i - 2 * j, 0)
    same(run(body, a=a, dst=Result(a.shape, dtype)), np.where(keep, a, np.asarray(-5.0).astype(a.dtype)))


def test_affine_select_counts_partitions_from_the_tile() -> None:
    a = random(64, 8)
    body = """
nisa.tensor_copy(dst=dst, src=a)
nisa.affine_select(dst=dst[32:64], pattern=[[-1, 8]], channel_multiplier=1, on_true_tile=a[32:64], on_false_value=0.0,
                   cmp_op=nl.greater_equal)
"""
    wanted = a.copy()
    wanted[32:] = np.tril(a[32:])
    same(run(body, a=a, dst=Result(a.shape)), wanted)


RANGE = (
    "nisa.range_select(dst=dst, on_true_tile=a, comp_op0=nl.{op0}, comp_op1=nl.{op1}, bound0=lo, bound1=hi, "
    "reduce_cmd=nisa.reduce_cmd.reset_reduce, reduce_res=r, reduce_op=nl.maximum, range_start={start})"
)
LO, HI = f32([[0], [3], [5], [-1], [100]]), f32([[12], [7], [5], [1], [200]])


@pytest.mark.parametrize("op0", ["greater", "greater_equal", "equal"])
@pytest.mark.parametrize("op1", ["less", "less_equal"])
@pytest.mark.parametrize("start", [0, 4, 2**20])
def test_range_select(op0: str, op1: str, start: int) -> None:
    a = random(5, 12)
    columns = np.float32(start + np.arange(12))
    low, high = LO + np.float32(start), HI + np.float32(start)
    keep = COMPARISONS[op0](columns, low) & COMPARISONS[op1](columns, high)
    wanted = np.where(keep, a, FP32_MIN)
    body = RANGE.format(op0=op0, op1=op1, start=start)
    got, r = run(body, a=a, lo=low, hi=high, dst=Result((5, 12)), r=Result((5, 1)))
    same(got, wanted)
    same(r, wanted.max(1, keepdims=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_range_select_of_16_bits(dtype: str) -> None:
    """The fill becomes minus infinity."""
    a = random(5, 12, dtype="bfloat16")
    keep = (np.arange(12) >= LO) & (np.arange(12) < HI)
    body = RANGE.format(op0="greater_equal", op1="less", start=0)
    got, r = run(body, psum=("a",), a=a, lo=LO, hi=HI, dst=Result((5, 12), dtype), r=Result((5, 1)))
    same(got, np.where(keep, cast_to(a.astype(np.float32), dtype), dtype_of(dtype).type(-np.inf)))
    same(r, np.where(keep, a.astype(np.float32), FP32_MIN).max(1, keepdims=True))


def test_range_select_over_tiles() -> None:
    """The running maximum goes on from one tile to the next."""
    a = random(5, 24)
    first = RANGE.format(op0="greater_equal", op1="less", start=0).replace("=a", "=a[:, 0:12]").replace("=r,", "=None,")
    second = RANGE.format(op0="greater_equal", op1="less", start=12).replace("=a", "=a[:, 12:24]")
    body = f"{first}\n{second.replace('reset_reduce', 'reduce')}"
    _, r = run(body, a=a, lo=LO, hi=HI, dst=Result((5, 12)), r=Result((5, 1)))
    keep = (np.arange(24) >= LO) & (np.arange(24) < HI)
    same(r, np.where(keep, a, FP32_MIN).max(1, keepdims=True))


def test_range_select_is_not_of_trn1() -> None:
    body = RANGE.format(op0="greater_equal", op1="less", start=0)
    tiles: dict[str, Any] = {"a": random(5, 12), "lo": LO, "hi": HI, "dst": Result((5, 12)), "r": Result((5, 1))}
    rejects(body, "range_select", ".*", "trn2|v3|generation", {"generation": "trn1"}, **tiles)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("false", ["-2.5", "c"])
def test_select_reduce(reverse: bool, false: str) -> None:
    a, c, p = random(5, 12, dtype="bfloat16"), random(5, 1), (whole(5, 12, limit=1) > 0).astype(np.uint8)
    body = (
        f"nisa.select_reduce(dst=dst, predicate=p, on_true=a, on_false={false}, reduce_res=r, "
        f"reduce_cmd=nisa.reduce_cmd.reset_reduce, reduce_op=nl.maximum, reverse_pred={reverse})"
    )
    wanted = np.where(p.astype(bool) != reverse, a.astype(np.float32), c if false == "c" else np.float32(-2.5))
    got, r = run(body, a=a, c=c, p=p, dst=Result((5, 12)), r=Result((5, 1)))
    same(got, wanted)
    same(r, wanted.max(1, keepdims=True))


A, P = random(5, 12), (whole(5, 12, limit=1) > 0).astype(np.uint8)
COPY = "nisa.tensor_copy_predicated(dst=dst, src=a, predicate=p)"
NUMBER = "nisa.tensor_copy_predicated(dst=dst, src=1.0, predicate=p, reverse_pred=True)"
AFFINE = "nisa.affine_select(dst, [[1, 12]], 0, on_true_tile=a, on_false_value=0.0, cmp_op=nl.less)"
BOUNDS = RANGE.format(op0="greater_equal", op1="less", start=0)
FILL = BOUNDS[:-1] + ", on_false_value=-3.4028235e38)"
REDUCE = "nisa.select_reduce(dst=dst, predicate=p, on_true=a, on_false=0.0)"
IN_BF16 = Result((5, 12), "bfloat16", fill=0.0)
BF16_SUM = Result((5, 1), "bfloat16", fill=0.0)
STRICT = [
    rejected("tensor_copy_predicated", "predicate", "uint", {"p": P.astype(np.int32)}, COPY),
    rejected("tensor_copy_predicated", "predicate", "uint", {"p": P.astype(np.float32)}, COPY),
    rejected("tensor_copy_predicated", "src|dst", "dtype", {"dst": IN_BF16}, COPY),
    rejected("tensor_copy_predicated", "reverse_pred", "", ("src=1.0", "src=a"), NUMBER),
    rejected("tensor_copy_predicated", "src", "float|int", ("src=1.0", "src=1"), NUMBER),
    rejected("tensor_copy_predicated", "src|predicate", "PSUM", {"psum": ("a", "p")}, COPY, psum=("a",)),
    rejected("tensor_copy_predicated", "predicate|src|dst", "", ("predicate=p", "predicate=p[:, 0:11]"), COPY),
    rejected("tensor_copy_predicated", "dst", "written|initiali", {"dst": Result((5, 12))}, COPY),
    rejected("affine_select", "pattern|dst", "", ("[1, 12]", "[1, 11]"), AFFINE),
    rejected("affine_select", "pattern", "4", ("[1, 12]", "[1, 1], [1, 1], [1, 2], [1, 2], [1, 3]"), AFFINE),
    rejected("affine_select", "cmp_op", "", ("nl.less", "nl.add"), AFFINE),
    rejected("affine_select", "on_true_tile", "dtype|float|8|16", {"a": A.astype(np.int32)}, AFFINE),
    rejected("affine_select", "on_false_value", "", ("=0.0", "=p"), AFFINE),
    rejected("range_select", "bound0", "float32|fp32", {"lo": LO.astype(np.int32)}, BOUNDS),
    rejected("range_select", "bound1", "tile|tensor", ("bound1=hi", "bound1=12.0"), BOUNDS),
    rejected("range_select", "bound1", "", ("bound1=hi", "bound1=a"), BOUNDS),
    rejected("range_select", "bound1", "", ("bound1=hi", "bound1=hi[0:4]"), BOUNDS),
    rejected("range_select", "comp_op1", "", ("nl.less,", "nl.not_equal,"), BOUNDS),
    rejected("range_select", "reduce_op", "max", ("nl.maximum", "nl.add"), BOUNDS),
    rejected("range_select", "on_false_value", "3.40", ("=-3.4028235e38", "=0.0"), FILL),
    rejected("range_select", "range_start", r"2\^24|2\*\*24|16777216", ("start=0", "start=16777216"), BOUNDS),
    rejected("range_select", "range_start", "int", ("start=0", "start=0.5"), BOUNDS),
    rejected("range_select", "on_true_tile", "float|dtype", {"a": A.astype(np.int16)}, BOUNDS),
    rejected("range_select", "reduce_res", "float32|fp32", {"r": BF16_SUM}, BOUNDS, dst=IN_BF16),
    rejected("select_reduce", "on_true", "dtype", {"a": A.astype(np.int32)}, REDUCE),
    rejected("select_reduce", "predicate", "dtype|int", {"p": P.astype(np.int32)}, REDUCE),
    rejected("select_reduce", "on_true|predicate", "PSUM", {"psum": ("a", "p")}, REDUCE, psum=("p",)),
    rejected("select_reduce", "on_false", "", ("on_false=0.0", "on_false=a"), REDUCE),
    rejected("select_reduce", "reduce_op", "max", ("=0.0)", "=0.0, reduce_op=nl.add)"), REDUCE),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT)
def test_strict(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    tiles: dict[str, Any] = {"a": A, "p": P, "lo": LO, "hi": HI, "dst": Result((5, 12), fill=0.0)}
    rejects(body, instruction, operand, rule, but, **{**tiles, "r": Result((5, 1), fill=0.0), **setup})
