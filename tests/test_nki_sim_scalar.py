"""The scalar engine: functions of data * scale + bias, their valid ranges, and their second form on trn3 (SDK 2.32)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Array, Result, cast_to, close, dtype_of, f32, random, rejected, rejects, run, same


def elementwise(function: Callable[[float], float]) -> Callable[[Array], Array]:
    return np.vectorize(function, otypes=[np.float64])


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def gelu(x: Array) -> Array:
    return x * (1 + elementwise(math.erf)(x / math.sqrt(2))) / 2


ANY: dict[str, Callable[[Array], Array]] = {
    "copy": lambda x: x,
    "square": np.square,
    "sigmoid": sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "gelu_dx": lambda x: gelu(x) / x + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    "gelu_apprx_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu_apprx_sigmoid": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
    "silu_dx": lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))),
    "tanh": np.tanh,
    "softplus": softplus,
    "mish": lambda x: x * np.tanh(softplus(x)),
    "erf": elementwise(math.erf),
    "erf_dx": lambda x: 2 / math.sqrt(math.pi) * np.exp(-x * x),
    "exp": np.exp,
    "sign": np.sign,
    "abs": np.abs,
}
LIMITED: dict[str, tuple[Callable[[Array], Array], float, float]] = {
    "log": (np.log, 2.0**-64, 2.0**64),
    "sqrt": (np.sqrt, 2.0**-116, 2.0**118),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-87, 2.0**97),
    "reciprocal": (lambda x: 1 / x, 2.0**-42, 2.0**42),
    "arctan": (np.arctan, -math.pi / 2, math.pi / 2),
    "sin": (np.sin, -math.pi, math.pi),
}
ACTIVATION = "nisa.activation(dst=dst, op=nl.{op}, data=a)"


@pytest.mark.parametrize("op", ANY)
def test_functions(op: str) -> None:
    a = random(7, 33) * 2
    close(run(ACTIVATION.format(op=op), a=a, dst=Result(a.shape)), ANY[op](a.astype(np.float64)))


@pytest.mark.parametrize("op", LIMITED)
def test_functions_within_their_range(op: str) -> None:
    function, low, high = LIMITED[op]
    a = np.linspace(0.3, 1.5, 30, dtype=np.float32).reshape(3, 10)
    close(run(ACTIVATION.format(op=op), a=a, dst=Result(a.shape)), function(a.astype(np.float64)))
    edges = f32([[low, high]])
    if low < 0:
        edges = np.nextafter(edges, np.float32(0))
    assert np.isfinite(run(ACTIVATION.format(op=op), a=edges, dst=Result((1, 2)))).all()
    beyond = {"a": f32([[1.0, high * 1.01 if op != "sqrt" else 2.0**119]])}
    rejects(ACTIVATION.format(op=op), "activation", "data", r"nl\.|range", beyond, a=edges, dst=Result((1, 2)))


@pytest.mark.parametrize("op", ["log", "sqrt", "rsqrt", "reciprocal"])
def test_zero_is_out_of_range(op: str) -> None:
    ones, zero = np.ones((1, 2), np.float32), f32([[1, 0]])
    rejects(ACTIVATION.format(op=op), "activation", "data", "", {"a": zero}, a=ones, dst=Result((1, 2)))


def test_the_range_is_that_of_the_scaled_input() -> None:
    body = "nisa.activation(dst=dst, op=nl.log, data=a, bias=b, scale=2.0)"
    a, b = f32([[0.0, 1.0]]), f32([[1.0]])
    close(run(body, a=a, b=b, dst=Result((1, 2))), np.log(2 * a + b))
    rejects(body, "activation", "data", "", {"b": f32([[-3.0]])}, a=a, b=b, dst=Result((1, 2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("memory", ["sbuf", "psum"])
def test_scale_and_bias(dtype: str, memory: str) -> None:
    a, bias, scale = random(9, 14), random(9, 1, dtype=dtype, seed=1), random(9, 1, seed=2)
    b32 = bias.astype(np.float32)
    tiles: dict[str, Any] = {"a": a, "b": bias, "s": scale, "dst": Result((9, 14), memory=memory)}
    wanted = np.exp(a.astype(np.float64) * scale + b32)
    close(run("nisa.activation(dst=dst, op=nl.exp, data=a, bias=b, scale=s)", psum=("a",), **tiles), wanted)
    got = run("nisa.activation(dst=dst, op=nl.copy, data=a, bias=0.5, scale=2.0)", **tiles)
    same(got, a * np.float32(2) + np.float32(0.5))
    same(run("nisa.activation(dst=a, op=nl.copy, data=a, scale=2.0)\nnisa.tensor_copy(dst=dst, src=a)", **tiles), a * 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "uint8", "float8_e5m2", "int32"])
def test_cast_at_the_write(dtype: str) -> None:
    a = f32([[0.5, 1.5, -2.5, 300.7, -300.2, 1e7]])
    same(run(ACTIVATION.format(op="copy"), a=a, dst=Result(a.shape, dtype)), cast_to(a, dtype))
    b = np.arange(-3, 3, dtype=np.int8).reshape(1, 6)
    close(run(ACTIVATION.format(op="exp"), a=b, dst=Result(b.shape)), np.exp(b.astype(np.float64)))


def test_exp_of_minus_infinity() -> None:
    a = f32([[-np.inf, -3.4028235e38, 0.0]])
    same(run(ACTIVATION.format(op="exp"), a=a, dst=Result(a.shape)), f32([[0, 0, 1]]))


@pytest.mark.parametrize(
    ("op0", "op1", "first", "both"),
    [
        ("multiply", "add", lambda x, c: x * c, lambda y, c: y + c),
        ("multiply", "subtract", lambda x, c: x * c, lambda y, c: y - c),
        ("multiply", "bypass", lambda x, c: x * c, lambda y, c: y),
        ("add", "bypass", lambda x, c: x + c, lambda y, c: y),
        ("subtract", "bypass", lambda x, c: x - c, lambda y, c: y),
        ("bypass", "bypass", lambda x, c: x, lambda y, c: y),
    ],
)
def test_second_form(op0: str, op1: str, first: Any, both: Any) -> None:
    a, c, d = random(5, 8), random(5, 1, seed=1), random(5, 1, seed=2)
    body = f"nisa.activate2(dst=dst, op=nl.tanh, data=a, imm0=c, imm1=d, op0=nl.{op0}, op1=nl.{op1})"
    tiles: dict[str, Any] = {"a": a, "c": c, "d": d, "dst": Result((5, 8))}
    close(run(body, generation="trn3", **tiles), np.tanh(both(first(a.astype(np.float64), c), d)))
    older = {"generation": "trn2"}
    rejects(body, "activate2", ".*", "trn3|v4|generation", older, generation="trn3", **tiles)


@pytest.mark.parametrize(("op", "function"), [("add", np.add), ("maximum", np.maximum), ("minimum", np.minimum)])
def test_second_form_reduces(op: str, function: Any) -> None:
    body = (
        "nisa.activate2(dst=dst, op=nl.copy, data=a, imm0=2.0, imm1=1.0, op0=nl.multiply, op1=nl.subtract, "
        f"reverse1=True, reduce_op=nl.{op}, reduce_res=r, reduce_cmd=nisa.reduce_cmd.reset_reduce)"
    )
    a = random(5, 8)
    got, r = run(body, generation="trn3", a=a, dst=Result((5, 8)), r=Result((5, 1)))
    close(got, 1 - 2 * a.astype(np.float64))
    close(r, function.reduce(1 - 2 * a.astype(np.float64), 1, keepdims=True))


def test_prelu() -> None:
    a = random(5, 8)
    body = "nisa.activate2(dst, nl.prelu, a, 1.0, 0.0, op0=nl.multiply, op1=nl.add, relu_param=0.25)"
    close(run(body, generation="trn3", a=a, dst=Result((5, 8))), np.where(a > 0, a, a * 0.25))


A, C = random(4, 8), random(4, 1, seed=1)
BIAS = "nisa.activation(dst=dst, op=nl.exp, data=a, bias=c, scale=1.0)"
SECOND = "nisa.activate2(dst=dst, op=nl.exp, data=a, imm0=c, imm1=1.0, op0=nl.multiply, op1=nl.add)"
TRN3: dict[str, Any] = {"generation": "trn3"}
GPSIMD = BIAS.replace("=1.0)", "=1.0, engine=nisa.engine.gpsimd)")
SUMMED = BIAS.replace("=1.0)", "=1.0, reduce_cmd=nisa.reduce_cmd.reset, engine=nisa.engine.scalar)")
SECOND_GPSIMD = SECOND.replace("op1=nl.add)", "op1=nl.add, engine=nisa.engine.gpsimd)")


@pytest.mark.parametrize(("by_scalar", "by_gpsimd"), [(BIAS, GPSIMD), (SECOND, SECOND_GPSIMD)])
def test_gpsimd_gives_the_same(by_scalar: str, by_gpsimd: str) -> None:
    tiles: dict[str, Any] = {"a": A, "c": C, "dst": Result((4, 8))}
    same(run(by_gpsimd, generation="trn3", **tiles), run(by_scalar, generation="trn3", **tiles))


STRICT = [
    rejected("activation", "op", "", ("nl.exp", "nl.add"), BIAS),
    rejected("activation", "op", "", ("nl.exp", "'exp'"), BIAS),
    rejected("activation", "bias", "1", ("bias=c", "bias=a"), BIAS),
    rejected("activation", "bias", "partition", ("bias=c", "bias=c[0:3]"), BIAS),
    rejected("activation", "bias", "dtype|float", {"c": C.astype(np.int32)}, BIAS),
    rejected("activation", "scale", "float32|fp32", ("scale=1.0", "scale=c"), BIAS, c=C.astype(dtype_of("bfloat16"))),
    rejected("activation", "scale", "", ("scale=1.0", "scale=a"), BIAS),
    rejected("activation", "dst|data", "", ("data=a", "data=a[:, 0:7]"), BIAS),
    rejected("activation", "dst|data", "", ("dst=dst", "dst=dst[0:3]"), BIAS),
    rejected("activation", "data", "", ("data=a", "data=1.0"), BIAS),
    rejected("activate2", "op0|op1", "", ("nl.multiply", "nl.maximum"), SECOND, generation="trn3"),
    rejected("activate2", "op0|op1", "", ("op1=nl.add", "op1=nl.multiply"), SECOND, generation="trn3"),
    rejected("activate2", "op0|op1", "", ("op0=nl.multiply", "op0=nl.bypass"), SECOND, generation="trn3"),
    rejected("activate2", "imm0", "", ("imm0=c", "imm0=a"), SECOND, generation="trn3"),
    rejected("activation", "engine", "generation", {"generation": "trn2"}, GPSIMD, **TRN3),
    rejected("activation", "engine", "scalar", ("gpsimd", "vector"), GPSIMD, **TRN3),
    rejected("activation", "engine", "scalar", ("gpsimd", "unknown"), GPSIMD, **TRN3),
    rejected("activation", "data", "sbuf", {"psum": ("a",)}, GPSIMD, **TRN3),
    rejected("activation", "engine", "reduce", ("scalar)", "gpsimd)"), SUMMED, **TRN3),
    rejected("activation", "engine", "reduce", ("gpsimd)", "gpsimd, reduce_op=nl.add)"), GPSIMD, **TRN3),
    rejected("activation", "engine", "reduce", ("gpsimd)", "gpsimd, reduce_res=dst[:, 0:1])"), GPSIMD, **TRN3),
    rejected("activate2", "engine", "scalar", ("gpsimd", "vector"), SECOND_GPSIMD, **TRN3),
    rejected("activate2", "engine", "reduce", ("gpsimd)", "gpsimd, reduce_op=nl.add)"), SECOND_GPSIMD, **TRN3),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT)
def test_strict(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body, instruction, operand, rule, but, **{"a": A, "c": C, "dst": Result((4, 8), fill=0.0), **setup})
