"""The blocks of one kind of layer, and the tensors that they number: what a cache shares with its forks."""

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torch_paged import dispatch, functional
from torch_paged.cache import BlockAllocator, KVCache, allocate_kv_cache
from torch_paged.integrations.transformers.layer_plan import Reach
from torch_paged.integrations.transformers.static_sizes import static_size

if TYPE_CHECKING:
    from torch_paged.integrations.transformers.paged_layer import PagedLayer

_FIRST_BLOCKS = 2  # a compiled forward takes a size of 1 for another case


class LayerStorage:
    """The packed tensor of one layer, and the scales of a quantised one.

    Attributes:
        kv_cache: (2, N, KH, S, DS), or (1, N, 1, S, DS) for latent attention. None before the first keys.
        kv_scales: (2, N, KH, S) float32 where the cache is quantised.
        holders: the cache layers that hand the tensor out: one in the cache, one in each of its forks.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.kv_cache: Tensor | None = None
        self.kv_scales: Tensor | None = None
        self.holders: weakref.WeakSet[PagedLayer] = weakref.WeakSet()

    def allocate(
        self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, like: Tensor, latent: bool
    ) -> None:
        """Allocate for N blocks, in the dtype and on the device of ``like`` unless the cache has its own dtype."""
        self._replace(self._allocated(num_blocks, num_kv_heads, block_size, head_dim, like, latent))

    def grow(self, num_blocks: int) -> None:
        """Move to a larger tensor, where there is one already; when that fails, the old one is as it was."""
        old, old_scales = self.kv_cache, self.kv_scales
        if old is None:
            return
        sides, old_blocks, num_kv_heads, block_size, head_dim = old.shape
        new = self._allocated(num_blocks, num_kv_heads, block_size, head_dim, old, sides == 1)
        new.kv_cache[:, :old_blocks] = old
        if old_scales is not None and new.kv_scales is not None:
            new.kv_scales[:, :old_blocks] = old_scales
        self._replace(new)

    def copy_blocks(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy whole blocks, where there is a tensor already."""
        if self.kv_cache is not None:
            functional.copy_blocks(self.kv_cache, sources, destinations, kv_scales=self.kv_scales)

    def _allocated(
        self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, like: Tensor, latent: bool
    ) -> KVCache:
        dtype = self.dtype or like.dtype
        return allocate_kv_cache(
            num_blocks,
            num_kv_heads,
            block_size,
            head_dim,
            dtype=dtype,
            device=like.device,
            latent=latent,
            scales="token" if dtype.itemsize == 1 else None,
            backend=dispatch.served().get(like.device.type, "cpu"),
        )

    def _replace(self, allocated: KVCache) -> None:
        self.kv_cache, self.kv_scales = allocated.kv_cache, allocated.kv_scales
        for holder in self.holders:
            holder.take_storage()


class SharedBlocks:
    """The pool of block ids of the layers that see the same keys.

    Attributes:
        allocator: says which block holds which tokens of which sequence.
        storages: the tensors of these layers.
        peak_blocks: the most blocks that were in use at once.
    """

    def __init__(self, reach: Reach, block_size: int, prefix_reuse: bool = False) -> None:
        self.allocator = BlockAllocator(
            _FIRST_BLOCKS,
            block_size,
            sliding_window=reach.window,
            attention_chunk=reach.chunk,
            prefix_reuse=prefix_reuse,
        )
        self.storages: list[LayerStorage] = []
        self.peak_blocks = 0

    @property
    def num_blocks(self) -> int:
        """N, the pool's size."""
        return self.allocator.num_blocks

    @property
    def in_use(self) -> int:
        """Blocks that at least one sequence holds."""
        return self.num_blocks - self.allocator.num_free_blocks

    def grow(self, num_blocks: int) -> None:
        """Make every tensor larger, and then the pool: where memory runs out, no block without memory is used."""
        for storage in self.storages:
            storage.grow(num_blocks)
        self.allocator.grow(num_blocks)

    def copy_pending(self, device: torch.device) -> None:
        """Do the copies that the last appends asked for."""
        sources, destinations = self.allocator.take_copies()
        if len(sources):
            skipped = static_size(len(sources), device) - len(sources)
            pairs = [nn.functional.pad(x, (0, skipped), value=-1).to(device) for x in (sources, destinations)]
            for storage in self.storages:
                storage.copy_blocks(*pairs)
