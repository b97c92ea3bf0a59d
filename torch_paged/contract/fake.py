"""What every op returns, without computing: fakes validate, and match the kernels in shape, dtype and stride."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_paged.contract.rules import dtype_name
from torch_paged.contract.schema import NAMESPACE, SCHEMAS
from torch_paged.contract.validate import QUANTIZED, validate


def register(library: torch.library.Library) -> None:
    """Register the fake of every op; meta tensors take the same way."""
    for name in SCHEMAS:
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake(name), lib=library)


def results(name: str, arguments: dict[str, Any]) -> Tensor | tuple[Tensor, ...] | None:
    """Return empty results of a valid call.

    Args:
        name: Op name with overload.
        arguments: All arguments by schema name, defaults filled in.

    Returns:
        What the op returns: contiguous tensors, on the device of its first tensor.
    """
    op, _, overload = name.partition(".")
    if op in ("paged_attention", "flash_attn_varlen"):
        out, *stats = _attention(arguments)
        return (out, *stats) if overload == "with_stats" else out
    if op == "merge_attention_states":
        outs, lses = arguments["outs"], arguments["lses"]
        return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
    if op == "gather_cache":
        return _gathered(arguments)
    return None


def _attention(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    query, value, value_dim = arguments["query"], arguments.get("value"), arguments["value_dim"]
    rows, heads, head_dim = query.shape
    width = value_dim if value_dim is not None else head_dim if value is None else value.size(-1)
    stats = query.new_empty((rows, heads), dtype=torch.float32)
    return query.new_empty((rows, heads, width)), stats, torch.empty_like(stats)


def _gathered(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    cache, num_seqs, max_len = arguments["kv_cache"], arguments["context_lens"].size(0), arguments["max_len"]
    pair, _, kv_heads, _, stored_dim = cache.shape
    dtype = torch.float32 if dtype_name(cache) in QUANTIZED else cache.dtype
    key = cache.new_empty((num_seqs, kv_heads, max_len, stored_dim), dtype=dtype)
    return key, cache.new_empty((num_seqs, kv_heads, max_len, 0 if pair == 1 else stored_dim), dtype=dtype)


def _fake(name: str) -> Callable[..., Any]:
    op, _, overload = name.partition(".")
    schema = getattr(getattr(getattr(torch.ops, NAMESPACE), op), overload or "default")._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments}

    def fake(*args: Any, **kwargs: Any) -> Any:
        arguments = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        validate(op, arguments)
        return results(name, arguments)

    return fake
