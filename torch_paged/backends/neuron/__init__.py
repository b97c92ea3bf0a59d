"""The Neuron backend: NKI kernels for Trainium 2 and 3, reached from PyTorch by thin bridges, or simulated."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch_paged.backends import BackendInfo
from torch_paged.backends.neuron.support import (
    LIMITS,
    SIMULATED,
    SIMULATION_SETTING,
    SIMULATION_VARIABLE,
    install_line,
    missing,
    refusal,
    variant,
    versions,
    wrong_generation,
    wrong_setting,
)
from torch_paged.backends.xla_runtime import on_neuron

_BRIDGES = {"cpu": "simulator", "neuron": "native", "xla": "torch_xla"}


def why_off() -> str | None:
    """Return why the kernels cannot run here, with the remedy, or None."""
    if SIMULATED:
        return missing("nki") or wrong_generation(simulated=True)
    if _in_reach("neuron") or _in_reach("xla"):
        return missing("nki", "neuronx-cc", "torch-neuronx") or wrong_generation(simulated=False)
    return f"no tensor here is on a NeuronCore: {install_line()}, or set {SIMULATION_VARIABLE}=1 to simulate kernels"


def load(device_type: str) -> Mapping[str, Callable[..., Any]] | None:
    """Return the kernels, which import nki and torch_neuronx when one is called; those for the CPU are simulated."""
    if device_type != "cpu" and not _in_reach(device_type):
        return None
    bridge = importlib.import_module(f"torch_paged.backends.neuron.bridge_{_BRIDGES[device_type]}")
    return bridge.kernels(BACKEND)


def _in_reach(device_type: str) -> bool:
    """Return whether there can be tensors of this device type; TorchNeuron names its own when torch is imported."""
    if device_type == "neuron":
        return torch._C._get_privateuse1_backend_name() == "neuron"
    return on_neuron()


BACKEND = BackendInfo(
    name="neuron",
    summary="NKI kernels for Trainium 2 and 3",
    limits=LIMITS,
    device_types=("neuron", "xla") if on_neuron() else ("neuron",),
    automatic=True,
    why_off=why_off,
    load=load,
    refusal=refusal,
    variant=variant,
    versions=versions,
    wrong_setting=wrong_setting,
    contiguous_cache=True,
    asked_for={"cpu": SIMULATION_SETTING} if SIMULATED else {},
)
