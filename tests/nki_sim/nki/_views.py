"""Views of tensors: slices, selections, reshapes, access patterns (nki.language.NkiTensor, SDK 2.32 API reference)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nki._dtypes import DType
from nki._errors import fail, require
from nki._layout import Dynamic, Layout, as_int, check_scalar_index, check_vector_index, fill_shape, row_major
from nki._register import RunTimeValue

if TYPE_CHECKING:
    from nki._tensor import NkiTensor


class Views:
    """The methods of NkiTensor that make views; none copies."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: DType
    dynamic: Dynamic | None
    on_chip: bool

    def _derive(
        self, layout: Layout, dtype: DType | None = None, dynamic: Dynamic | None = None, what: str = "view"
    ) -> "NkiTensor":
        raise NotImplementedError

    @property
    def layout(self) -> Layout:
        """Shape, strides and offset in one."""
        return Layout(self.shape, self.strides, self.offset)

    def _dim(self, what: str, dim: Any, first: int = 0, operand: str = "dim") -> int:
        number = as_int(what, operand, dim)
        require(first <= number < len(self.shape), what, operand, f"lie in [{first}, {len(self.shape)})", number)
        return number

    def _free_dim(self, what: str, dim: Any) -> int:
        return self._dim(what, dim, 1 if self.on_chip else 0)

    def __getitem__(self, key: Any) -> "NkiTensor":
        """Slice: ints, slices with a step, nl.ds and "..."."""
        keys = list(key) if isinstance(key, tuple) else [key]
        dots = [at for at, part in enumerate(keys) if part is Ellipsis]
        require(len(dots) <= 1, "slice", "index", "have at most one '...'", len(dots))
        if dots:
            missing = len(self.shape) - len(keys) + 1
            keys[dots[0] : dots[0] + 1] = [slice(None)] * missing
        require(len(keys) <= len(self.shape), "slice", "index", f"have at most {len(self.shape)} parts", len(keys))
        keys += [slice(None)] * (len(self.shape) - len(keys))
        self._keep_rows("slice", keys[0])
        shape, strides, offset = [], [], self.offset
        for dim, part in enumerate(keys):
            size, step = self.shape[dim], self.strides[dim]
            if isinstance(part, slice):
                start, count, jump = self._range("slice", dim, part.start, part.stop, part.step)
                shape.append(count)
                strides.append(step * jump)
            else:
                start = as_int("slice", f"index of dimension {dim}", part)
                require(0 <= start < size, "slice", f"index of dimension {dim}", f"lie in [0, {size})", start)
                if self.on_chip and dim == 0:
                    shape.append(1)
                    strides.append(step)
            offset += start * step
        if self.on_chip and len(shape) < 2:
            shape.append(1)
            strides.append(1)
        return self._derive(Layout(tuple(shape or [1]), tuple(strides or [1]), offset), dynamic=self.dynamic)

    def _keep_rows(self, what: str, rows: Any) -> None:
        """Fail where a part of the rows of a gather is asked for."""
        gather = self.dynamic is not None and self.dynamic.kind != "scalar"
        require(not gather or rows == slice(None), what, "dimension 0", "stay whole after indices for its rows", rows)

    def _range(self, what: str, dim: int, start: Any, stop: Any, step: Any) -> tuple[int, int, int]:
        size = self.shape[dim]
        low = 0 if start is None else as_int(what, f"start of dimension {dim}", start)
        high = size if stop is None else as_int(what, f"end of dimension {dim}", stop)
        jump = 1 if step is None else as_int(what, f"step of dimension {dim}", step)
        require(low >= 0, what, f"start of dimension {dim}", "be at least 0", low)
        rule = f"be above the start, {low}, and at most {size}"
        require(low < high <= size, what, f"end of dimension {dim}", rule, high)
        require(jump >= 1, what, f"step of dimension {dim}", "be at least 1", jump)
        contiguous = jump == 1 or not (self.on_chip and dim == 0)
        require(contiguous, what, "step of the partition dimension", "be 1", jump)
        return low, -(-(high - low) // jump), jump

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> "NkiTensor":
        """Give elements start, start + step, ... below end of one dimension."""
        dim = self._dim("slice", dim)
        self._keep_rows("slice", slice(None) if dim else slice(start, end, step))
        low, count, jump = self._range("slice", dim, start, end, step)
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + low * strides[dim]
        shape[dim], strides[dim] = count, strides[dim] * jump
        return self._derive(Layout(tuple(shape), tuple(strides), offset), dynamic=self.dynamic, what="slice")

    def select(self, dim: int, index: Any) -> "NkiTensor":
        """Give one index of a dimension, which goes away; the index may be a register, a scalar or a (1, 1) tensor."""
        dim = self._free_dim("select", dim)
        self._keep_rows("select", slice(None) if dim else index)
        size, step = self.shape[dim], self.strides[dim]
        kept = [at for at in range(len(self.shape)) if at != dim]
        layout = Layout(tuple(self.shape[at] for at in kept), tuple(self.strides[at] for at in kept), self.offset)
        if self.on_chip and len(kept) < 2:
            layout = Layout((*layout.shape, 1), (*layout.strides, 1), self.offset)
        if isinstance(index, (Views, RunTimeValue)):
            require(self.dynamic is None, "select", "index", "be the only run-time index of the tensor", "a second one")
            dynamic = Dynamic("scalar", check_scalar_index("select", "index", index, self.on_chip), step, size)
            return self._derive(layout, dynamic=dynamic, what="select")
        number = as_int("select", "index", index)
        require(0 <= number < size, "select", "index", f"lie in [0, {size})", number)
        return self._derive(replace(layout, offset=self.offset + number * step), dynamic=self.dynamic, what="select")

    def vector_select(self, dim: int, vector_offset: "NkiTensor") -> "NkiTensor":
        """Give a row for each entry of a (P, 1) tensor of indices in SBUF: DMA gathers and scatters."""
        dim = self._dim("vector_select", dim)
        require(dim == 0, "vector_select", "dim", "be 0", dim)
        rows = check_vector_index("vector_select", self, vector_offset)
        dynamic = Dynamic("vector", vector_offset, self.strides[0], self.shape[0])
        return self._derive(Layout((rows, *self.shape[1:]), self.strides, self.offset), dynamic=dynamic)

    def indirect(self, index: "NkiTensor", num_elem: int | None = None) -> "NkiTensor":
        """Give the columns that an index tensor names, per group of partitions (generation 4 and later)."""
        from nki._machine import machine

        require(machine().generation >= 4, "indirect", "generation", "be 4 or later", machine().generation)
        require(self.on_chip and self.dynamic is None, "indirect", "tensor", "be on chip, with a static address", self)
        good = isinstance(index, Views) and index.on_chip and index.shape[0] == self.shape[0] and index.dtype.is_int
        require(good, "indirect", "index", f"be integers ({self.shape[0]}, K) on chip", index)
        count = math.prod(index.shape) if num_elem is None else as_int("indirect", "num_elem", num_elem)
        require(1 <= count <= math.prod(index.shape), "indirect", "num_elem", "be at most the indices", count)
        dynamic = Dynamic("columns", index, 1, math.prod(self.shape[1:]))
        flat = Layout((self.shape[0], count), (self.strides[0], 0), self.offset)
        view = self._derive(flat, dynamic=dynamic, what="indirect")
        view.columns_of = self.layout
        return view

    def reshape(self, shape: Sequence[int]) -> "NkiTensor":
        """Give the same elements in row-major order in another shape, which may hold one -1."""
        sizes = fill_shape(tuple(as_int("reshape", "shape", n) for n in shape), math.prod(self.shape), "reshape")
        same = not self.on_chip or sizes[0] == self.shape[0]
        require(same, "reshape", "shape", f"keep {self.shape[0]} partitions", sizes)
        dummy = np.lib.stride_tricks.as_strided(np.empty(1, np.int8), self.shape, self.strides, writeable=False)
        try:
            strides = np.reshape(dummy, sizes, copy=False).strides
        except ValueError:
            fail("reshape", "tensor", "be contiguous where dimensions are merged or split (make a copy)", self)
        require(self.dynamic is None, "reshape", "tensor", "have a static address", self)
        return self._derive(Layout(sizes, tuple(strides), self.offset), what="reshape")

    def reshape_dim(self, dim: int, shape: Sequence[int]) -> "NkiTensor":
        """Split one dimension; the sizes may hold one -1."""
        dim = self._dim("reshape_dim", dim)
        sizes = fill_shape(tuple(as_int("reshape_dim", "shape", n) for n in shape), self.shape[dim], "reshape_dim")
        trivial = dim > 0 or not self.on_chip or sizes == self.shape[:1]
        require(trivial, "reshape_dim", "shape", "leave the partition dimension as it is", sizes)
        steps = tuple(self.strides[dim] * step for step in row_major(sizes))
        merged = (*self.shape[:dim], *sizes, *self.shape[dim + 1 :])
        strides = (*self.strides[:dim], *steps, *self.strides[dim + 1 :])
        return self._derive(Layout(merged, strides, self.offset), dynamic=self.dynamic, what="reshape_dim")

    def flatten_dims(self, start_dim: int, end_dim: int) -> "NkiTensor":
        """Merge dimensions start_dim .. end_dim, both included."""
        first = self._free_dim("flatten_dims", start_dim)
        last = self._dim("flatten_dims", end_dim, first)
        inner = Layout(self.shape[first : last + 1], self.strides[first : last + 1])
        steps = [step for n, step in zip(inner.shape, inner.strides, strict=True) if n > 1]
        unit = steps[-1] if steps else inner.strides[-1]
        scaled = Layout(inner.shape, tuple(step // unit if unit else step for step in inner.strides))
        divides = all(unit and step % unit == 0 for step in steps)
        require(not steps or (divides and scaled.contiguous), "flatten_dims", "tensor", "be contiguous there", self)
        shape = (*self.shape[:first], math.prod(inner.shape), *self.shape[last + 1 :])
        strides = (*self.strides[:first], unit, *self.strides[last + 1 :])
        return self._derive(Layout(shape, strides, self.offset), dynamic=self.dynamic, what="flatten_dims")

    def permute(self, dims: Sequence[int]) -> "NkiTensor":
        """Reorder the dimensions; on chip the first stays."""
        order = tuple(as_int("permute", "dims", dim) for dim in dims)
        complete = sorted(order) == list(range(len(self.shape)))
        require(complete, "permute", "dims", f"name each of {len(self.shape)} dimensions once", order)
        pinned = self.on_chip or (self.dynamic is not None and self.dynamic.kind == "vector")
        require(not pinned or order[0] == 0, "permute", "dims", "keep dimension 0 first", order)
        layout = Layout(tuple(self.shape[d] for d in order), tuple(self.strides[d] for d in order), self.offset)
        return self._derive(layout, dynamic=self.dynamic, what="permute")

    def rearrange(
        self,
        src_pattern: Sequence[Any],
        dst_pattern: Sequence[Any],
        fixed_sizes: dict[str, int] | None = None,
    ) -> "NkiTensor":
        """Name the dimensions, split those named by a tuple, and give them in another order, merged likewise."""
        sizes = dict(fixed_sizes or {})
        view: Any = self
        require(len(src_pattern) == len(self.shape), "rearrange", "src_pattern", "name each dimension", src_pattern)
        names: list[str] = []
        for part in src_pattern:
            group = [part] if isinstance(part, str) else list(part)
            dim = len(names)
            if len(group) > 1:
                view = view.reshape_dim(dim, tuple(sizes.get(name, -1) for name in group))
            names += group
        order = [name for part in dst_pattern for name in ([part] if isinstance(part, str) else part)]
        same = len(set(names)) == len(names) and sorted(order) == sorted(names)
        require(same, "rearrange", "dst_pattern", f"name {names} once each", dst_pattern)
        view = view.permute(tuple(names.index(name) for name in order))
        for dim, part in enumerate(dst_pattern):
            if not isinstance(part, str) and len(part) > 1:
                view = view.flatten_dims(dim, dim + len(part) - 1)
        return view

    def broadcast(self, dim: int, size: int) -> "NkiTensor":
        """Repeat a dimension of size 1 without a copy (stride 0)."""
        dim = self._free_dim("broadcast", dim)
        size = as_int("broadcast", "size", size)
        require(self.shape[dim] == 1, "broadcast", "dim", "name a dimension of size 1", self.shape[dim])
        require(size >= 1, "broadcast", "size", "be at least 1", size)
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        strides = (*self.strides[:dim], 0, *self.strides[dim + 1 :])
        return self._derive(Layout(shape, strides, self.offset), dynamic=self.dynamic, what="broadcast")

    def expand_dim(self, dim: int) -> "NkiTensor":
        """Insert a dimension of size 1."""
        dim = as_int("expand_dim", "dim", dim)
        first = 1 if self.on_chip else 0
        require(first <= dim <= len(self.shape), "expand_dim", "dim", f"lie in [{first}, {len(self.shape)}]", dim)
        step = self.shape[dim] * self.strides[dim] if dim < len(self.shape) else 1
        shape = (*self.shape[:dim], 1, *self.shape[dim:])
        strides = (*self.strides[:dim], step, *self.strides[dim:])
        return self._derive(Layout(shape, strides, self.offset), dynamic=self.dynamic, what="expand_dim")

    def squeeze_dim(self, dim: int) -> "NkiTensor":
        """Drop a dimension of size 1."""
        dim = self._free_dim("squeeze_dim", dim)
        require(self.shape[dim] == 1, "squeeze_dim", "dim", "name a dimension of size 1", self.shape[dim])
        rest = len(self.shape) > (2 if self.on_chip else 1)
        require(rest, "squeeze_dim", "tensor", "keep two dimensions on chip, one in HBM", self.shape)
        shape = (*self.shape[:dim], *self.shape[dim + 1 :])
        strides = (*self.strides[:dim], *self.strides[dim + 1 :])
        return self._derive(Layout(shape, strides, self.offset), dynamic=self.dynamic, what="squeeze_dim")

    def is_contiguous(self) -> bool:
        """Whether rows have no gaps; on chip the partition dimension does not count."""
        layout = Layout(self.shape[1:], self.strides[1:]) if self.on_chip else self.layout
        return layout.contiguous

    def is_indirect(self) -> bool:
        """Whether the address is a vector or columns that are known at run time."""
        return self.dynamic is not None and self.dynamic.kind != "scalar"

    def get_pattern(self) -> list[list[int]]:
        """Give [[step, count], ...], outermost first."""
        return [[step, count] for step, count in zip(self.strides, self.shape, strict=True)]
