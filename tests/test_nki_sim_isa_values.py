"""Values of nki.isa where a near miss would go unnoticed elsewhere (SDK 2.32 API reference)."""

from typing import Any

import ml_dtypes
import nki
import numpy as np
import pytest
from nki_sim_kernels import Result, close, load, random, rejects, run, same, strict_only, target, whole

BEYOND = 2**24 + 1


def test_memset_of_large_integers() -> None:
    same(run(f"nisa.memset(dst=dst, value={BEYOND})", dst=Result((2, 3), "int32")), np.full((2, 3), BEYOND, np.int32))


@strict_only
@pytest.mark.parametrize(
    ("body", "instruction"),
    [
        ("nisa.tensor_scalar(dst=dst, data=a, op0=nl.add, operand0=1.0)", "tensor_scalar"),
        ("nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.add, engine=nisa.engine.vector)", "tensor_tensor"),
        ("nisa.scalar_tensor_tensor(dst=dst, data=a, op0=nl.add, operand0=0.0, op1=nl.add, operand1=b)", "scalar_.*"),
        ("nisa.tensor_reduce(dst=dst, op=nl.add, data=c, axis=2)", "tensor_reduce"),
        (
            "nisa.tensor_tensor_scan(dst=dst, data0=b, data1=a, initial=0.0, op0=nl.add, op1=nl.add)",
            "tensor_tensor_scan",
        ),
    ],
)
def test_integers_beyond_fp32(body: str, instruction: str) -> None:
    """fp32 holds 2**24, but gives it for 2**24 + 1 too."""
    a, b = np.full((2, 1), BEYOND - 3, np.int32), np.ones((2, 1), np.int32)
    large: dict[str, Any] = {"a": a + 1, "c": np.stack([a + 1, b], 2)}
    rejects(body, instruction, "dst", "24", large, a=a, b=b, c=np.stack([a, b], 2), dst=Result((2, 1), "int32"))


def test_cumulation_goes_on_in_the_accumulators() -> None:
    a = whole(3, 8)
    body = """
nisa.tensor_scalar_cumulative(dst=dst[:, 0:5], src=a[:, 0:5], op0=nl.add, op1=nl.add, imm0=1.0)
nisa.tensor_scalar_cumulative(dst=dst[:, 5:8], src=a[:, 5:8], op0=nl.add, op1=nl.add, imm0=1.0,
                              reduce_cmd=nisa.reduce_cmd.reduce)
"""
    same(run(body, a=a, dst=Result(a.shape)), np.cumsum(a + 1, 1))


@strict_only
def test_transpose_within_a_bank() -> None:
    body = """
wide = nl.ndarray((16, 544), nl.float32, buffer=nl.psum)
nisa.nc_transpose(dst=wide[:, 480:512], data=a)
nisa.tensor_copy(dst=dst, src=wide[:, 480:512])
"""
    a = random(32, 16)
    same(run(body, a=a, dst=Result((16, 32))), a.T)
    rejects(body.replace("480:512], data=a)", "480:512], data=a)  # !"), "nc_transpose", ".*", "bank",
            ("wide[:, 480:512], data", "wide[:, 500:532], data"), a=a, dst=Result((16, 32)))  # fmt: skip


QUANTIZE = "nisa.quantize_mx(dst=q.view(nl.float8_e5m2_x4), src=a, dst_scale=s)"


@pytest.mark.parametrize(
    ("peak", "scale"), [(0.0, 0), (2.0**-126, 0), (2.0**-100, 13), (1.0, 113), (1.9, 113), (2.0, 114)]
)
def test_scales(peak: float, scale: int) -> None:
    """2 ** (floor(log2(peak)) - 14) for e5m2, biased by 127, and never below 2 ** -127."""
    a = np.zeros((32, 8), ml_dtypes.bfloat16)
    a[3, 5] = peak
    results: dict[str, Any] = {"q": Result((32, 8), "uint8"), "s": Result((4, 2), "uint8")}
    _, got = run(QUANTIZE, generation="trn3", a=a, **results)
    wanted = np.zeros((4, 2), np.uint8)
    wanted[0, 1] = scale
    same(got, wanted)


def test_products_of_4_bit_floats() -> None:
    """Every value of e2m1, four to an element, against small 8-bit floats."""
    codes = np.arange(16, dtype=np.uint8)
    left = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).reshape(1, 4, 4)
    packed = (codes.reshape(4, 4).astype(np.uint16) << (4 * np.arange(4, dtype=np.uint16))).sum(1, dtype=np.uint16)
    a = np.tile(packed, (32, 1))
    b = np.random.default_rng(0).integers(-3, 4, (32, 6, 4)).astype(ml_dtypes.float8_e5m2)
    body = """
nisa.nc_matmul_mx(dst=dst, stationary=a.view(nl.float4_e2m1fn_x4), moving=b.view(nl.float8_e5m2_x4), stationary_scale=s,
                  moving_scale=t, accumulate=False)
"""
    tiles: dict[str, Any] = {"a": a, "b": b.view(np.uint8).reshape(32, 24)}
    scales: dict[str, Any] = {"s": np.full((4, 4), 128, np.uint8), "t": np.full((4, 6), 127, np.uint8)}
    got = run(body, generation="trn3", **tiles, **scales, dst=Result((4, 6), memory="psum"))
    wanted = 2 * np.einsum("kmi,kni->mn", np.tile(left, (32, 1, 1)), b.astype(np.float64))
    close(got, wanted)


KERNEL = """
@nki.jit
def kernel(x):
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    a = nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=a, src=x)
    p = nl.ndarray((32, 32), nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=p, stationary=a, moving=a, accumulate=False{})
    nisa.dma_copy(dst=out, src=a)
    return out
"""


@strict_only
@pytest.mark.parametrize(
    ("dtype", "more", "columns"),
    [
        ("float32", "", 128),
        ("float32", ", is_moving_onezero=True", 64),
        ("float32", ", is_stationary_onezero=True", 64),
        ("float32", ", is_transpose=True", 64),
        ("bfloat16", "", 32),
        ("float16", ", is_moving_onezero=True", 32),
    ],
)
def test_passes_over_the_columns(dtype: str, more: str, columns: int) -> None:
    """fp32 takes four passes, half of them with a hint or as a transposition."""
    with target("trn2", 1):
        simulated = nki.simulate(load(KERNEL.format(more)).kernel)
        simulated(np.eye(32).astype(getattr(ml_dtypes, dtype, dtype)))
    assert simulated.cores[0].counters["tensor"].elements == columns
