"""Rarer forms of the compute instructions: hints, transposes by products, shifts, generations, indirect columns."""

from typing import Any

import ml_dtypes
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

TRANSPOSED = "nisa.nc_matmul(dst=dst, stationary=a, moving=eye, is_transpose=True)"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_transpose_by_a_product(dtype: str) -> None:
    """The result has the dtype of 16-bit data and keeps its bits, NaN and infinity too."""
    a = random(20, 50, dtype=dtype)
    a[3, :3] = [np.inf, -np.inf, np.nan]
    eye = np.eye(20).astype(a.dtype)
    tiles: dict[str, Any] = {"a": a, "eye": eye, "dst": Result((50, 20), dtype, memory="psum")}
    same(run(TRANSPOSED, **tiles), a.T)
    rejects(TRANSPOSED, "nc_matmul", "moving", "identity", {"eye": eye * 2}, **tiles)


@pytest.mark.parametrize("hint", ["is_stationary_onezero", "is_moving_onezero"])
def test_hints_change_no_number(hint: str) -> None:
    a = (whole(9, 6, limit=1) > 0).astype(np.float32)
    b = (whole(9, 12, limit=1, seed=1) > 0).astype(np.float32)
    body = f"nisa.nc_matmul(dst=dst, stationary=a, moving=b, accumulate=False, {hint}=True)"
    same(run(body, a=a, b=b, dst=Result((6, 12), memory="psum")), a.T @ b)


def test_the_engine_of_a_transpose_follows_its_memories() -> None:
    body = "nisa.nc_transpose(dst=dst, data=a)"
    a = random(20, 30)
    same(run(body, a=a, dst=Result((30, 20))), a.T)
    wide: dict[str, Any] = {"a": random(20, 40), "dst": Result((40, 20), memory="psum")}
    same(run(body, **wide), wide["a"].T)
    rejects(body, "nc_transpose", "data", "32", {"dst": Result((40, 20))}, **wide)


def test_transpose_of_nan_on_trn1() -> None:
    a = random(20, 40)
    body = "nisa.nc_transpose(dst=dst, data=a, engine=nisa.engine.tensor)"
    broken = a.copy()
    broken[1, 2] = np.nan
    tiles: dict[str, Any] = {"a": a, "dst": Result((40, 20), memory="psum")}
    same(run(body, generation="trn1", **tiles), a.T)
    rejects(body, "nc_transpose", "data", "finite|NaN", {"a": broken}, generation="trn1", **tiles)


def test_scales_of_many_partitions() -> None:
    """Beyond 32 partitions, row q * 32 + j of the scales is for eight partitions from q * 32 + 8 * j on."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, (64, n, 4)).astype(np.float32) for n in (6, 12))
    scales, factors = [], []
    for n in (6, 12):
        rows = rng.integers(125, 130, (8, n)).astype(np.uint8)
        laid = np.full((64, n), 200, np.uint8)
        laid[[0, 1, 2, 3, 32, 33, 34, 35]] = rows
        scales.append(laid)
        factors.append(np.exp2(rows.astype(np.float32) - 127).repeat(8, 0)[:, :, None])
    body = """
nisa.nc_matmul_mx(dst=dst, stationary=a.view(nl.float8_e4m3fn_x4), moving=b.view(nl.float8_e4m3fn_x4),
                  stationary_scale=sa, moving_scale=sb, accumulate=False)
"""
    packed = [x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).reshape(64, -1) for x in (a, b)]
    tiles: dict[str, Any] = {"a": packed[0], "b": packed[1], "sa": scales[0], "sb": scales[1]}
    wanted = np.einsum("kmi,kni->mn", a * factors[0], b * factors[1]).astype(np.float32)
    same(run(body, generation="trn3", **tiles, dst=Result((6, 12), memory="psum")), wanted)


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_shifts_by_a_tensor(dtype: str) -> None:
    a = np.random.default_rng(0).integers(0, 256, (3, 8), np.uint8).astype(dtype)
    by = np.random.default_rng(1).integers(0, 7, (3, 8)).astype(dtype)
    body = "nisa.tensor_tensor(dst=dst, data1=a, data2=by, op=nl.{})"
    result = Result((3, 8), dtype)
    same(run(body.format("left_shift"), a=a, by=by, dst=result), (a << by).astype(dtype))
    same(run(body.format("right_shift"), a=a, by=by, dst=result), a >> by)


def test_bit_operations_in_pairs() -> None:
    a = np.random.default_rng(0).integers(0, 2**31, (3, 8)).astype(np.int32)
    mask = i32([[255], [127], [63]])
    body = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.right_shift, operand0=4, op1=nl.bitwise_and, operand1=m)"
    same(run(body, a=a, m=mask, dst=Result((3, 8), "int32")), (a >> 4) & mask)


def test_invert() -> None:
    a = np.random.default_rng(0).integers(0, 256, (3, 8), np.uint8)
    body = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.invert, operand0=None)"
    same(run(body, a=a, dst=Result((3, 8), "uint8")), ~a)


def test_a_block_and_a_slot() -> None:
    """Paging by bit operations: exact for any token number, and a dead token is negative."""
    tokens = i32([[0, 15, 16, 31, 2**30 - 1, 1000003]])
    body = """
block = nl.ndarray((1, 6), nl.int32)
slot = nl.ndarray((1, 6), nl.int32)
dead = nl.ndarray((1, 6), nl.int32)
nisa.tensor_scalar(dst=block, data=a, op0=nl.right_shift, operand0=4)
nisa.tensor_scalar(dst=slot, data=a, op0=nl.bitwise_and, operand0=15)
nisa.tensor_scalar(dst=block, data=block, op0=nl.left_shift, operand0=4)
nisa.tensor_tensor(dst=dst, data1=block, data2=slot, op=nl.bitwise_or)
nisa.tensor_tensor(dst=dead, data1=a, data2=length, op=nl.greater_equal, engine=nisa.engine.gpsimd)
nisa.tensor_scalar(dst=dead, data=dead, op0=nl.left_shift, operand0=31)
nisa.tensor_tensor(dst=dst, data1=dst, data2=dead, op=nl.bitwise_or)
"""
    got = run(body, a=tokens, length=np.full_like(tokens, 1000003), dst=Result((1, 6), "int32"))
    alive = tokens < 1000003
    same(np.where(alive, got, 0), np.where(alive, tokens, 0))
    assert (got[~alive] < 0).all()


def test_power_is_of_gpsimd() -> None:
    a, b = np.abs(random(4, 8)) + 1, random(4, 8, seed=1)
    body = "nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.power, engine=nisa.engine.gpsimd)"
    close(run(body, a=a, b=b, dst=Result((4, 8))), a.astype(np.float64) ** b)
    rejects(body, "tensor_tensor", "engine|op", "", ("gpsimd", "vector"), a=a, b=b, dst=Result((4, 8)))


@pytest.mark.parametrize(("op", "function"), [("abs_max", np.maximum), ("abs_min", np.minimum)])
def test_magnitudes_are_of_trn3(op: str, function: Any) -> None:
    a, b = random(4, 8), random(4, 8, seed=1)
    body = f"nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.{op})"
    tiles: dict[str, Any] = {"a": a, "b": b, "dst": Result((4, 8))}
    same(run(body, generation="trn3", **tiles), function(np.abs(a), np.abs(b)))
    rejects(body, "tensor_tensor", "op", "trn3|v4|generation", {"generation": "trn2"}, generation="trn3", **tiles)


def test_fills_of_packed_values() -> None:
    body = """
t = nl.ndarray((4, 3), nl.float8_e4m3fn_x4)
nisa.memset(dst=t, value=0)
nisa.tensor_copy(dst=dst, src=t.view(nl.uint8))
"""
    result = Result((4, 12), "uint8")
    same(run(body, generation="trn3", dst=result), np.zeros((4, 12), np.uint8))
    rejects(body, "memset", "value", "0", ("value=0", "value=1"), generation="trn3", dst=result)


def test_a_rounder_float32() -> None:
    """tfloat32 keeps ten bits of the mantissa."""
    a = f32([[1 + 2**-11, 1 + 2**-10, 1 + 3 * 2**-11, 3.14159265, 1e30]])
    body = "t = nl.ndarray((1, 5), nl.tfloat32)\nnisa.tensor_copy(dst=t, src=a)\nnisa.tensor_copy(dst=dst, src=t)"
    got = run(body, a=a, dst=Result((1, 5)))
    assert (got.view(np.uint32) & 0x1FFF == 0).all()
    np.testing.assert_allclose(got, a, rtol=2**-11)
    assert got[0, 0] == 1
    assert got[0, 2] == np.float32(1 + 2**-9)


def columns_of(index: Array, group: int, count: int) -> Array:
    """Return for each partition the columns that its group names: entry i at partition i % group, column i // group."""
    rows = [index[group * (p // group) : group * (p // group + 1)].T.reshape(-1)[:count] for p in range(len(index))]
    return np.stack(rows).astype(np.int64)


def test_indirect_results() -> None:
    a, index = random(32, 20), np.zeros((32, 2), np.uint16)
    for first in (0, 16):
        index[first : first + 16] = np.random.default_rng(first).permutation(40)[:32].reshape(2, 16).T
    body = "nisa.tensor_copy(dst=dst.indirect(idx, num_elem=20), src=a, engine=nisa.engine.vector)"
    wanted = np.zeros((32, 40), np.float32)
    np.put_along_axis(wanted, columns_of(index, 16, 20), a, 1)
    tiles: dict[str, Any] = {"a": a, "idx": index, "dst": Result((32, 40), fill=0.0)}
    same(run(body, generation="trn3", **tiles), wanted)
    rejects(body, "tensor_copy", "dst", "", {"idx": index * 0}, generation="trn3", **tiles)


def test_indirect_products() -> None:
    """The tensor engine takes columns in groups of 32 partitions."""
    a, b = whole(32, 40, dtype="bfloat16"), whole(32, 12, dtype="bfloat16", seed=1)
    index = np.random.default_rng(0).integers(0, 40, (32, 1)).astype(np.uint16)
    body = "nisa.nc_matmul(dst=dst, stationary=a.indirect(idx, num_elem=20), moving=b, accumulate=False)"
    taken = np.take_along_axis(a, columns_of(index, 32, 20), 1).astype(np.float32)
    got = run(body, generation="trn3", a=a, b=b, idx=index, dst=Result((20, 12), memory="psum"))
    same(got, taken.T @ b.astype(np.float32))


A = random(4, 8)
EMPTY = Result((4, 8), fill=0.0)
OLDER = {"generation": "trn1"}
INT = {"a": whole(4, 8, dtype="int32"), "dst": Result((4, 8), "int32", fill=0)}
SHIFT = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.left_shift, operand0=3)"
WIDE = "nisa.nc_matmul(dst=dst, stationary=a, moving=a, accumulate=False, tile_position=(0, 0), tile_size=(32, 128))"
PRODUCT = {"dst": Result((8, 8), memory="psum")}
BY_SCALAR = "nisa.tensor_copy(dst=dst, src=a, engine=nisa.engine.scalar)  # !"
BIAS = "nisa.activation(dst=dst, op=nl.exp, data=a, bias=1.0)"
ABS = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.abs, operand0=None)"
ADD = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.add, operand0=2.0)"
REVERSED = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.add, operand0=2.0, reverse0=True)"
ORED = "nisa.tensor_reduce(dst=dst[:, 0:1], op=nl.bitwise_or, data=a, axis=1, negate=False)"
COPY = "nisa.tensor_copy(dst=dst, src=a)"
STRICT = [
    rejected("tensor_copy", "engine", "generation", OLDER, BY_SCALAR),
    rejected("activation", "bias", "generation", OLDER, BIAS),
    rejected("nc_matmul", "tile_size", "32|generation", OLDER, WIDE, **PRODUCT),
    rejected("tensor_scalar", "operand0", "int", ("operand0=3", "operand0=3.0"), SHIFT, **INT),
    rejected("tensor_scalar", "operand0", "", ("operand0=3", "operand0=32"), SHIFT, **INT),
    rejected("tensor_scalar", "operand0", "", ("operand0=3", "operand0=None"), SHIFT, **INT),
    rejected("tensor_scalar", "engine|op0", "", ("=3)", "=3, engine=nisa.engine.scalar)"), SHIFT, **INT),
    rejected("tensor_scalar", "operand0", "0|None", ("None)", "2.0)"), ABS),
    rejected("tensor_scalar", "reverse1", "", ("=2.0)", "=2.0, reverse1=True)"), ADD),
    rejected("tensor_scalar", "reverse0", "bool|True", ("reverse0=True", "reverse0=1"), REVERSED),
    rejected("tensor_reduce", "negate", "bit", ("negate=False", "negate=True"), ORED, **INT),
    rejected("tensor_copy", "dst", "NaN", {"a": A * np.float32(np.nan)}, COPY, dst=Result((4, 8), "int32")),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT)
def test_strict(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body, instruction, operand, rule, but, **{"a": A, "dst": EMPTY, **setup})


def test_e4m3fn_beyond_its_range() -> None:
    """No document says whether 448 saturates: an error, as NaN would be."""
    body = "nisa.tensor_copy(dst=dst, src=a)"
    a = f32([[447.0, -448.0, 0.001]])
    tiles: dict[str, Any] = {"a": a, "dst": Result((1, 3), "float8_e4m3fn")}
    same(run(body, generation="trn3", **tiles), cast_to(a, "float8_e4m3fn"))
    assert dtype_of("float8_e4m3fn").itemsize == 1
    rejects(body, "tensor_copy", "dst", "range|448|saturat", {"a": f32([[1, 2, 500]])}, generation="trn3", **tiles)
