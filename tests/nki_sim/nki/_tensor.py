"""Tensors and views, and how instructions read and write them.

Interface for instructions (`instruction` and `operand` are names for messages):
    tensor.shape .dtype .buffer .ndim .size .name .strides .offset
    tensor.partitions        size of dimension 0
    tensor.free              elements per partition
    tensor.start_partition   physical first partition
    tensor.bank              PSUM bank, None elsewhere; fails where the view spans several
    tensor.values(instruction, operand) -> (P, F) array of its dtype; fails on undefined elements
    tensor.values_f32(instruction, operand) -> the same as float32; fails on integers beyond 2**24
    tensor.write(values, instruction, where=None, accumulated=False): (P, F), cast by `nki._dtypes.cast` and marked as
        written; `where` (P, F) bool leaves the other elements as they are
    tensor.written() -> (P, F) bool: defined elements
    tensor.accumulated() -> (P, F) bool: elements that a matrix multiplication wrote last
    tensor.is_indirect()     address made at run time by a vector (DMA) or by columns (`.indirect`)
A (P, 1) vector reads as any other tensor. Where `.indirect(...)` made the operand, `values` and `write` follow its
columns in groups of 16 partitions; the tensor engine passes group=32.
"""

import math
from typing import Any

import numpy as np

from nki._access import Place, check_hazards, forget_neighbours, touch
from nki._dtypes import Array, DType, cast, check_dtype, check_exact, check_narrow, int64
from nki._errors import fail, require
from nki._layout import MAX_DIMS, Dynamic, Layout, as_int, check_scalar_index, check_vector_index, overlaps, row_major
from nki._machine import machine
from nki._memory import ACCUMULATED, BANK_BYTES, UNWRITTEN, WRITTEN, Storage
from nki._register import NkiScalar, RunTimeValue
from nki._views import Views


class NkiTensor(Views):
    """A view of a storage (nki.language.NkiTensor, SDK 2.32 API reference)."""

    def __init__(
        self, storage: Storage, layout: Layout, dtype: DType, dynamic: Dynamic | None = None, name: str = ""
    ) -> None:
        self.storage = storage
        self.shape, self.strides, self.offset = layout.shape, layout.strides, layout.offset
        self.dtype = dtype
        self.dynamic = dynamic
        self.name = name or storage.name
        self.buffer = storage.buffer
        self.on_chip = storage.buffer.on_chip
        self.columns_of: Layout | None = None  # what `.indirect` selects from

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    partitions = property(lambda self: self.shape[0])
    free = property(lambda self: math.prod(self.shape[1:]))

    @property
    def partition_elements(self) -> int:
        """Elements of the storage per partition, in this dtype."""
        return max(1, self.storage.free_bytes // self.dtype.itemsize)

    @property
    def start_partition(self) -> int:
        """Physical partition of the first element; 0 in HBM."""
        return self.storage.start_partition + self.offset // self.partition_elements if self.on_chip else 0

    @property
    def bank(self) -> int | None:
        """PSUM bank that holds the view."""
        if self.buffer.name != "psum":
            return None
        base = self.storage.address[1] if self.storage.address else self.storage.bank * BANK_BYTES
        free = Layout(self.shape[1:], self.strides[1:], self.offset % self.partition_elements)
        first = (base + free.first * self.dtype.itemsize) // BANK_BYTES
        last = (base + (free.last + 1) * self.dtype.itemsize - 1) // BANK_BYTES
        running = machine().instruction or "bank"
        require(first == last, running, "dst", f"lie in one bank of {BANK_BYTES} bytes", f"{first}..{last}")
        return first

    def _derive(
        self, layout: Layout, dtype: DType | None = None, dynamic: Dynamic | None = None, what: str = "view"
    ) -> "NkiTensor":
        rule = f"have at most {MAX_DIMS} dimensions"
        require(not self.on_chip or len(layout.shape) <= MAX_DIMS, what, "tensor", rule, layout.shape)
        return NkiTensor(self.storage, layout, dtype or self.dtype, dynamic, self.name)

    def view(self, dtype: DType) -> "NkiTensor":
        """Reinterpret the bytes; the last dimension is contiguous and scales with the size of the dtypes."""
        dtype = check_dtype("view", dtype, machine().generation)
        require(self.dynamic is None, "view", "tensor", "have a static address", self)
        self._check_reinterpreted("view", dtype)
        require(self.strides[-1] == 1 or self.shape[-1] == 1, "view", "last dimension", "be contiguous", self.strides)
        old, new = self.dtype.itemsize, dtype.itemsize
        outer = (*self.strides[:-1], self.offset, self.shape[-1])
        require(all(n * old % new == 0 for n in outer), "view", "dtype", "divide rows and offset", dtype)
        shape = (*self.shape[:-1], self.shape[-1] * old // new)
        strides = (*(step * old // new for step in self.strides[:-1]), 1)
        return self._derive(Layout(shape, strides, self.offset * old // new), dtype=dtype, what="view")

    reinterpret_cast = view

    def _check_reinterpreted(self, what: str, dtype: DType) -> None:
        check_narrow(what, "tensor", self.dtype)
        check_narrow(what, "dtype", dtype)

    def ap(
        self,
        pattern: list[list[int]],
        offset: int | None = None,
        scalar_offset: "NkiTensor | RunTimeValue | None" = None,
        vector_offset: "NkiTensor | None" = None,
        indirect_dim: int = 0,
        dtype: DType | None = None,
    ) -> "NkiTensor":
        """Give an access pattern of [[step, count], ...], outermost first.

        The documents disagree about patterns on views, so only whole allocations, reshaped at most, take one. A
        run-time index counts in the view's shape, as the API reference of SDK 2.32 has it; the guide of 2.31 says "the
        base tensor", which may mean the shape before a reshape.
        """
        new = check_dtype("ap", dtype, machine().generation) if dtype is not None else self.dtype
        if new is not self.dtype:
            self._check_reinterpreted("ap", new)
        whole = self.offset == 0 and self.layout.contiguous and self.dynamic is None
        whole = whole and self.size * self.dtype.itemsize == self.storage.data.size
        require(whole, "ap", "tensor", "be a whole allocation, neither sliced nor permuted", self)
        pairs = [tuple(as_int("ap", "pattern", n) for n in pair) for pair in pattern]
        good = bool(pairs) and all(len(pair) == 2 and pair[0] >= 0 and pair[1] >= 1 for pair in pairs)
        require(good, "ap", "pattern", "be [[step >= 0, count >= 1], ...]", pattern)
        require(len(pairs) <= MAX_DIMS or not self.on_chip, "ap", "pattern", f"have at most {MAX_DIMS} pairs", pattern)
        start = 0 if offset is None else as_int("ap", "offset", offset)
        layout = Layout(tuple(n for _, n in pairs), tuple(step for step, _ in pairs), start)
        dim = self._dim("ap", indirect_dim, operand="indirect_dim")
        both = scalar_offset is not None and vector_offset is not None
        require(not both, "ap", "scalar_offset and vector_offset", "not both be given", "both")
        dynamic = None
        scale = math.prod(self.shape[dim + 1 :]) * self.dtype.itemsize // new.itemsize
        if scalar_offset is not None:
            require(dim > 0 or not self.on_chip, "ap", "indirect_dim", "not be the partition on chip", dim)
            index = check_scalar_index("ap", "scalar_offset", scalar_offset, self.on_chip)
            dynamic = Dynamic("scalar", index, scale, None)
        if vector_offset is not None:
            require(dim == 0, "ap", "indirect_dim", "be 0 with vector_offset", dim)
            rows = math.prod(vector_offset.shape) if check_vector_index("ap", self, vector_offset) else 0
            require(
                pairs[0][0] == scale, "ap", "pattern's first step", f"be the {scale} elements of a row", pairs[0][0]
            )
            require(pairs[0][1] <= rows, "ap", "pattern's first count", f"be at most the {rows} indices", pairs[0][1])
            row = Layout(layout.shape[1:], layout.strides[1:], start)
            require(0 <= row.first <= row.last < scale, "ap", "pattern", f"stay in a row of {scale} elements", row.last)
            dynamic = Dynamic("vector", vector_offset, scale, self.shape[0])
        view = self._derive(layout, new, dynamic, "ap")
        view._check_pattern(new)
        return view

    def _check_pattern(self, dtype: DType) -> None:
        layout, total = self.layout, self.storage.data.size // dtype.itemsize
        if self.on_chip:
            row = self.partition_elements
            require(self.ndim >= 2, "ap", "pattern", "have a partition and a free pair on chip", self.get_pattern())
            require(
                layout.strides[0] == row,
                "ap",
                "pattern's first step",
                f"be the {row} elements of a partition",
                self.strides[0],
            )
            free = Layout(layout.shape[1:], layout.strides[1:], layout.offset % row)
            require(free.last < row, "ap", "pattern", f"stay below the {row} elements of a partition", free.last)
        if self.dynamic is None or self.dynamic.kind == "scalar":
            require(
                layout.first >= 0 and layout.last < total, "ap", "pattern", f"stay in {total} elements", layout.last
            )

    def moved(self, instruction: str, operand: str) -> tuple[Layout, bool]:
        """Give the layout with the run-time index of a scalar address, and whether that stays in the tensor."""
        layout = self.layout
        if self.dynamic is None:
            return layout, True
        require(self.dynamic.kind == "scalar", instruction, operand, "not be a gather or scatter here", self)
        index = self.index_value(instruction, operand)
        moved = Layout(layout.shape, layout.strides, layout.offset + index * self.dynamic.stride)
        reach = index * self.dynamic.stride * self.dtype.itemsize
        wide = isinstance(self.dynamic.index, NkiScalar) and self.dynamic.index.dtype is int64
        rule = "be reached by a run-time offset of 32 bits, in bytes"
        require(wide or reach < 2**32, instruction, operand, rule, reach)
        limit = self.dynamic.limit
        total = self.storage.data.size // self.dtype.itemsize
        inside = index >= 0 and (limit is None or index < limit) and moved.last < total
        if inside and self.on_chip:
            row = self.partition_elements
            low = layout.offset % row + index * self.dynamic.stride
            inside = Layout(layout.shape[1:], layout.strides[1:], low).last < row
        return moved, inside

    def resolve(self, instruction: str, operand: str) -> Layout:
        """Give the layout with the run-time index of a scalar address, which must stay in the tensor."""
        layout, inside = self.moved(instruction, operand)
        require(
            inside, instruction, operand, "stay inside its tensor with its run-time index", f"out of bounds in {self}"
        )
        return layout

    def index_value(self, instruction: str, operand: str) -> int:
        """Give the run-time index of a scalar address."""
        assert self.dynamic is not None
        index = self.dynamic.index
        if isinstance(index, RunTimeValue):
            return index.read(instruction, operand)
        return int(index.values(instruction, f"{operand}'s run-time index").reshape(())[()])

    def elements(self, array: Array, place: Place) -> Array:
        """Give the elements, as unsigned integers, of an array with a byte per byte of the storage.

        A view where the place is a layout, a copy where it is element numbers.
        """
        k = self.dtype.itemsize
        if not isinstance(place, Layout):
            return array.view(f"u{k}")[place]
        strides = tuple(step * k for step in place.strides)
        return np.ndarray(place.shape, f"u{k}", array.data, place.offset * k, strides)

    def pick(self, array: Array, place: Place) -> Array:
        """Give (*shape, itemsize) of an array with an entry per byte of the storage; a view if place is a layout."""
        k, size = self.dtype.itemsize, array.itemsize
        if not isinstance(place, Layout):
            return array.reshape(-1, k)[place]
        strides = (*(step * k * size for step in place.strides), size)
        return np.ndarray((*place.shape, k), array.dtype, array.data, place.offset * k * size, strides)

    def put(self, array: Array, place: Place, value: Any) -> None:
        """Set what `pick` gives to one value."""
        if isinstance(place, Layout):
            self.pick(array, place)[...] = value
        else:
            array.reshape(-1, self.dtype.itemsize)[place] = value

    def _columns(self, instruction: str, operand: str, group: int) -> Array:
        """Give the (P, n) elements that `.indirect` selects, counted in the storage."""
        assert self.dynamic is not None
        assert self.columns_of is not None
        assert isinstance(self.dynamic.index, NkiTensor)
        index = self.dynamic.index.values(instruction, f"{operand}'s index").astype(np.int64)
        limit = self.dynamic.limit or 0
        base = self.columns_of
        free = np.zeros((1,), np.int64)
        for count, step in zip(base.shape[1:], base.strides[1:], strict=True):
            free = (free[:, None] + np.arange(count) * step).reshape(-1)
        order = np.arange(self.free)
        result = np.empty((self.partitions, self.free), np.int64)
        for partition in range(self.partitions):
            rows = partition // group * group + order % group
            good = bool((rows < index.shape[0]).all() and (order // group < index.shape[1]).all())
            require(good, instruction, f"{operand}'s index", "have an entry for each element", index.shape)
            chosen = index[rows, order // group]
            require(
                bool(((chosen >= 0) & (chosen < limit)).all()), instruction, operand, f"lie in {limit}", chosen.max()
            )
            result[partition] = base.offset + partition * base.strides[0] + free[chosen]
        return result

    def read(self, instruction: str, operand: str, place: Place | None = None) -> Array:
        """Give the elements in the view's shape, or at a place of the same storage, all of them defined."""
        place = self.resolve(instruction, operand) if place is None else place
        touch(self.storage, instruction, operand)
        if not np.array(self.elements(self.storage.state, place), order="C").view(np.uint8).all():
            self._fail_undefined(instruction, operand)
        check_hazards(self, place, instruction, operand, writes=False)
        return np.array(self.elements(self.storage.data, place), order="C").view(self.dtype.numpy)

    def _fail_undefined(self, instruction: str, operand: str) -> None:
        where = f"{self.name or 'a tensor'} {self.shape} of {self.storage.line}"
        fail(instruction, operand, "hold initialised elements only", f"elements of {where} that were not written")

    def values(self, instruction: str, operand: str, group: int = 16) -> Array:
        """Give the elements as (P, F) in their own dtype; fails where one is undefined."""
        if self.dynamic is not None and self.dynamic.kind == "columns":
            return self.read(instruction, operand, self._columns(instruction, operand, group))
        return self.read(instruction, operand).reshape(self.partitions, -1)

    def values_f32(self, instruction: str, operand: str, group: int = 16) -> Array:
        """Give the elements as (P, F) in float32, as arithmetic sees them; integers beyond 2**24 fail."""
        values = self.values(instruction, operand, group)
        require(self.dtype.kind != "packed", instruction, operand, "not be a packed dtype", self.dtype)
        if self.dtype.is_int:
            check_exact(instruction, operand, values)
        with np.errstate(all="ignore"):
            return values.astype(np.float32)

    def write(
        self,
        values: Array,
        instruction: str,
        where: Array | None = None,
        accumulated: bool = False,
        operand: str = "dst",
        group: int = 16,
    ) -> None:
        """Store (P, F) results, cast to the view's dtype; `where` (P, F) tells which."""
        stored = cast(np.asarray(values), self.dtype, instruction, operand)
        state = ACCUMULATED if accumulated else WRITTEN
        if self.dynamic is not None and self.dynamic.kind == "columns":
            at = self._columns(instruction, operand, group)
            kept = np.ones(at.shape, bool) if where is None else where.reshape(at.shape)
            require(np.unique(at[kept]).size == at[kept].size, instruction, operand, "name each element once", self)
            self.store(stored.reshape(at.shape)[kept], instruction, operand, at[kept], state=state)
            return
        self.store(stored.reshape(self.shape), instruction, operand, where=where, state=state)

    def store(
        self,
        stored: Array,
        instruction: str,
        operand: str,
        place: Place | None = None,
        where: Array | None = None,
        state: int = WRITTEN,
    ) -> None:
        """Put elements that have the view's dtype where the view is, or at a place of the same storage."""
        place = self.resolve(instruction, operand) if place is None else place
        touch(self.storage, instruction, operand)
        require(not self.storage.constant, instruction, operand, "not be an argument handed over read-only", self)
        shape = place.shape
        if isinstance(place, Layout):
            require(not overlaps(place), instruction, operand, "write no element twice, as a stride of 0 does", self)
        check_hazards(self, place, instruction, operand, writes=True)
        k = self.dtype.itemsize
        mark = int.from_bytes([state] * k, "little")
        raw = np.ascontiguousarray(stored).reshape(shape).view(f"u{k}")
        for array, new in ((self.storage.data, raw), (self.storage.state, mark)):
            if not isinstance(place, Layout):
                array.view(f"u{k}")[place] = new
            elif where is None:
                self.elements(array, place)[...] = new
            else:
                np.copyto(self.elements(array, place), np.asarray(new, f"u{k}"), where=where.reshape(shape))
        forget_neighbours(self, place)

    def written(self) -> Array:
        """Tell as (P, F) which elements are defined."""
        state = self.pick(self.storage.state, self.resolve("written", "tensor"))
        return (state != UNWRITTEN).all(-1).reshape(self.partitions, -1)

    def accumulated(self) -> Array:
        """Tell as (P, F) which elements a matrix multiplication wrote last."""
        state = self.pick(self.storage.state, self.resolve("accumulated", "tensor"))
        return (state == ACCUMULATED).all(-1).reshape(self.partitions, -1)

    def __setitem__(self, key: Any, value: Any) -> None:
        fail("assignment", "tensor", "be written by an instruction's dst", f"tensor[{key}] = ...")

    def __bool__(self) -> bool:
        fail("tensor", "use", "be an operand of an instruction", "a Python condition")

    def __repr__(self) -> str:
        return f"{self.name or 'tensor'}{list(self.shape)} {self.dtype!r} in {self.buffer!r}"


def whole(storage: Storage) -> NkiTensor:
    """Give the tensor that a new allocation is."""
    return NkiTensor(storage, Layout(storage.shape, row_major(storage.shape)), storage.dtype)
