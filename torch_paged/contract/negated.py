"""Ops that write refuse a cache with the negative bit before anything is written.

Torch hands an op a copy of what has the bit and cannot copy results back for an op that returns nothing: it raises once
the op has run, when what else the op writes is written. Of a tensor that is only read a copy is as good.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_paged.contract.schema import NAMESPACE, SCHEMAS


def register(library: torch.library.Library) -> None:
    """Register what the ops that write do with tensors that have the negative bit."""
    for name in SCHEMAS:
        op, _, overload = name.partition(".")
        overloaded = getattr(getattr(getattr(torch.ops, NAMESPACE), op), overload or "default")
        written = [argument.name if argument.is_write else None for argument in overloaded._schema.arguments]
        if any(written):
            library.impl(name, _writing(op, overloaded, written), "Negative")


def _writing(op: str, overloaded: torch._ops.OpOverload, written: list[str | None]) -> Callable[..., None]:
    def kernel(*args: Any) -> None:
        for name, value in zip(written, args, strict=False):
            if name is not None and isinstance(value, Tensor) and value.is_neg():
                raise ValueError(
                    f"{op}: every tensor must be dense (torch.strided) and plain, got {name} with the negative bit"
                )
        overloaded(*(value.resolve_neg() if isinstance(value, Tensor) else value for value in args))

    return kernel
