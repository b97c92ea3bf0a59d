"""The only place where a dispatcher key meets a backend."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from torch_paged import backends
from torch_paged.backends import BackendInfo
from torch_paged.contract import autograd, fake, negated
from torch_paged.contract.schema import NAMESPACE, SCHEMAS, define_ops

VARIABLE = "TORCH_PAGED_BACKEND"
SWITCHES = ("TORCH_PAGED_DEBUG", "TORCH_PAGED_LOG")
"""Variables that are 0 or 1; unset and empty mean 0."""

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
    negated.register(library)
    _library = library
    for device_type, info in chosen.items():
        _bind(info, device_type, library)
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
    """Return why ``import torch_paged`` fails here, or None; known only to the modules that ``python -m`` runs."""
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
            elsewhere = [kind for kind, name in _served.items() if name == info.name]
            if elsewhere:
                return f"{text}; backend '{info.name}' serves {', '.join(elsewhere)} here"
            return f"{text}; backend '{info.name}' is off because {info.why_off() or f'{VARIABLE} names another'}"
    return f"{text}; move the tensors to a served device, or see `python -m torch_paged.collect_env`"


def _chosen_backends() -> dict[str, BackendInfo]:
    """Return which backend is to serve each device type: the one that a setting asks for, else the device's own."""
    for name in SWITCHES:
        if (asked := os.environ.get(name, "")) not in ("", "0", "1"):
            raise ImportError(f"torch_paged: {name} must be 0 or 1, got {asked!r}")
    known = backends.discover()
    wanted = os.environ.get(VARIABLE, "auto") or "auto"
    if wanted not in ("auto", *known):
        raise ImportError(f"torch_paged: {VARIABLE} must be one of auto, {', '.join(known)}, got {wanted!r}")
    chosen: dict[str, BackendInfo] = {}
    settings: dict[str, str] = {}
    for info in known.values():
        for device_type, setting in info.asked_for.items():
            if wanted not in ("auto", info.name) or device_type in settings:
                other = settings.get(device_type, f"{VARIABLE}={wanted}")
                raise ImportError(f"torch_paged: {setting} and {other} contradict each other: unset one of them")
            _require(info, setting)
            chosen[device_type], settings[device_type] = info, setting
    if wanted != "auto":
        _require(known[wanted], f"{VARIABLE}={wanted}")
    for info in known.values():
        if info.name == wanted or (wanted == "auto" and info.automatic and info.why_off() is None):
            chosen = dict.fromkeys(info.device_types, info) | chosen
    return chosen


def _require(info: BackendInfo, setting: str) -> None:
    reason = info.why_off()
    if reason is not None:
        raise ImportError(f"torch_paged: {setting} cannot be served: {reason}")


def _bind(info: BackendInfo, device_type: str, library: torch.library.Library) -> None:
    kernels = info.load(device_type)
    if kernels is None:
        return
    for name, kernel in kernels.items():
        library.impl(name, kernel, torch._C._dispatch_key_for_device(device_type))
    _served[device_type] = info.name


def _no_backend_kernel(name: str) -> Callable[..., NoReturn]:
    op = name.partition(".")[0]

    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if not tensors:
            first = getattr(getattr(torch.ops, NAMESPACE), op).default._schema.arguments[0].name
            raise ValueError(f"{op}: {first} must be given, got None")
        for tensor in tensors:
            if tensor.device.type not in _served:
                raise NotImplementedError(no_backend(op, tensor.device.type))
        layouts = sorted({str(tensor.layout) for tensor in tensors if tensor.layout is not torch.strided})
        kind = f"layout {layouts[0]}" if layouts else "a tensor of another kind"
        raise ValueError(f"{op}: every tensor must be dense (torch.strided) and plain, got {kind}")

    return kernel
