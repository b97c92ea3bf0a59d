"""What all ways to the kernels share: an op's arguments, checked, as runs of NKI kernels. Imports nki at a call."""

import importlib
from collections.abc import Callable
from typing import Any

from torch_paged.backends import BackendInfo
from torch_paged.backends.neuron.launch import Launch
from torch_paged.backends.python_kernels import python_kernels

_MODULES = {"paged_attention": "decode", "flash_attn_varlen": "varlen", "merge_attention_states": "merge"}
"""Op -> the module that has a function of its name; the others are in ``cache``."""


def kernels(info: BackendInfo, launch: Callable[[], Launch]) -> dict[str, Callable[..., Any]]:
    """Return a kernel for each op of the contract.

    Args:
        info: this backend.
        launch: gives what runs kernels, at each call.
    """

    def run(name: str, arguments: dict[str, Any]) -> Any:
        op, _, overload = name.partition(".")
        module = importlib.import_module(f"torch_paged.backends.neuron.{_MODULES.get(op, 'cache')}")
        results = getattr(module, op)(launch(), arguments)
        if op in ("paged_attention", "flash_attn_varlen"):
            return results if overload == "with_stats" else results[0]
        return results

    return python_kernels(info, run)
