"""Copies, transposes and sums by DMA: bytes, casts through fp32, rows by index, and the modes (SDK 2.32)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Array, Result, cast_to, dtype_of, i32, random, rejected, rejects, run, same, whole

COPY = "nisa.dma_copy(dst=dst, src=a)"
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3", "float8_e5m2", "int32", "uint32", "int8", "uint8", "int16"]
TABLE = random(10, 12, seed=4)
IDX = i32([[7], [0], [3], [5], [9]])
DEAD = i32([[7], [-1], [3], [10], [9]])
GATHER = "nisa.dma_copy(dst=dst, src=x.ap(pattern=[[12, 5], [1, 12]], offset=0, vector_offset=idx))"
SCATTER = "nisa.dma_copy(dst=x.ap(pattern=[[12, 5], [1, 12]], offset=0, vector_offset=idx), src=a)"


def to_fp32(a: Array) -> Array:
    return a.astype(np.float32)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("of", ["float32", "bfloat16", "int32", "uint8"])
def test_cast(of: str, to: str) -> None:
    """Another dtype goes through fp32, ties to even, integers saturating; the same dtype keeps its bytes."""
    a = random(5, 7, dtype=of)
    if of == "float32":
        a = (a * 100).astype(np.float32)
        a[0] = [0.5, 1.5, 2.5, -0.5, -1.5, 3e9, -3e9]
    same(run(COPY, a=a, dst=Result((5, 7), to)), a if of == to else cast_to(to_fp32(a), to))


def test_integers_beyond_2_24_in_a_cast() -> None:
    a = i32([[2**24 + 1, -(2**24) - 3, 2**31 - 1]])
    same(run(COPY, a=a, dst=Result((1, 3), "int32")), a)
    change = {"dst": Result((1, 3), "uint32")}
    rejects(COPY + "  # !", "dma_copy", "src", r"2\*\*24", change, a=a, dst=Result((1, 3), "int32"))


@pytest.mark.parametrize("shape", [(6, 10), (3, 20), (12, 5), (4, 3, 5)])
def test_shapes_may_differ(shape: tuple[int, ...]) -> None:
    """Elements are taken in the order of each side's own pattern."""
    a = random(6, 10)
    same(run(COPY, a=a, dst=Result(shape)), a.reshape(shape))
    same(run("nisa.dma_copy(dst=dst, src=x)", hbm={"x": a}, dst=Result(shape)), a.reshape(shape))


def test_hbm_to_hbm_in_place() -> None:
    x, y = random(4, 5), random(4, 5, seed=1)
    run("nisa.dma_copy(dst=y[1:3, 0:4:3], src=x[0:2, 1:3])", hbm={"x": x, "y": y})
    wanted = random(4, 5, seed=1)
    wanted[1:3, 0:4:3] = x[0:2, 1:3]
    same(y, wanted)


def test_scatter() -> None:
    x, a = TABLE.copy(), random(5, 12)
    run(SCATTER, hbm={"x": x}, idx=IDX, a=a)
    wanted = TABLE.copy()
    wanted[IDX[:, 0]] = a
    same(x, wanted)


def test_skip_keeps_what_was_there() -> None:
    skip = GATHER.replace("=idx)", "=idx), oob_mode=nisa.oob_mode.skip")
    wanted = np.full((5, 12), 9, np.float32)
    wanted[[0, 2, 4]] = TABLE[[7, 3, 9]]
    same(run(skip, hbm={"x": TABLE}, idx=DEAD, dst=Result((5, 12), fill=9.0)), wanted)
    x, a = TABLE.copy(), random(5, 12)
    run(SCATTER.replace("=idx)", "=idx), oob_mode=nisa.oob_mode.skip"), hbm={"x": x}, idx=DEAD, a=a)
    wanted = TABLE.copy()
    wanted[[7, 3, 9]] = a[[0, 2, 4]]
    same(x, wanted)


def test_skipped_rows_stay_unwritten() -> None:
    skip = GATHER.replace("=idx)", "=idx), oob_mode=nisa.oob_mode.skip")
    body = skip + "\nnisa.tensor_copy(dst=out, src=dst)"
    tiles: dict[str, Any] = {"dst": Result((5, 12)), "out": Result((5, 12))}
    rejects(body, "tensor_copy", "src", "written|initiali", {"idx": DEAD}, hbm={"x": TABLE}, idx=IDX, **tiles)


def test_gather_casts() -> None:
    wanted = cast_to(TABLE[IDX[:, 0]], "bfloat16")
    same(run(GATHER, hbm={"x": TABLE}, idx=IDX, dst=Result((5, 12), "bfloat16")), wanted)


@pytest.mark.parametrize("mode", ["unknown", "swdge", "hwdge", "none"])
def test_modes(mode: str) -> None:
    a = random(4, 6)
    same(run(f"nisa.dma_copy(dst=dst, src=a, dge_mode=nisa.dge_mode.{mode})", a=a, dst=Result((4, 6))), a)


MODE = "nisa.dma_copy(dst=dst, src=a, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.sync)"
A = random(5, 12)
STRICT_DMA = [
    rejected("dma_copy", "dst|src", "count|element|size", {"dst": Result((5, 11))}, COPY, dst=Result((5, 12))),
    rejected("dma_copy", "dst|src", "hwdge|dtype", {"dst": Result((5, 12), "bfloat16")}, MODE),
    rejected("dma_copy", "engine", "", ("engine.sync", "engine.vector"), MODE),
    rejected("dma_copy", "engine", "hwdge", ("dge_mode.hwdge", "dge_mode.unknown"), MODE),
    rejected("dma_copy", "dge_mode", "", ("dge_mode=nisa.dge_mode.hwdge", "dge_mode=2"), MODE),
    rejected("dma_copy", "src|dge_mode", "", ("swdge", "hwdge"), GATHER[:-1] + ", dge_mode=nisa.dge_mode.swdge)"),
    rejected("dma_copy", "src|dge_mode", "", ("swdge", "none"), GATHER[:-1] + ", dge_mode=nisa.dge_mode.swdge)"),
    rejected(
        "dma_copy",
        "priority",
        "trn3|generation|v4",
        {"generation": "trn2"},
        "nisa.dma_copy(dst=dst, src=a, priority=1)",
        generation="trn3",
    ),
    rejected("dma_copy", "priority", "", ("=3", "=4"), "nisa.dma_copy(dst=dst, src=a, priority=3)", generation="trn3"),
    rejected("dma_copy", "oob_mode", "", ("nisa.oob_mode.skip", "1"), GATHER[:-1] + ", oob_mode=nisa.oob_mode.skip)"),
    rejected("dma_copy", "dst", "duplicate|twice|once|unique|distinct", {"idx": IDX * 0}, SCATTER),
    rejected(
        "dma_copy",
        ".*",
        "indirect|vector_offset",
        ("src=x[0:5]", "src=x.ap(pattern=[[12, 5], [1, 12]], offset=0, vector_offset=idx)"),
        "nisa.dma_copy(dst=y.ap(pattern=[[12, 5], [1, 12]], offset=0, vector_offset=idx), src=x[0:5])",
    ),
]


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT_DMA)
def test_strict_dma(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    tiles: dict[str, Any] = {"hbm": {"x": TABLE.copy(), "y": TABLE.copy()}, "a": A, "idx": IDX}
    rejects(body, instruction, operand, rule, but, **{**tiles, "dst": Result((5, 12), fill=0.0), **setup})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "uint16"])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((16, 128), (1, 0)), ((16, 3, 128), (2, 1, 0)), ((16, 2, 3, 128), (3, 1, 2, 0))],
    ids=["2d", "3d", "4d"],
)
def test_transpose(shape: tuple[int, ...], axes: tuple[int, ...], dtype: str) -> None:
    a = random(*shape, dtype=dtype)
    wanted = a.transpose(axes)
    for given in ("", f", axes={axes}", ", dge_mode=nisa.dge_mode.hwdge"):
        body = f"nisa.dma_transpose(dst=dst, src=a{given})"
        same(run(body, a=a, dst=Result(wanted.shape, dtype)), wanted)
        same(run(body.replace("src=a", "src=x"), hbm={"x": a}, dst=Result(wanted.shape, dtype)), wanted)


@pytest.mark.parametrize(("rows", "index"), [(32, (32, 1)), (16, (16, 1)), (48, (128, 1)), (144, (128, 2))])
def test_transpose_of_gathered_rows(rows: int, index: tuple[int, int]) -> None:
    """Indices are taken column by column, as many as there are rows."""
    x = random(200, 128, dtype="bfloat16")
    idx = np.random.default_rng(0).permutation(200)[:rows]
    table = np.zeros(index[::-1], np.uint32).reshape(-1)
    table[:rows] = idx
    table = np.ascontiguousarray(table.reshape(index[::-1]).T)
    body = f"nisa.dma_transpose(dst=dst, src=x.ap(pattern=[[128, {rows}], [1, 128]], offset=0, vector_offset=idx))"
    same(run(body, hbm={"x": x}, idx=table, dst=Result((128, rows), "bfloat16")), x[idx].T)


TRANSPOSE = "nisa.dma_transpose(dst=dst, src=a)"
BF = random(16, 128, dtype="bfloat16")
BF_T = Result((128, 16), "bfloat16")
GATHERED = "nisa.dma_transpose(dst=dst, src=x.ap(pattern=[[128, 16], [1, 128]], offset=0, vector_offset=idx))"
STRICT_TRANSPOSE = [
    rejected("dma_transpose", "src|dst", "dtype|byte", {"a": random(16, 128), "dst": Result((128, 16))}, TRANSPOSE),
    rejected("dma_transpose", "dst|src", "dtype", {"dst": Result((128, 16), "float16")}, TRANSPOSE),
    rejected("dma_transpose", "dst", "shape", {"dst": Result((128, 1, 16), "bfloat16")}, TRANSPOSE),
    rejected("dma_transpose", "axes", "", ("(1, 0)", "(0, 1)"), "nisa.dma_transpose(dst=dst, src=a, axes=(1, 0))"),
    rejected(
        "dma_transpose",
        "src",
        "16",
        {"a": random(32, 128, dtype="bfloat16"), "dst": Result((128, 32), "bfloat16")},
        "nisa.dma_transpose(dst=dst, src=a, dge_mode=nisa.dge_mode.hwdge)",
    ),
    rejected(
        "dma_transpose",
        "src",
        "128",
        {"a": random(16, 64, dtype="bfloat16"), "dst": Result((64, 16), "bfloat16")},
        "nisa.dma_transpose(dst=dst, src=a, dge_mode=nisa.dge_mode.hwdge)",
    ),
    rejected("dma_transpose", "src|vector_offset", "uint32", {"idx": np.arange(16, dtype=np.int32)[:, None]}, GATHERED),
    rejected("dma_transpose", "src", "", {"idx": np.arange(16, 32, dtype=np.uint32)[:, None]}, GATHERED),
    rejected(
        "dma_transpose",
        "oob_mode",
        "",
        ("src=x.ap(pattern=[[128, 16], [1, 128]], offset=0, vector_offset=idx)", "src=a"),
        GATHERED[:-1] + ", oob_mode=nisa.oob_mode.skip)",
    ),
]


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT_TRANSPOSE)
def test_strict_transpose(
    body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]
) -> None:
    idx = np.arange(16, dtype=np.uint32)[::-1].reshape(16, 1).copy()
    tiles: dict[str, Any] = {"hbm": {"x": random(20, 128, dtype="bfloat16")}, "a": BF, "idx": idx, "dst": BF_T}
    rejects(body, instruction, operand, rule, but, **{**tiles, **setup})


SUM = "nisa.dma_compute(dst=dst, srcs=[a, b], reduce_op=nl.add)"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_sum(dtype: str) -> None:
    a, b = whole(5, 12, dtype=dtype), whole(5, 12, limit=100, seed=1)
    same(run(SUM, a=a, b=b, dst=Result((5, 12), dtype)), cast_to(to_fp32(a) + b, dtype))


def test_add_to_rows() -> None:
    rows = "x.ap(pattern=[[12, 5], [1, 12]], offset=0, vector_offset=idx)"
    body = f"nisa.dma_compute(dst={rows}, srcs=[a, {rows}], reduce_op=nl.add)"
    x = TABLE.copy()
    run(body, hbm={"x": x}, idx=IDX, a=A)
    wanted = TABLE.copy()
    wanted[IDX[:, 0]] += A
    same(x, wanted)
    again = body.replace(", reduce_op", ",  reduce_op")
    rejects(again, "dma_compute", ".*", "", {"idx": IDX * 0}, hbm={"x": TABLE.copy()}, idx=IDX, a=A)


def test_add_gathered_rows() -> None:
    rows = "x.ap(pattern=[[12, 5], [1, 12]], offset=0, vector_offset=idx)"
    body = f"nisa.dma_compute(dst=dst, srcs=[dst, {rows}], reduce_op=nl.add)"
    same(run(body, hbm={"x": TABLE}, idx=IDX, dst=Result((5, 12), fill=2.0)), TABLE[IDX[:, 0]] + np.float32(2))


@pytest.mark.parametrize(
    ("good", "bad", "operand"),
    [
        ("nl.add", "nl.maximum", "reduce_op"),
        ("nl.add)", "nl.add, scales=[1.0, 2.0])", "scales"),
        ("[a, b]", "[]", "srcs"),
        ("[a, b]", "[" + "a, " * 17 + "]", "srcs"),
        ("[a, b]", "[a, b[0:4]]", "srcs.*"),
    ],
)
def test_strict_sum(good: str, bad: str, operand: str) -> None:
    rejects(SUM, "dma_compute", operand, "", (good, bad), a=A, b=A, dst=Result((5, 12)))


def test_dtype_of_packed_values_is_kept() -> None:
    a = np.arange(48, dtype=np.uint8).reshape(4, 12)
    body = "b = nl.ndarray((4, 3), nl.float8_e4m3fn_x4)\nnisa.dma_copy(dst=b, src=a.view(nl.float8_e4m3fn_x4))\n"
    body += "nisa.dma_copy(dst=dst, src=b.view(nl.uint8))"
    same(run(body, generation="trn3", a=a, dst=Result((4, 12), "uint8")), a.astype(dtype_of("uint8")))
    packed = body.replace("nl.uint8))", "nl.uint8))\nnisa.dma_copy(dst=dst[:, 0:3], src=b.view(nl.uint8)[:, 0:3])  # !")
    rejects(
        packed,
        "dma_copy",
        ".*",
        "packed|x4|MX|dtype",
        ("b.view(nl.uint8)[:, 0:3]", "b"),
        generation="trn3",
        a=a,
        dst=Result((4, 12), "uint8"),
    )
