"""The contract's reference as a backend: plain PyTorch, slow. Chosen by name, never fallen back to."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch_paged.backends import Arguments, BackendInfo, Variant
from torch_paged.contract.schema import NAMESPACE, SCHEMAS


def _kernel(qualified_name: str) -> Callable[..., Any]:
    from torch_paged.contract import bounds, reference, validate

    op, _, overload = qualified_name.partition(".")
    function = getattr(reference, f"{op}_{overload}" if overload else op)
    schema = getattr(getattr(torch.ops, NAMESPACE), op)
    names = [(a.name, a.default_value) for a in getattr(schema, overload or "default")._schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(names)
        arguments.update(zip(arguments, args, strict=False))
        arguments.update(kwargs)
        validate.validate(op, arguments)
        bounds.check_values(op, arguments)
        return function(**arguments)

    return kernel


def load() -> Mapping[str, Callable[..., Any]]:
    """Return a validating kernel for every op."""
    return {name: _kernel(name) for name in SCHEMAS}


def variant(op: str, arguments: Arguments) -> Variant:
    """Return the one way in which the reference runs a call."""
    return Variant(name=op, isa="torch", compiled=False)


BACKEND = BackendInfo(
    name="reference",
    summary="the contract in plain PyTorch, for checking (only by TORCH_PAGED_BACKEND=reference)",
    device_types=("cpu",),
    automatic=False,
    why_off=lambda: None,
    load=load,
    refusal=lambda op, arguments: None,
    variant=variant,
    versions=lambda: {"torch": torch.__version__},
)
