"""Memory that a kernel handed on without writing all of it: another kernel may read what was written.

A kernel says so by its name in `HANDED_ON`, a tuple of its module. All other results must be written in full.
"""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from nki._dtypes import Array
from nki._memory import Storage

_waiting: list[tuple["weakref.ref[Array]", Array, str]] = []  # who owns the bytes, the state of each, their line


def may_hand_on(function: Callable[..., Any]) -> bool:
    """Whether the kernel's module names it as one whose results only other kernels read."""
    return function.__name__ in function.__globals__.get("HANDED_ON", ())


def hand_on(storage: Storage) -> None:
    """Remember which bytes were written, as long as the memory lives."""
    owner = storage.data
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    _waiting[:] = [entry for entry in _waiting if entry[0]() is not None]
    _waiting.append((weakref.ref(owner), storage.state, storage.line))


def states_of(array: Array) -> tuple[Array, str] | None:
    """Give the state of each byte of an array (of its contiguous form) in memory that was handed on, and its line."""
    start = array.__array_interface__["data"][0]
    for owner, state, line in _waiting:
        memory = owner()
        if memory is None:
            continue
        offset = start - memory.__array_interface__["data"][0]
        if 0 <= offset < state.size:
            shape, strides = (*array.shape, array.itemsize), (*array.strides, 1)
            states = np.lib.stride_tricks.as_strided(state[offset:], shape, strides, writeable=False)
            return np.array(states, order="C").reshape(-1), line
    return None
