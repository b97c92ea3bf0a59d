"""What all ways to the kernels share: an op's arguments, checked, as runs of NKI kernels. Imports nki."""

from collections.abc import Callable
from typing import Any

from torch_paged.backends import BackendInfo
from torch_paged.backends.neuron import cache, decode, merge, varlen
from torch_paged.backends.neuron.launch import Launch
from torch_paged.backends.python_kernels import python_kernels

_OPS = {
    "reshape_and_cache": cache.reshape_and_cache,
    "quantize_and_cache": cache.quantize_and_cache,
    "copy_blocks": cache.copy_blocks,
    "gather_cache": cache.gather_cache,
    "merge_attention_states": merge.merge_attention_states,
    "paged_attention": decode.paged_attention,
    "flash_attn_varlen": varlen.flash_attn_varlen,
}


def kernels(info: BackendInfo, launch: Callable[[], Launch]) -> dict[str, Callable[..., Any]]:
    """Return a kernel for each op of the contract.

    Args:
        info: this backend.
        launch: gives what runs kernels, at each call.
    """

    def run(name: str, arguments: dict[str, Any]) -> Any:
        op, _, overload = name.partition(".")
        results = _OPS[op](launch(), arguments)
        if op in ("paged_attention", "flash_attn_varlen"):
            return results if overload == "with_stats" else results[0]
        return results

    return python_kernels(info, run)
