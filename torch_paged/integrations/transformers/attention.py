"""The attention function that transformers finds under the names ``torch_paged`` and ``torch_paged_latent``.

A cache layer returns its packed ``kv_cache`` as key and as value: a handle, known by the Python attribute that points
back at the layer. Everything else (training, ``use_cache=False``, cross attention) takes the dense way: PyTorch's own
attention, and for soft caps and sinks, which that does not know, plain PyTorch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from torch_paged.functional import flash_attn_varlen, paged_attention
from torch_paged.integrations.transformers.handle import HANDLE_ATTRIBUTE, LOST_HANDLE
from torch_paged.integrations.transformers.latent import LATENT_ATTENTION_NAME
from torch_paged.integrations.transformers.mask import paged_mask
from torch_paged.integrations.transformers.paged_layer import PagedLayer
from torch_paged.integrations.transformers.step import Step
from torch_paged.integrations.transformers.versions import as_mask_function

ATTENTION_NAME = "torch_paged"

_UNSUPPORTED_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "position_bias")


@dataclass(frozen=True)
class Options:
    """What a layer asks of its attention: factor and cap of the logits, (H,) sinks or None."""

    scale: float
    cap: float
    sinks: Tensor | None
    dropout: float = 0.0


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over a paged cache layer where ``key`` is its handle, else over dense keys.

    Dimensions:
        B sequences, Q new tokens of each, H query heads, KH kv heads, D head_dim, C columns of dense keys.

    Args:
        module: the attention layer that calls.
        query: (B, H, Q, D).
        key: the handle of a cache layer, or dense (B, KH, C, D).
        value: the same handle, or dense (B, KH, C, DV).
        attention_mask: with a handle None (padding is in the cache's lengths) or a mask in transformers' columns, else
            (B, 1, Q, C) bool or additive.
        dropout: probability, 0.0 for none. None may be used with a handle.
        scaling: factor of the logits. None: ``1 / sqrt(D)``.
        softcap: cap of the logits. None or 0.0: none.
        s_aux: (H,) one logit per head without a value (sinks). None: none.
        kwargs: what else the model passes. The window is the cache layer's; another one is refused.

    Returns:
        ``(B, Q, H, DV)`` in the query's dtype, zeros in rows that see no token, and None for the weights.

    Raises:
        NotImplementedError: an option that the paged way does not have.
        RuntimeError: the handle was copied, viewed or reshaped on its way here.
    """
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "attention: torch_paged does not support output_attentions, the ops do not return weights"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    options = Options(scale, float(softcap or 0.0), None if s_aux is None else s_aux.float(), dropout)
    layer: PagedLayer | None = getattr(key, HANDLE_ATTRIBUTE, None)
    if layer is not None and value is key:
        _check_paged_call(module, layer, query, attention_mask, dropout, kwargs)
        layer.cache.pending_layer = None
        if layer.latent:
            return _absorbed(module, layer, query, attention_mask, options), None
        return _cached(layer, query, attention_mask, options), None
    if key.ndim != 4 or value.ndim != 4 or layer is not None:
        raise RuntimeError(LOST_HANDLE.format(type(module).__name__))
    return _dense(query, key, value, attention_mask, options), None


def _check_paged_call(
    module: nn.Module, layer: PagedLayer, query: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    name, window = type(module).__name__, layer.group.reach.window
    if dropout:
        raise NotImplementedError(f"attention: PagedCache does not support dropout ({dropout}); call model.eval()")
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) or layer.cache.causal_step is layer.cache.step
    if mask is None and not is_causal and query.shape[2] > 1:
        raise NotImplementedError(f"attention: PagedCache does not support bidirectional attention ({name})")
    given_window = kwargs.get("sliding_window")
    if mask is None and given_window is not None and given_window != window:
        raise NotImplementedError(
            f"attention: PagedCache does not support a window of {given_window} ({name}) "
            f"in a layer whose cache has {window}"
        )
    for keyword in _UNSUPPORTED_KEYWORDS:
        if kwargs.get(keyword) is not None:
            raise NotImplementedError(f"attention: PagedCache does not support {keyword} ({name}); leave it out")


def _cached(layer: PagedLayer, query: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    if mask is None:
        return _paged(layer, query, None, options)
    mask = _without_forgotten(layer, mask)
    allowed = _as_bool(mask)
    if allowed is None or layer.group.lost_blocks:
        return _dense(query, *layer.gather_heads(), mask, options)
    return _paged(layer, query, allowed, options)


def _absorbed(module: Any, layer: PagedLayer, query: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """Attend with the up-projections of key and value moved to the query's and the output's side (MLA)."""
    latent_dim, _ = layer.widths
    heads, key_dim, value_dim = query.shape[1], module.qk_nope_head_dim, module.v_head_dim
    up = module.kv_b_proj.weight.view(heads, key_dim + value_dim, latent_dim)
    compressed = query[..., :key_dim] @ up[:, :key_dim]  # (B, H, Q, R)
    out = _cached(layer, torch.cat([compressed, query[..., key_dim:]], -1), mask, options)
    return torch.einsum("bqhr,hvr->bqhv", out, up[:, key_dim:])


def _paged(layer: PagedLayer, query: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    group = layer.group
    batch, heads, new_tokens, head_dim = query.shape
    step = _step_of_last(layer.cache.step, batch, new_tokens)
    tokens = query.transpose(1, 2).reshape(batch * new_tokens, heads, head_dim).to(layer.dtype)
    if step.one_token_each and mask is None:
        out = paged_attention(
            tokens,
            layer.kv_cache,
            group.block_tables,
            step.context_lens,
            kv_scales=layer.kv_scales,
            sinks=options.sinks,
            softmax_scale=options.scale,
            logits_soft_cap=options.cap,
            sliding_window=group.reach.window,
            attention_chunk=group.reach.chunk,
            value_dim=layer.value_dim,
        )
    else:
        attn_mask = None if mask is None else _mask_of_rows(layer, mask, batch)
        out = flash_attn_varlen(
            tokens,
            cu_seqlens_q=step.cu_seqlens_q,
            kv_cache=layer.kv_cache,
            block_tables=group.block_tables,
            context_lens=step.context_lens,
            max_seqlen_q=step.max_seqlen_q,
            max_seqlen_k=group.block_tables.shape[1] * group.block_size,
            kv_scales=layer.kv_scales,
            sinks=options.sinks,
            attn_mask=attn_mask,
            query_positions=step.query_positions,
            softmax_scale=options.scale,
            logits_soft_cap=options.cap,
            causal=mask is None,
            sliding_window=group.reach.window if mask is None else None,
            attention_chunk=group.reach.chunk if mask is None else None,
            value_dim=layer.value_dim,
        )
    return out.view(batch, new_tokens, heads, out.shape[-1]).to(query.dtype)


def _step_of_last(step: Step, batch: int, new_tokens: int) -> Step:
    """Return the step of the last queries only, which is all that layers with shared keys may get."""
    if new_tokens >= step.max_seqlen_q:
        return step
    if batch != len(step.context_lens):
        raise NotImplementedError("attention: PagedCache does not support a part of the queries of a packed forward")
    device = step.context_lens.device
    positions = step.query_positions
    return Step(
        cu_seqlens_q=torch.arange(0, (batch + 1) * new_tokens, new_tokens, dtype=torch.int32, device=device),
        context_lens=step.context_lens,
        max_seqlen_q=new_tokens,
        one_token_each=new_tokens == 1 and positions is None,
        query_positions=None if positions is None else positions.view(batch, -1)[:, -new_tokens:].flatten(),
    )


def _without_forgotten(layer: PagedLayer, mask: Tensor) -> Tensor:
    """Hide in a mask in columns the keys that a layer with a window or chunks has forgotten when a forward begins."""
    forgotten = layer.cache.forgotten(layer.group.reach)
    if forgotten is None:
        return mask
    lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(forgotten[:, None, None], lowest)


def _as_bool(mask: Tensor) -> Tensor | None:
    """Return an additive mask as bool, None where it adds anything but 0 and the lowest number."""
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return ~hidden if bool((hidden | (mask == 0)).all()) else None


def _mask_of_rows(layer: PagedLayer, mask: Tensor, batch: int) -> Tensor:
    """Return a (B, H or 1, Q, C) mask in columns as the op's (T, C) or (H, T, C) mask in positions."""
    by_token = layer.cache.columns_now().mask_of_tokens(mask.expand(batch, -1, -1, -1))
    rows = by_token.transpose(0, 1).flatten(1, 2)
    return rows[0] if len(rows) == 1 else rows


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    if not options.cap and options.sinks is None:
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype),
            dropout_p=options.dropout,
            scale=options.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).contiguous()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = (query @ key.transpose(2, 3)).float() * options.scale  # (B, H, Q, C)
    if options.cap:
        logits = options.cap * torch.tanh(logits / options.cap)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:
        logits = logits + mask
    if options.sinks is not None:
        sinks = options.sinks.view(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.softmax(-1)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, options.dropout).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def register() -> None:
    """Tell transformers the attention and the mask function, under both names."""
    for name in (ATTENTION_NAME, LATENT_ATTENTION_NAME):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, as_mask_function(paged_mask))
