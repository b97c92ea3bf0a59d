"""A transformers cache whose layers write into paged tensors and hand their packed cache on."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from torch_paged import functional
from torch_paged.cache import allocate_kv_cache
from torch_paged.integrations.transformers.attention import ATTENTION_NAME, HANDLE_ATTRIBUTE, MaskOffset
from torch_paged.integrations.transformers.block_group import BlockGroup


class PagedLayer(CacheLayerMixin):
    """The cache of one attention layer: a packed ``(2, N, KH, S, D)`` tensor, and the group that says where tokens lie."""

    is_compileable = True
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
            raise RuntimeError("PagedCache: the first forward must run eagerly, got a compiled one; run the prefill first")
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

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the dense length, and the cache itself in the place of the offset: the mask function needs it."""
        self.cache.check_implementation()
        return self.get_seq_length() + query_length, MaskOffset(self.cache)  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """Return -1: the layer grows."""
        return -1


class PagedCache(DynamicCache):
    """Keep the keys and values of a decoder-only model in blocks instead of one padded rectangle.

    Only real tokens take slots: the padding of a ragged batch costs nothing, beams share blocks until they are written, and
    blocks behind a sliding window are reused. The layers' tensors are ``(2, N, KH, S, D)``.

    Args:
        config: the model's config; its attention implementation must be ``"torch_paged"``.
        max_cache_length: columns that the cache will reach (prompt and new tokens). Pool and tables are then sized once,
            which is what a compiled forward needs. None: they grow as needed.
        block_size: tokens in a block.
        device: where block tables and slots live: the model's device.

    Raises:
        ValueError: a size below 1.
        NotImplementedError: the model has layers that are neither full nor sliding-window attention.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from torch_paged.integrations.transformers import PagedCache, patch_model
        >>> config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> model = patch_model(LlamaForCausalLM(config).eval())
        >>> cache = PagedCache(model.config)
        >>> logits = model(torch.arange(1, 20)[None], past_key_values=cache).logits
        >>> cache.get_seq_length(), cache.blocks_in_use
        (19, 2)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        max_cache_length: int | None = None,
        block_size: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("max_cache_length", max_cache_length), ("block_size", block_size)):
            if value is not None and value < 1:
                raise ValueError(f"PagedCache: {name} must be >= 1, got {value}")
        self.config = config.get_text_config(decoder=True)
        self.max_cache_length = max_cache_length
        self.device = torch.device(device)
        self.groups: dict[int | None, BlockGroup] = {}
        layers: list[CacheLayerMixin] = []
        for window in layer_windows(self.config):
            group = self.groups.setdefault(window, BlockGroup(window, block_size, self.device))
            layers.append(PagedLayer(self, group))
        self._forget()
        Cache.__init__(self, layers=layers)

    def _forget(self) -> None:
        self.lengths: list[int] = []
        self.columns = 0
        self.new_tokens = 0
        self.prepared = False
        self._real: list[list[bool]] | None = None
        self._padded_columns = 0
        self.pending_layer: PagedLayer | None = None
        self.query_positions: Tensor | None = None
        self.columns_tensor = torch.zeros((), dtype=torch.long, device=self.device)

    def prepare(self, batch_size: int, new_tokens: int, mask: Tensor | None = None) -> None:
        """Get ready for a forward of ``new_tokens`` columns: blocks, slots, lengths. Calling it again changes nothing.

        The mask function calls it; before a compiled forward that is called by hand, call it yourself.

        Args:
            batch_size: B, rows of the forward.
            new_tokens: columns of the forward, padding included.
            mask: (B, at least new_tokens) True at real tokens; the last columns count. None: all real, or as told before.

        Raises:
            ValueError: another batch size than the cache holds.
            RuntimeError: the forward before did not run through all layers, or a compiled forward was not prepared.
        """
        if torch.compiler.is_compiling():
            if not self.prepared or self.new_tokens != new_tokens or self.layers[0].written:
                raise RuntimeError("PagedCache: call prepare() before each compiled forward")
            return
        self._finish_step()
        if self.prepared and self.new_tokens == new_tokens and mask is None:
            return
        if not self.lengths:
            self.lengths = [0] * batch_size
        if batch_size != len(self.lengths):
            raise ValueError(f"PagedCache: batch size must be {len(self.lengths)} as cached, got {batch_size}")
        real = _real_columns(mask, new_tokens)
        if not self.prepared or self.new_tokens != new_tokens or self._real != real:
            self._forget_preparation()
            self._lay_out(new_tokens, real)

    def _lay_out(self, new_tokens: int, real: list[list[bool]] | None) -> None:
        batch_size = len(self.lengths)
        counts = [new_tokens] * batch_size if real is None else [sum(row) for row in real]
        for group in self.groups.values():
            if not group.started:
                group.start(counts, new_tokens, self.max_cache_length)
            group.extend(counts, real)
        self._new_lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.context_lens = torch.tensor(self._new_lengths, dtype=torch.int32, device=self.device)
        ends = range(0, (batch_size + 1) * new_tokens, new_tokens)
        self.cu_seqlens_q = torch.tensor(ends, dtype=torch.int32, device=self.device)
        self.query_positions = None
        if real is not None and not _left_padded(real):
            positions = _positions(self.lengths, real)
            self.query_positions = torch.tensor(positions, dtype=torch.int32, device=self.device)
        self.columns_tensor.fill_(self.columns)
        self.new_tokens = new_tokens
        self._real = real
        self.prepared = True

    def _finish_step(self) -> None:
        self.check_no_pending_handle()
        written = [layer.written for layer in self.layers]
        if not any(written):
            return
        if not all(written):
            raise RuntimeError(
                f"PagedCache: the forward before wrote {sum(written)} of {len(written)} layers; call reset() and start again"
            )
        self.lengths = self._new_lengths
        self.columns += self.new_tokens
        if self._real is not None:
            self._padded_columns = self.columns
        self.prepared = False
        for layer in self.layers:
            layer.written = False

    def ensure_prepared(self, layer: PagedLayer, batch_size: int, new_tokens: int) -> None:
        """Prepare for a model that asked for no mask before it updates this layer."""
        if layer.written or not self.prepared or self.new_tokens != new_tokens or len(self.lengths) != batch_size:
            self.prepare(batch_size, new_tokens)

    def check_no_pending_handle(self) -> None:
        """Raise when a layer's handle never reached ``attention_forward``."""
        if self.pending_layer is not None:
            raise RuntimeError(
                "PagedCache: the keys that update() returned must reach the torch_paged attention function, got lost; "
                "the model copies them, or does not use the attention interface: call patch_model(model)"
            )

    def check_implementation(self) -> None:
        """Raise when the model would read the cache with another attention implementation."""
        if self.config._attn_implementation != ATTENTION_NAME:
            raise ValueError(
                f"PagedCache: the model's attention implementation must be '{ATTENTION_NAME}', "
                f"got '{self.config._attn_implementation}'; call patch_model(model)"
            )

    @property
    def is_compileable(self) -> bool:
        """True: every layer is paged."""
        return True

    @property
    def batch_size(self) -> int:
        """Rows in the cache, -1 before the first forward."""
        return len(self.lengths) or -1

    @property
    def blocks_in_use(self) -> int:
        """Blocks that hold tokens now, over all groups of layers."""
        return sum(group.blocks_in_use for group in self.groups.values())

    @property
    def peak_blocks(self) -> int:
        """The most blocks that held tokens at once, over all groups of layers."""
        return sum(group.peak_blocks for group in self.groups.values())

    @property
    def pool_bytes(self) -> int:
        """Bytes of all layers' tensors."""
        return sum(layer.kv_cache.nbytes for layer in self.layers if layer.is_initialized)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the blocks that held tokens at the peak, over all layers."""
        parts = [layer for layer in self.layers if layer.is_initialized]
        return sum(layer.kv_cache.nbytes // layer.group.num_blocks * layer.group.peak_blocks for layer in parts)

    def reset(self) -> None:
        """Forget all tokens; the pools stay."""
        for group in self.groups.values():
            group.clear()
        for layer in self.layers:
            layer.written = False
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let every row continue the row that ``beam_idx`` names; shared blocks are copied when they are written."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the named rows, ids or a bool mask."""
        self._select(torch.arange(len(self.lengths))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; the copies share their blocks until they are written."""
        self._select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def _forget_preparation(self) -> None:
        if self.prepared:
            for group in self.groups.values():
                group.truncate(self.lengths)
            self.prepared = False

    def _select(self, rows: list[int]) -> None:
        self._finish_step()
        self._forget_preparation()
        for group in self.groups.values():
            group.select(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns; 0 forgets nothing.

        Raises:
            ValueError: a positive number, more columns than are cached, or columns whose window is gone.
            NotImplementedError: padding lies in the columns.
        """
        self._finish_step()
        self._forget_preparation()
        columns = self.columns + tokens_to_remove
        if tokens_to_remove > 0 or columns < 0:
            raise ValueError(f"PagedCache: tokens_to_remove must be in [{-self.columns}, 0], got {tokens_to_remove}")
        if tokens_to_remove == 0:
            return
        if columns < self._padded_columns:
            raise NotImplementedError(
                f"PagedCache: crop is not supported behind column {self._padded_columns}, where padding lies, got {columns}"
            )
        lengths = [length + tokens_to_remove for length in self.lengths]
        for group in self.groups.values():
            group.truncate(lengths)
        self.lengths, self.columns = lengths, columns

    def activate_past_recording(self) -> None:
        """Do nothing: a step frees only blocks that the steps after it cannot see."""

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError("PagedCache: dense keys and values are not kept; read them with torch_paged.gather_cache")


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
            raise NotImplementedError(f"PagedCache: cache layer {kind} ({name}) is not supported; use the model unpatched")
    return windows


def _real_columns(mask: Tensor | None, new_tokens: int) -> list[list[bool]] | None:
    if mask is None:
        return None
    real = mask[:, -new_tokens:].bool()
    return None if bool(real.all()) else real.tolist()


def _left_padded(real: list[list[bool]]) -> bool:
    return all(row == sorted(row) for row in real)


def _positions(lengths: list[int], real: list[list[bool]]) -> list[int]:
    positions = []
    for length, row in zip(lengths, real, strict=True):
        for is_real in row:
            positions.append(length if is_real else -1)
            length += is_real
    return positions
