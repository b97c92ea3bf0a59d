"""The tensor engine: products, accumulation in PSUM, transposes, scaled eight-bit products (SDK 2.32)."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from nki_sim_kernels import (
    STRICT as STRICT_SIMULATOR,
)
from nki_sim_kernels import (
    Array,
    Result,
    close,
    dtype_of,
    random,
    refused_with,
    rejected,
    rejects,
    run,
    same,
    whole,
)

MATMUL = "nisa.nc_matmul(dst=dst, stationary=a, moving=b, accumulate=False)"


def product(a: Array, b: Array) -> Array:
    return a.astype(np.float32).reshape(len(a), -1).T @ b.astype(np.float32).reshape(len(b), -1)


@pytest.mark.parametrize(("k", "m", "n"), [(1, 1, 1), (3, 5, 7), (17, 64, 100), (128, 128, 512), (96, 127, 33)])
@pytest.mark.parametrize("dtypes", ["bfloat16", "float32", "float16", "float8_e4m3", "bfloat16 float8_e5m2"])
def test_product(k: int, m: int, n: int, dtypes: str) -> None:
    first, _, second = dtypes.partition(" ")
    a, b = whole(k, m, dtype=first), whole(k, n, dtype=second or first, seed=1)
    same(run(MATMUL, a=a, b=b, dst=Result((m, n), memory="psum")), product(a, b))


def test_accumulates_in_fp32() -> None:
    a, b = random(128, 64, dtype="bfloat16"), random(128, 96, dtype="bfloat16", seed=1)
    close(run(MATMUL, a=a, b=b, dst=Result((64, 96), memory="psum")) / 16, product(a, b) / 16)


def test_free_dimensions_are_flattened() -> None:
    a, b = whole(9, 2, 5), whole(9, 3, 4)
    same(run(MATMUL, a=a, b=b, dst=Result((10, 3, 4), memory="psum")).reshape(10, 12), product(a, b))


@pytest.mark.parametrize("flags", [("False", "True"), ("None", "None"), ("False", "None"), ("False", "False")])
def test_accumulation(flags: tuple[str, str]) -> None:
    """None overwrites what no product has written since its allocation, and adds to the rest."""
    body = "\n".join(
        f"nisa.nc_matmul(dst=dst, stationary=a[0:{k}], moving=b[0:{k}], accumulate={flag})"
        for k, flag in zip((40, 20), flags, strict=True)
    )
    a, b = whole(40, 6), whole(40, 9)
    first = product(a, b) if flags[1] != "False" else 0
    same(run(body, a=a, b=b, dst=Result((6, 9), memory="psum")), (first + product(a[:20], b[:20])).astype(np.float32))


def test_overlapping_regions_accumulate_each_on_its_own() -> None:
    body = """
nisa.nc_matmul(dst=dst[:, 0:8], stationary=a, moving=b[:, 0:8], accumulate=False)
nisa.nc_matmul(dst=dst[:, 8:12], stationary=a, moving=b[:, 8:12], accumulate=False)
nisa.nc_matmul(dst=dst[:, 4:10], stationary=a, moving=b[:, 4:10], accumulate=True)
"""
    a, b = whole(5, 6), whole(5, 12)
    wanted = product(a, b)
    wanted[:, 4:10] *= 2
    same(run(body, a=a, b=b, dst=Result((6, 12), memory="psum")), wanted)


def test_partial_sums_can_be_read() -> None:
    body = """
p = nl.ndarray((6, 12), nl.float32, buffer=nl.psum)
nisa.nc_matmul(dst=p, stationary=a, moving=b, accumulate=False)
nisa.tensor_copy(dst=first, src=p)
nisa.nc_matmul(dst=p, stationary=a, moving=b, accumulate=True)
nisa.tensor_copy(dst=second, src=p)
"""
    a, b = whole(5, 6), whole(5, 12)
    first, second = run(body, a=a, b=b, first=Result((6, 12)), second=Result((6, 12)))
    same(first, product(a, b))
    same(second, 2 * product(a, b))


A, B = whole(9, 6), whole(9, 12)
BF = {"a": A.astype(ml_dtypes.bfloat16), "b": B.astype(ml_dtypes.bfloat16)}
IN_A_TILE = MATMUL[:-1] + ", tile_position=(0, 0), tile_size=(32, 128))"
ONE_ROW = MATMUL[:-1] + ", perf_mode=nisa.matmul_perf_mode.none)"
STRICT_MATMUL = [
    rejected("nc_matmul", "dst", "accumulate|initiali|overwr", ("=False", "=True"), MATMUL),
    rejected("nc_matmul", "dst", "", ("=False", "=True"), "nisa.memset(dst=dst, value=0.0)\n" + MATMUL),
    rejected("nc_matmul", "dst", "PSUM", {"dst": Result((6, 12))}, MATMUL),
    rejected("nc_matmul", "stationary", "SBUF", {"psum": ("a",)}, MATMUL),
    rejected("nc_matmul", "moving", "SBUF", {"psum": ("b",)}, MATMUL),
    rejected("nc_matmul", ".*", "partition", ("moving=b", "moving=b[0:8]"), MATMUL),
    rejected("nc_matmul", "dst", "", {"dst": Result((7, 12), memory="psum", fill=0.0)}, MATMUL),
    rejected("nc_matmul", "dst", "", {"dst": Result((6, 13), memory="psum", fill=0.0)}, MATMUL),
    rejected("nc_matmul", "stationary", "128", {"a": whole(9, 129)}, MATMUL),
    rejected("nc_matmul", "moving|dst", "512", {"b": whole(9, 513), "dst": Result((6, 513), memory="psum")}, MATMUL),
    rejected("nc_matmul", "stationary", "dtype|float", {"a": A.astype(np.int8)}, MATMUL, **BF),
    rejected("nc_matmul", "moving", "dtype|float", {"b": B.astype(np.int32)}, MATMUL, **BF),
    rejected("nc_matmul", "stationary|moving", "fp32|float32", {"b": BF["b"]}, MATMUL),
    rejected("nc_matmul", "stationary|moving", "fp32|float32", {"a": BF["a"]}, MATMUL),
    rejected("nc_matmul", "dst", "float32", {"dst": Result((6, 12), "bfloat16", memory="psum")}, MATMUL),
    rejected("nc_matmul", "accumulate", "", ("=False", "='no'"), MATMUL),
    rejected("nc_matmul", "perf_mode|stationary", "double_row", ("mode.none", "mode.double_row"), ONE_ROW),
    rejected("nc_matmul", "tile_position|tile_size", "", (", tile_size=(32, 128)", ""), IN_A_TILE),
    rejected("nc_matmul", "tile_position", "", ("(0, 0)", "(16, 0)"), IN_A_TILE),
    rejected("nc_matmul", "tile_position|stationary", "32", ("(0, 0)", "(32, 0)"), IN_A_TILE),
    rejected("nc_matmul", "tile_size", "", ("(32, 128)", "(16, 128)"), IN_A_TILE),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT_MATMUL)
def test_strict_matmul(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body, instruction, operand, rule, but, **{"a": A, "b": B, "dst": Result((6, 12), memory="psum"), **setup})


def test_row_tiles() -> None:
    body = """
for row in range(0, 128, 32):
    nisa.nc_matmul(dst=dst[:, row // 32], stationary=a[row:row + 32], moving=b[row:row + 32], accumulate=False,
                   tile_position=(row, 0), tile_size=(32, 128))
"""
    a, b = whole(128, 6), whole(128, 12)
    got = run(body, a=a, b=b, dst=Result((6, 4, 12), memory="psum"))
    same(got, np.stack([product(a[row : row + 32], b[row : row + 32]) for row in range(0, 128, 32)], 1))


def test_double_rows() -> None:
    """Two rows of fp8 to a partition are summed over."""
    body = MATMUL[:-1] + ", perf_mode=nisa.matmul_perf_mode.double_row)"
    a, b = whole(20, 2, 6, dtype="float8_e4m3"), whole(20, 2, 12, dtype="float8_e5m2")
    wanted = product(a[:, 0], b[:, 0]) + product(a[:, 1], b[:, 1])
    tiles: dict[str, Any] = {"a": a, "b": b, "dst": Result((6, 12), memory="psum")}
    same(run(body, **tiles), wanted)
    flat = body.replace("=a,", "=a.reshape({}),")
    with_pairs = flat.format("(20, 2, 6)")
    rejects(with_pairs, "nc_matmul", "stationary", "2", ("(20, 2, 6)", "(20, 12)"), **tiles)
    rejects(with_pairs, "nc_matmul", "stationary", "2", ("(20, 2, 6)", "(20, 6, 2)"), **tiles)
    wide = {name: tiles[name].astype(ml_dtypes.bfloat16) for name in "ab"}
    rejects(body, "nc_matmul", "stationary|moving", "fp8|float8|8", wide, **tiles)


def test_e4m3fn_is_of_trn3() -> None:
    a, b = whole(9, 6, dtype="float8_e4m3fn"), whole(9, 12, dtype="float8_e4m3fn")
    tiles: dict[str, Any] = {"a": a, "b": b, "dst": Result((6, 12), memory="psum")}
    same(run(MATMUL, generation="trn3", **tiles), product(a, b))
    if STRICT_SIMULATOR:
        refused_with(lambda: run(MATMUL, generation="trn2", **tiles), "kernel", "a_hbm", "generation", None)
    mixed = {"b": b.astype(ml_dtypes.float8_e4m3)}
    rejects(MATMUL, "nc_matmul", "stationary|moving", "e4m3", mixed, generation="trn3", **tiles)


def test_bf16_sums_are_of_trn3() -> None:
    tiles: dict[str, Any] = {"a": A, "b": B, "dst": Result((6, 12), "bfloat16", memory="psum")}
    same(run(MATMUL, generation="trn3", **tiles), product(A, B).astype(ml_dtypes.bfloat16))
    rejects(MATMUL, "nc_matmul", "dst", "float32", {"generation": "trn2"}, generation="trn3", **tiles)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint16"])
@pytest.mark.parametrize("shape", [(128, 128), (7, 100), (1, 5), (33, 4, 3)])
def test_transpose_by_the_tensor_engine(shape: tuple[int, ...], dtype: str) -> None:
    """Bits are kept: NaN and infinity too."""
    a = random(*shape, dtype=dtype)
    if np.dtype(a.dtype).kind not in "iu":
        a.reshape(-1)[:4] = np.array([np.nan, np.inf, -np.inf, -0.0]).astype(a.dtype)
    wanted = a.reshape(len(a), -1).T
    body = "nisa.nc_transpose(dst=dst, data=a, engine=nisa.engine.tensor)"
    got = run(body, a=a, dst=Result(wanted.shape, dtype, memory="psum"))
    same(got.view(np.uint8), np.ascontiguousarray(wanted).view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32"])
@pytest.mark.parametrize("shape", [(32, 32), (5, 17), (1, 32)])
def test_transpose_by_the_vector_engine(shape: tuple[int, ...], dtype: str) -> None:
    a = random(*shape, dtype=dtype)
    body = "nisa.nc_transpose(dst=dst, data=a, engine=nisa.engine.vector)"
    same(run(body, a=a, dst=Result(shape[::-1], dtype)), a.T)


SMALL = random(20, 30)
TENSOR = "nisa.nc_transpose(dst=dst, data=a, engine=nisa.engine.tensor)"
VECTOR = "nisa.nc_transpose(dst=dst, data=a, engine=nisa.engine.vector)"
IN_PSUM = Result((30, 20), memory="psum")
STRICT_TRANSPOSE = [
    rejected("nc_transpose", "dst", "PSUM", {"dst": Result((30, 20))}, TENSOR, dst=IN_PSUM),
    rejected("nc_transpose", "data", "SBUF", {"psum": ("a",)}, TENSOR, dst=IN_PSUM),
    rejected("nc_transpose", "dst", "dtype", {"dst": Result((30, 20), "bfloat16", memory="psum")}, TENSOR, dst=IN_PSUM),
    rejected("nc_transpose", "dst", "shape|transpos", {"dst": Result((20, 30), memory="psum")}, TENSOR, dst=IN_PSUM),
    rejected("nc_transpose", "data", "128", {"a": random(20, 130)}, TENSOR, dst=IN_PSUM),
    rejected("nc_transpose", "data", "32", {"a": random(20, 33), "dst": Result((33, 20))}, VECTOR),
    rejected("nc_transpose", "data", "32", {"a": random(33, 30), "dst": Result((30, 33))}, VECTOR),
    rejected("nc_transpose", "engine", "", ("engine.vector", "engine.scalar"), VECTOR),
    rejected(
        "nc_transpose",
        "data",
        "8|bit|byte",
        {"a": whole(20, 30, dtype="float8_e4m3"), "dst": Result((30, 20), "float8_e4m3", memory="psum")},
        TENSOR,
        dst=IN_PSUM,
    ),
]


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT_TRANSPOSE)
def test_strict_transpose(
    body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]
) -> None:
    rejects(body, instruction, operand, rule, but, **{"a": SMALL, "dst": Result((30, 20)), **setup})


def test_scaled_products() -> None:
    """Four values to an element; 8 partitions and 4 values share the exponent of a scale."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, (32, n, 4)).astype(np.float32) for n in (6, 12))
    scale_a, scale_b = (rng.integers(125, 130, (4, n)).astype(np.uint8) for n in (6, 12))
    body = """
left = a.view(nl.float8_e4m3fn_x4)
right = b.view(nl.float8_e4m3fn_x4)
nisa.nc_matmul_mx(dst=dst, stationary=left, moving=right, stationary_scale=sa, moving_scale=sb, accumulate=False)
"""
    packed = [x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).reshape(32, -1) for x in (a, b)]
    scaled = [x * np.exp2(s.astype(np.float32) - 127).repeat(8, 0)[:, :, None] for x, s in ((a, scale_a), (b, scale_b))]
    wanted = np.einsum("kmi,kni->mn", *scaled)
    tiles: dict[str, Any] = {"a": packed[0], "b": packed[1], "sa": scale_a, "sb": scale_b}
    result = Result((6, 12), memory="psum")
    same(run(body, generation="trn3", **tiles, dst=result), wanted.astype(np.float32))
    older = {"generation": "trn2"}
    marked = body.replace("x4)\nright", "x4)  # !\nright")
    rejects(marked, "view|nc_matmul_mx", ".*", "trn3|v4|generation", older, generation="trn3", **tiles, dst=result)


def test_quantised_groups() -> None:
    """The scale is the power of two that leaves the group's largest value at half of the dtype's largest exponent."""
    a = random(32, 16, dtype="bfloat16")
    body = "nisa.quantize_mx(dst=dst.view(nl.float8_e4m3fn_x4), src=a, dst_scale=scale)"
    values, scale = run(body, generation="trn3", a=a, dst=Result((32, 16), "uint8"), scale=Result((4, 4), "uint8"))
    groups = np.abs(a.astype(np.float64)).reshape(4, 8, 4, 4).max(axis=(1, 3))
    exponent = np.floor(np.log2(groups)) - 7
    same(scale, (exponent + 127).astype(np.uint8))
    wanted = a.astype(np.float32) / np.exp2(exponent).astype(np.float32).repeat(8, 0).repeat(4, 1)
    same(values.view(dtype_of("float8_e4m3fn")), wanted.astype(ml_dtypes.float8_e4m3fn))
