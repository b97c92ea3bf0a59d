"""Activation instructions of the Scalar engine, two of which GpSimd runs too from generation 4 on (SDK 2.33)."""

from typing import Any

import numpy as np

import nki._dtypes as dt
from nki._machine import machine
from nki._tensor import NkiTensor
from nki.isa._access import F32, broadcast_f32, demand, f32, listed, reject, write
from nki.isa._accumulators import accumulate, check_command
from nki.isa._activations import ACTIVATIONS, activate
from nki.isa._alu import OPERATORS, Operator
from nki.isa._arithmetic import combine, find_reduction, name_of
from nki.isa._enums import engine as Engine
from nki.isa._enums import reduce_cmd as Command
from nki.isa._instruction import instruction
from nki.isa._operands import FLOATS, NUMBERS, Spec, result, scalar_or_vector, tile, vector

_COMMANDS = (Command.idle, Command.reset, Command.reduce, Command.reset_reduce)
_BIAS = (dt.float32, dt.float16, dt.bfloat16)


def _spec(**more: Any) -> Spec:
    return Spec(
        {
            "dst": result(indirect=True),
            "data": tile(indirect=True),
            "reduce_res": vector(dtypes=FLOATS, optional=True, written=True),
            **more,
        },
        engines=(Engine.scalar, Engine.gpsimd),
        equal=("dst", "data"),
        accumulates=True,
        since=4 if "imm0" in more else 2,
    )


def _function(op: Any, with_parameter: bool) -> str:
    name = name_of("op", op)
    known = name in ACTIVATIONS or (name == "prelu" and with_parameter)
    demand(known, "op", "be an activation function" + ("" if with_parameter else " without a parameter"), f"nl.{name}")
    return name


def _apply(function: str, x: F32, relu_param: F32) -> F32:
    if function in ACTIVATIONS:
        valid = ACTIVATIONS[function]
        outside = valid.invalid(x)
        if outside.any():
            measured = "a magnitude" if valid.of_magnitude else "a value"
            rule = f"give nl.{function} {measured} within its range [{valid.low:g}, {valid.high:g}]"
            reject("data", rule, float(x[outside][0]))
    return activate(function, x, relu_param)


def _check_engine(engine: Engine, *tensors: Any, reduces: bool) -> None:
    """Fail where the engine cannot do what is asked of it."""
    demand(engine in (Engine.scalar, Engine.gpsimd), "engine", "be engine.scalar or engine.gpsimd", engine)
    if engine is Engine.gpsimd:
        demand(machine().generation >= 4, "engine", "be engine.scalar before generation 4", engine)
        demand(not reduces, "engine", "be engine.scalar with reduce_op, reduce_res or a reduce_cmd", engine)
        indirect = any(isinstance(tensor, NkiTensor) and tensor.is_indirect() for tensor in tensors)
        demand(not indirect, "engine", "be engine.scalar with indirect views", engine)


def _finish(
    dst: NkiTensor, data: NkiTensor, outcome: F32, op: Operator | None, res: NkiTensor | None, command: Command
) -> None:
    check_command(command, _COMMANDS)
    if command in (Command.reduce, Command.reset_reduce):
        demand(op is not None, "reduce_op", f"be a reduction, such as nl.add, with {command}", None)
    write(dst, outcome)
    accumulate("scalar", command, data, outcome, op, res)


def _activation(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    bias: float | NkiTensor | None,
    scale: float | NkiTensor,
    reduce_op: Any,
    reduce_res: NkiTensor | None,
    command: Command,
) -> None:
    function = _function(op, with_parameter=False)
    fold = None if reduce_op is None else find_reduction("reduce_op", reduce_op, ("add",))
    if bias is not None and not isinstance(bias, NkiTensor):
        demand(machine().generation >= 3, "bias", "be a tensor before generation 3", bias)
    with np.errstate(all="ignore"):
        x = f32("data", data) * broadcast_f32("scale", scale)
        if bias is not None:
            x = x + broadcast_f32("bias", bias)
    _finish(dst, data, _apply(function, x, np.zeros((1, 1), np.float32)), fold, reduce_res, command)


@instruction(_spec(bias=scalar_or_vector(dtypes=_BIAS, optional=True), scale=scalar_or_vector()))
def activation(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    bias: float | NkiTensor | None = None,
    scale: float | NkiTensor = 1.0,
    reduce_op: Any = None,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Command = Command.idle,
    engine: Engine = Engine.scalar,
    name: str | None = None,
) -> None:
    """dst = op(data * scale + bias), and its sum over the free dimensions (nki.isa.activation, SDK 2.32 API reference).

    engine: SDK 2.33, which gives the accumulators to the Scalar engine alone. No document has indirect views on GpSimd.
    Bias dtypes: SDK 2.27 admits fp32, fp16 and bf16, SDK 2.32 any but tfloat32; the former holds here. The pseudo code
    of 2.32 adds the old accumulators twice; the text, which adds the sum once, holds here. The error of the engine's
    tables is not documented: results are those of the exact function.
    """
    reduces = reduce_op is not None or reduce_res is not None or reduce_cmd is not Command.idle
    _check_engine(engine, dst, data, reduces=reduces)
    _activation(dst, op, data, bias, scale, reduce_op, reduce_res, reduce_cmd)


@instruction(_spec(bias=scalar_or_vector(dtypes=_BIAS, optional=True), scale=scalar_or_vector()))
def activation_reduce(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    reduce_op: Any,
    reduce_res: NkiTensor | None,
    bias: float | NkiTensor | None = None,
    scale: float | NkiTensor = 1.0,
    name: str | None = None,
) -> None:
    """activation with reset_reduce (nki.isa.activation_reduce, SDK 2.32 API reference)."""
    _activation(dst, op, data, bias, scale, reduce_op, reduce_res, Command.reset_reduce)


_PIPELINES = (
    ("multiply", "add"),
    ("multiply", "subtract"),
    ("multiply", "bypass"),
    ("add", "bypass"),
    ("subtract", "bypass"),
    ("bypass", "bypass"),
)


@instruction(
    _spec(
        imm0=scalar_or_vector(dtypes=NUMBERS),
        imm1=scalar_or_vector(dtypes=NUMBERS),
        relu_param=scalar_or_vector(dtypes=NUMBERS),
    )
)
def activate2(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    imm0: float | NkiTensor,
    imm1: float | NkiTensor,
    op0: Any,
    op1: Any,
    relu_param: float | NkiTensor = 0.0,
    reverse0: bool = False,
    reverse1: bool = False,
    reduce_op: Any = None,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Command = Command.idle,
    engine: Engine = Engine.scalar,
    name: str | None = None,
) -> None:
    """dst = op((data op0 imm0) op1 imm1), and its fold over the free dimensions (nki.isa.activate2, SDK 2.32).

    engine: as of activation (SDK 2.33).
    """
    reduces = reduce_op is not None or reduce_res is not None or reduce_cmd is not Command.idle
    _check_engine(engine, dst, data, reduces=reduces)
    function = _function(op, with_parameter=True)
    names = (name_of("op0", op0), name_of("op1", op1))
    if names not in _PIPELINES:
        reject("op0 and op1", "be " + listed(tuple(" and ".join(pair) for pair in _PIPELINES)), names)
    if isinstance(imm0, NkiTensor) and isinstance(imm1, NkiTensor):
        demand(imm0.dtype is imm1.dtype, "imm1", f"have the dtype of imm0 ({imm0.dtype})", imm1.dtype)
    legal = ("add", "maximum", "minimum", "abs_max", "abs_min")
    fold = None if reduce_op is None else find_reduction("reduce_op", reduce_op, legal)
    x = f32("data", data)
    for number, (stage, imm, reverse) in enumerate(((names[0], imm0, reverse0), (names[1], imm1, reverse1))):
        if stage == "bypass":
            demand(not reverse, f"reverse{number}", f"be False with op{number} bypassed", reverse)
        else:
            x = combine(OPERATORS[stage], x, broadcast_f32(f"imm{number}", imm), reverse)
    outcome = _apply(function, x, broadcast_f32("relu_param", relu_param))
    _finish(dst, data, outcome, fold, reduce_res, reduce_cmd)
