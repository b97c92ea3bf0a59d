"""Plans of the last steps: the layers of a step share lengths and tables, so that one plan serves them all."""

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

ENTRIES = 8

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class _Then:
    """A tensor as it was: its values on the host, where looking costs little; elsewhere itself and its version."""

    tensor: "weakref.ref[Tensor]"
    version: int
    values: Tensor | None

    def is_now(self, tensor: Tensor) -> bool:
        if self.values is None:
            return self.tensor() is tensor and tensor._version == self.version
        return (
            tensor.device == self.values.device
            and tensor.dtype == self.values.dtype
            and torch.equal(tensor, self.values)
        )

    def alive(self) -> bool:
        return self.values is not None or self.tensor() is not None


@dataclass(frozen=True)
class _Entry:
    """A plan, and what it was made from."""

    make: Callable[..., Any]
    sizes: Hashable
    tensors: tuple[_Then, ...]
    plan: Any

    def is_of(self, make: Callable[..., Any], tensors: tuple[Tensor, ...], sizes: Hashable) -> bool:
        return (
            self.make is make
            and self.sizes == sizes
            and all(then.is_now(tensor) for then, tensor in zip(self.tensors, tensors, strict=True))
        )

    def alive(self) -> bool:
        return all(then.alive() for then in self.tensors)


_entries: tuple[_Entry, ...] = ()  # newest first; replaced as a whole, so that threads see old or new ones


def remembered(make: Callable[..., Plan], tensors: tuple[Tensor, ...], sizes: Hashable) -> Plan:
    """Return ``make(*tensors, sizes)``, as it was returned before where nothing changed since.

    On a device tensors are compared by identity and by torch's count of in-place changes, since a look at their values
    would wait for it. Changes behind torch's back (``tensor.data``, kernels of one's own) are not seen there; tensors
    of inference mode count no changes, so that what is made from them is not remembered. An op that stays a node of a
    compiled graph must not ask: compilers use the memory of a tensor again, and count nothing.

    Args:
        make: depends on its arguments alone.
        tensors: what it reads.
        sizes: compared by value.
    """
    global _entries
    host = all(tensor.device.type == "cpu" for tensor in tensors)
    if not host and any(tensor.is_inference() for tensor in tensors):
        return make(*tensors, sizes)
    for entry in _entries:
        if entry.is_of(make, tensors, sizes):
            plan: Plan = entry.plan
            return plan
    then = tuple(
        _Then(weakref.ref(tensor), 0, tensor.detach().clone())
        if host
        else _Then(weakref.ref(tensor), tensor._version, None)
        for tensor in tensors
    )
    made = make(*tensors, sizes)
    _entries = (_Entry(make, sizes, then, made), *(other for other in _entries if other.alive()))[:ENTRIES]
    return made
