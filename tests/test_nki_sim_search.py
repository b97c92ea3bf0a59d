"""The vector engine's copies and fills, shuffles of partitions, and the eight largest of a row (SDK 2.32)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Array, Result, cast_to, f32, i32, random, rejected, rejects, run, same, whole

COPY = "nisa.tensor_copy(dst=dst, src=a)"


@pytest.mark.parametrize("engine", ["vector", "scalar", "gpsimd", "unknown"])
@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), ("int8", "float32"), ("float32", "int8"), ("bfloat16", "uint8")]
)
def test_copy_casts(engine: str, dtypes: tuple[str, str]) -> None:
    a = random(3, 17, dtype=dtypes[0])
    if dtypes[0] != "int8":
        a = (a.astype(np.float32) * 100).astype(a.dtype)
    body = COPY[:-1] + f", engine=nisa.engine.{engine})"
    same(run(body, a=a, dst=Result(a.shape, dtypes[1])), cast_to(a.astype(np.float32), dtypes[1]))


@pytest.mark.parametrize("engine", ["vector", "gpsimd", "scalar"])
def test_copy_keeps_bits(engine: str) -> None:
    a = i32([[2**31 - 1, -(2**31), 2**24 + 1]])
    body = COPY[:-1] + f", engine=nisa.engine.{engine})"
    same(run(body, a=a, dst=Result(a.shape, "int32")), a)


def test_copy_to_another_shape_and_place() -> None:
    a = random(40, 6)
    body = """
far = nl.ndarray((104, 3, 2), nl.float32)
nisa.tensor_copy(dst=far[64:104], src=a)
nisa.tensor_copy(dst=dst, src=far[64:104])
"""
    same(run(body, a=a, dst=Result((40, 6))), a)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float32", -1.5), ("bfloat16", 3.1415926), ("int32", -7), ("uint8", 255), ("int32", 2**31 - 1), ("float16", 1)],
)
@pytest.mark.parametrize("memory", ["sbuf", "psum"])
def test_fill(dtype: str, value: float, memory: str) -> None:
    got = run(f"nisa.memset(dst=dst, value={value})", dst=Result((3, 2, 5), dtype, memory=memory))
    wanted = np.full((3, 2, 5), value, got.dtype) if dtype == "int32" else cast_to(np.full((3, 2, 5), value), dtype)
    same(got, wanted)


@pytest.mark.parametrize("partitions", [32, 64, 128])
def test_shuffle(partitions: int) -> None:
    mask = np.random.default_rng(0).permutation(32).tolist()
    mask[3] = mask[8] = 255
    a = random(partitions, 5)
    body = f"nisa.nc_stream_shuffle(dst=dst, src=a, shuffle_mask={mask})"
    wanted = np.full((partitions, 5), 7, np.float32)
    for first in range(0, partitions, 32):
        for to, of in enumerate(mask):
            if of != 255:
                wanted[first + to] = a[first + of]
    same(run(body, a=a, dst=Result((partitions, 5), fill=7.0)), wanted)


def test_shuffle_in_place_to_spread_one_row() -> None:
    a = random(32, 5)
    body = f"nisa.nc_stream_shuffle(dst=a, src=a, shuffle_mask={[0] * 32})\n{COPY}"
    same(run(body, a=a, dst=Result((32, 5))), np.broadcast_to(a[:1], (32, 5)).copy())


@pytest.mark.parametrize("shape", [(5, 8), (128, 100), (3, 7, 9)])
def test_eight_largest(shape: tuple[int, ...]) -> None:
    a = whole(*shape, limit=20)
    wanted = -np.sort(-a.reshape(len(a), -1), 1)[:, :8]
    same(run("nisa.max8(dst=dst, src=a)", a=a, dst=Result((len(a), 8))), wanted)
    got = run("nisa.max8(dst=dst, src=a)", a=a, dst=Result((len(a), 8), "bfloat16"))
    same(got, cast_to(wanted, "bfloat16"))


def places(row: Array, values: Array) -> list[int]:
    """Return where each value is; the n-th of equal values is at the n-th place."""
    found, used = [], set[int]()
    for value in values:
        place = next(i for i, x in enumerate(row) if x == value and i not in used)
        used.add(place)
        found.append(place)
    return found


@pytest.mark.parametrize("dtype", ["uint32", "uint16"])
def test_find(dtype: str) -> None:
    a = whole(6, 30, limit=9)
    vals = -np.sort(-a, 1)[:, :8]
    wanted = np.array([places(row, v) for row, v in zip(a, vals, strict=True)], dtype)
    same(run("nisa.nc_find_index8(dst=dst, data=a, vals=v)", a=a, v=vals, dst=Result((6, 8), dtype)), wanted)


def test_replace() -> None:
    """Equal values are consumed from the last column of `vals` on, so the first place goes to the last column."""
    a = f32([[1, 2, 3, 4, 8, 8, 8, 8, 8, 8, 8]])
    vals = f32([[3, 8, 8, 8, 8, 8, 8, 8]])
    body = "nisa.nc_match_replace8(dst=dst, data=a, vals=v, imm=-1.0, dst_idx=idx)"
    got, idx = run(body, a=a, v=vals, dst=Result(a.shape), idx=Result((1, 8), "uint32"))
    same(idx, np.array([[2, 10, 9, 8, 7, 6, 5, 4]], np.uint32))
    same(got, f32([[1, 2, -1, 4, *[-1] * 7]]))


def test_replace_some_of_equal_values() -> None:
    a, vals = f32([[5, 1, 5, 2, 5, 3, 4, 6, 0]]), f32([[6, 5, 5, 4, 3, 2, 1, 0]])
    body = "nisa.nc_match_replace8(dst=dst, data=a, vals=v, imm=-9.0)"
    same(run(body, a=a, v=vals, dst=Result(a.shape)), f32([[-9, -9, -9, -9, 5, -9, -9, -9, -9]]))


A = whole(4, 16, limit=30)
V = -np.sort(-A, 1)[:, :8]
SHUFFLE = f"nisa.nc_stream_shuffle(dst=dst, src=w, shuffle_mask={[*range(31), 31]})"
FIND = "nisa.nc_find_index8(dst=idx, data=a, vals=v)\nnisa.memset(dst=dst, value=0.0)"
REPLACE = "nisa.nc_match_replace8(dst=dst, data=a, vals=v, imm=0.0, dst_idx=idx)"
FILL_INT = "nisa.memset(dst=b, value=2)\n" + COPY
FILL = "nisa.memset(dst=dst, value=0.0, engine=nisa.engine.vector)"
MAX8 = "nisa.max8(dst=dst[:, 0:8], src=a[:, 0:8])"
W: dict[str, Any] = {"w": whole(32, 16), "dst": Result((32, 16))}
FOUND: dict[str, Any] = {"idx": Result((4, 8), "uint32"), "v": V}
STRICT_SEARCH = [
    rejected("tensor_copy", "src|dst", "", ("src=a", "src=a[:, 0:15]"), COPY),
    rejected("tensor_copy", "src|dst", "", ("src=a", "src=a[0:3]"), COPY),
    rejected("tensor_copy", "src", "", ("src=a", "src=1.0"), COPY),
    rejected("tensor_copy", "engine", "", ("src=a", "src=a, engine=nisa.engine.tensor"), COPY),
    rejected("tensor_copy", "dst|src", "PSUM|SBUF", {"psum": ("a",)}, COPY[:-1] + ", engine=nisa.engine.gpsimd)"),
    rejected("memset", "value", "int", ("value=2", "value=2.0"), FILL_INT, b=Result((2, 2), "int32")),
    rejected("memset", "engine", "", ("engine.vector", "engine.scalar"), FILL),
    rejected("memset", "value", "", ("value=0.0", "value=a"), "nisa.memset(dst=dst, value=0.0)"),
    rejected("nc_stream_shuffle", "shuffle_mask", "31|255", ("31]", "32]"), SHUFFLE, **W),
    rejected("nc_stream_shuffle", "shuffle_mask", "32", (", 31]", "]"), SHUFFLE, **W),
    rejected("nc_stream_shuffle", "dst|src", "dtype", {"dst": Result((32, 16), "bfloat16")}, SHUFFLE, **W),
    rejected("nc_stream_shuffle", "dst|src", "", {"dst": Result((32, 15), fill=0.0)}, SHUFFLE, **W),
    rejected("max8", "src", "8", ("a[:, 0:8]", "a[:, 0:7]"), MAX8),
    rejected("max8", "dst", "8", ("dst[:, 0:8]", "dst[:, 0:9]"), MAX8),
    rejected("max8", "src", "3|rank|dim", ("a[:, 0:8]", "a.reshape((4, 2, 2, 4))"), MAX8),
    rejected("nc_find_index8", "vals", "8", ("vals=v", "vals=v[:, 0:7]"), FIND, **FOUND),
    rejected("nc_find_index8", "dst", "uint", {"idx": Result((4, 8), "int32")}, FIND, **FOUND),
    rejected("nc_find_index8", "vals", "", {"v": np.full_like(V, 1000)}, FIND, **FOUND),
    rejected("nc_match_replace8", "vals", "8", ("vals=v", "vals=v[:, 0:7]"), REPLACE, **FOUND),
    rejected("nc_match_replace8", "dst_idx", "uint32", {"idx": Result((4, 8), "uint16")}, REPLACE, **FOUND),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT_SEARCH)
def test_strict_search(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body, instruction, operand, rule, but, **{"a": A, "dst": Result((4, 16), fill=0.0), **setup})
