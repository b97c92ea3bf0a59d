"""The contract's reference as a backend: plain PyTorch, slow. Chosen by name, never fallen back to."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch_paged.backends import Arguments, BackendInfo, Variant
from torch_paged.backends.python_kernels import python_kernels
from torch_paged.contract import reference


def load(device_type: str) -> Mapping[str, Callable[..., Any]]:
    """Return a validating kernel for every op."""
    return python_kernels(BACKEND, _run, check_values=True)


def _run(name: str, arguments: dict[str, Any]) -> Any:
    return getattr(reference, name.replace(".", "_"))(**arguments)


def variant(op: str, arguments: Arguments, device_type: str) -> Variant:
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
