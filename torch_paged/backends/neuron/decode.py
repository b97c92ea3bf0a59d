"""Paged attention for decode: the torch side, which lays out what the kernels read and computes nothing."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_paged.backends import Arguments
from torch_paged.backends.neuron.decode_kernel import attend_chunks
from torch_paged.backends.neuron.float8 import float8_values
from torch_paged.backends.neuron.launch import Launch
from torch_paged.backends.neuron.merge_kernel import merge_chunks
from torch_paged.backends.neuron.plan import (
    PARTITIONS,
    DecodeSizes,
    decode_plan,
    merge_groups,
    merge_parts,
    query_parts,
    unit_tokens,
)
from torch_paged.backends.neuron.plan_memory import remembered


def paged_attention(launch: Launch, arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from one token of each sequence to its cache.

    Args:
        launch: runs kernels.
        arguments: all arguments by schema name, checked, defaults filled in.

    Returns:
        out (B, H, value_dim or D) in the query dtype, lse and max_logits (B, H) float32.
    """
    query, kv_cache, tables = arguments["query"], arguments["kv_cache"], arguments["block_tables"]
    sinks, attn_mask, kv_scales = arguments["sinks"], arguments["attn_mask"], arguments["kv_scales"]
    num_seqs, num_heads, head_dim = query.shape
    sides, num_blocks, num_kv_heads, block_size, stored_dim = kv_cache.shape
    value_dim = head_dim if arguments["value_dim"] is None else arguments["value_dim"]
    if not (num_seqs and num_blocks and tables.shape[1]):
        return _no_keys(query, sinks, value_dim)

    scales_rank = 0 if kv_scales is None else kv_scales.dim()
    dtype = torch.float32 if query.dtype == torch.float16 and scales_rank == 4 else query.dtype  # as it is multiplied
    row_bytes = stored_dim * dtype.itemsize
    unit = unit_tokens(block_size, stored_dim * kv_cache.dtype.itemsize, row_bytes, num_heads * dtype.itemsize)
    parts = block_size // unit
    mask = mask_units = None
    if attn_mask is not None:
        columns = min(attn_mask.shape[-1], tables.shape[1] * block_size)
        mask_units = max(1, -(-columns // unit))
        mask = remembered(_laid_out_mask, (attn_mask,), (mask_units, unit))
    sizes = DecodeSizes(
        sides=sides,
        num_blocks=num_blocks,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        value_dim=value_dim,
        block_size=block_size,
        unit=unit,
        mask_units=mask_units,
        sliding_window=arguments["sliding_window"],
        attention_chunk=arguments["attention_chunk"],
        query_parts=query_parts(num_heads, head_dim * query.dtype.itemsize),
        cores=launch.cores,
    )
    plan = remembered(decode_plan, (tables, arguments["context_lens"]), sizes)

    num_rows = sides * num_blocks * num_kv_heads * parts
    cache, table = kv_cache.view(num_rows, unit * stored_dim), None
    if cache.dtype == torch.float8_e4m3fn and launch.generation == "trn2":
        cache, table = cache.view(torch.uint8), float8_values(dtype, query.device)
    head_scales = token_scales = None
    if scales_rank == 4:
        token_scales = kv_scales.reshape(num_rows, unit)
    elif scales_rank:
        head_scales = kv_scales.reshape(sides, -1).expand(2, num_kv_heads).reshape(1, -1)
    slopes, scale = arguments["alibi_slopes"], arguments["softmax_scale"]
    sums, stats = launch(
        attend_chunks,
        query.reshape(num_seqs * sizes.query_parts, -1),
        cache,
        plan.units,
        plan.query_rows,
        plan.turns,
        None if slopes is None else slopes.reshape(1, -1),
        mask,
        head_scales,
        token_scales,
        table,
        num_heads,
        num_kv_heads,
        head_dim,
        parts,
        unit,
        value_dim,
        1 / math.sqrt(head_dim) if scale is None else scale,
        arguments["logits_soft_cap"],
        sides == 1 and num_kv_heads == 1,
    )
    rows = merge_parts(num_seqs, num_heads, value_dim, launch.cores)
    live, heads = num_seqs * rows, num_heads // rows
    groups = merge_groups(live, launch.cores)
    sink_rows = None
    if sinks is not None:
        members = sinks.reshape(num_kv_heads, sizes.group).T.repeat(num_seqs, 1).reshape(live, heads)
        sink_rows = pad(members, (0, 0, 0, groups * PARTITIONS - live)).reshape(groups, -1)
    out, found = launch(
        merge_chunks,
        sums.reshape(-1, heads * value_dim),
        stats.reshape(-1, heads * 2),
        plan.places,
        plan.merge_turns,
        sink_rows,
        query,
        groups,
    )
    shape = (num_seqs, sizes.group, num_kv_heads, -1)
    out = out.reshape(-1, heads * value_dim)[:live].reshape(shape).transpose(1, 2).flatten(1, 2).contiguous()
    found = found.reshape(-1, heads * 2)[:live].reshape(shape).permute(3, 0, 2, 1).flatten(2).contiguous()
    return out, found[0], found[1]


def _laid_out_mask(attn_mask: Tensor, sizes: Any) -> Tensor:
    """Return a mask as rows of the units of a sequence, (B * mask units, mask heads * unit) uint8."""
    mask_units, unit = sizes
    mask = attn_mask if attn_mask.dim() == 3 else attn_mask[None]
    mask = mask[..., : mask_units * unit]
    mask = pad(mask, (0, mask_units * unit - mask.shape[-1]))
    heads, num_seqs, _ = mask.shape
    mask = mask.reshape(heads, num_seqs, mask_units, unit).permute(1, 2, 0, 3)
    return mask.reshape(num_seqs * mask_units, heads * unit).view(torch.uint8)


def _no_keys(query: Tensor, sinks: Tensor | None, value_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = query.shape[:2]
    nothing = torch.full(shape, -math.inf, device=query.device)
    lse = nothing.clone() if sinks is None else sinks.expand(shape).contiguous()
    return query.new_zeros((*shape, value_dim)), lse, nothing
