"""Kernels whose integer operands are known when they are traced.

The static profile of libtpu takes every value that is loaded from scalar memory for 0: with lengths in an array no
block of keys would be counted. ``know`` puts the values of a call's integer arguments into its kernels as constants.
The programs are made to be counted, never to be run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.interpreters import partial_eval

Scalars = list[np.ndarray[Any, Any]]
"""The values of the scalar operands of one kernel call."""


def know(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    state: Sequence[int] = (),
    rows: Mapping[tuple[int, int], tuple[int, int]] | None = None,
) -> Callable[..., Any]:
    """Return ``function`` with the values of its integer arguments known to its kernels.

    Args:
        function: takes arrays and calls kernels.
        arguments: its arguments: ``np.ndarray`` where the values are known, else what has a shape and a dtype.
        state: scalar operands that a kernel writes; they stay in memory, and count as 0.
        rows: (kernel call, scalar operand) -> another operand, which says how many rows of the first the kernel reads,
            and how long these are.
    """
    calls = _scalars(function, arguments)

    def known(*arrays: Any) -> Any:
        with _pallas_call(_Specialised(calls, state, rows or {})):
            return function(*arrays)

    return known


def _scalars(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Scalars]:
    """Return the scalar operands of each kernel call, computed from the known arguments."""

    def recorded(*arrays: Any) -> list[list[Any]]:
        recorder = _Recorder()
        with _pallas_call(recorder), jax.disable_jit():
            function(*arrays)
        return recorder.calls

    avals = [None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments]
    closed, shapes = jax.make_jaxpr(recorded, return_shape=True)(*avals)
    needed, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    leaves = jax.tree.leaves(list(arguments), is_leaf=lambda x: hasattr(x, "dtype"))
    given = [x for x, wanted in zip(leaves, used, strict=True) if wanted]
    values = jax.core.eval_jaxpr(needed, closed.consts, *given)
    return [[np.asarray(x) for x in call] for call in jax.tree.unflatten(jax.tree.structure(shapes), values)]


@contextmanager
def _pallas_call(replacement: Callable[..., Any]) -> Iterator[None]:
    original = pl.pallas_call
    pl.pallas_call = replacement
    try:
        yield
    finally:
        pl.pallas_call = original


_EXCEPTIONS = 4
"""Values that need not fit."""


class _Recorder:
    """Stands in for ``pl.pallas_call``: keeps the scalar operands and computes nothing."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []

    def __call__(self, kernel: Any, out_shape: Any, *, grid_spec: Any = None, **options: Any) -> Callable[..., Any]:
        def call(*operands: Any) -> Any:
            self.calls.append(list(operands[: _num_scalars(grid_spec)]))
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

        return call


class _Specialised:
    """Stands in for ``pl.pallas_call``: the kernel sees constants in place of its scalar operands."""

    def __init__(
        self, calls: list[Scalars], state: Sequence[int], rows: Mapping[tuple[int, int], tuple[int, int]]
    ) -> None:
        self.calls, self.state, self.rows = enumerate(calls), state, rows
        self.original = pl.pallas_call

    def __call__(self, kernel: Any, out_shape: Any, *, grid_spec: Any = None, **options: Any) -> Callable[..., Any]:
        at, values = next(self.calls)
        count = _num_scalars(grid_spec)

        def known(*refs: Any) -> Any:
            mine = list(refs)
            for i in set(range(count)) - set(self.state):
                read = values[i].size
                if (at, i) in self.rows:
                    rows, length = self.rows[at, i]
                    read = int(values[rows].flat[0]) * length
                mine[i] = _Known(refs[i], values[i], read)
            return kernel(*mine)

        kernel_call = self.original(known, out_shape, grid_spec=grid_spec, **options)

        def call(*operands: Any) -> Any:
            # From VMEM, where the compiler may put a table that was reshaped, v5e's profile knows no way to SMEM.
            scalars = [pltpu.with_memory_space_constraint(x, pltpu.MemorySpace.HBM) for x in operands[:count]]
            return kernel_call(*scalars, *operands[count:])

        return call


class _Known:
    """A ref of known values, of which the first are read: with rows of some width, each column is linear in the row."""

    def __init__(self, ref: Any, values: np.ndarray[Any, Any], read: int) -> None:
        self.shape, self.dtype = ref.shape, ref.dtype
        flat = values.reshape(-1)[:read].astype(np.int64)
        self.strides = [int(np.prod(values.shape[axis + 1 :])) for axis in range(values.ndim)]
        for width in range(1, len(flat) + 1):
            if len(flat) % width == 0 and self._fits(flat.reshape(-1, width)):
                return
        raise ValueError(f"tpu_known: columns must be linear in their rows, got {values}")

    def _fits(self, table: np.ndarray[Any, Any]) -> bool:
        self.first = table[0]
        self.steps = table[1] - table[0] if len(table) > 1 else np.zeros_like(table[0])
        linear = self.first + np.arange(len(table))[:, None] * self.steps
        self.exceptions = {int(i): int(table.flat[i]) for i in np.flatnonzero(linear != table)}
        return len(self.exceptions) <= _EXCEPTIONS

    def __getitem__(self, index: Any) -> jax.Array:
        indices = index if isinstance(index, tuple) else (index,)
        place = jnp.int32(sum(i * stride for i, stride in zip(indices, self.strides, strict=True)))
        width = len(self.first)
        row, column = (place, jnp.int32(0)) if width == 1 else (jax.lax.div(place, width), jax.lax.rem(place, width))
        value = jnp.int32(0)
        for i, (first, step) in enumerate(zip(self.first, self.steps, strict=True)):
            here = jnp.int32(first) + row * jnp.int32(step) if step else jnp.int32(first)
            value = here if i == 0 else jnp.where(column == i, here, value)
        for i, other in self.exceptions.items():
            value = jnp.where(place == i, jnp.int32(other), value)
        return value


def _num_scalars(grid_spec: Any) -> int:
    return getattr(grid_spec, "num_scalar_prefetch", 0)
