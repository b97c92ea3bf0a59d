"""Memories: what fits, where a tile may start, who reaches what, and what nobody wrote (SDK 2.32)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Result, call, random, rejected, rejects, rejects_kernel, run, same

KIB = 1024
ALLOCATE = """
@nki.jit
def kernel(x):
    out = nl.ndarray((128, 1), nl.int32, buffer=nl.shared_hbm)
    first = nl.ndarray((128, {size}), nl.int32, buffer=nl.{memory})
    nisa.memset(dst=first, value=3)
    nisa.{store}
    return out
"""


@pytest.mark.parametrize(
    ("generation", "fits", "too_much"), [("trn2", 200 * KIB, 224 * KIB + 4), ("trn3", 232 * KIB, 256 * KIB + 4)]
)
def test_capacity(generation: str, fits: int, too_much: int) -> None:
    source = ALLOCATE.format(size=fits // 4, memory="sbuf", store="dma_copy(dst=out, src=first[:, 0:1])")
    but = (f"128, {fits // 4}", f"128, {too_much // 4}")
    rejects_kernel(
        source, "ndarray", ".*", "SBUF|capacity|bytes", but, np.zeros((1, 1), np.uint8), generation=generation
    )


def test_generations_differ_in_capacity() -> None:
    body = f"big = nl.ndarray((128, {230 * KIB}), nl.uint8)\nnisa.tensor_copy(dst=dst, src=a)"
    change = {"generation": "trn2"}
    rejects(
        body.replace(")\n", ")  # !\n"),
        "ndarray",
        ".*",
        "",
        change,
        generation="trn3",
        a=random(2, 2),
        dst=Result((2, 2)),
    )


LIVE = """
@nki.jit
def kernel(x):
    out = nl.ndarray((128, 1), nl.int32, buffer=nl.shared_hbm)
    first = nl.ndarray((128, 30000), nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=first, value=1)
    first = None
    second = nl.ndarray((128, 30000), nl.int32, buffer=nl.sbuf)  # !
    nisa.memset(dst=second, value=2)
    nisa.dma_copy(dst=out, src=second[:, 7:8])
    return out
"""


def test_a_dropped_tensor_frees_its_bytes() -> None:
    rejects_kernel(LIVE, "ndarray", ".*", "", ("first = None", "kept = None"), random(1, 1))


def test_a_view_keeps_its_bytes() -> None:
    rejects_kernel(LIVE, "ndarray", ".*", "", ("first = None", "first = first[:, 0:1]"), random(1, 1))


BANKS = """
@nki.jit
def kernel(x):
    out = nl.ndarray((128, 512), nl.float32, buffer=nl.shared_hbm)
    banks = []
    for bank in range(8):
        tile = nl.ndarray((128, 512), nl.float32, buffer=nl.psum)  # !
        nisa.memset(dst=tile, value=bank)
        banks.append(tile)
    result = nl.ndarray((128, 512), nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=result, src=banks[7])
    nisa.dma_copy(dst=out, src=result)
    return out
"""


def test_eight_banks() -> None:
    source = BANKS.replace("value=bank", "value=7.0")
    same(call(source, random(1, 1)), np.full((128, 512), 7, np.float32))
    rejects_kernel(source, "ndarray", ".*", "PSUM|bank", ("range(8)", "range(9)"), random(1, 1))


def test_matmul_across_banks() -> None:
    body = """
big = nl.ndarray((64, 1024), nl.float32, buffer=nl.psum)
nisa.memset(dst=big, value=0.0)
nisa.nc_matmul(dst=big[:, 0:512], stationary=a, moving=b, accumulate=False)
nisa.tensor_copy(dst=dst, src=big[:, 0:512])
"""
    change = ("dst=big[:, 0:512]", "dst=big[:, 256:768]")
    rejects(body, "nc_matmul", "dst", "bank", change, a=random(8, 64), b=random(8, 512), dst=Result((64, 512)))


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("32:64", "16:48"),
        ("96:128", "80:112"),
        ("64:128", "32:96"),
        ("0:96", "32:128"),
        ("64:100", "32:68"),
        ("96:97", "1:2"),
    ],
)
def test_start_partition(good: str, bad: str) -> None:
    start, end = map(int, good.split(":"))
    body = f"""
part = nl.ndarray((128, 3), nl.float32)
nisa.memset(dst=part, value=0.0)
nisa.tensor_copy(dst=part[0:{end - start}], src=a[{good}])
nisa.tensor_copy(dst=dst, src=part[0:{end - start}])
"""
    a = random(128, 3)
    same(run(body, a=a, dst=Result((end - start, 3))), a[start:end])
    marked = body.replace(f"src=a[{good}])", f"src=a[{good}])  # !")
    rejects(
        marked, "tensor_copy", "src", "start|partition", (f"a[{good}]", f"a[{bad}]"), a=a, dst=Result((end - start, 3))
    )


def test_dma_starts_anywhere() -> None:
    a = random(128, 3)
    same(run("nisa.dma_copy(dst=dst, src=a[17:94])", a=a, dst=Result((77, 3))), a[17:94])


def test_partitions() -> None:
    body = "b = nl.ndarray((128, 2), nl.float32)\nnisa.tensor_copy(dst=dst, src=a)"
    rejects(
        body.replace("2), nl.float32)", "2), nl.float32)  # !"),
        "ndarray",
        ".*",
        "128",
        ("(128, 2)", "(129, 2)"),
        a=random(2, 2),
        dst=Result((2, 2)),
    )


UNWRITTEN = """
part = nl.ndarray((4, 6), nl.{dtype})
nisa.memset(dst=part[:, 0:3], value={value})
nisa.memset(dst=part[:, 3:6], value={value})
nisa.tensor_copy(dst=dst, src=part)
"""


@pytest.mark.parametrize(("dtype", "value"), [("float32", 1.0), ("int32", 4), ("uint8", 255), ("bfloat16", 1.0)])
def test_uninitialised(dtype: str, value: float) -> None:
    body = UNWRITTEN.format(dtype=dtype, value=value)
    rejects(
        body,
        "tensor_copy",
        "src",
        "initiali[sz]ed|written",
        ("part[:, 3:6]", "part[:, 3:5]"),
        dst=Result((4, 6), dtype),
    )


@pytest.mark.parametrize(
    ("read", "operand"),
    [
        ("nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.add)", "data2"),
        ("nisa.tensor_scalar(dst=dst, data=a, op0=nl.add, operand0=b[:, 0:1])", "operand0"),
        ("nisa.activation(dst=dst, op=nl.copy, data=a, bias=b[:, 0:1])", "bias"),
        ("nisa.dma_copy(dst=dst, src=b)", "src"),
        ("nisa.range_select(dst, a, nl.greater_equal, nl.less, bound0=a[:, 0:1], bound1=b[:, 0:1])", "bound1"),
    ],
)
def test_uninitialised_operands(read: str, operand: str) -> None:
    body = f"b = nl.ndarray((4, 6), nl.float32)\nnisa.memset(dst=b, value=0.0)\n{read}"
    instruction = read[5 : read.index("(")]
    change = ("dst=b, value", "dst=b[0:3], value")
    rejects(body, instruction, operand, "initiali[sz]ed|written", change, a=random(4, 6), dst=Result((4, 6)))


def test_nan_is_a_value() -> None:
    a = np.full((2, 3), np.nan, np.float32)
    same(run("nisa.tensor_copy(dst=dst, src=a)", a=a, dst=Result((2, 3))), a)


def test_unwritten_remains_after_a_partial_write() -> None:
    body = """
part = nl.ndarray((4, 6), nl.float32)
nisa.memset(dst=part, value=1.0)
nisa.tensor_copy(dst=part[:, 2:4], src=a)
nisa.tensor_copy(dst=dst, src=part)
"""
    a = random(4, 2)
    wanted = np.ones((4, 6), np.float32)
    wanted[:, 2:4] = a
    same(run(body, a=a, dst=Result((4, 6))), wanted)
    change = ("dst=part, value", "dst=part[:, 0:3], value")
    rejects(body, "tensor_copy", "src", "initiali[sz]ed|written", change, a=a, dst=Result((4, 6)))


A, B = random(4, 8), random(4, 8, seed=1)
REACH = [
    rejected(
        "tensor_copy", "src", "HBM|SBUF", ("src=a", "src=x"), "nisa.tensor_copy(dst=dst, src=a)", hbm={"x": A}, a=A
    ),
    rejected(
        "tensor_tensor",
        "data1 and data2|data1|data2",
        "PSUM",
        {"psum": ("a", "b")},
        "nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.add)",
        psum=("a",),
        a=A,
        b=B,
    ),
    rejected(
        "tensor_tensor_scan",
        "data0 and data1|data0|data1",
        "PSUM",
        {"psum": ("a", "b")},
        "nisa.tensor_tensor_scan(dst=dst, data0=a, data1=b, initial=0.0, op0=nl.multiply, op1=nl.add)",
        psum=("b",),
        a=A,
        b=B,
    ),
    rejected(
        "scalar_tensor_tensor",
        "data and operand1|data|operand1",
        "PSUM",
        {"psum": ("a", "b")},
        "nisa.scalar_tensor_tensor(dst=dst, data=a, op0=nl.multiply, operand0=2.0, op1=nl.add, operand1=b)",
        psum=("b",),
        a=A,
        b=B,
    ),
    rejected(
        "tensor_tensor",
        "data1",
        "PSUM|SBUF",
        {"psum": ("a",)},
        "nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.add, engine=nisa.engine.gpsimd)",
        a=A,
        b=B,
    ),
    rejected(
        "affine_select",
        "on_true_tile",
        "PSUM|SBUF",
        {"psum": ("a",)},
        "nisa.affine_select(dst=dst, pattern=[[1, 8]], channel_multiplier=0, on_true_tile=a, on_false_value=0.0)",
        a=A,
    ),
    rejected("dma_copy", "src", "PSUM|SBUF", {"psum": ("a",)}, "nisa.dma_copy(dst=dst, src=a)  # !", a=A),
    rejected(
        "tensor_partition_reduce",
        "data",
        "PSUM|SBUF",
        {"psum": ("a",)},
        "nisa.tensor_partition_reduce(dst=dst[0:1], op=nl.add, data=a)",
        a=A,
        dst=Result((4, 8), fill=0.0),
    ),
]


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), REACH)
def test_reach(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body, instruction, operand, rule, but, **{"dst": Result((4, 8)), **setup})


@pytest.mark.parametrize("memory", ["sbuf", "hbm"])
def test_output_memory(memory: str) -> None:
    source = """
@nki.jit
def kernel(x):
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=x)
    return out  # !
"""
    change = ("buffer=nl.shared_hbm", f"buffer=nl.{memory}")
    rejects_kernel(source, "kernel", ".*", "shared_hbm", change, random(3, 4))


def test_stale_under_an_address() -> None:
    body = """
old = nl.ndarray((4, 8), nl.float32, buffer=nl.psum, address=(0, 2048))
nisa.tensor_copy(dst=old, src=a)
new = nl.ndarray((4, 8), nl.float32, buffer=nl.psum, address=(0, 2048))
nisa.tensor_copy(dst=new, src=b)
nisa.tensor_copy(dst=dst, src=new)
"""
    same(run(body, a=A, b=B, dst=Result((4, 8))), B)
    rejects(body, "tensor_copy", "src", "", ("src=new)", "src=old)"), a=A, b=B, dst=Result((4, 8)))


def test_tile_size() -> None:
    body = """
assert nl.tile_size.pmax == 128
assert nl.tile_size.psum_bank_fmax == 512
assert nl.tile_size.psum_bank_fmax_bytes == 2048
assert nl.tile_size.psum_num_banks == 8
assert nl.tile_size.gemm_stationary_fmax == 128
assert nl.tile_size.gemm_moving_fmax == 512
assert nl.tile_size.bn_stats_fmax == 512
assert nl.tile_size.sbuf_fmax_bytes == 4 * nl.tile_size.sbuf_fmax
nisa.tensor_copy(dst=dst, src=a)
"""
    for generation in ("trn2", "trn3"):
        run(body, generation=generation, a=A, dst=Result((4, 8)))
