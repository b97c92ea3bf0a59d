"""What every op computes, in plain PyTorch: the oracle of the tests, and the ``reference`` backend.

One sequence at a time: gather its keys, build the mask of what each query sees, softmax, weigh the values. Runs on any
device; arguments are taken as valid (``validate`` and ``bounds`` come first). ``compute_dtype`` is the dtype of the two
matrix products; logits, softmax and statistics are at least float32. Unused table entries are never dereferenced, and
what a row does not see is selected away, not multiplied by zero.
"""

from itertools import pairwise

import torch
from torch import Tensor

from torch_paged.contract.reference_cache import (
    copy_blocks,
    gather_cache,
    quantize_and_cache,
    read_blocks,
    reshape_and_cache,
)

__all__ = [
    "copy_blocks",
    "flash_attn_varlen",
    "flash_attn_varlen_with_stats",
    "gather_cache",
    "merge_attention_states",
    "paged_attention",
    "paged_attention_with_stats",
    "quantize_and_cache",
    "reshape_and_cache",
]


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    kv_scales: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attend from one token of each sequence to its cache; see ``paged_attention_with_stats``."""
    return paged_attention_with_stats(
        query,
        kv_cache,
        block_tables,
        context_lens,
        kv_scales,
        sinks,
        alibi_slopes,
        attn_mask,
        softmax_scale,
        logits_soft_cap,
        sliding_window,
        attention_chunk,
        value_dim,
        compute_dtype=compute_dtype,
    )[0]


def paged_attention_with_stats(
    query: Tensor,  # (B, H, D)
    kv_cache: Tensor,  # (2 | 1, N, KH, S, DS)
    block_tables: Tensor,  # (B, M)
    context_lens: Tensor,  # (B,)
    kv_scales: Tensor | None = None,  # (2 | 1,), (2 | 1, KH) or (2 | 1, N, KH, S)
    sinks: Tensor | None = None,  # (H,)
    alibi_slopes: Tensor | None = None,  # (H,)
    attn_mask: Tensor | None = None,  # (B, C), (KH, B, C) or (H, B, C)
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode: query ``b`` sits at position ``context_lens[b] - 1`` of its sequence.

    Returns:
        out (B, H, value_dim or D) in the query dtype, lse (B, H), max_logits (B, H).
    """
    num_seqs = query.size(0)
    return flash_attn_varlen_with_stats(
        query,
        None,
        None,
        torch.arange(num_seqs + 1, dtype=torch.int32, device=query.device),
        None,
        kv_cache,
        block_tables,
        context_lens,
        1,
        block_tables.size(1) * kv_cache.size(3),
        kv_scales,
        sinks,
        alibi_slopes,
        attn_mask,
        softmax_scale=softmax_scale,
        logits_soft_cap=logits_soft_cap,
        sliding_window=sliding_window,
        attention_chunk=attention_chunk,
        value_dim=value_dim,
        compute_dtype=compute_dtype,
    )


def flash_attn_varlen(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    kv_cache: Tensor | None,
    block_tables: Tensor | None,
    context_lens: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    kv_scales: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attend from packed ragged queries; see ``flash_attn_varlen_with_stats``."""
    return flash_attn_varlen_with_stats(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        kv_cache,
        block_tables,
        context_lens,
        max_seqlen_q,
        max_seqlen_k,
        kv_scales,
        sinks,
        alibi_slopes,
        attn_mask,
        query_positions,
        softmax_scale,
        logits_soft_cap,
        causal,
        sliding_window,
        attention_chunk,
        value_dim,
        compute_dtype=compute_dtype,
    )[0]


def flash_attn_varlen_with_stats(
    query: Tensor,  # (T, H, D)
    key: Tensor | None,  # (Tk, KH, D)
    value: Tensor | None,  # (Tk, KH, DV)
    cu_seqlens_q: Tensor,  # (B + 1,)
    cu_seqlens_k: Tensor | None,  # (B + 1,)
    kv_cache: Tensor | None,  # (2 | 1, N, KH, S, DS)
    block_tables: Tensor | None,  # (B, M)
    context_lens: Tensor | None,  # (B,)
    max_seqlen_q: int,
    max_seqlen_k: int,
    kv_scales: Tensor | None = None,
    sinks: Tensor | None = None,  # (H,)
    alibi_slopes: Tensor | None = None,  # (H,)
    attn_mask: Tensor | None = None,  # (T, C), (KH, T, C) or (H, T, C)
    query_positions: Tensor | None = None,  # (T,)
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from packed ragged queries to the cache, to new keys, or to both in one softmax.

    Returns:
        out (T, H, value_dim or DV or D) in the query dtype, lse (T, H), max_logits (T, H).
    """
    num_tokens, num_heads, head_dim = query.shape
    if value_dim is None:
        value_dim = head_dim if value is None else value.size(-1)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    wide = torch.promote_types(compute_dtype, torch.float32)
    out = query.new_zeros((num_tokens, num_heads, value_dim))
    lse = torch.full((num_tokens, num_heads), float("-inf"), dtype=wide, device=query.device)
    max_logits = lse.clone()

    bounds_q = cu_seqlens_q.tolist()
    bounds_k = [0] * len(bounds_q) if cu_seqlens_k is None else cu_seqlens_k.tolist()
    contexts = [0] * len(bounds_q) if context_lens is None else context_lens.tolist()
    for seq, (first, last) in enumerate(pairwise(bounds_q)):
        rows = slice(first, last)
        new = slice(bounds_k[seq], bounds_k[seq + 1])
        context = contexts[seq]
        kv_len = context + new.stop - new.start
        if query_positions is None:
            positions = torch.arange(kv_len - (last - first), kv_len, device=query.device)
        else:
            positions = query_positions[rows].long()
        visible = _visible(positions, kv_len, causal, sliding_window, attention_chunk)  # (q, L)

        keys, values = [], []
        if kv_cache is not None and block_tables is not None:
            entries = block_tables[seq, : -(-context // kv_cache.size(3))]
            used = _used_entries(visible[:, :context], kv_cache.size(3))
            tokens = read_blocks(kv_cache, kv_scales, entries, used, compute_dtype)[:, :context]
            keys.append(tokens[0, ..., :head_dim])
            values.append(tokens[-1, ..., :value_dim])  # a latent cache has one side: the value lies in the key
        if key is not None:
            keys.append(key[new].to(compute_dtype))
            values.append((key if value is None else value)[new, :, :value_dim].to(compute_dtype))

        if attn_mask is not None:
            visible = visible & _mask_rows(attn_mask, rows, kv_len, num_heads)  # (1 | H, q, L)
        logits = _logits(query[rows].to(compute_dtype), torch.cat(keys), scale, logits_soft_cap)  # (H, q, L)
        if alibi_slopes is not None:
            distances = (positions[:, None] - torch.arange(kv_len, device=query.device)).abs()
            logits = logits - alibi_slopes.to(wide)[:, None, None] * distances
        out[rows], lse[rows], max_logits[rows] = _softmax(logits, visible, sinks, torch.cat(values))
    return out, lse, max_logits


def merge_attention_states(
    outs: Tensor,  # (P, T, H, D)
    lses: Tensor,  # (P, T, H)
    sinks: Tensor | None = None,  # (H,)
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint parts of the keys into attention over their union.

    Returns:
        out (T, H, D) in the dtype of ``outs``, lse (T, H).
    """
    lses = lses.to(compute_dtype)
    terms = lses if sinks is None else torch.cat([lses, sinks.to(compute_dtype).expand_as(lses[:1])])
    lse = terms.logsumexp(0)
    weights = terms.softmax(0)[: lses.size(0), ..., None]  # not exp(lses - lse): a large lse is rounded too far
    out = torch.where(lses[..., None] == float("-inf"), 0, weights * outs.to(compute_dtype)).sum(0)
    return out.to(outs.dtype), lse


def _visible(positions: Tensor, kv_len: int, causal: bool, window: int | None, chunk: int | None) -> Tensor:
    """Return (q, L) bool: which keys length, causality, window and chunk let each position see."""
    p = positions[:, None]
    j = torch.arange(kv_len, device=positions.device)
    visible = torch.ones((positions.numel(), kv_len), dtype=torch.bool, device=positions.device)
    if causal or chunk is not None:
        visible &= j <= p
    if window is not None:
        visible &= (p - j).abs() < window
    if chunk is not None:
        visible &= p.div(chunk, rounding_mode="floor") == j.div(chunk, rounding_mode="floor")
    return visible


def _used_entries(visible: Tensor, block_size: int) -> Tensor:
    """Return (M,) bool: the table entries that hold a key which some row sees."""
    seen = visible.any(0)
    padded = torch.nn.functional.pad(seen, (0, -seen.numel() % block_size))
    return padded.reshape(-1, block_size).any(1)


def _mask_rows(attn_mask: Tensor, rows: slice, kv_len: int, num_heads: int) -> Tensor:
    """Return the rows of a mask as (1 | H, q, L); columns behind the mask are False."""
    mask = attn_mask[None] if attn_mask.dim() == 2 else attn_mask.repeat_interleave(num_heads // attn_mask.size(0), 0)
    mask = mask[:, rows, :kv_len]
    return torch.nn.functional.pad(mask, (0, kv_len - mask.size(-1)))


def _logits(query: Tensor, keys: Tensor, scale: float, soft_cap: float) -> Tensor:
    """Return (H, q, L) scaled and capped logits of query (q, H, D) and keys (L, KH, D)."""
    groups = query.unflatten(1, (keys.size(1), query.size(1) // keys.size(1)))
    logits = torch.einsum("qkgd,lkd->kgql", groups, keys).flatten(0, 1)
    logits = logits.to(torch.promote_types(query.dtype, torch.float32)) * scale
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def _softmax(
    logits: Tensor,  # (H, q, L)
    visible: Tensor,  # (q, L) or (1 | H, q, L)
    sinks: Tensor | None,
    values: Tensor,  # (L, KH, DV)
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (q, H, DV), lse (q, H) and max_logits (q, H)."""
    num_heads, num_rows, kv_len = logits.shape
    visible = visible.expand_as(logits)
    logits = logits.masked_fill(~visible, float("-inf"))
    nothing = logits.new_full((num_heads, num_rows, 1), float("-inf"))
    sink = nothing if sinks is None else sinks.to(logits.dtype)[:, None, None].expand_as(nothing)
    with_sink = torch.cat([logits, sink], -1)
    lse = with_sink.logsumexp(-1)
    max_logits = torch.cat([logits, nothing], -1).amax(-1)
    weights = (
        with_sink.softmax(-1)[..., :kv_len].masked_fill(~visible, 0).to(values.dtype)
    )  # an empty row is NaN before

    kv_heads, group = values.size(1), num_heads // values.size(1)
    values = values.transpose(0, 1)  # (KH, L, DV)
    if values.isfinite().all() or not num_rows:
        packed = weights.reshape(kv_heads, group * num_rows, kv_len)
        out = (packed @ values).reshape(num_heads, num_rows, values.size(-1))
    else:
        values = values.repeat_interleave(group, 0)
        rows = [
            torch.where(visible[:, row, :, None], weights[:, row, :, None] * values, 0).sum(1)
            for row in range(num_rows)
        ]
        out = torch.stack(rows, 1)
    return out.transpose(0, 1), lse.T, max_logits.T
