"""Checks of the contract's numbered lines, each of which runs for a backend and a dtype of the keys."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from torch_paged.testing.backends import Backend

LINES = {
    0: "heads, cache layouts and scales",
    1: "default of softmax_scale",
    2: "scale, cap, ALiBi, mask, softmax",
    3: "positions and causality",
    4: "sliding window",
    5: "attention chunk",
    6: "attn_mask",
    7: "sinks",
    8: "rows that see no key",
    9: "lse and max_logits",
    10: "dtypes",
    11: "what is unused is not read",
    12: "more than 2^31 elements",
    13: "equal bits in any batch",
    14: "no backward",
    15: "writes, copies, gathers, merges",
}
"""The contract's lines by number; 0 is what stands before them, of the tensors, 15 what stands behind, of the ops."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (*FLOATS, *QUANTIZED)
"""What a cache may hold. Queries and new keys have the same dtype, or float32 beside a quantised cache."""

SOURCES = ("decode", "cache", "new", "both")
"""Where keys come from: the cache, with one query a sequence; or packed queries and cache, new keys, or both."""

PACKED = SOURCES[1:]

SIZES = (torch.float32, torch.bfloat16, torch.int8)
"""A dtype of each size: for checks that are slow where kernels are interpreted, or where only the size could matter."""


@dataclass(frozen=True)
class Check:
    """A check of one line of the contract.

    Attributes:
        line: its number.
        name: what must hold.
        run: takes a backend and a dtype of ``dtypes``; raises AssertionError where it does not hold.
        dtypes: those that it is about.
        of_ops: True where it is about the ops alone: the bare reference functions check nothing and have a backward.
    """

    line: int
    name: str
    run: Callable[[Backend, torch.dtype], None]
    dtypes: tuple[torch.dtype, ...]
    of_ops: bool = False


CHECKS: list[Check] = []
"""All checks, in the order of the lines."""


def check(
    line: int,
    sources: Sequence[str] = (),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    of_ops: bool = False,
    **values: Sequence[Any],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a check, once for each source and each combination of values.

    Args:
        line: number of the contract's line.
        sources: where given, the function takes a ``source``; new keys alone are not checked for quantised caches.
        dtypes: dtypes that it is about.
        of_ops: True where the bare reference functions need not pass it.
        values: further arguments of the function, by name.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        given: list[dict[str, Any]] = [{}]
        for name, choices in (({"source": sources} if sources else {}) | values).items():
            given = [chosen | {name: choice} for chosen in given for choice in choices]
        for chosen in given:
            said = [str(value).removeprefix("torch.") for value in chosen.values()]
            name = f"{function.__name__}[{'-'.join(said)}]" if said else function.__name__
            served = tuple(dtype for dtype in dtypes if dtype in FLOATS or chosen.get("source") != "new")
            CHECKS.append(Check(line, name, partial(function, **chosen), served, of_ops))
        return function

    return register
