"""The only place where a dispatcher key meets a backend."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from torch_paged import backends
from torch_paged.backends import BackendInfo
from torch_paged.contract import autograd, fake
from torch_paged.contract.schema import NAMESPACE, SCHEMAS, define_ops

VARIABLE = "TORCH_PAGED_BACKEND"

overloads = SimpleNamespace()
"""Op -> its overload, ``<op>_with_stats`` too: a look-up through ``torch.ops`` costs each call more."""
calls = SimpleNamespace()
"""The same, less the Python frame that an overload's call adds; ``torch.compile`` knows the overloads only."""

_library: torch.library.Library | None = None
_served: dict[str, str] = {}  # device type -> backend name
_failure: str | None = None


def register() -> None:
    """Define the ops, then bind fakes, the autograd rule and the backends that run here."""
    global _library
    if _library is not None:
        return
    chosen = _chosen_backends()
    try:
        library = define_ops()
    except RuntimeError as error:
        raise ImportError(
            f"torch_paged: the ops of torch.ops.{NAMESPACE} are already defined in this process, by "
            "libtorch_paged_schema.so or another library; load that one or import torch_paged, not both"
        ) from error
    for name in SCHEMAS:
        library.impl(name, _no_backend_kernel(name), "CompositeExplicitAutograd")
    fake.register(library)
    autograd.register(library)
    _library = library
    for info in chosen:
        _bind(info, library)
    for name in SCHEMAS:
        op, _, overload = name.partition(".")
        packet = getattr(getattr(torch.ops, NAMESPACE), op)
        found = getattr(packet, overload or "default")
        setattr(overloads, name.replace(".", "_"), found)
        setattr(calls, name.replace(".", "_"), found._op)


def register_for_report() -> None:
    """Register, but keep the reason of a failure for the report that is to tell it."""
    global _failure
    try:
        register()
    except ImportError as error:
        _failure = str(error)


def failure() -> str | None:
    """Return why ``import torch_paged`` fails here, known only in ``python -m torch_paged.collect_env``, or None."""
    return _failure


def served() -> dict[str, str]:
    """Return the backend that serves each device type in this process."""
    return dict(_served)


def no_backend(op: str, device_type: str) -> str:
    """Return the sentence for a device that no backend serves: the device, the available backends, what to do."""
    available = ", ".join(sorted(set(_served.values()))) or "none"
    text = f"{op}: no backend serves device '{device_type}' (available backends: {available})"
    for info in backends.discover().values():
        if info.automatic and device_type in info.device_types:
            return f"{text}; backend '{info.name}' is off because {info.why_off() or f'{VARIABLE} names another'}"
    return f"{text}; move the tensors to a served device, or see `python -m torch_paged.collect_env`"


def _chosen_backends() -> list[BackendInfo]:
    known = backends.discover()
    wanted = os.environ.get(VARIABLE, "auto") or "auto"
    if wanted == "auto":
        return [info for info in known.values() if info.automatic and info.why_off() is None]
    if wanted not in known:
        raise ImportError(f"torch_paged: {VARIABLE} must be one of auto, {', '.join(known)}, got {wanted!r}")
    reason = known[wanted].why_off()
    if reason is not None:
        raise ImportError(f"torch_paged: {VARIABLE}={wanted} cannot be served: {reason}")
    return [known[wanted]]


def _bind(info: BackendInfo, library: torch.library.Library) -> None:
    kernels = info.load()
    for device_type in info.device_types:
        key = torch._C._dispatch_key_for_device(device_type)
        for name, kernel in kernels.items():
            library.impl(name, kernel, key)
        _served[device_type] = info.name


def _no_backend_kernel(name: str) -> Callable[..., NoReturn]:
    op = name.partition(".")[0]

    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        for tensor in tensors:
            if tensor.device.type not in _served:
                raise NotImplementedError(no_backend(op, tensor.device.type))
        layouts = sorted({str(tensor.layout) for tensor in tensors if tensor.layout is not torch.strided})
        kind = f"layout {layouts[0]}" if layouts else "a tensor of another kind"
        raise ValueError(f"{op}: every tensor must be dense (torch.strided) and plain, got {kind}")

    return kernel
