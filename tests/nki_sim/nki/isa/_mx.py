"""Microscaling formats: groups of 8 partitions x 4 elements that share a power of two (generation 4).

Four elements are packed into one, the first, it is taken, in the lowest bits. Scales, guide "MXFP matmul": one
row per 8 partitions, in the first four rows of each quadrant; with 32 partitions those four rows suffice.
"""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

import nki._dtypes as dt
from nki._dtypes import DType
from nki._machine import machine
from nki._tensor import NkiTensor
from nki.isa._access import F32, Array, demand, f32, listed, reject, values, write
from nki.isa._enums import engine as Engine
from nki.isa._instruction import instruction
from nki.isa._operands import MX_PACKED, MX_SCALES, PSUM_ONLY, SBUF_ONLY, Spec, result, tile
from nki.isa._tensor_engine import ROWS_OF_INDIRECT, accumulate_psum, check_output, check_row_tile

F64 = npt.NDArray[np.float64]
QUADRANT = 32
GROUP_PARTITIONS = 8
PACKED = 4
BIAS = 127
NAN_SCALE = 255
_ELEMENTS: dict[DType, tuple[Any, int]] = {
    dt.float8_e5m2_x4: (ml_dtypes.float8_e5m2, 15),
    dt.float8_e4m3fn_x4: (ml_dtypes.float8_e4m3fn, 8),
}
"""Element dtype and largest exponent."""
_FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float64)


def _unpack(packed: Array, dtype: DType) -> F64:
    """(P, F) packed elements as (P, F, 4) numbers."""
    if dtype is dt.float4_e2m1fn_x4:
        nibbles = (packed[..., None] >> np.arange(0, 16, 4, dtype=np.uint16)) & np.uint16(15)
        return _FP4_VALUES[nibbles]
    element, _ = _ELEMENTS[dtype]
    return np.ascontiguousarray(packed).view(element).reshape(*packed.shape, PACKED).astype(np.float64)


def _check_scale(operand: str, scale: NkiTensor, partitions: int, columns: int) -> None:
    rows = (partitions, partitions // GROUP_PARTITIONS) if partitions <= QUADRANT else (partitions,)
    demand(scale.partitions in rows, operand, f"have {listed(rows)} partitions for {partitions} of data", scale.shape)
    demand(scale.free == columns, operand, f"have {columns} elements per partition", scale.shape)


def _scale_rows(partitions: int) -> list[tuple[int, int]]:
    """First and last row of scales, last excluded, per quadrant of the data."""
    count = QUADRANT // GROUP_PARTITIONS
    return [(first, first + count) for first in range(0, partitions, QUADRANT)]


def _decode(operand: str, data: NkiTensor, scale: NkiTensor) -> F64:
    """The numbers (4 P, F) that packed data and its scales stand for."""
    rows = []
    for first, last in _scale_rows(data.partitions):
        stored = values(f"{operand}_scale", scale if scale.is_indirect() else scale.slice(0, first, last))
        rows.append(stored[first:last] if scale.is_indirect() else stored)
    exponents = np.concatenate(rows).view(np.uint8)
    demand(not (exponents == NAN_SCALE).any(), f"{operand}_scale", "be a number", "NaN")
    factors = np.ldexp(1.0, exponents.astype(np.int64) - BIAS)
    spread = np.repeat(factors, GROUP_PARTITIONS, axis=0)
    numbers = _unpack(values(operand, data, ROWS_OF_INDIRECT), data.dtype) * spread[:, :, None]
    return numbers.transpose(0, 2, 1).reshape(-1, data.free)


def _check_pair(operand: str, data: NkiTensor, scale: NkiTensor) -> None:
    same = data.is_indirect() == scale.is_indirect()
    if same and data.dynamic is not None and scale.dynamic is not None:
        same = data.dynamic.index is scale.dynamic.index
    demand(same, f"{operand}_scale", f"be indirect with the index of {operand}, or both direct", scale)


@instruction(
    Spec(
        {
            "dst": result(dtypes=(dt.float32, dt.bfloat16), memories=PSUM_ONLY, indirect=True),
            "stationary": tile(dtypes=MX_PACKED, memories=SBUF_ONLY, indirect=True),
            "moving": tile(dtypes=MX_PACKED, memories=SBUF_ONLY, indirect=True),
            "stationary_scale": tile(dtypes=MX_SCALES, memories=SBUF_ONLY, indirect=True),
            "moving_scale": tile(dtypes=MX_SCALES, memories=SBUF_ONLY, indirect=True),
        },
        engines=(Engine.tensor,),
        partitions=("stationary", "moving"),
        since=4,
        work=lambda arguments: int(arguments["moving"].free),
    )
)
def nc_matmul_mx(
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    stationary_scale: NkiTensor,
    moving_scale: NkiTensor,
    tile_position: Any = None,
    tile_size: Any = None,
    accumulate: bool | None = None,
    name: str | None = None,
) -> None:
    """dst (M, N) = scaled stationary transposed times scaled moving (nki.isa.nc_matmul_mx, SDK 2.32 API reference).

    The sum runs over the partitions and the four elements of each pack.
    """
    demand(stationary.partitions % QUADRANT == 0, "stationary", "have a multiple of 32 partitions", stationary.shape)
    good = stationary.free % 2 == 0 and stationary.free <= 128
    demand(good, "stationary", "have an even free size of at most 128", stationary.shape)
    check_row_tile(tile_position, tile_size, {"stationary": stationary, "moving": moving})
    check_output(dst, stationary.free, moving.free)
    for operand, data, scale in (("stationary", stationary, stationary_scale), ("moving", moving, moving_scale)):
        _check_pair(operand, data, scale)
        _check_scale(f"{operand}_scale", scale, data.partitions, data.free)
    x, y = _decode("stationary", stationary, stationary_scale), _decode("moving", moving, moving_scale)
    with np.errstate(all="ignore"):
        accumulate_psum(dst, (x.T @ y).astype(np.float32), accumulate)


def _encode(x: F32, dtype: DType) -> tuple[Array, npt.NDArray[np.uint8]]:
    """Packed elements (P, F) and scales (P / 8, F) of numbers (P, 4 F)."""
    element, largest = _ELEMENTS[dtype]
    partitions, columns = x.shape[0], x.shape[1] // PACKED
    groups = x.reshape(partitions // GROUP_PARTITIONS, GROUP_PARTITIONS, columns, PACKED).astype(np.float64)
    peak = np.abs(groups).max(axis=(1, 3))
    exponent = np.where(peak > 0, np.frexp(peak)[1] - 1 - (largest - 1), -BIAS)
    exponent = np.maximum(exponent, -BIAS)
    scaled = groups / np.ldexp(1.0, exponent)[:, None, :, None]
    packed = np.ascontiguousarray(scaled.reshape(partitions, columns * PACKED).astype(np.float32).astype(element))
    return packed.view(dtype.numpy), (exponent + BIAS).astype(np.uint8)


@instruction(
    Spec(
        {
            "dst": result(dtypes=(dt.float8_e5m2_x4, dt.float8_e4m3fn_x4), memories=SBUF_ONLY),
            "src": tile(dtypes=(dt.float16, dt.bfloat16), memories=SBUF_ONLY),
            "dst_scale": result(dtypes=MX_SCALES, memories=SBUF_ONLY),
        },
        partitions=("dst", "src"),
        since=4,
    )
)
def quantize_mx(dst: NkiTensor, src: NkiTensor, dst_scale: NkiTensor, name: str | None = None) -> None:
    """dst, dst_scale = src in a packed 8-bit format (nki.isa.quantize_mx, SDK 2.32 API reference).

    The scale is 2 ** (floor(log2(peak)) - (largest exponent - 1)), 2 ** -127 for zeros; elements round to nearest even.
    """
    demand(src.partitions % QUADRANT == 0, "src", "have a multiple of 32 partitions", src.shape)
    if src.free % PACKED:
        reject("src", "have a multiple of 4 elements per partition", src.free)
    demand(dst.free * PACKED == src.free, "dst", f"have {src.free // PACKED} elements per partition", dst.shape)
    _check_scale("dst_scale", dst_scale, src.partitions, dst.free)
    x = f32("src", src)
    demand(bool(np.isfinite(x).all()), "src", "be finite: the scale of NaN or infinity is not documented", "others")
    packed, scales = _encode(x, dst.dtype)
    write(dst, packed)
    for at, (first, last) in enumerate(_scale_rows(src.partitions)):
        part = scales[at * (last - first) : (at + 1) * (last - first)].view(dst_scale.dtype.numpy)
        dst_scale.slice(0, first, last).write(part, machine().instruction, operand="dst_scale")
