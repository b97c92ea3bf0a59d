"""A transformers cache that keeps keys and values in blocks, and prepares every forward on the host."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from torch_paged.integrations.transformers.attention import ATTENTION_NAME
from torch_paged.integrations.transformers.block_group import BlockGroup
from torch_paged.integrations.transformers.paged_layer import PagedLayer, layer_windows
from torch_paged.integrations.transformers.step import Step
from torch_paged.integrations.transformers.versions import PreTrainedConfig, columns_after_crop


class PagedCache(DynamicCache):
    """Keep the keys and values of a decoder-only model in blocks instead of one padded rectangle.

    Only real tokens take slots: the padding of a ragged batch costs nothing, beams share blocks until they are written,
    and blocks behind a sliding window are reused. The layers' tensors are ``(2, N, KH, S, D)``.

    Args:
        config: the model's config; its attention implementation must be ``"torch_paged"``.
        max_cache_length: columns that the cache will reach (prompt and new tokens). Pool and tables are then sized
            once, which is what a compiled forward needs. None: they grow as needed.
        block_size: tokens in a block.
        device: where block tables and slots live: the model's device.
        prefix_reuse: True to keep the blocks of prompts after ``reset``, for prompts that begin alike.

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

    step: Step
    layers: list[PagedLayer]  # type: ignore[assignment]  # transformers has layers of several kinds

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        max_cache_length: int | None = None,
        block_size: int = 16,
        device: torch.device | str = "cpu",
        prefix_reuse: bool = False,
    ) -> None:
        for name, value in (("max_cache_length", max_cache_length), ("block_size", block_size)):
            if value is not None and value < 1:
                raise ValueError(f"PagedCache: {name} must be >= 1, got {value}")
        self.config = config.get_text_config(decoder=True)
        self.max_cache_length = max_cache_length
        self.device = torch.device(device)
        self.groups: dict[int | None, BlockGroup] = {}
        layers: list[PagedLayer] = []
        for window in layer_windows(self.config):
            if window not in self.groups:
                self.groups[window] = BlockGroup(window, block_size, self.device, prefix_reuse=prefix_reuse)
            group = self.groups[window]
            layers.append(PagedLayer(self, group))
        self._forget()
        Cache.__init__(self, layers=list(layers))

    def _forget(self) -> None:
        self.lengths: list[int] = []
        self.columns = 0
        self.new_tokens = 0
        self.prepared = False
        self._real: list[list[bool]] | None = None
        self._history: list[bytearray] = []  # of each row, 1 for a column with a real token
        self.pending_layer: PagedLayer | None = None
        self.columns_tensor = torch.zeros((), dtype=torch.long, device=self.device)

    def prepare(self, batch_size: int, new_tokens: int, mask: Tensor | None = None) -> None:
        """Get ready for a forward of ``new_tokens`` columns: blocks, slots, lengths. Calling it again changes nothing.

        The mask function calls it; before a compiled forward that is called by hand, call it yourself.

        Args:
            batch_size: B, rows of the forward.
            new_tokens: columns of the forward, padding included.
            mask: (B, at least new_tokens) True at real tokens; the last columns count. None: all real, or as told
                before.

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
            self._history = [bytearray() for _ in range(batch_size)]
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
        positions = None
        if real is not None and not _padded_before_all_tokens(self.lengths, real):
            positions = self._int32(_positions(self.lengths, real))
        self.step = Step(
            cu_seqlens_q=self._int32(range(0, (batch_size + 1) * new_tokens, new_tokens)),
            context_lens=self._int32(self._new_lengths),
            max_seqlen_q=new_tokens,
            one_token_each=new_tokens == 1 and positions is None,
            query_positions=positions,
        )
        self.columns_tensor.fill_(self.columns)
        self.new_tokens = new_tokens
        self._real = real
        self.prepared = True

    def _int32(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def _finish_step(self) -> None:
        self.check_no_pending_handle()
        written = [layer.written for layer in self.layers]
        if not any(written):
            return
        if not all(written):
            raise RuntimeError(
                f"PagedCache: the forward before wrote {sum(written)} of {len(written)} layers; "
                "call reset() and start again"
            )
        self.lengths = self._new_lengths
        self.columns += self.new_tokens
        for seq, row in enumerate(self._history):
            row += bytes([1]) * self.new_tokens if self._real is None else bytes(self._real[seq])
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
        self._history = [bytearray(self._history[row]) for row in rows]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns; 0 forgets nothing.

        Before transformers named it so, 0 and above are the columns to keep.

        Raises:
            ValueError: a positive number, more columns than are cached, or columns whose window is gone.
        """
        self._finish_step()
        self._forget_preparation()
        columns = columns_after_crop(self.columns, tokens_to_remove)
        if columns == self.columns:
            return
        lengths = [length - sum(row[columns:]) for length, row in zip(self.lengths, self._history, strict=True)]
        for group in self.groups.values():
            group.truncate(lengths)
        self.lengths, self.columns = lengths, columns
        for row in self._history:
            del row[columns:]

    def activate_past_recording(self) -> None:
        """Do nothing: a step frees only blocks that the steps after it cannot see."""

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError(
            "PagedCache: dense keys and values are not kept; read them with torch_paged.gather_cache"
        )


def _real_columns(mask: Tensor | None, new_tokens: int) -> list[list[bool]] | None:
    if mask is None:
        return None
    real = mask[:, -new_tokens:].bool()
    return None if bool(real.all()) else real.tolist()


def _padded_before_all_tokens(lengths: list[int], real: list[list[bool]]) -> bool:
    """Say whether counting back from a row's last token gives every padding column a position below 0."""
    return all(all(row) or (length == 0 and row == sorted(row)) for length, row in zip(lengths, real, strict=True))


def _positions(lengths: list[int], real: list[list[bool]]) -> list[int]:
    positions = []
    for length, row in zip(lengths, real, strict=True):
        for is_real in row:
            positions.append(length if is_real else -1)
            length += is_real
    return positions
