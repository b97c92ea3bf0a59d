"""What all ways to the kernels share: an op's arguments, checked, as the call of one JAX function. Imports no jax."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_paged.backends import Arguments, BackendInfo
from torch_paged.backends.python_kernels import python_kernels
from torch_paged.backends.tpu.block_sizes import power_of_two

_CACHE_OPTIONS = ("kv_scales", "sinks", "alibi_slopes", "attn_mask")
_ARRAYS = {
    "reshape_and_cache": ("key", "value", "kv_cache", "slot_mapping", "kv_scales"),
    "quantize_and_cache": ("key", "value", "kv_cache", "kv_scales", "slot_mapping"),
    "paged_attention": ("query", "kv_cache", "block_tables", "context_lens", *_CACHE_OPTIONS),
    "flash_attn_varlen": (
        *("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "kv_cache", "block_tables", "context_lens"),
        *_CACHE_OPTIONS,
        "query_positions",
    ),
    "merge_attention_states": ("outs", "lses", "sinks"),
    "copy_blocks": ("kv_cache", "src_blocks", "dst_blocks", "kv_scales"),
    "gather_cache": ("kv_cache", "block_tables", "context_lens", "kv_scales", "starts"),
}
_FUNCTIONS = {"paged_attention": "decode", "flash_attn_varlen": "varlen", "merge_attention_states": "merge"}


@dataclass(frozen=True)
class JaxCall:
    """One call of a JAX function of this folder.

    Attributes:
        module: its module, such as ``"decode"``.
        function: its name.
        arrays: its positional arguments, in order.
        options: its keyword arguments but ``chip`` and ``interpret``; hashable, a part of the program.
        written: the arrays that are updated: positions in ``arrays``. The function returns their new contents.
    """

    module: str
    function: str
    arrays: tuple[Tensor | None, ...]
    options: Mapping[str, Any]
    written: tuple[int, ...]

    @property
    def attends(self) -> bool:
        """Whether the function takes a ``chip``."""
        return self.module in ("decode", "varlen")

    @property
    def kv_cache(self) -> Tensor | None:
        """The cache, if there is one."""
        names = _ARRAYS[self.function]
        return self.arrays[names.index("kv_cache")] if "kv_cache" in names else None


def kernels(info: BackendInfo, run: Callable[[JaxCall], tuple[Tensor, ...]]) -> dict[str, Callable[..., Any]]:
    """Return a kernel for each op of the contract.

    Args:
        info: this backend.
        run: runs the JAX function, writes what is to be written, and returns what the op returns.
    """

    def run_op(name: str, arguments: dict[str, Any]) -> Any:
        results = run(jax_call(name, arguments))
        return results[0] if len(results) == 1 else results or None

    return python_kernels(info, run_op)


def jax_call(name: str, arguments: Arguments) -> JaxCall:
    """Return the call that an op's checked arguments are.

    Args:
        name: op with overload.
        arguments: all arguments by schema name, defaults filled in.
    """
    op, _, overload = name.partition(".")
    arrays = {key: arguments[key] for key in _ARRAYS[op]}
    options: dict[str, Any] = {}
    if op in ("paged_attention", "flash_attn_varlen"):
        options = _attention_options(op, arguments, stats=overload == "with_stats")
        for key in ("cu_seqlens_q", "cu_seqlens_k"):
            if arrays.get(key) is not None:
                arrays[key] = _from_zero(arrays[key])
    elif op == "gather_cache":
        options = {"max_len": int(arguments["max_len"])}
    elif op == "copy_blocks":
        last = arguments["kv_cache"].size(1)
        arrays["src_blocks"], arrays["dst_blocks"] = (
            _int32(arrays[side], last) for side in ("src_blocks", "dst_blocks")
        )
        arrays["kv_scales"] = arguments["kv_scales"] if "kv_scales" in written(op, arguments) else None
    elif op in ("reshape_and_cache", "quantize_and_cache"):
        slots = arguments["kv_cache"].size(1) * arguments["kv_cache"].size(3)
        arrays["slot_mapping"] = _int32(arguments["slot_mapping"], slots)
    return JaxCall(
        _FUNCTIONS.get(op, "cache"),
        op,
        tuple(arrays.values()),
        options,
        tuple(list(arrays).index(key) for key in written(op, arguments)),
    )


def written(op: str, arguments: Arguments) -> tuple[str, ...]:
    """Return the arguments that a call updates: the cache, and scales that belong to single tokens."""
    if op == "reshape_and_cache":
        return ("kv_cache",)
    if op in ("quantize_and_cache", "copy_blocks"):
        scales = arguments["kv_scales"]
        return ("kv_cache", "kv_scales") if scales is not None and scales.dim() == 4 else ("kv_cache",)
    return ()


def _attention_options(op: str, arguments: Arguments, *, stats: bool) -> dict[str, Any]:
    scale = arguments["softmax_scale"]
    shared = ("logits_soft_cap", "sliding_window", "attention_chunk", "value_dim")
    options: dict[str, Any] = {
        "softmax_scale": 1 / math.sqrt(arguments["query"].size(-1)) if scale is None else scale,
        **{key: arguments[key] for key in shared},
        "stats": stats,
    }
    if op == "flash_attn_varlen":
        # exact lengths would each be a program
        bounds = {key: power_of_two(int(arguments[key])) for key in ("max_seqlen_q", "max_seqlen_k")}
        options |= {**bounds, "causal": arguments["causal"]}
    return options


def _from_zero(cu_seqlens: Tensor) -> Tensor:
    """Return prefix sums that begin with 0: rows in front of the first sequence would be written by no one."""
    return torch.nn.functional.pad(cu_seqlens[1:], (1, 0))


def _int32(indices: Tensor, end: int) -> Tensor:
    """Return indices as int32, which is what the kernels read; those outside ``[0, end)`` stay outside."""
    return indices if indices.dtype == torch.int32 else indices.clamp(-1, end).to(torch.int32)
