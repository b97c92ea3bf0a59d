"""Operators applied to operands: which are legal where, in fp32 or on bit patterns."""

from typing import Any

import numpy as np

from nki._dtypes import EXACT, DType
from nki._machine import machine
from nki._tensor import NkiTensor
from nki.isa._access import F32, Array, broadcast_f32, demand, listed, reject, values
from nki.isa._alu import OPERATORS, Kind, Operator
from nki.isa._operands import INT32, INTS

GENERATION_4 = ("abs_max", "abs_min", "square", "relu")


def name_of(operand: str, op: Any) -> str:
    """The name in nki.language of an operator or function given as an argument."""
    module = getattr(op, "__module__", None) or ""
    demand(module.startswith("nki.language"), operand, "be an operator of nki.language", repr(op))
    return str(op.__name__)


def find(operand: str, op: Any, *kinds: Kind) -> Operator:
    """The elementwise operator, of one of the kinds."""
    name = name_of(operand, op)
    found = OPERATORS.get(name)
    if found is None or found.name != name or found.kind not in kinds:
        reject(operand, "be an operator that is " + listed(tuple(kind.value for kind in kinds)), f"nl.{name}")
    if name in GENERATION_4:
        demand(machine().generation >= 4, operand, f"not be nl.{name} before generation 4", machine().generation)
    return found


def find_reduction(operand: str, op: Any, allowed: tuple[str, ...] = ()) -> Operator:
    """The operator as a reduction, where nl.max and nl.min stand for nl.maximum and nl.minimum."""
    name = name_of(operand, op)
    found = OPERATORS.get(name)
    if found is None or (found.name not in allowed if allowed else not found.reduces):
        legal = allowed or tuple(op.name for op in OPERATORS.values() if op.reduces)
        reject(
            operand,
            "be a reduction among " + listed(tuple(f"nl.{name}" for name in dict.fromkeys(legal))),
            f"nl.{name}",
        )
    return found


def _check_unused(op: Operator, operand: str, other: Any, reverse: bool) -> None:
    unused = other is None or (not isinstance(other, NkiTensor) and other == 0)
    demand(unused, operand, f"be None or 0 with nl.{op.name}", other)
    demand(not reverse, operand.replace("operand", "reverse"), f"be False with nl.{op.name}", reverse)


def arithmetic(op: Operator, x: F32, operand: str, other: Any, reverse: bool) -> F32:
    """x op other in fp32, where other is a number or a (P, 1) tensor; None or 0 with an operator of one input."""
    with np.errstate(all="ignore"):
        if op.unary:
            _check_unused(op, operand, other, reverse)
            return op.value(x).astype(np.float32)
        demand(other is not None, operand, f"be given with nl.{op.name}", None)
        y = broadcast_f32(operand, other)
        return (op.value(y, x) if reverse else op.value(x, y)).astype(np.float32)


def combine(op: Operator, x: F32, y: F32, reverse: bool = False) -> F32:
    """x op y in fp32."""
    with np.errstate(all="ignore"):
        return (op.value(y, x) if reverse else op.value(x, y)).astype(np.float32)


def bits(op: Operator, x: Array, dtype: DType, operand: str, other: Any, reverse: bool) -> Array:
    """x op other on bit patterns of the dtype."""
    if op.unary:
        _check_unused(op, operand, other, reverse)
        return op.value(x)
    y = pattern(operand, other, dtype)
    shifted, count = (y, x) if reverse else (x, y)
    if op.name.endswith("shift"):
        check_shift(operand, count)
    return op.value(shifted, count)


def check_shift(operand: str, count: Array) -> None:
    """Fail where a shift count is not below the width: no document says what such a shift gives."""
    width = count.dtype.itemsize * 8
    wide = count.astype(np.int64)
    rule = f"shift by 0 to {width - 1} bits"
    demand(bool(((wide >= 0) & (wide < width)).all()), operand, rule, f"{wide.min()} to {wide.max()}")


def pattern(operand: str, value: Any, dtype: DType) -> Array:
    """An integer or a (P, 1) tensor of the dtype, as bit patterns."""
    if isinstance(value, NkiTensor):
        demand(
            value.dtype is dtype, operand, f"have the dtype of the data ({dtype}) with bitvec operators", value.dtype
        )
        return values(operand, value)
    demand(type(value) is int, operand, "be an integer with bitvec operators", repr(value))
    width = dtype.itemsize * 8
    demand(-(1 << (width - 1)) <= value < 1 << width, operand, f"fit {width} bits", value)
    unsigned = np.array([[value & ((1 << width) - 1)]], dtype=f"uint{width}")
    return unsigned.view(dtype.numpy)


def check_bitvec_dtypes(**tensors: NkiTensor) -> None:
    """Fail unless all tensors have one integer dtype: bitvec operators cast nothing."""
    (first_name, first), *others = tensors.items()
    demand(first.dtype in INTS, first_name, "be of an integer dtype with bitvec operators", first.dtype)
    for name, tensor in others:
        rule = f"have the dtype of {first_name} ({first.dtype}) with bitvec operators"
        demand(tensor.dtype is first.dtype, name, rule, tensor.dtype)


def check_integers(result: F32, dst: NkiTensor, *inputs: Any) -> None:
    """Fail where fp32 arithmetic on 32-bit integers gives integers that it may have rounded: 2**24 stands for
    2**24 + 1 as well.
    """
    integers = any(isinstance(value, NkiTensor) and value.dtype in INT32 for value in inputs)
    if dst.dtype in INT32 and integers:
        largest = float(np.abs(result).max())
        demand(largest < EXACT, "dst", "stay below 2**24, where fp32 arithmetic begins to round integers", largest)


def reduce_free(op: Operator, x: Array) -> Array:
    """Fold the last axis."""
    with np.errstate(all="ignore"):
        if op.name in _FOLDS:
            return np.asarray(_FOLDS[op.name].reduce(x, axis=-1)).astype(x.dtype)
        return np.asarray(_FOLDS[op.name.removeprefix("abs_") + "imum"].reduce(np.abs(x), axis=-1))


_FOLDS: dict[str, np.ufunc] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
}
