"""The kernels on CPU tensors, on a simulator: ``nki.simulate``, the vendor's or another of the same interface."""

import os
from collections.abc import Callable
from typing import Any

import nki

from torch_paged.backends import BackendInfo
from torch_paged.backends.neuron import calls
from torch_paged.backends.neuron.launch import Launch


def kernels(info: BackendInfo) -> dict[str, Callable[..., Any]]:
    """Return a simulated kernel for each op; NKI's own variables choose generation and cores."""
    return calls.kernels(info, _launch)


def _launch() -> Launch:
    generation = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE") or "trn3"
    return Launch(generation, int(os.environ.get("NEURON_LOGICAL_NC_CONFIG") or 1), run)


def run(kernel: Any, cores: int, *arguments: Any) -> Any:
    """Run a kernel on the simulator: of contiguous tensors, those that it writes change in place."""
    return nki.simulate(kernel[cores] if cores > 1 else kernel)(*arguments)
