"""Instructions of the DMA engines: copies, transposes and sums between HBM and SBUF."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nki._dtypes import cast, check_exact, check_narrow
from nki._errors import require
from nki._instruction import instruction
from nki._layout import Layout
from nki._memory import sbuf
from nki._tensor import NkiTensor
from nki.isa import _enums
from nki.isa._dma_access import (
    by_vector,
    check_member,
    check_mode,
    check_overlap,
    check_priority,
    check_tensor,
    convert,
    count,
    indexed_rows,
    load,
    store,
)

AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


@instruction
def dma_copy(
    dst: NkiTensor,
    src: NkiTensor,
    priority: int | None = None,
    oob_mode: Any = _enums.oob_mode.error,
    dge_mode: Any = _enums.dge_mode.unknown,
    engine: Any = _enums.engine.unknown,
    name: str | None = None,
) -> None:
    """Copy between HBM and SBUF, with gathers and scatters of rows, casting by way of fp32.

    nki.isa.dma_copy, SDK 2.32 API reference; guides on access patterns (2.31) and descriptor generation. Where several
    columns of indices gather 128 * M rows, source and destination are contiguous and of one dtype. Not documented, and
    refused: gather and scatter at once, an index twice in a scatter, overlapping operands.
    """
    title = "dma_copy"
    check_tensor(title, "dst", dst)
    check_tensor(title, "src", src)
    require(dst.size == src.size, title, "dst", f"have the {src.size} elements of src", dst.size)
    check_mode(title, dge_mode, (dst, src))
    check_priority(title, priority, dge_mode)
    check_member(title, "engine", engine, _enums.engine)
    hardware = dge_mode is _enums.dge_mode.hwdge
    allowed = (_enums.engine.unknown, _enums.engine.sync, _enums.engine.scalar)
    good = engine in allowed and (hardware or engine is _enums.engine.unknown)
    require(good, title, "engine", "be sync or scalar, and only with dge_mode.hwdge", engine)
    require(not hardware or dst.dtype is src.dtype, title, "dst", f"be {src.dtype} as src with hwdge", dst.dtype)
    require(not (by_vector(dst) and by_vector(src)), title, "dst", "not be indirect where src is", dst)
    for operand, tensor in (("dst", dst), ("src", src)):
        if by_vector(tensor):
            _check_vector(title, operand, tensor, src if tensor is dst else dst)
    check_overlap(title, dst, src)
    values, exist = load(title, "src", src, oob_mode)
    moved = store(title, dst, convert(title, values, exist, src, dst), exist, oob_mode)
    count(moved, dst, src)


def _check_vector(title: str, operand: str, tensor: NkiTensor, other: NkiTensor) -> None:
    assert tensor.dynamic is not None
    assert isinstance(tensor.dynamic.index, NkiTensor)
    index = tensor.dynamic.index
    require(index.size == tensor.shape[0], title, operand, f"have one index for each of {tensor.shape[0]} rows", index)
    if index.shape[1] > 1:
        rule = "be gathered from with several columns of indices, not scattered to"
        require(operand == "src", title, operand, rule, index)
        require(index.shape[0] == 128, title, operand, "have 128 rows of indices where there are columns", index)
        row = Layout(tensor.shape[1:], tensor.strides[1:])
        good = row.contiguous and other.is_contiguous() and tensor.dtype is other.dtype
        require(good, title, operand, "be contiguous and of one dtype with dst where indices have columns", tensor)
    else:
        rows = other.shape[0] == tensor.shape[0] or not other.on_chip
        require(rows, title, operand, f"have one index for each partition, {other.shape[0]}", tensor.shape[0])


@instruction
def dma_transpose(
    dst: NkiTensor,
    src: NkiTensor,
    axes: tuple[int, ...] | None = None,
    priority: int | None = None,
    dge_mode: Any = _enums.dge_mode.unknown,
    oob_mode: Any = _enums.oob_mode.error,
    name: str | None = None,
) -> None:
    """Transpose into SBUF; with a vector of row indices, gather and transpose.

    nki.isa.dma_transpose, SDK 2.32 API reference. Versions differ in the shapes that hwdge takes: 16 rows of 128
    elements are in all of them. Direct transposes take 2-byte dtypes only (the trn2 guide names 4-byte ones too).
    """
    title = "dma_transpose"
    check_tensor(title, "dst", dst)
    check_tensor(title, "src", src)
    require(dst.buffer is sbuf and dst.dynamic is None, title, "dst", "be in SBUF, with a static address", dst)
    require(dst.dtype is src.dtype, title, "dst", f"have src's dtype {src.dtype}", dst.dtype)
    require(src.dtype.itemsize == 2, title, "src", "have a 2-byte dtype", src.dtype)
    require(src.ndim in AXES, title, "src", "have 2 to 4 dimensions", src.shape)
    order = AXES[src.ndim]
    require(axes is None or tuple(axes) == order, title, "axes", f"be {order} or None", axes)
    wanted = tuple(src.shape[axis] for axis in order)
    require(dst.shape == wanted, title, "dst", f"have shape {wanted}", dst.shape)
    check_mode(title, dge_mode, (dst, src))
    check_priority(title, priority, dge_mode)
    check_member(title, "oob_mode", oob_mode, _enums.oob_mode)
    require(oob_mode is _enums.oob_mode.error or src.dynamic is not None, title, "oob_mode",
            "be error where src has a static address", oob_mode)  # fmt: skip
    if by_vector(src):
        _check_gather(title, src, dge_mode)
    else:
        modes = (_enums.dge_mode.unknown, _enums.dge_mode.hwdge)
        require(dge_mode in modes, title, "dge_mode", "be unknown or hwdge", dge_mode)
        if dge_mode is _enums.dge_mode.hwdge:
            good = src.shape[0] == 16 and src.shape[-1] == 128
            require(good, title, "src", "have 16 rows of 128 elements with hwdge", src.shape)
    check_overlap(title, dst, src)
    values, exist = load(title, "src", src, oob_mode)
    moved = store(title, dst, values.transpose(order), exist.transpose(order), oob_mode)
    count(moved, src)


def _check_gather(title: str, src: NkiTensor, dge_mode: Any) -> None:
    assert src.dynamic is not None
    assert isinstance(src.dynamic.index, NkiTensor)
    index = src.dynamic.index
    modes = (_enums.dge_mode.unknown, _enums.dge_mode.swdge)
    require(dge_mode in modes, title, "dge_mode", "be unknown or swdge with a vector of indices", dge_mode)
    require(src.shape[-1] <= 128, title, "src", "have at most 128 elements in the last dimension", src.shape)
    require(src.shape[0] % 16 == 0, title, "src", "have a multiple of 16 rows", src.shape)
    flat = src.ndim < 4 or 1 in src.shape[1:3]
    require(flat, title, "src", "have size 1 in dimension 1 or 2 where there are four", src.shape)
    require(index.dtype.name == "uint32", title, "src's vector_offset", "be uint32", index.dtype)
    rows = index.shape[0]
    require(
        16 <= rows <= 128 and rows % 16 == 0, title, "src's vector_offset", "have 16, 32, ... 128 rows", index.shape
    )
    require(index.shape[1] == 1 or rows == 128, title, "src's vector_offset", "have 128 rows with columns", index.shape)


@instruction
def dma_compute(
    dst: NkiTensor,
    srcs: Sequence[NkiTensor],
    reduce_op: Any,
    scales: Sequence[float] | None = None,
    unique_indices: bool = True,
    oob_mode: Any = _enums.oob_mode.error,
    name: str | None = None,
) -> None:
    """Sum up to 16 tensors in fp32; with a vector of indices, add to scattered rows or add gathered ones.

    nki.isa.dma_compute, SDK 2.32 API reference. Indices that repeat are refused.
    """
    title = "dma_compute"
    check_tensor(title, "dst", dst)
    require(isinstance(srcs, (list, tuple)), title, "srcs", "be a list of tensors", type(srcs).__name__)
    require(1 <= len(srcs) <= 16, title, "srcs", "be 1 to 16 tensors", len(srcs))
    for number, src in enumerate(srcs):
        check_tensor(title, f"srcs[{number}]", src)
        require(src.size == dst.size, title, f"srcs[{number}]", f"have the {dst.size} elements of dst", src.size)
    for operand, tensor in (("dst", dst), *((f"srcs[{number}]", src) for number, src in enumerate(srcs))):
        check_narrow(title, operand, tensor.dtype)
    is_add = getattr(reduce_op, "__name__", "") == "add" and reduce_op.__module__.startswith("nki.language")
    require(is_add, title, "reduce_op", "be nl.add", reduce_op)
    unit = scales is None or (len(scales) == len(srcs) and all(scale == 1.0 for scale in scales))
    require(unit, title, "scales", "be None or 1.0 for each of srcs", scales)
    require(isinstance(unique_indices, bool), title, "unique_indices", "be True or False", unique_indices)
    check_mode(title, _enums.dge_mode.unknown, (dst, *srcs))
    if by_vector(dst) or any(by_vector(src) for src in srcs):
        _check_update(title, dst, srcs, unique_indices)
    total, exist = np.zeros(dst.size, np.float32), np.ones(dst.size, bool)
    for number, src in enumerate(srcs):
        values, there = load(title, f"srcs[{number}]", src, oob_mode)
        exist &= there.reshape(-1)
        require(src.dtype.kind != "packed", title, f"srcs[{number}]", "not be of a packed dtype", src.dtype)
        if src.dtype.is_int:
            check_exact(title, f"srcs[{number}]", values[there])
        with np.errstate(all="ignore"):
            total += np.where(there, values, 0).astype(np.float32).reshape(-1)
    result = np.zeros(dst.size, dst.dtype.numpy)
    result[exist] = cast(total[exist], dst.dtype, title)
    moved = store(title, dst, result, exist, oob_mode)
    count(moved * (len(srcs) + 1) // 2, dst, *srcs)


def _check_update(title: str, dst: NkiTensor, srcs: Sequence[NkiTensor], unique_indices: bool) -> None:
    require(len(srcs) == 2, title, "srcs", "be two with a vector of indices", len(srcs))
    require(unique_indices, title, "unique_indices", "be True with a vector of indices", unique_indices)
    for number, src in enumerate(srcs):
        if by_vector(src):
            addresses, inside = indexed_rows(title, f"srcs[{number}]", src)
            once = np.unique(addresses[inside]).size == addresses[inside].size
            require(once, title, f"srcs[{number}]", "have indices that differ", src)
    same = [_same_view(dst, src) for src in srcs]
    indirect = [by_vector(src) for src in srcs]
    if by_vector(dst):
        good = any(same) and not all(indirect) and srcs[same.index(True) ^ 1].buffer is sbuf
        require(good, title, "srcs", "be dst itself and a tensor of SBUF where dst is scattered to", list(srcs))
    else:
        good = any(same) and any(indirect) and dst.buffer is sbuf
        require(good, title, "srcs", "be dst itself, in SBUF, and rows that are gathered", list(srcs))


def _same_view(a: NkiTensor, b: NkiTensor) -> bool:
    same = a.storage is b.storage and a.layout == b.layout and a.dtype is b.dtype
    if a.dynamic is None or b.dynamic is None:
        return same and a.dynamic is b.dynamic
    i, j = a.dynamic.index, b.dynamic.index
    both = isinstance(i, NkiTensor) and isinstance(j, NkiTensor)
    if both and isinstance(i, NkiTensor) and isinstance(j, NkiTensor):
        return same and i.storage is j.storage and i.layout == j.layout
    return same and i is j


__all__ = ["dma_compute", "dma_copy", "dma_transpose"]
