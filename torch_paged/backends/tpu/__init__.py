"""The TPU backend: Pallas kernels in pure JAX, reached from PyTorch by thin bridges or interpreted on CPU tensors."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

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
from torch_paged.backends.xla_runtime import on_neuron

_BRIDGES = {"xla": "torch_xla", "tpu": "torch_tpu"}
"""Device type -> the package whose tensors have it."""


def why_off() -> str | None:
    """Return why the kernels cannot run here, with the remedy, or None."""
    if INTERPRETED:
        return missing("jax")
    reached = [package for device_type, package in _BRIDGES.items() if _in_reach(device_type)]
    wrong = missing("jax", "libtpu", *reached)
    if wrong is not None or reached:
        return wrong
    elsewhere = ", as torch_xla's are on NeuronCores" if on_neuron() else ""
    remedy = f"{install_line()}, or set {INTERPRET_VARIABLE}=1 to interpret the kernels"
    return f"no tensor here is on a TPU{elsewhere}: {remedy}"


def load(device_type: str) -> Mapping[str, Callable[..., Any]] | None:
    """Return the kernels, which import jax and torch_xla when one is called; those for the CPU are interpreted."""
    if device_type == "cpu":
        from torch_paged.backends.tpu import bridge_interpret

        return bridge_interpret.kernels(BACKEND)
    if not _in_reach(device_type):
        return None
    bridge = importlib.import_module(f"torch_paged.backends.tpu.bridge_{_BRIDGES[device_type]}")
    return bridge.kernels(BACKEND)


def _in_reach(device_type: str) -> bool:
    """Return whether there can be tensors of this device type; torch_tpu makes its own known where it finds a TPU."""
    if device_type == "tpu":
        return torch._C._get_privateuse1_backend_name() == "tpu"
    return importlib.util.find_spec("torch_xla") is not None and not on_neuron()


def versions() -> Mapping[str, str]:
    """Return the versions of jax, libtpu, torch_xla and torch_tpu that are installed."""
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
    device_types=("tpu",) if on_neuron() else tuple(_BRIDGES),
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
