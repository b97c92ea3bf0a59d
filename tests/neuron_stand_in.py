"""A stand-in for TorchNeuron, for processes of their own: device ``neuron`` on host memory, kernels on the simulator.

Importing this names the device and gives it ATen's operators: each runs on the host tensors that the device's tensors
hold. ``wrap_nki`` runs a kernel on the simulator; where ``torch.compile`` traces, the kernel is a node of the graph.
"""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "neuron"
_KEYS = ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
_RESHAPES = tuple(getattr(torch.ops.aten, name).default for name in ("view", "_unsafe_view", "_reshape_alias"))
_hosts: dict[int, Tensor] = {}  # storage of a tensor of the device -> its host tensor
_calls: list[tuple[Any, int, tuple[Any, ...]]] = []  # kernel, cores, arguments with ``Tensor`` for each tensor
ran: list[tuple[str, int]] = []
"""Name and cores of each kernel that ran."""


def _host(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device.type != DEVICE:
        return value
    return _hosts[value.untyped_storage()._cdata]


def _on_device(tensor: Tensor) -> Tensor:
    found = torch._C._acc.create_empty_tensor(tuple(tensor.shape), tensor.dtype)
    _hosts[found.untyped_storage()._cdata] = tensor
    return found


def _on_host(op: Any) -> Any:
    """Return an operator for the device's tensors."""

    def call(*args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        if op in _RESHAPES:  # a tensor of the device looks contiguous, whatever its host tensor is
            return _on_device(_host(args[0]).reshape(args[1]))
        result = op(*tree_map(_host, args), **tree_map(_host, kwargs))
        if asked is not None and torch.device(asked).type != DEVICE:
            return result
        given = {id(_host(x)): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        return tree_map_only(Tensor, lambda x: given[id(x)] if id(x) in given else _on_device(x), result)

    return call


def _operators() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    for name in sorted({name for key in _KEYS for name in torch._C._dispatch_get_registrations_for_dispatch_key(key)}):
        space, _, rest = name.partition("::")
        op, _, overload = rest.partition(".")
        if space == "aten" and op != "detach":  # fake tensors are detached through this key
            library.impl(rest, _on_host(getattr(getattr(torch.ops.aten, op), overload or "default")), "PrivateUse1")
    return library


def _run(tensors: list[Tensor], call: int) -> list[Tensor]:
    """Run a kernel on the simulator; what it writes is written."""
    from torch_paged.backends.neuron import bridge_simulator

    kernel, cores, arguments = _calls[call]
    given = iter(tensors)
    placed = [next(given) if x is Tensor else x for x in arguments]
    whole = [x.contiguous() if isinstance(x, Tensor) else x for x in placed]
    results = bridge_simulator.run(kernel, cores, *whole)
    for before, after in zip(placed, whole, strict=True):
        if after is not before:
            before.copy_(after)
    return [] if results is None else [results] if isinstance(results, Tensor) else list(results)


def _nki(tensors: list[Tensor], call: int) -> list[Tensor]:
    results = _run([_host(x) for x in tensors], call)
    kernel, cores, _ = _calls[call]
    ran.append((kernel.__name__, cores))
    return [_on_device(x) for x in results]


def _without_results_being_written() -> AbstractContextManager[Any]:
    """Let the simulator give back what a plan of zeros leaves unwritten: only shapes and dtypes are wanted."""
    if importlib.util.find_spec("nki._handed") is None:  # the vendor's nki, which does not look
        return nullcontext()
    return mock.patch("nki._handed.may_hand_on", return_value=True)


def _nki_fake(tensors: list[Tensor], call: int) -> list[Tensor]:
    with unset_fake_temporarily(), _without_results_being_written():
        shapes = _run([torch.zeros(x.shape, dtype=x.dtype) for x in tensors], call)
    return [torch.empty(x.shape, dtype=x.dtype, device=DEVICE) for x in shapes]


class wrap_nki:
    """A kernel as TorchNeuron calls it: brackets choose the cores."""

    def __init__(self, kernel: Any, cores: int = 1) -> None:
        self.kernel = kernel
        self.cores = cores

    def __getitem__(self, cores: int) -> "wrap_nki":
        return wrap_nki(self.kernel, cores)

    def __call__(self, *arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        _calls.append((self.kernel, self.cores, tuple(Tensor if isinstance(x, Tensor) else x for x in arguments)))
        results = torch.ops.stand_in.nki(tensors, len(_calls) - 1)
        return None if not results else results[0] if len(results) == 1 else tuple(results)


_setup_privateuseone_for_python_backend(DEVICE)
_library = _operators()
_nodes = torch.library.Library("stand_in", "DEF")
_nodes.define("nki(Tensor[] tensors, int call) -> Tensor[]")
_nodes.impl("nki", _nki, "PrivateUse1")
torch.library.register_fake("stand_in::nki", _nki_fake, lib=_nodes)
