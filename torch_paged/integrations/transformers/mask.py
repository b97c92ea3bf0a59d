"""The mask function that transformers finds under our names: it prepares the paged cache, and draws masks for the rest.

Padding and windows need no mask with a paged cache: lengths and positions say it all. Other masks (image blocks, prefix
LM) are drawn by transformers in its columns and handed on to the attention function.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from torch_paged.integrations.transformers.layer_plan import Reach
from torch_paged.integrations.transformers.static_sizes import compiles_each_shape
from torch_paged.integrations.transformers.versions import dense_mask

if TYPE_CHECKING:
    from torch_paged.integrations.transformers.paged_cache import PagedCache


class MaskOffset:
    """Carries the cache to the mask function, in the place of the column offset, which is 0 with a paged cache."""

    def __init__(self, cache: "PagedCache", reach: Reach) -> None:
        self.cache = cache
        self.reach = reach

    def __add__(self, columns: int) -> int:
        return columns

    __radd__ = __add__


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
    """Prepare the paged cache for the coming forward; return no mask where lengths and windows say all.

    Args:
        batch_size: B.
        q_length: new tokens of each sequence.
        kv_length: columns of the dense keys.
        q_offset: column of the first new token.
        kv_offset: what ``get_mask_sizes`` returned: a ``MaskOffset`` when the cache is paged.
        mask_function: what transformers would draw.
        attention_mask: (B, columns) bool, False at padding, or None.
        kwargs: options of the dense mask.

    Returns:
        None with a paged cache whose queries are causal, chunk and window included, as one new token nearly always is;
        else a (B, 1, Q, C) bool mask, also where ``attention_mask`` hides tokens that earlier forwards did not.

    Raises:
        NotImplementedError: another mask than causal, in a compiled forward.
    """
    hides_tokens = False
    if isinstance(kv_offset, MaskOffset):
        kv_offset.cache.prepare(batch_size, q_length, attention_mask)
        hides_tokens = kv_offset.cache.hides_tokens(attention_mask)
        if _is_causal(mask_function, kwargs) and not hides_tokens:
            if q_length > 1:
                kv_offset.cache.causal_step = kv_offset.cache.step
            return None
        if kv_offset.cache.is_packed:
            raise NotImplementedError(
                "attention_mask: PagedCache does not support masks other than causal, window and chunk for packed "
                "tokens"
            )
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "attention_mask: PagedCache does not support masks other than causal, window and chunk in a compiled "
                "forward; run it eagerly"
            )
        if compiles_each_shape(kv_offset.cache.device):
            raise NotImplementedError(
                "attention_mask: PagedCache does not support masks other than causal, window and chunk on device "
                f"'{kv_offset.cache.device.type}', where each shape is compiled; run it on the CPU"
            )
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": 0 if isinstance(kv_offset, MaskOffset) else kv_offset,
        "attention_mask": attention_mask,
    }
    mask = dense_mask(mask_function=mask_function, **options, **kwargs)
    if hides_tokens or not isinstance(kv_offset, MaskOffset):
        return mask
    if q_length == 1 and mask is not None and kv_offset.reach.chunk is None:
        plain = dense_mask(mask_function=_causal(kv_offset.reach), **options, **{**kwargs, "use_vmap": False})
        return None if plain is not None and torch.equal(mask, plain) else mask
    return mask


def _causal(reach: Reach) -> Any:
    if reach.window is None:
        return causal_mask_function
    return sliding_window_causal_mask_function(reach.window)


def _is_causal(mask_function: Any, kwargs: dict[str, Any]) -> bool:
    """Say whether a mask function is causal alone or with the window or chunk that the cache layer knows."""
    if kwargs.get("use_vmap"):
        return False
    if mask_function is causal_mask_function:
        return True
    return kwargs.get("local_size") is not None and mask_function.__qualname__.startswith("and_masks")
