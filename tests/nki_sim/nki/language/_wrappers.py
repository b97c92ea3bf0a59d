"""Experimental functions of nki.language, each made of instructions (release notes 0.3.0).

Those that the release notes call wrong on hardware are not here, nor forms of others that they call wrong.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nki._errors import require
from nki._memory import psum, sbuf
from nki._tensor import NkiTensor
from nki.language._allocation import ndarray
from nki.language._operators import add, maximum, minimum, multiply  # type: ignore[attr-defined]

__all__ = ["broadcast_to", "expand_dims", "load", "matmul", "max", "mean", "min", "prod", "store", "sum", "transpose"]


def load(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Copy a tensor of HBM into a new one of SBUF."""
    from nki import isa

    require(not src.on_chip, "load", "src", "be in HBM", src)
    shape = src.shape if src.ndim > 1 else (src.shape[0], 1)
    dst = ndarray(shape, src.dtype if dtype is None else dtype)
    isa.dma_copy(dst=dst, src=src)
    return dst


def store(dst: NkiTensor, value: NkiTensor) -> None:
    """Copy a tensor of SBUF into HBM."""
    from nki import isa

    require(value.buffer is sbuf, "store", "value", "be in SBUF", value)
    isa.dma_copy(dst=dst, src=value)


def matmul(x: NkiTensor, y: NkiTensor, transpose_x: bool = False) -> NkiTensor:
    """Give x.T @ y in PSUM, x being handed over transposed: only that form is right on hardware."""
    from nki import isa

    require(transpose_x is True, "matmul", "transpose_x", "be True", transpose_x)
    dst = ndarray((x.free, y.free), _float32(), buffer=psum)
    isa.nc_matmul(dst=dst, stationary=x, moving=y, accumulate=False)
    return dst


def _float32() -> Any:
    from nki.language import float32

    return float32


def transpose(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Give the transpose of a (P, F) tensor of SBUF in PSUM."""
    from nki import isa

    require(dtype is None or dtype is x.dtype, "transpose", "dtype", "be that of x", dtype)
    dst = ndarray((x.free, x.partitions), x.dtype, buffer=psum)
    isa.nc_transpose(dst=dst, data=x, engine=isa.engine.tensor)
    return dst


def _reduce(title: str, op: Any, x: NkiTensor, axis: int | Sequence[int], dtype: Any, keepdims: bool) -> NkiTensor:
    from nki import isa

    axes = [axis] if isinstance(axis, int) else list(axis)
    axes = [at + x.ndim if at < 0 else at for at in axes]
    require(0 not in axes, title, "axis", "leave out the partitions", axis)
    kept = [n for at, n in enumerate(x.shape) if at not in axes]
    shape = [1 if at in axes else n for at, n in enumerate(x.shape)] if keepdims else kept
    dst = ndarray(tuple(shape if len(shape) > 1 else [*shape, 1]), x.dtype if dtype is None else dtype)
    isa.tensor_reduce(dst=dst, op=op, data=x, axis=axes, keepdims=keepdims or len(kept) < 2)
    return dst


def max(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Give the maximum over the last dimensions."""
    return _reduce("max", maximum, x, axis, dtype, keepdims)


def min(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Give the minimum over the last dimensions."""
    return _reduce("min", minimum, x, axis, dtype, keepdims)


def sum(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Give the sum over the last dimensions."""
    return _reduce("sum", add, x, axis, dtype, keepdims)


def prod(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Give the product over the last dimensions."""
    return _reduce("prod", multiply, x, axis, dtype, keepdims)


def mean(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Give the mean over the last dimensions."""
    from nki import isa

    axes = [axis] if isinstance(axis, int) else list(axis)
    total = _reduce("mean", add, x, axis, _float32(), keepdims)
    dst = ndarray(total.shape, x.dtype if dtype is None else dtype)
    isa.tensor_scalar(dst=dst, data=total, op0=multiply, operand0=1.0 / math.prod(x.shape[at] for at in axes))
    return dst


def broadcast_to(x: NkiTensor, shape: Sequence[int]) -> NkiTensor:
    """Give a view in which free dimensions of size 1 repeat."""
    require(len(shape) == x.ndim, "broadcast_to", "shape", f"have {x.ndim} dimensions", shape)
    view = x
    for dim, (old, new) in enumerate(zip(x.shape, np.asarray(shape).tolist(), strict=True)):
        view = view if old == new else view.broadcast(dim, int(new))
    return view


def expand_dims(x: NkiTensor, axis: int) -> NkiTensor:
    """Give a view with a further dimension of size 1."""
    return x.expand_dim(axis)
