"""How DMA reads, writes, converts and counts: shared by its instructions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nki._dtypes import Array, cast, check_exact, check_narrow
from nki._errors import fail, require
from nki._layout import Layout, elements_of
from nki._machine import machine
from nki._tensor import NkiTensor
from nki.isa import _enums


def check_tensor(title: str, operand: str, value: Any) -> None:
    require(isinstance(value, NkiTensor), title, operand, "be a tensor", type(value).__name__)
    require(value.buffer.name != "psum", title, operand, "be in HBM or SBUF, which DMA reaches", value)
    columns = value.dynamic is not None and value.dynamic.kind == "columns"
    require(not columns, title, operand, "not be made by .indirect, which DMA does not follow", value)


def check_member(title: str, operand: str, value: Any, kind: type) -> None:
    require(isinstance(value, kind), title, operand, f"be a member of nisa.{kind.__name__}", repr(value))


def by_vector(tensor: NkiTensor) -> bool:
    return tensor.dynamic is not None and tensor.dynamic.kind == "vector"


def check_mode(title: str, dge_mode: Any, tensors: Sequence[NkiTensor]) -> None:
    """Who builds the descriptors decides what addresses may be (guide on descriptor generation)."""
    check_member(title, "dge_mode", dge_mode, _enums.dge_mode)
    generation = machine().generation
    hardware = dge_mode is _enums.dge_mode.hwdge
    require(not hardware or generation >= 3, title, "dge_mode", "not be hwdge before trn2", dge_mode)
    for tensor in tensors:
        if tensor.dynamic is not None:
            static = dge_mode is _enums.dge_mode.none
            require(not static, title, "dge_mode", "not be none with an address known at run time", tensor)
        if by_vector(tensor):
            require(not hardware, title, "dge_mode", "not be hwdge with a vector of indices", tensor)
            require(generation >= 3, title, "src's vector_offset", "not be used before trn2", tensor)


def check_priority(title: str, priority: Any, dge_mode: Any) -> None:
    if priority is not None:
        require(machine().generation >= 4, title, "priority", "be None before trn3", priority)
        require(type(priority) is int and 0 <= priority <= 3, title, "priority", "be 0 to 3", priority)
        require(dge_mode is not _enums.dge_mode.none, title, "priority", "be None with dge_mode.none", priority)


def indexed_rows(title: str, operand: str, tensor: NkiTensor) -> tuple[Array, Array]:
    """Give the elements (rows, per row) that a vector of indices names, and which of the rows lie inside.

    Indices are counted column by column; a negative one is a large unsigned number.
    """
    assert tensor.dynamic is not None
    assert isinstance(tensor.dynamic.index, NkiTensor)
    index = tensor.dynamic.index.values(title, f"{operand}'s vector_offset").T.reshape(-1).astype(np.int64)
    require(index.size >= tensor.shape[0], title, operand, f"have an index for {tensor.shape[0]} rows", index.size)
    index = index[: tensor.shape[0]]
    inside = (index >= 0) & (index < (tensor.dynamic.limit or 0))
    row = Layout((1, *tensor.shape[1:]), (0, *tensor.strides[1:]), tensor.offset)
    addresses = elements_of(row).reshape(1, -1) + index[:, None] * tensor.dynamic.stride
    return addresses, inside


def check_inside(title: str, operand: str, tensor: NkiTensor, inside: Array, oob_mode: Any) -> None:
    check_member(title, "oob_mode", oob_mode, _enums.oob_mode)
    if oob_mode is _enums.oob_mode.error and not inside.all():
        where = f"index number {int(np.argmin(inside))} of {tensor}"
        fail(title, operand, "have every run-time index inside its tensor, or oob_mode.skip", where)


def load(title: str, operand: str, tensor: NkiTensor, oob_mode: Any) -> tuple[Array, Array]:
    """Read a source: values and which of them exist, both in its shape."""
    if by_vector(tensor):
        addresses, inside = indexed_rows(title, operand, tensor)
        check_inside(title, operand, tensor, inside, oob_mode)
        values = np.zeros(addresses.shape, tensor.dtype.numpy)
        if inside.any():
            values[inside] = tensor.read(title, operand, addresses[inside])
        exist = np.broadcast_to(inside[:, None], addresses.shape)
        return values.reshape(tensor.shape), exist.reshape(tensor.shape)
    place = static(title, operand, tensor, oob_mode)
    if place is None:
        return np.zeros(tensor.shape, tensor.dtype.numpy), np.zeros(tensor.shape, bool)
    return tensor.read(title, operand, place), np.ones(tensor.shape, bool)


def static(title: str, operand: str, tensor: NkiTensor, oob_mode: Any) -> Layout | None:
    """Give the layout with a scalar index applied, None where that lies outside and is skipped."""
    check_member(title, "oob_mode", oob_mode, _enums.oob_mode)
    if tensor.dynamic is not None and oob_mode is _enums.oob_mode.skip:
        moved, inside = tensor.moved(title, operand)
        return moved if inside else None
    return tensor.resolve(title, operand)


def store(title: str, tensor: NkiTensor, values: Array, exist: Array, oob_mode: Any) -> int:
    """Write a destination where values exist, and give the number of elements moved."""
    if by_vector(tensor):
        addresses, inside = indexed_rows(title, "dst", tensor)
        check_inside(title, "dst", tensor, inside, oob_mode)
        chosen = inside[:, None] & exist.reshape(addresses.shape)
        unique = np.unique(addresses[chosen]).size == int(chosen.sum())
        require(unique, title, "dst", "be scattered to by indices that differ", "an index given twice")
        if chosen.any():
            tensor.store(values.reshape(addresses.shape)[chosen], title, "dst", addresses[chosen])
        return int(chosen.sum())
    place = static(title, "dst", tensor, oob_mode)
    if place is None:
        return 0
    tensor.store(values.reshape(tensor.shape), title, "dst", place, where=exist.reshape(tensor.shape))
    return int(exist.sum())


def check_overlap(title: str, dst: NkiTensor, src: NkiTensor) -> None:
    """Fail where a copy reads what it writes."""
    if dst.storage is not src.storage or dst.is_indirect() or src.is_indirect():
        return
    spans = []
    for operand, tensor in (("dst", dst), ("src", src)):
        layout, inside = tensor.moved(title, operand)
        if not inside:
            return
        size = tensor.dtype.itemsize
        spans.append((elements_of(layout).reshape(-1)[:, None] * size + np.arange(size)).reshape(-1))
    require(not np.isin(spans[0], spans[1]).any(), title, "dst", "not overlap src", dst)


def run_length(tensor: NkiTensor) -> int:
    """Elements that follow each other in memory: what one descriptor can take."""
    first = 1 if tensor.on_chip or by_vector(tensor) else 0
    length = 1
    for count, step in zip(reversed(tensor.shape[first:]), reversed(tensor.strides[first:]), strict=True):
        if count > 1 and step != length:
            break
        length *= count
    return length


def count(moved: int, *tensors: NkiTensor) -> None:
    size = max(tensor.dtype.itemsize for tensor in tensors)
    run = min(run_length(tensor) for tensor in tensors)
    machine().count("dma", elements=moved, bytes=moved * size, descriptors=-(-moved // run))


def convert(title: str, values: Array, exist: Array, src: NkiTensor, dst: NkiTensor) -> Array:
    """Cast by way of float32, unless the dtypes are equal."""
    if src.dtype is dst.dtype:
        return values
    check_narrow(title, "src", src.dtype)
    check_narrow(title, "dst", dst.dtype)
    packed = "packed" in (src.dtype.kind, dst.dtype.kind)
    require(not packed, title, "dst", f"have src's packed dtype {src.dtype}", dst.dtype)
    kept = values[exist]
    if src.dtype.is_int:
        check_exact(title, "src", kept)
    with np.errstate(all="ignore"):
        single = kept.astype(np.float32)
    result = np.zeros(values.shape, dst.dtype.numpy)
    result[exist] = cast(single, dst.dtype, title)
    return result
