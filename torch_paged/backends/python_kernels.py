"""What every kernel written in Python does before it computes: complete the arguments, check them, refuse."""

import os
from collections.abc import Callable
from typing import Any

import torch

from torch_paged.backends import BackendInfo
from torch_paged.contract import bounds, validate
from torch_paged.contract.schema import NAMESPACE, SCHEMAS

DEBUG = os.environ.get("TORCH_PAGED_DEBUG", "0") == "1"
"""Check values on every device, on copies in host memory."""


def python_kernels(
    info: BackendInfo, run: Callable[[str, dict[str, Any]], Any], *, check_values: bool = DEBUG
) -> dict[str, Callable[..., Any]]:
    """Return a kernel for each op that raises what the contract wants raised, then runs.

    Args:
        info: The backend: its refusals and settings.
        run: Takes the op's name, with overload, and all its arguments by name; they are valid and not refused.
        check_values: Also check what only values tell; on an accelerator that waits for the device.
    """
    return {name: _kernel(info, name, run, check_values) for name in SCHEMAS}


def _kernel(
    info: BackendInfo, name: str, run: Callable[[str, dict[str, Any]], Any], check_values: bool
) -> Callable[..., Any]:
    op, _, overload = name.partition(".")
    schema = getattr(getattr(getattr(torch.ops, NAMESPACE), op), overload or "default")._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments}

    def kernel(*args: Any, **kwargs: Any) -> Any:
        wrong = info.wrong_setting()
        if wrong is not None:
            raise ValueError(f"torch_paged: {wrong}")
        arguments = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        validate.validate(op, arguments)
        if check_values:
            bounds.check_values(op, {key: _on_host(value) for key, value in arguments.items()})
        reason = info.refusal(op, arguments)
        if reason is not None:
            raise NotImplementedError(reason)
        return run(name, arguments)

    return kernel


def _on_host(value: Any) -> Any:
    """Return a host copy of a tensor that rules about values read: indices, and scales for tensors or heads."""
    if not isinstance(value, torch.Tensor) or value.dim() > 2 or value.dtype == torch.bool:
        return value
    return value.cpu()
