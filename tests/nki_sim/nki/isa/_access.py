"""How instructions fail, and how they read and write their operands."""

import math
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from nki._dtypes import check_exact
from nki._errors import fail, kernel_line
from nki._machine import machine
from nki._memory import psum
from nki._tensor import NkiTensor

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

MAX_PARTITIONS = 128
MAX_STEP = 2**15 - 1


def reject(operand: str, rule: str, got: Any) -> NoReturn:
    """Fail in the name of the running instruction."""
    fail(machine().instruction, operand, rule, got)


def demand(condition: bool, operand: str, rule: str, got: Any) -> None:
    """Fail in the name of the running instruction unless the condition holds."""
    if not condition:
        reject(operand, rule, got)


def listed(values: tuple[Any, ...]) -> str:
    """The values in words."""
    return " or ".join(map(str, values))


def check_start_partition(operand: str, value: NkiTensor, partitions: int) -> None:
    """Fail unless so many partitions may start where the tensor does (trn1 architecture guide)."""
    step = 32 if partitions <= 32 else 64 if partitions <= 64 else MAX_PARTITIONS
    if value.start_partition % step:
        allowed = listed(tuple(range(0, MAX_PARTITIONS, step)))
        reject(operand, f"start at partition {allowed} with {partitions} partitions", value.start_partition)


def unknown(fact: str) -> NoReturn:
    """Refuse what cannot be simulated from the documents, naming the missing fact."""
    raise NotImplementedError(f"{machine().instruction}: the documents do not say {fact} ({kernel_line()})")


def check_pattern(operand: str, value: NkiTensor) -> None:
    """Fail where a step of the free dimensions, contiguous ones merged, exceeds 16 bits (trn1 architecture guide)."""
    merged: list[tuple[int, int]] = []
    for count, step in zip(value.shape[1:], value.strides[1:], strict=True):
        if count == 1:
            continue
        if merged and merged[-1][1] == count * step:
            merged[-1] = (merged[-1][0] * count, step)
        else:
            merged.append((count, step))
    for _, step in merged:
        demand(step <= MAX_STEP, operand, f"have steps of at most {MAX_STEP} elements", step)


def values(operand: str, value: NkiTensor, group: int = 16) -> Array:
    """The (P, F) elements as they are stored; `group`: partitions that share the indices of an indirect view."""
    return np.asarray(value.values(machine().instruction, operand, group))


def f32(operand: str, value: NkiTensor, group: int = 16) -> F32:
    """The (P, F) elements as float32."""
    return np.asarray(value.values_f32(machine().instruction, operand, group), dtype=np.float32)


def write(value: NkiTensor, elements: Array) -> None:
    """Write (P, F) elements, cast to the tensor's dtype."""
    value.write(elements, machine().instruction)


def is_number(value: Any) -> bool:
    """Whether it is a compile-time number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def scalar_f32(operand: str, value: Any) -> np.float32:
    """A compile-time number as float32."""
    demand(is_number(value), operand, "be a Python number", repr(value))
    if isinstance(value, int):
        check_exact(machine().instruction, operand, np.asarray([int32(operand, value)]))
    with np.errstate(over="ignore"):
        single = np.float32(value)
    demand(math.isinf(value) or not np.isinf(single), operand, "be a float32 number", value)
    return single


def broadcast_f32(operand: str, value: Any) -> F32:
    """A number or a (P, 1) tensor as float32, to be broadcast along the free dimensions."""
    if isinstance(value, NkiTensor):
        return f32(operand, value)
    return np.full((1, 1), scalar_f32(operand, value), dtype=np.float32)


def int32(operand: str, value: Any) -> int:
    """A compile-time integer of 32 bits."""
    if isinstance(value, bool) or not isinstance(value, int):
        reject(operand, "be an integer", repr(value))
    demand(-(2**31) <= value < 2**31, operand, "fit 32 bits", value)
    return value


def in_psum(value: Any) -> bool:
    """Whether an operand is a tensor in PSUM."""
    return isinstance(value, NkiTensor) and value.buffer is psum


def index_of(value: Any) -> NkiTensor | None:
    """The index of an indirect view, None of other operands."""
    indirect = isinstance(value, NkiTensor) and value.is_indirect() and value.dynamic is not None
    return value.dynamic.index if indirect and isinstance(value.dynamic.index, NkiTensor) else None
