"""The attention function and the mask function that transformers finds under the name ``torch_paged``.

A cache layer returns its packed ``kv_cache`` as key and as value: a handle, known by the Python attribute that points
back at the layer. Everything else (training, ``use_cache=False``) takes the dense way, written here in plain PyTorch
because transformers has no single dense function that knows soft caps and sinks.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from torch_paged.functional import flash_attn_varlen, paged_attention
from torch_paged.integrations.transformers.versions import as_mask_function, dense_mask

if TYPE_CHECKING:
    from torch_paged.integrations.transformers.paged_cache import PagedCache
    from torch_paged.integrations.transformers.paged_layer import PagedLayer

ATTENTION_NAME = "torch_paged"
HANDLE_ATTRIBUTE = "_torch_paged_layer"

_UNSUPPORTED_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "position_bias")


class MaskOffset:
    """Carries the cache to the mask function, in the place of the column offset that a paged cache does not have."""

    def __init__(self, cache: "PagedCache") -> None:
        self.cache = cache


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
        attention_mask: None with a handle (padding is in the cache's lengths), else (B, 1, Q, C) bool or additive.
        dropout: probability, 0.0 for none. None may be used with a handle.
        scaling: factor of the logits. None: ``1 / sqrt(D)``.
        softcap: cap of the logits. None or 0.0: none.
        s_aux: (H,) one logit per head without a value (sinks). None: none.
        kwargs: what else the model passes. The window is the cache layer's; another one is refused.

    Returns:
        ``(B, Q, H, DV)`` in the query's dtype, zeros in padding rows, and None for the weights.

    Raises:
        NotImplementedError: an option that the paged way does not have.
        RuntimeError: the handle was copied, viewed or reshaped on its way here.
    """
    layer: PagedLayer | None = getattr(key, HANDLE_ATTRIBUTE, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    cap = float(softcap or 0.0)
    if layer is not None and value is key:
        _check_paged_call(module, layer.group.window, attention_mask, dropout, kwargs)
        return _paged(layer, query, key, scale, cap, s_aux), None
    if key.ndim != 4 or value.ndim != 4 or layer is not None:
        raise RuntimeError(
            "attention: key must be the handle that PagedCache.update() returned, got a copy or a view of it; "
            f"{type(module).__name__} changes keys after the cache update, which torch_paged does not support"
        )
    return _dense(query, key, value, attention_mask, dropout, scale, cap, s_aux), None


def _check_paged_call(
    module: nn.Module, window: int | None, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    name = type(module).__name__
    if mask is not None:
        raise NotImplementedError(
            f"attention: PagedCache does not support 4-D or custom masks ({name}); pass a 2-D attention_mask"
        )
    if dropout:
        raise NotImplementedError(f"attention: PagedCache does not support dropout ({dropout}); call model.eval()")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(f"attention: PagedCache does not support bidirectional attention ({name})")
    given_window = kwargs.get("sliding_window")
    if given_window is not None and given_window != window:
        raise NotImplementedError(
            f"attention: PagedCache does not support a window of {given_window} ({name}) "
            f"in a layer whose cache has {window}"
        )
    for keyword in _UNSUPPORTED_KEYWORDS:
        if kwargs.get(keyword) is not None:
            raise NotImplementedError(f"attention: PagedCache does not support {keyword} ({name}); leave it out")


def _paged(
    layer: "PagedLayer", query: Tensor, kv_cache: Tensor, scale: float, cap: float, s_aux: Tensor | None
) -> Tensor:
    group, step = layer.group, layer.cache.step
    batch, heads, new_tokens, head_dim = query.shape
    tokens = query.transpose(1, 2).reshape(batch * new_tokens, heads, head_dim)
    sinks = None if s_aux is None else s_aux.float()
    layer.cache.pending_layer = None
    if step.one_token_each:
        out = paged_attention(
            tokens,
            kv_cache,
            group.block_tables,
            step.context_lens,
            sinks=sinks,
            softmax_scale=scale,
            logits_soft_cap=cap,
            sliding_window=group.window,
            value_dim=layer.value_dim,
        )
    else:
        out = flash_attn_varlen(
            tokens,
            cu_seqlens_q=step.cu_seqlens_q,
            kv_cache=kv_cache,
            block_tables=group.block_tables,
            context_lens=step.context_lens,
            max_seqlen_q=step.max_seqlen_q,
            max_seqlen_k=group.block_tables.shape[1] * group.block_size,
            sinks=sinks,
            query_positions=step.query_positions,
            softmax_scale=scale,
            logits_soft_cap=cap,
            causal=True,
            sliding_window=group.window,
            value_dim=layer.value_dim,
        )
    return out.view(batch, new_tokens, heads, out.shape[-1])


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float,
    cap: float,
    s_aux: Tensor | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = (query @ key.transpose(2, 3)).float() * scale  # (B, H, Q, C)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:
        logits = logits + mask
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.softmax(-1)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, dropout).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def paged_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: "int | MaskOffset" = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Prepare the paged cache for the coming forward and return no mask; without one, return the dense mask.

    Args:
        batch_size: B.
        q_length: new tokens of each sequence.
        kv_length: columns of the dense keys.
        q_offset: column of the first new token.
        kv_offset: what ``get_mask_sizes`` returned: a ``MaskOffset`` when the cache is paged.
        mask_function: what transformers would draw: causal, or causal with a window.
        attention_mask: (B, columns) bool, False at padding, or None.
        kwargs: options of the dense mask.

    Returns:
        None with a paged cache, else a (B, 1, Q, C) bool mask.

    Raises:
        NotImplementedError: a mask other than causal and window, with a paged cache.
    """
    if isinstance(kv_offset, MaskOffset):
        plain = mask_function is causal_mask_function
        windowed = kwargs.get("local_size") is not None and not mask_function.__qualname__.startswith("or_masks")
        if kwargs.get("use_vmap") or not (plain or windowed):
            raise NotImplementedError("attention_mask: PagedCache does not support masks other than causal and window")
        kv_offset.cache.prepare(batch_size, q_length, attention_mask)
        return None
    return dense_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def register() -> None:
    """Tell transformers the attention and the mask function, both under ``ATTENTION_NAME``."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, as_mask_function(paged_mask))
