"""The cache of one layer: where update() writes, and the handle that it returns."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from torch_paged import functional
from torch_paged.integrations.transformers.block_group import BlockGroup
from torch_paged.integrations.transformers.handle import HANDLE_ATTRIBUTE
from torch_paged.integrations.transformers.latent import check_not_expanded, is_compressed
from torch_paged.integrations.transformers.mask import MaskOffset
from torch_paged.integrations.transformers.shared_blocks import LayerStorage
from torch_paged.integrations.transformers.versions import new_columns

if TYPE_CHECKING:
    from torch_paged.integrations.transformers.paged_cache import PagedCache


class PagedLayer(CacheLayerMixin):
    """The cache of one attention layer: a packed tensor in blocks; its group says where tokens lie."""

    is_compileable = False  # PagedCache says it for all layers; transformers 4.57 asks each before assisted decoding
    is_croppable = True
    supports_early_init = False
    kv_cache: Tensor
    kv_scales: Tensor | None

    def __init__(self, cache: "PagedCache", group: BlockGroup, index: int, storage: LayerStorage) -> None:
        self.cache = cache
        self.group = group
        self.index = index
        self.storage = storage
        self.is_sliding = group.reach != (None, None)
        self.is_initialized = False
        self.written = False
        self.value_dim: int | None = None
        self.widths = (0, 0)
        storage.holders.add(self)

    def fork(self, cache: "PagedCache", group: BlockGroup) -> "PagedLayer":
        """Return a layer of another cache on the same storage."""
        layer = PagedLayer(cache, group, self.index, self.storage)
        layer.value_dim, layer.widths = self.value_dim, self.widths
        if self.is_initialized:
            layer.dtype = self.dtype
            layer.is_initialized = True
            layer.take_storage()
        return layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the packed cache for the heads and the dtype of the first keys."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "PagedCache: the first forward must run eagerly, got a compiled one; run the prefill first"
            )
        _, num_kv_heads, _, head_dim = key_states.shape
        self.widths = (head_dim, value_states.shape[3])
        latent = is_compressed(self.cache.config, key_states, value_states)
        if latent and not self.cache.gathered:
            check_not_expanded(self.cache.config)
        self.value_dim = head_dim if latent else self.widths[1]
        if not latent and self.widths[1] > head_dim:
            raise NotImplementedError(
                f"PagedCache: layer {self.index} has values wider than its keys, {self.widths[1]} and {head_dim}"
            )
        self.dtype = key_states.dtype
        if self.storage.kv_cache is None:
            stored_dim = sum(self.widths) if latent else head_dim
            self.storage.allocate(
                self.group.num_blocks, num_kv_heads, self.group.block_size, stored_dim, key_states, latent
            )
        self.is_initialized = True
        self.take_storage()

    @torch.compiler.disable
    def take_storage(self) -> None:
        """Hold the storage's tensors, as aliases; that of the keys leads back to this layer and to no other."""
        if self.is_initialized and self.storage.kv_cache is not None:
            self.kv_cache, self.kv_scales = self.storage.kv_cache.detach(), self.storage.kv_scales
            setattr(self.kv_cache, HANDLE_ATTRIBUTE, self)
            for pool in (self.kv_cache, self.kv_scales):  # one compiled forward serves pools of any size
                if pool is not None:
                    torch._dynamo.maybe_mark_dynamic(pool, 1)

    @property
    def latent(self) -> bool:
        """Whether one compressed row is key and value of all heads."""
        return self.kv_cache.shape[0] == 1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values ``(B, KH, Q, D)`` into their slots.

        Returns:
            The handle, as key and as value: only ``attention_forward`` can read it. Where the cache is gathered, dense
            keys and values in transformers' columns.

        Raises:
            RuntimeError: the handle of the layer before was never used.
            ValueError: the model would read the handle with another attention implementation.
        """
        batch, num_kv_heads, new_tokens, _ = key_states.shape
        self.cache.check_no_pending_handle()
        if not torch.compiler.is_compiling():
            if not self.cache.gathered:
                self.cache.check_implementation()
            self.cache.ensure_prepared(self, batch, new_tokens)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = batch * new_tokens
        key = key_states.detach().to(self.dtype).transpose(1, 2).reshape(tokens, num_kv_heads, self.widths[0])
        value = value_states.detach().to(self.dtype).transpose(1, 2).reshape(tokens, num_kv_heads, self.widths[1])
        rows, beside = (torch.cat([key, value], -1), None) if self.latent else (key, value)
        if self.kv_scales is None:
            functional.reshape_and_cache(rows, beside, self.kv_cache, self.group.slot_mapping)
        else:
            functional.quantize_and_cache(rows, beside, self.kv_cache, self.kv_scales, self.group.slot_mapping)
        self.written = True
        if self.cache.gathered:
            return self.gather()
        self.cache.pending_layer = self
        return self.kv_cache, self.kv_cache

    def gather(self) -> tuple[Tensor, Tensor]:
        """Return dense copies of what the model cached, (B, KH, columns, D), zeros at padding and behind the window."""
        key, value = self._gather_rows()
        key_dim, value_dim = self.widths
        return key[..., :key_dim], (key[..., key_dim:] if self.latent else value)[..., :value_dim]

    def gather_heads(self) -> tuple[Tensor, Tensor]:
        """Return dense copies of what the ops attend to, in the same columns."""
        key, value = self._gather_rows()
        return key[..., : sum(self.widths) if self.latent else self.widths[0]], (key if self.latent else value)[
            ..., : self.value_dim
        ]

    def _gather_rows(self) -> tuple[Tensor, Tensor]:
        columns = self.cache.columns_now()
        key, value = functional.gather_cache(
            self.kv_cache,
            self.group.block_tables,
            self.cache.step.context_lens,
            columns.num_columns,
            kv_scales=self.kv_scales,
            starts=columns.starts,
        )
        return columns.in_columns(key).to(self.dtype), columns.in_columns(value).to(self.dtype)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Dense keys, gathered now; None before the first forward."""
        return self._gathered(0)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Dense values, gathered now; None before the first forward."""
        return self._gathered(1)

    def _gathered(self, side: int) -> Tensor | None:
        if not self.is_initialized or not self.cache.lengths:
            return None
        self.cache.settle()
        return self.gather()[side]

    def get_seq_length(self) -> int:
        """Return the columns that transformers counts: padding included, this forward's too once it is written."""
        if torch.compiler.is_compiling():
            return self.cache.columns_tensor  # type: ignore[return-value]  # an int here would recompile at each step
        return self.cache.columns + (self.cache.new_tokens if self.written else 0)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the dense length, and the cache itself in the place of the offset: the mask function needs it."""
        length = self.get_seq_length() + new_columns(query_length)
        if self.cache.gathered:
            return length, 0
        self.cache.check_implementation()
        return length, MaskOffset(self.cache, self.group.reach)  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """Return -1: the layer grows."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions of transformers
