"""The contract's reference as a backend: plain PyTorch, slow. Chosen by name, never fallen back to."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch_paged.backends import Arguments, BackendInfo, Variant
from torch_paged.contract import bounds, reference, validate
from torch_paged.contract.schema import NAMESPACE, SCHEMAS


def _kernel(qualified_name: str) -> Callable[..., Any]:
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
    summary="the contract in plain PyTorch, for checking",
    limits={
        "query dtypes": "float32, bfloat16, float16",
        "cache dtypes": "the query's, int8, float8_e4m3fn, float8_e5m2",
        "scales": "per tensor, per head, per token and head",
        "head_dim, block size, H / KH": "any",
        "cache strides": "any with a unit last stride",
        "latent caches": "yes",
        "windows, chunks, soft caps, sinks, ALiBi": "yes",
        "masks, query positions, statistics": "yes",
        "batch-invariant results": "no",
        "bad values": "raise before the first write",
        "run on hardware": "x86_64",
    },
    device_types=("cpu",),
    automatic=False,
    why_off=lambda: None,
    load=load,
    refusal=lambda op, arguments: None,
    variant=variant,
    versions=lambda: {"torch": torch.__version__},
)
