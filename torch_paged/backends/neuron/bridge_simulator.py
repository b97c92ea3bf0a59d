"""The kernels on CPU tensors, on a simulator: ``nki.simulate``, the vendor's or another of the same interface."""

from collections.abc import Callable
from typing import Any

from torch_paged.backends import BackendInfo
from torch_paged.backends.neuron import calls
from torch_paged.backends.neuron.launch import Launch
from torch_paged.backends.neuron.support import cores, generation


def kernels(info: BackendInfo) -> dict[str, Callable[..., Any]]:
    """Return a simulated kernel for each op; NKI's own variables choose generation and cores."""
    return calls.kernels(info, lambda: Launch(generation(simulated=True), cores(simulated=True), run))


def run(kernel: Any, num_cores: int, *arguments: Any) -> Any:
    """Run a kernel on the simulator: of contiguous tensors, those that it writes change in place."""
    import nki

    return nki.simulate(kernel[num_cores] if num_cores > 1 else kernel)(*arguments)
