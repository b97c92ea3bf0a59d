"""What an op writes is no lazily negated view: torch's own fallback fails on one with an error that names nothing."""

from collections.abc import Callable

import torch
from torch import Tensor

from torch_paged.contract.schema import NAMESPACE, SCHEMAS


def register(library: torch.library.Library) -> None:
    """Register, for the ops that write, what is called where a tensor has the negative bit."""
    for name in SCHEMAS:
        op, _, overload = name.partition(".")
        overloaded = getattr(getattr(getattr(torch.ops, NAMESPACE), op), overload or "default")
        written = {i: a.name for i, a in enumerate(overloaded._schema.arguments) if a.is_write}
        if written:
            library.impl(name, _kernel(op, overloaded, written), "Negative")


def _kernel(op: str, overloaded: torch._ops.OpOverload, written: dict[int, str]) -> Callable[..., None]:
    def kernel(*args: Tensor | None) -> None:
        for i, name in written.items():
            tensor = args[i] if i < len(args) else None
            if tensor is not None and tensor.is_neg():
                raise ValueError(f"{op}: {name} must not be a negated view, it is written, got one (is_neg())")
        overloaded(*(arg.resolve_neg() if isinstance(arg, Tensor) else arg for arg in args))

    return kernel
