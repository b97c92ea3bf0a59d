"""Where the elements of a view lie, and addresses that are known at run time only."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nki._dtypes import Array, int32
from nki._errors import fail, require
from nki._register import NkiScalar, RunTimeValue, VirtualRegister

if TYPE_CHECKING:
    from nki._tensor import NkiTensor

MAX_DIMS = 5  # the partition and four free dimensions


@dataclass(frozen=True)
class Layout:
    """Where a view's elements lie in its storage, in elements of its dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def first(self) -> int:
        """Lowest element."""
        return self.offset + sum(min(0, (n - 1) * step) for n, step in zip(self.shape, self.strides, strict=True))

    @property
    def last(self) -> int:
        """Highest element."""
        return self.offset + sum(max(0, (n - 1) * step) for n, step in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow each other without gaps in row-major order."""
        pairs = [(n, step) for n, step in zip(self.shape, self.strides, strict=True) if n > 1]
        expected = [math.prod(n for n, _ in pairs[at + 1 :]) for at in range(len(pairs))]
        return [step for _, step in pairs] == expected


@dataclass(frozen=True, eq=False)
class Dynamic:
    """An address that is known at run time only.

    kind: "scalar" (one index), "vector" (an index per row, DMA) or "columns" (`.indirect`).
    stride: elements from one index to the next.
    limit: indices lie below it; None where only the extent of the storage bounds them.
    """

    kind: str
    index: "NkiTensor | RunTimeValue"
    stride: int
    limit: int | None


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a new allocation."""
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))


def as_int(instruction: str, operand: str, value: Any) -> int:
    """Give a compile-time integer; registers, tensors and booleans are none."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, RunTimeValue):
        fail(instruction, operand, "be an integer known at compile time", type(value).__name__)
    number = operator.index(value)
    require(-(2**31) <= number < 2**31, instruction, operand, "fit 32 bits", number)
    return number


def elements_of(layout: Layout) -> Array:
    """Give the element numbers that a layout visits, in its shape."""
    elements = np.full((), layout.offset, np.int64)
    for count, step in zip(layout.shape, layout.strides, strict=True):
        elements = elements[..., None] + np.arange(count) * step
    return elements


def overlaps(layout: Layout) -> bool:
    """Tell whether a layout visits an element twice."""
    pairs = sorted((step, count) for step, count in zip(layout.strides, layout.shape, strict=True) if count > 1)
    reach = 0
    for step, count in pairs:
        if step <= reach:
            elements = elements_of(layout)
            return bool(np.unique(elements).size < elements.size)
        reach += step * (count - 1)
    return False


def fill_shape(shape: tuple[int, ...], size: int, what: str) -> tuple[int, ...]:
    unknown = shape.count(-1)
    require(unknown <= 1 and all(n > 0 or n == -1 for n in shape), what, "shape", "have at most one -1", shape)
    known = math.prod(n for n in shape if n != -1)
    if unknown:
        require(size % known == 0, what, "shape", f"divide {size} elements", shape)
        return tuple(size // known if n == -1 else n for n in shape)
    require(known == size, what, "shape", f"have {size} elements", shape)
    return shape


def check_scalar_index(what: str, operand: str, index: Any, on_chip: bool) -> Any:
    """Check a run-time index: a register, a scalar (of 32 bits on chip: SDK 2.33), or one int32 or uint32 in SBUF."""
    if isinstance(index, VirtualRegister):
        return index
    if isinstance(index, NkiScalar):
        narrow = not on_chip or index.dtype is int32
        require(narrow, what, operand, "be a scalar of 32 bits where the tensor is on chip", index.dtype)
        return index
    good = _is_tensor(index) and math.prod(index.shape) == 1
    require(good, what, operand, "be a register or a (1, 1) tensor", index)
    memory = index.buffer.name == "sbuf" and index.dtype.name in ("int32", "uint32")
    require(memory, what, operand, "be int32 or uint32 in SBUF", index)
    return index


def check_vector_index(what: str, base: Any, index: Any) -> int:
    """Check a vector of run-time indices and give its number of rows."""
    require(not base.on_chip, what, "tensor", "be in HBM", base)
    require(base.dynamic is None, what, "tensor", "have no other run-time index", base)
    good = _is_tensor(index) and index.dtype.name in ("int32", "uint32") and len(index.shape) == 2
    require(good, what, "vector_offset", "be a two-dimensional int32 or uint32 tensor", index)
    require(index.buffer.name == "sbuf", what, "vector_offset", "be in SBUF", index)
    return int(index.shape[0])


def _is_tensor(value: Any) -> bool:
    from nki._tensor import NkiTensor

    return isinstance(value, NkiTensor)
