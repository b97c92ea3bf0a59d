"""ALU operators of the Vector, Scalar and GpSimd engines (SDK 2.32 API reference, table of math operators)."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Kind(Enum):
    """How an operator reads its elements."""

    bitvec = "bitvec"
    bitvec_unary = "bitvec unary"
    arithmetic = "arithmetic"
    unary = "unary"


@dataclass(frozen=True)
class Operator:
    """One operator: its kind, whether it may reduce, and its value on arrays of one dtype."""

    name: str
    kind: Kind
    reduces: bool
    value: Callable[..., Array]

    @property
    def bitvec(self) -> bool:
        return self.kind in (Kind.bitvec, Kind.bitvec_unary)

    @property
    def unary(self) -> bool:
        return self.kind in (Kind.unary, Kind.bitvec_unary)


def _flag(compare: Callable[..., Array]) -> Callable[..., Array]:
    """Comparisons and logical operators give 1.0 or 0.0."""
    return lambda x, y: compare(x, y).astype(np.float32)


def _shift(x: Array, bits: Array, shift: Callable[..., Array]) -> Array:
    """Shift bit patterns: the right shift is logical, whatever the sign."""
    unsigned = np.dtype(f"uint{x.dtype.itemsize * 8}")
    return shift(x.view(unsigned), np.asarray(bits).astype(unsigned)).view(x.dtype)


def _operators() -> dict[str, Operator]:
    table: dict[str, Operator] = {}

    def put(kind: Kind, reduces: bool, **values: Callable[..., Array]) -> None:
        for name, value in values.items():
            table[name] = Operator(name, kind, reduces, value)

    put(Kind.bitvec_unary, False, invert=np.invert)
    put(Kind.bitvec, True, bitwise_and=np.bitwise_and, bitwise_or=np.bitwise_or, bitwise_xor=np.bitwise_xor)
    put(
        Kind.bitvec,
        False,
        left_shift=lambda x, y: _shift(x, y, np.left_shift),
        right_shift=lambda x, y: _shift(x, y, np.right_shift),
    )
    put(
        Kind.arithmetic,
        True,
        add=np.add,
        subtract=np.subtract,
        multiply=np.multiply,
        maximum=np.maximum,
        minimum=np.minimum,
        logical_and=_flag(np.logical_and),
        logical_or=_flag(np.logical_or),
        logical_xor=_flag(np.logical_xor),
    )
    put(
        Kind.arithmetic,
        False,
        equal=_flag(np.equal),
        not_equal=_flag(np.not_equal),
        greater_equal=_flag(np.greater_equal),
        greater=_flag(np.greater),
        less_equal=_flag(np.less_equal),
        less=_flag(np.less),
        power=np.power,
        abs_max=lambda x, y: np.maximum(np.abs(x), np.abs(y)),
        abs_min=lambda x, y: np.minimum(np.abs(x), np.abs(y)),
    )
    put(
        Kind.unary,
        False,
        abs=np.abs,
        square=np.square,
        relu=lambda x: np.maximum(x, np.float32(0)),
        rsqrt=lambda x: np.float32(1) / np.sqrt(x),
        reciprocal=lambda x: np.float32(1) / x,
    )
    table["max"] = table["maximum"]
    table["min"] = table["minimum"]
    return table


OPERATORS = _operators()

COMPARISONS = ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")

IDENTITIES = {
    "add": 0.0,
    "subtract": 0.0,
    "multiply": 1.0,
    "maximum": -np.inf,
    "minimum": np.inf,
    "abs_max": 0.0,
    "abs_min": np.inf,
}
"""What `reset_reduce` puts into the accumulators before the operator folds the results."""
