"""The cache of one layer: where update() writes, and the handle that it returns."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from torch_paged import functional
from torch_paged.cache import allocate_kv_cache
from torch_paged.integrations.transformers.attention import HANDLE_ATTRIBUTE, MaskOffset
from torch_paged.integrations.transformers.block_group import BlockGroup
from torch_paged.integrations.transformers.versions import PreTrainedConfig, new_columns

if TYPE_CHECKING:
    from torch_paged.integrations.transformers.paged_cache import PagedCache


class PagedLayer(CacheLayerMixin):
    """The cache of one attention layer: a packed ``(2, N, KH, S, D)`` tensor; its group says where tokens lie."""

    is_compileable = False  # PagedCache says it for all layers; transformers 4.57 asks each before assisted decoding
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: "PagedCache", group: BlockGroup) -> None:
        self.cache = cache
        self.group = group
        self.is_sliding = group.window is not None
        self.is_initialized = False
        self.written = False
        self.value_dim: int | None = None
        group.layers.append(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the packed cache for the heads and the dtype of the first keys."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "PagedCache: the first forward must run eagerly, got a compiled one; run the prefill first"
            )
        _, num_kv_heads, _, head_dim = key_states.shape
        allocated = allocate_kv_cache(
            self.group.num_blocks,
            num_kv_heads,
            self.group.block_size,
            head_dim,
            dtype=key_states.dtype,
            device=key_states.device,
        )
        self.value_dim = None if value_states.shape[3] == head_dim else value_states.shape[3]
        self._hold(allocated.kv_cache)
        self.is_initialized = True

    def _hold(self, kv_cache: Tensor) -> None:
        setattr(kv_cache, HANDLE_ATTRIBUTE, self)
        self.kv_cache = kv_cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values ``(B, KH, Q, D)`` into their slots.

        Returns:
            The handle, as key and as value. Only ``attention_forward`` can read it.

        Raises:
            RuntimeError: the handle of the layer before was never used.
        """
        batch, num_kv_heads, new_tokens, head_dim = key_states.shape
        self.cache.check_no_pending_handle()
        if not torch.compiler.is_compiling():
            self.cache.ensure_prepared(self, batch, new_tokens)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        functional.reshape_and_cache(
            key_states.detach().transpose(1, 2).reshape(batch * new_tokens, num_kv_heads, head_dim),
            value_states.detach().transpose(1, 2).reshape(batch * new_tokens, num_kv_heads, value_states.shape[3]),
            self.kv_cache,
            self.group.slot_mapping,
        )
        self.written = True
        self.cache.pending_layer = self
        return self.kv_cache, self.kv_cache

    def copy_blocks(self, source: Tensor, destination: Tensor) -> None:
        """Copy whole blocks, where this layer has a cache already."""
        if self.is_initialized:
            functional.copy_blocks(self.kv_cache, source, destination)

    def grow(self, num_blocks: int) -> None:
        """Move to a larger pool, where this layer has a cache already."""
        if self.is_initialized:
            _, old_blocks, num_kv_heads, block_size, head_dim = self.kv_cache.shape
            larger = allocate_kv_cache(
                num_blocks, num_kv_heads, block_size, head_dim, dtype=self.kv_cache.dtype, device=self.kv_cache.device
            ).kv_cache
            larger[:, :old_blocks] = self.kv_cache
            self._hold(larger)

    def get_seq_length(self) -> int:
        """Return the columns that transformers counts: padding included, this forward's too once it is written."""
        if torch.compiler.is_compiling():
            return self.cache.columns_tensor  # type: ignore[return-value]  # an int here would recompile at each step
        return self.cache.columns + (self.cache.new_tokens if self.written else 0)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the dense length, and the cache itself in the place of the offset: the mask function needs it."""
        self.cache.check_implementation()
        return self.get_seq_length() + new_columns(query_length), MaskOffset(self.cache)  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """Return -1: the layer grows."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions of transformers


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """Return each layer's window, None for full attention.

    Raises:
        NotImplementedError: a layer of another kind.
    """
    name = config.model_type
    if getattr(config, "kv_lora_rank", None) is not None:
        raise NotImplementedError(f"PagedCache: latent attention ({name}) is not supported; use the model unpatched")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise NotImplementedError(f"PagedCache: chunked attention ({name}) is not supported; use the model unpatched")
    windows: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        else:
            kind = type(layer).__name__
            raise NotImplementedError(
                f"PagedCache: cache layer {kind} ({name}) is not supported; use the model unpatched"
            )
    return windows
