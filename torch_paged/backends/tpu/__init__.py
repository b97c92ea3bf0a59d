"""The TPU backend: Pallas kernels in pure JAX, reached from PyTorch by thin bridges or interpreted on CPU tensors."""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from torch_paged.backends import BackendInfo
from torch_paged.backends.tpu.support import (
    HEAD_DIM_MULTIPLE,
    INTERPRET_SETTING,
    INTERPRET_VARIABLE,
    INTERPRETED,
    LIMITS,
    OLDEST,
    install_line,
    missing,
    refusal,
    variant,
    wrong_setting,
)


def why_off() -> str | None:
    """Return why the kernels cannot run here, with the remedy, or None."""
    if INTERPRETED:
        return missing("jax")
    return (
        missing(*OLDEST)
        or f"no tensor here is on a TPU: {install_line()}, or set {INTERPRET_VARIABLE}=1 to interpret the kernels"
    )


def load(device_type: str) -> Mapping[str, Callable[..., Any]] | None:
    """Return the interpreted kernels for the CPU; no other device type is reached yet."""
    if device_type != "cpu":
        return None
    from torch_paged.backends.tpu import bridge_interpret

    return bridge_interpret.kernels(BACKEND)


def versions() -> Mapping[str, str]:
    """Return the versions of jax and libtpu that are installed."""
    found = {}
    for package in OLDEST:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


BACKEND = BackendInfo(
    name="tpu",
    summary="Pallas kernels for TPU v4 to 7x",
    limits=LIMITS,
    device_types=("xla", "tpu"),
    automatic=True,
    why_off=why_off,
    load=load,
    refusal=refusal,
    variant=variant,
    versions=versions,
    wrong_setting=wrong_setting,
    head_dim_multiple=HEAD_DIM_MULTIPLE,
    contiguous_cache=True,
    asked_for={"cpu": INTERPRET_SETTING} if INTERPRETED else {},
)
