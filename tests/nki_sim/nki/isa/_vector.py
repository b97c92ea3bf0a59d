"""Elementwise instructions of the Vector, Scalar and GpSimd engines."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nki._machine import machine
from nki._tensor import NkiTensor
from nki.isa._access import Array, demand, f32, in_psum, reject, values, write
from nki.isa._accumulators import accumulate, check_command, forget
from nki.isa._alu import Kind, Operator
from nki.isa._arithmetic import (
    arithmetic,
    bits,
    check_bitvec_dtypes,
    check_integers,
    check_shift,
    combine,
    find,
    find_reduction,
)
from nki.isa._enums import engine as Engine
from nki.isa._enums import reduce_cmd as Command
from nki.isa._instruction import instruction
from nki.isa._operands import F32_ONLY, FLOATS, INT32, NUMBERS, Spec, result, scalar_or_vector, tile, vector

_TENSORS = ("dst", "data1", "data2")


def _native_integers(arguments: Mapping[str, Any]) -> bool:
    """Whether all tensors are 32-bit integers in SBUF, which GpSimd adds and multiplies exactly."""
    tensors = [arguments[name] for name in _TENSORS]
    return all(t.dtype in INT32 and not in_psum(t) for t in tensors)


def _choose_tensor_tensor(arguments: Mapping[str, Any]) -> Engine:
    op = find("op", arguments["op"], Kind.bitvec, Kind.arithmetic)
    if op.name == "power" or (_native_integers(arguments) and not op.bitvec):
        return Engine.gpsimd
    return Engine.vector


@instruction(
    Spec(
        {"dst": result(indirect=True), "data1": tile(indirect=True), "data2": tile()},
        engines=(Engine.vector, Engine.gpsimd),
        choose=_choose_tensor_tensor,
        equal=_TENSORS,
        one_in_psum=("data1", "data2"),
    )
)
def tensor_tensor(
    dst: NkiTensor,
    data1: NkiTensor,
    data2: NkiTensor,
    op: Any,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """dst = data1 op data2 (nki.isa.tensor_tensor, SDK 2.32 API reference).

    fp32 arithmetic, except 32-bit integers on GpSimd, which are exact: an overflow there is an error, since no document
    says whether it wraps.
    """
    operator = find("op", op, Kind.bitvec, Kind.arithmetic)
    arguments = {"dst": dst, "data1": data1, "data2": data2, "op": op}
    if operator.bitvec:
        demand(engine is not Engine.gpsimd, "engine", "be engine.vector with bitvec operators", engine)
        check_bitvec_dtypes(data1=data1, data2=data2, dst=dst)
        count = values("data2", data2)
        if operator.name.endswith("shift"):
            check_shift("data2", count)
        write(dst, operator.value(values("data1", data1), count))
        return
    if operator.name == "power":
        demand(engine is not Engine.vector, "engine", "be engine.gpsimd with nl.power", engine)
        for operand in _TENSORS:
            demand(not in_psum(arguments[operand]), operand, "be in nl.sbuf with nl.power", "nl.psum")
    if operator.name in ("abs_max", "abs_min"):
        demand(engine is not Engine.gpsimd, "engine", f"be engine.vector with nl.{operator.name}", engine)
    if _native_integers(arguments) and engine is not Engine.vector and operator.name != "power":
        write(dst, _exact(operator, values("data1", data1), values("data2", data2), dst))
        return
    outcome = combine(operator, f32("data1", data1), f32("data2", data2))
    check_integers(outcome, dst, data1, data2)
    write(dst, outcome)


def _exact(operator: Operator, x: Array, y: Array, dst: NkiTensor) -> Array:
    """Native 32-bit arithmetic of GpSimd."""
    outcome = operator.value(x.astype(np.int64), y.astype(np.int64)).astype(np.int64)
    limits = np.iinfo(dst.dtype.numpy)
    low, high = int(outcome.min()), int(outcome.max())
    demand(limits.min <= low and high <= limits.max, "dst", f"hold every result as {dst.dtype}", f"{low} to {high}")
    return outcome.astype(dst.dtype.numpy)


_SCALAR_ENGINE_OPS = (("multiply", "add"), ("multiply", None), ("add", None))


@instruction(
    Spec(
        {
            "dst": result(indirect=True),
            "data": tile(indirect=True),
            "operand0": scalar_or_vector(dtypes=NUMBERS, optional=True),
            "operand1": scalar_or_vector(dtypes=NUMBERS, optional=True),
        },
        engines=(Engine.vector, Engine.scalar, Engine.gpsimd),
        choose=lambda arguments: Engine.vector,
        equal=("dst", "data"),
    )
)
def tensor_scalar(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: float | NkiTensor | None,
    reverse0: bool = False,
    op1: Any = None,
    operand1: float | NkiTensor | None = None,
    reverse1: bool = False,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """dst = (data op0 operand0) op1 operand1 (nki.isa.tensor_scalar, SDK 2.32 API reference).

    The documents do not say what operands bitvec operators take: integers, or tensors of the dtype of the data. The
    exact lowering of address arithmetic on 32-bit integers is undocumented: integers beyond 2**24 are errors.
    """
    kinds = (Kind.bitvec, Kind.bitvec_unary, Kind.arithmetic, Kind.unary)
    first = find("op0", op0, *kinds)
    second = None if op1 is None else find("op1", op1, *kinds)
    if second is None:
        demand(operand1 is None, "operand1", "be None without op1", operand1)
        demand(not reverse1, "reverse1", "be False without op1", reverse1)
    elif second.bitvec != first.bitvec:
        reject("op1", "be bitvec or arithmetic as op0 is", f"nl.{first.name} and nl.{second.name}")
    _check_tensor_scalar_engine(engine, first, second)
    if first.bitvec:
        check_bitvec_dtypes(data=data, dst=dst)
        pattern = bits(first, values("data", data), data.dtype, "operand0", operand0, reverse0)
        if second is not None:
            pattern = bits(second, pattern, data.dtype, "operand1", operand1, reverse1)
        write(dst, pattern)
        return
    for operand, value in (("operand0", operand0), ("operand1", operand1)):
        if isinstance(value, NkiTensor):
            demand(value.dtype in F32_ONLY, operand, "be nl.float32 with arithmetic operators", value.dtype)
    outcome = arithmetic(first, f32("data", data), "operand0", operand0, reverse0)
    if second is not None:
        outcome = arithmetic(second, outcome, "operand1", operand1, reverse1)
    check_integers(outcome, dst, data)
    write(dst, outcome)


def _check_tensor_scalar_engine(asked: Engine, first: Operator, second: Operator | None) -> None:
    names = (first.name, second.name if second else None)
    if asked is Engine.scalar:
        demand(machine().generation >= 3, "engine", "not be engine.scalar before generation 3", asked)
        legal = "be multiply and add, multiply alone or add alone on the Scalar engine"
        demand(names in _SCALAR_ENGINE_OPS, "op0 and op1", legal, names)
    if asked is Engine.gpsimd:
        demand(names == ("rsqrt", None), "op0 and op1", "be rsqrt alone on the GpSimd engine", names)


@instruction(
    Spec(
        {
            "dst": result(),
            "data": tile(),
            "operand0": scalar_or_vector(),
            "operand1": tile(),
            "reduce_res": vector(dtypes=FLOATS, optional=True, written=True),
        },
        equal=("dst", "data", "operand1"),
        one_in_psum=("data", "operand1"),
        accumulates=True,
    )
)
def scalar_tensor_tensor(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: float | NkiTensor,
    op1: Any,
    operand1: NkiTensor,
    reverse0: bool = False,
    reverse1: bool = False,
    reduce_cmd: Command = Command.reset_reduce,
    reduce_op: Any = ...,
    reduce_res: NkiTensor | None = None,
    name: str | None = None,
) -> None:
    """dst = (data op0 operand0) op1 operand1, operand1 a tensor (nki.isa.scalar_tensor_tensor, SDK 2.32 API reference).

    SDK 2.33 adds a fold over the free dimensions by the accumulators, taken to be that of tensor_scalar_reduce. No
    document shows its default operator: the accumulators are undefined where it is not named.
    """
    if reduce_op is ...:
        default = reduce_cmd is Command.reset_reduce and reduce_res is None
        demand(default, "reduce_op", "be given with reduce_cmd or reduce_res", "its default")
    else:
        check_command(reduce_cmd, (Command.idle, Command.reset_reduce, Command.reduce))
        fold = find_reduction("reduce_op", reduce_op, ("add", "multiply", "maximum", "minimum"))
    first = find("op0", op0, Kind.arithmetic, Kind.unary)
    second = find("op1", op1, Kind.arithmetic)
    scaled = arithmetic(first, f32("data", data), "operand0", operand0, reverse0)
    outcome = combine(second, scaled, f32("operand1", operand1), reverse1)
    check_integers(outcome, dst, data, operand1)
    write(dst, outcome)
    if reduce_op is ...:
        forget("vector")
    else:
        accumulate("vector", reduce_cmd, data, outcome, fold, reduce_res)


@instruction(Spec({"dst": result(), "data": tile()}, equal=("dst", "data")))
def reciprocal(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> None:
    """dst = 1 / data in fp32 (nki.isa.reciprocal, SDK 2.32 API reference); 1 / 0 is taken to be infinite."""
    with np.errstate(all="ignore"):
        write(dst, np.float32(1) / f32("data", data))
