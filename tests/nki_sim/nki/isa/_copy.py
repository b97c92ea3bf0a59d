"""Copies, fills and selections."""

from typing import Any

import numpy as np

import nki._dtypes as dt
from nki._machine import machine
from nki._register import VirtualRegister
from nki._tensor import NkiTensor
from nki.isa._access import Array, demand, f32, int32, reject, scalar_f32, values, write
from nki.isa._alu import COMPARISONS, Kind
from nki.isa._arithmetic import find
from nki.isa._enums import engine as Engine
from nki.isa._instruction import instruction
from nki.isa._operands import ANY, FLOATS, MX_PACKED, NUMBERS, SBUF_ONLY, Spec, result, tile
from nki.language import equal  # type: ignore[attr-defined]

_SELECTABLE = (*FLOATS, dt.uint8, dt.int8, dt.uint16, dt.int16, dt.bool_)


def copied(dst: NkiTensor, operand: str, src: NkiTensor) -> Array:
    """The elements of src as a copy hands them to dst: bits where the dtypes agree, else fp32."""
    if src.dtype is dst.dtype:
        return values(operand, src)
    for name, tensor in (("dst", dst), (operand, src)):
        demand(tensor.dtype in NUMBERS, name, "have a dtype that the engines cast, or that of the other", tensor.dtype)
    return f32(operand, src)


@instruction(
    Spec(
        {"dst": result(dtypes=ANY, indirect=True), "src": tile(dtypes=ANY, indirect=True)},
        engines=(Engine.vector, Engine.scalar, Engine.gpsimd),
        equal=("dst", "src"),
    )
)
def tensor_copy(dst: NkiTensor, src: NkiTensor, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """dst = src (nki.isa.tensor_copy, SDK 2.32 API reference): bit exact with equal dtypes, else through fp32."""
    if engine is Engine.scalar:
        demand(machine().generation >= 3, "engine", "not be engine.scalar before generation 3", engine)
    if engine is Engine.gpsimd:
        demand(
            not (dst.is_indirect() or src.is_indirect()), "engine", "be vector or scalar with indirect views", engine
        )
    write(dst, copied(dst, "src", src))


@instruction(Spec({"dst": result(dtypes=ANY)}, engines=(Engine.vector, Engine.gpsimd)))
def memset(dst: NkiTensor, value: Any, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """Fill dst with a constant of its kind (nki.isa.memset, SDK 2.32 API reference); packed dtypes take 0 only."""
    shape = (dst.partitions, dst.free)
    if dst.dtype in MX_PACKED:
        demand(type(value) is int and value == 0, "value", f"be 0 for {dst.dtype}", repr(value))
        write(dst, np.zeros(shape, dst.dtype.numpy))
    elif dst.dtype.is_int:
        demand(type(value) is int, "value", f"be an integer for {dst.dtype}", repr(value))
        limits = np.iinfo(dst.dtype.numpy)
        demand(limits.min <= value <= limits.max, "value", f"fit {dst.dtype}", value)
        write(dst, np.full(shape, value, dst.dtype.numpy))
    else:
        write(dst, np.full(shape, scalar_f32("value", value)))


@instruction(
    Spec(
        {
            "dst": result(indirect=True),
            "src": tile(scalar=True),
            "predicate": tile(dtypes=(dt.uint8, dt.uint16, dt.uint32), indirect=True),
        },
        equal=("dst", "src", "predicate"),
        one_in_psum=("src", "predicate"),
        same_dtype=("dst", "src"),
    )
)
def tensor_copy_predicated(
    dst: NkiTensor,
    src: float | NkiTensor,
    predicate: NkiTensor,
    reverse_pred: bool = False,
    name: str | None = None,
) -> None:
    """dst = src where the predicate is not 0 (nki.isa.tensor_copy_predicated, SDK 2.32 API reference).

    The rest of dst keeps its elements, which must be defined. SDK 2.33: reverse_pred only with a scalar src, which must
    be a float for a float dst, an integer for an integer dst.
    """
    chosen = values("predicate", predicate) != 0
    if reverse_pred:
        demand(not isinstance(src, NkiTensor), "reverse_pred", "be False with a tensor src", reverse_pred)
        chosen = ~chosen
    values("dst", dst)
    if isinstance(src, NkiTensor):
        new = values("src", src)
    elif dst.dtype.is_int:
        demand(type(src) is int, "src", f"be an integer for {dst.dtype}", repr(src))
        new = np.full(chosen.shape, int32("src", src), np.int64)
    else:
        demand(isinstance(src, float), "src", f"be a float for {dst.dtype}", repr(src))
        new = np.full(chosen.shape, scalar_f32("src", src))
    dst.write(new, machine().instruction, where=chosen)


def affine_values(dst: NkiTensor, pattern: Any, offset: Any, channel_multiplier: Any) -> Array:
    """offset + p * channel_multiplier + sum(i_k * step_k) as (P, F) int64, within 32 bits.

    No document says that a 32-bit overflow wraps: it is an error.
    """
    good = isinstance(pattern, (list, tuple)) and 1 <= len(pattern) <= 4
    good = good and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pattern)
    demand(good, "pattern", "be a list of 1 to 4 [step, num] pairs", pattern)
    line = np.zeros(1, np.int64)
    for pair in pattern:
        step, count = int32("pattern", pair[0]), int32("pattern", pair[1])
        demand(count >= 1, "pattern", "have counts of at least 1", pattern)
        line = (line[:, None] + np.arange(count) * step).reshape(-1)
    demand(line.size == dst.free, "pattern", f"count the {dst.free} elements per partition of dst", line.size)
    if isinstance(offset, VirtualRegister):
        start = offset.read(machine().instruction, "offset")
    else:
        start = int32("offset", offset)
    lanes = np.arange(dst.partitions)[:, None] * int32("channel_multiplier", channel_multiplier)
    affine = start + lanes + line
    low, high = int(affine.min()), int(affine.max())
    demand(low >= -(2**31) and high < 2**31, "pattern", "give integers of 32 bits", f"{low} to {high}")
    return affine


@instruction(Spec({"dst": result(memories=SBUF_ONLY)}, engines=(Engine.gpsimd,)))
def iota(dst: NkiTensor, pattern: Any, offset: Any = 0, channel_multiplier: int = 0, name: str | None = None) -> None:
    """dst[p, i] = offset + p * channel_multiplier + sum(i_k * step_k) (nki.isa.iota, SDK 2.32 API reference)."""
    write(dst, affine_values(dst, pattern, offset, channel_multiplier))


@instruction(
    Spec(
        {
            "dst": result(dtypes=_SELECTABLE, memories=SBUF_ONLY),
            "on_true_tile": tile(dtypes=_SELECTABLE, memories=SBUF_ONLY),
        },
        engines=(Engine.gpsimd,),
        equal=("dst", "on_true_tile"),
    )
)
def affine_select(
    dst: NkiTensor,
    pattern: Any,
    channel_multiplier: int,
    on_true_tile: NkiTensor,
    on_false_value: float,
    cmp_op: Any = equal,
    offset: Any = 0,
    name: str | None = None,
) -> None:
    """dst = on_true_tile where cmp_op(affine value, 0), else on_false_value (nki.isa.affine_select, SDK 2.32).

    The affine value is that of iota; cmp_op defaults to nl.equal. Dtypes: the SDK 2.26 page admits floats and integers
    of 8 and 16 bits, the 2.32 page any; the former holds here.
    """
    compare = find("cmp_op", cmp_op, Kind.arithmetic)
    if compare.name not in COMPARISONS:
        reject("cmp_op", "be a comparison", f"nl.{compare.name}")
    affine = affine_values(dst, pattern, offset, channel_multiplier)
    chosen = compare.value(affine, np.int64(0)) != 0
    filler = np.full(chosen.shape, scalar_f32("on_false_value", on_false_value))
    selected = copied(dst, "on_true_tile", on_true_tile)
    dst.write(selected, machine().instruction, where=chosen)
    dst.write(filler, machine().instruction, where=~chosen)
