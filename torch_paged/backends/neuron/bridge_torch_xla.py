"""The kernels on XLA tensors of torch-neuronx up to 2.9: each becomes a custom call in torch_xla's lazy graph.

Never run. What a kernel writes to its arguments does not come back through such a call, so ops that write are refused.
"""

from collections.abc import Callable
from typing import Any

from torch_paged.backends import BackendInfo
from torch_paged.backends.neuron import calls
from torch_paged.backends.neuron.launch import Launch
from torch_paged.backends.neuron.support import cores, generation


def kernels(info: BackendInfo) -> dict[str, Callable[..., Any]]:
    """Return a kernel for each op."""
    return calls.kernels(info, lambda: Launch(generation(simulated=False), cores(simulated=False), run))


def run(kernel: Any, num_cores: int, *arguments: Any) -> Any:
    """Record a kernel, which finds torch_xla by its arguments."""
    return kernel[num_cores](*arguments)
