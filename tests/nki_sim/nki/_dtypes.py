"""The dtypes of nki.language (shared API page, SDK 2.32), their numpy forms, and the casts of the engines.

int64 is for run-time scalars (SDK 2.33): in HBM, and in SBUF as a (1, 1) tile; DMA copies it, nothing else reads it but
scalar_load. The list of dtypes of 2.33.0 has uint64 too, which no other page uses: it is missing here.
float8_e4m3fn comes with generation 4: before, the compiler has an error for it (NCC_EVRF051 among its error codes).
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nki._errors import fail, require

Array = NDArray[Any]
EXACT = 2**24  # fp32 holds every integer up to here


@dataclass(frozen=True, eq=False)
class DType:
    """One dtype of nki.language, compared by identity.

    kind: "float", "int", "scale" (e8m0) or "packed" (four elements in one).
    """

    name: str
    numpy: np.dtype[Any]
    kind: str
    oldest: int = 2  # generation that first has it

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.numpy.itemsize

    @property
    def is_float(self) -> bool:
        """Whether the engines take it for a number with a fraction."""
        return self.kind == "float"

    @property
    def is_int(self) -> bool:
        """Whether it is an integer, bool_ included."""
        return self.kind == "int"

    def __repr__(self) -> str:
        return f"nl.{self.name}"


float32 = DType("float32", np.dtype(np.float32), "float")
tfloat32 = DType("tfloat32", np.dtype(np.float32), "float")
float16 = DType("float16", np.dtype(np.float16), "float")
bfloat16 = DType("bfloat16", np.dtype(ml_dtypes.bfloat16), "float")
float8_e4m3 = DType("float8_e4m3", np.dtype(ml_dtypes.float8_e4m3), "float")
float8_e4m3fn = DType("float8_e4m3fn", np.dtype(ml_dtypes.float8_e4m3fn), "float", 4)
float8_e5m2 = DType("float8_e5m2", np.dtype(ml_dtypes.float8_e5m2), "float")
float8_e8m0fnu = DType("float8_e8m0fnu", np.dtype(ml_dtypes.float8_e8m0fnu), "scale", 4)
bool_ = DType("bool_", np.dtype(np.uint8), "int")
uint8 = DType("uint8", np.dtype(np.uint8), "int")
uint16 = DType("uint16", np.dtype(np.uint16), "int")
uint32 = DType("uint32", np.dtype(np.uint32), "int")
int8 = DType("int8", np.dtype(np.int8), "int")
int16 = DType("int16", np.dtype(np.int16), "int")
int32 = DType("int32", np.dtype(np.int32), "int")
int64 = DType("int64", np.dtype(np.int64), "int")
float8_e5m2_x4 = DType("float8_e5m2_x4", np.dtype(np.uint32), "packed", 4)
float8_e4m3fn_x4 = DType("float8_e4m3fn_x4", np.dtype(np.uint32), "packed", 4)
float4_e2m1fn_x4 = DType("float4_e2m1fn_x4", np.dtype(np.uint16), "packed", 4)

DTYPES = {value.name: value for value in list(globals().values()) if isinstance(value, DType)}
_OF_NUMPY = {dtype.numpy: dtype for dtype in reversed(DTYPES.values())} | {
    np.dtype(np.float32): float32,
    np.dtype(np.uint8): uint8,
    np.dtype(np.uint16): uint16,
    np.dtype(np.uint32): uint32,
    np.dtype(np.bool_): bool_,
}


def of_numpy(dtype: "np.dtype[Any]") -> DType:
    """Give the dtype of a kernel's argument that came as a numpy array."""
    if dtype not in _OF_NUMPY:
        raise TypeError(f"nki has no dtype for {dtype}")
    return _OF_NUMPY[dtype]


def check_dtype(instruction: str, dtype: Any, generation: int, operand: str = "dtype") -> DType:
    """Give the dtype back, or fail where it is none or comes with a later generation."""
    require(isinstance(dtype, DType), instruction, operand, "be a dtype of nki.language", repr(dtype))
    rule = f"exist on generation {generation} (from {dtype.oldest} on)"
    require(generation >= dtype.oldest, instruction, operand, rule, dtype)
    return dtype


def check_narrow(instruction: str, operand: str, dtype: DType) -> None:
    """Fail where the dtype is int64, which only copies and scalars know."""
    require(dtype is not int64, instruction, operand, "not be nl.int64, which only DMA copies and scalars know", dtype)


def check_exact(instruction: str, operand: str, values: Array) -> None:
    """Fail where integers pass through fp32 that it cannot hold exactly."""
    if values.size and values.dtype.kind in "iuf":
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        largest = max(abs(int(finite.max(initial=0))), abs(int(finite.min(initial=0))))
        rule = "stay within 2**24, beyond which fp32 arithmetic rounds integers"
        require(largest <= EXACT, instruction, operand, rule, largest)


def _to_tf32(values: Array) -> Array:
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values.astype(np.float32))


def cast(values: Array, dtype: DType, instruction: str, operand: str = "dst") -> Array:
    """Cast an instruction's result to the dtype in which it is stored.

    fp32 to integers rounds to the nearest, ties to even, and saturates (release notes 0.6.0); fp32 to narrower floats
    rounds to nearest even and overflows to infinity. No document says what NaN becomes as an integer, nor what an
    overflow becomes as float8_e4m3fn: both are errors. Integers keep their value, and must fit; as floats they go by
    way of fp32, so up to 2**24 only.
    """
    target = dtype.numpy
    require(dtype.kind != "packed" or values.dtype == target, instruction, operand, "not be a packed dtype", dtype)
    if values.dtype == target and dtype is not tfloat32:
        return values
    with np.errstate(all="ignore"):
        if values.dtype.kind in "iub":
            if dtype.is_int:
                wide = values.astype(np.int64)
                limits = np.iinfo(target)
                fits = bool(((wide >= limits.min) & (wide <= limits.max)).all())
                require(fits, instruction, operand, f"hold every result as {dtype}", "an integer outside its range")
                return wide.astype(target)
            check_exact(instruction, operand, values)
        single = values.astype(np.float32)
        if dtype.is_int:
            require(not np.isnan(single).any(), instruction, operand, f"not store NaN as {dtype}", "NaN")
            limits = np.iinfo(target)
            rounded = np.rint(single).astype(np.float64)
            return np.clip(rounded, float(limits.min), float(limits.max)).astype(target)
        if dtype is tfloat32:
            return _to_tf32(single)
        narrow = single.astype(target)
        if dtype is float8_e4m3fn:
            overflow = np.isnan(narrow.astype(np.float32)) & ~np.isnan(single)
            if overflow.any():
                fail(instruction, operand, "stay within the range of nl.float8_e4m3fn", float(single[overflow][0]))
        return narrow
