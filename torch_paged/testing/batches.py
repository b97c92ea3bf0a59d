"""Other batches with the same sequences: reordered, alone, with other blocks."""

from typing import Any

import torch
from torch import Tensor

from torch_paged.testing.cases import cumulative


def take_sequences(arguments: dict[str, Any], order: list[int]) -> tuple[dict[str, Any], Tensor]:
    """Return the call for some of the sequences of an attention call, in another order.

    Args:
        arguments: Arguments of ``paged_attention`` or ``flash_attn_varlen`` by schema name.
        order: Sequence numbers.

    Returns:
        The new arguments, and (T',) the row of the old call that each new row is.
    """
    varlen = "cu_seqlens_q" in arguments
    cu_seqlens_q = arguments["cu_seqlens_q"] if varlen else torch.arange(arguments["query"].size(0) + 1)
    rows, query_lens = _rows(cu_seqlens_q, order)
    taken = dict(arguments, query=arguments["query"][rows])
    if arguments["attn_mask"] is not None:
        taken["attn_mask"] = arguments["attn_mask"][..., rows, :]
    if arguments["kv_cache"] is not None:
        for name in ("block_tables", "context_lens"):
            taken[name] = arguments[name][order]
    if varlen:
        taken["cu_seqlens_q"] = cumulative(query_lens)
        if arguments["query_positions"] is not None:
            taken["query_positions"] = arguments["query_positions"][rows]
        if arguments["key"] is not None:
            new, new_lens = _rows(arguments["cu_seqlens_k"], order)
            taken["cu_seqlens_k"] = cumulative(new_lens)
            for name in ("key", "value"):
                taken[name] = None if arguments[name] is None else arguments[name][new]
    return taken, rows


def permute_blocks(arguments: dict[str, Any], order: Tensor) -> dict[str, Any]:
    """Return the same call with block ``order[i]`` of its cache moved to ``i``, and the tables changed to match."""
    tables = arguments["block_tables"]
    known = (tables >= 0) & (tables < order.numel())
    moved = torch.where(known, order.argsort()[tables.clamp(0, order.numel() - 1).long()].int(), tables)
    scales = arguments["kv_scales"]
    return dict(
        arguments,
        kv_cache=arguments["kv_cache"][:, order],
        kv_scales=scales[:, order] if scales is not None and scales.dim() == 4 else scales,
        block_tables=moved,
    )


def _rows(cu_seqlens: Tensor, order: list[int]) -> tuple[Tensor, tuple[int, ...]]:
    bounds = cu_seqlens.tolist()
    rows = [torch.arange(bounds[seq], bounds[seq + 1]) for seq in order]
    return torch.cat([torch.arange(0), *rows]), tuple(part.numel() for part in rows)
