"""The kernels on TorchNeuron's tensors (device ``neuron``). Never run on a device.

In eager mode an op runs its kernels one by one. ``torch.compile`` sees through the ops that only read: its graph holds
the kernels as nodes, and the plans that they share once. An op that writes stays a node of its own, as only its schema
tells what it writes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from torch_paged.backends import BackendInfo
from torch_paged.backends.neuron import calls
from torch_paged.backends.neuron.launch import Launch
from torch_paged.backends.neuron.support import cores, generation
from torch_paged.contract.schema import NAMESPACE, SCHEMAS

_libraries: list[torch.library.Library] = []


def kernels(info: BackendInfo) -> dict[str, Callable[..., Any]]:
    """Return a kernel for each op; ``torch.compile`` is told what the ops that read consist of."""
    found = calls.kernels(info, lambda: Launch(generation(simulated=False), cores(simulated=False), run))
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, signature in SCHEMAS.items():
        if "!" not in signature:
            rule = _see_through(found[name])
            torch.library.register_torch_dispatch(f"{NAMESPACE}::{name}", FunctionalTensorMode, rule, lib=library)
    _libraries.append(library)
    return found


def run(kernel: Any, num_cores: int, *arguments: Any) -> Any:
    """Run a kernel, or record it where ``torch.compile`` traces."""
    return _wrapped(kernel)[num_cores](*arguments)


@cache
def _wrapped(kernel: Any) -> Any:
    from torch_neuronx import wrap_nki

    return wrap_nki(kernel)


def _see_through(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return how an op is traced: on this device as what its kernel does, elsewhere as itself."""

    def rule(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(isinstance(x, torch.Tensor) and x.device.type == "neuron" for x in (*args, *kwargs.values())):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return kernel(*args, **kwargs)

    return rule
