"""A transformers cache that keeps keys and values in blocks, and prepares every forward on the host."""

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from torch_paged.integrations.transformers.attention import ATTENTION_NAME
from torch_paged.integrations.transformers.block_group import BlockGroup
from torch_paged.integrations.transformers.checks import check_rows, check_sizes
from torch_paged.integrations.transformers.columns import (
    ColumnMap,
    column_map,
    padded_before_all_tokens,
    query_positions,
    real_columns,
)
from torch_paged.integrations.transformers.latent import LATENT_ATTENTION_NAME
from torch_paged.integrations.transformers.layer_plan import Reach, plan_layers
from torch_paged.integrations.transformers.paged_layer import PagedLayer
from torch_paged.integrations.transformers.pool_sizes import PoolSizes
from torch_paged.integrations.transformers.shared_blocks import LayerStorage, SharedBlocks
from torch_paged.integrations.transformers.static_sizes import compiles_each_shape, static_size
from torch_paged.integrations.transformers.step import Step
from torch_paged.integrations.transformers.versions import PreTrainedConfig, columns_after_crop

_DENSE_MASKS_ONLY = ("encoder-decoder", "paligemma")  # do not take the masks that generate makes for a compiled forward
_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


class PagedCache(PoolSizes, DynamicCache):
    """Keep the keys and values of a decoder-only model in blocks instead of one padded rectangle.

    Only real tokens take slots: the padding of a ragged batch costs nothing, beams share blocks until they are written,
    and blocks behind a sliding window are reused. The layers' tensors are ``(2, N, KH, S, D)``. Layers without keys of
    their own (linear attention, keys shared with another layer) are kept as transformers makes them.

    ``copy.deepcopy`` of a cache is a fork: it shares the pool, so no key is copied until one of the two writes into a
    block that both hold; what it holds is freed when it is dropped or reset.

    Args:
        config: the config of a patched model, or of one with the attention implementation ``"torch_paged"``.
        max_cache_length: columns that the cache will reach (prompt and new tokens). Pool and tables are then sized
            once, which is what a compiled forward needs. None: they grow as needed.
        block_size: tokens in a block.
        device: where block tables and slots live: the model's device.
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2`` for a quantised cache, with a scale for
            each token and head. None: the dtype of the keys.
        prefix_reuse: True to keep the blocks of prompts after ``reset``, for prompts that begin alike.

    Raises:
        ValueError: a size below 1, or a dtype that is none of these.
        NotImplementedError: the model has layers of a kind that cannot be paged.

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
    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        max_cache_length: int | None = None,
        block_size: int = 16,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        prefix_reuse: bool = False,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"PagedCache: config must be that of a transformers model, got {type(config).__name__}")
        lengths = {} if max_cache_length is None else {"max_cache_length": max_cache_length}
        check_sizes("PagedCache", block_size=block_size, **lengths)
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"PagedCache: dtype must be None, int8, float8_e4m3fn or float8_e5m2, got {dtype}")
        self._model_type = "encoder-decoder" if config.is_encoder_decoder else config.model_type
        self.config = config.get_text_config(decoder=True)
        self.max_cache_length = max_cache_length
        self.device = torch.device(device)
        self.prefix_reuse = prefix_reuse
        self.gathered = False
        self.may_compile = max_cache_length is not None  # generate then draws masks outside of the model
        self.groups: dict[Reach, BlockGroup] = {}
        layers: list[Any] = []
        for index, planned in enumerate(plan_layers(self.config)):
            if isinstance(planned, Reach):
                if planned not in self.groups:
                    self.groups[planned] = BlockGroup(
                        planned, SharedBlocks(planned, block_size, prefix_reuse), self.device
                    )
                group = self.groups[planned]
                storage = LayerStorage(dtype)
                group.blocks.storages.append(storage)
                layers.append(PagedLayer(self, group, index, storage))
            else:
                layers.append(planned)
        self._take_layers(layers)
        self._forget()
        Cache.__init__(self, layers=layers)

    def _take_layers(self, layers: list[Any]) -> None:
        self.paged_layers = [layer for layer in layers if isinstance(layer, PagedLayer)]
        self.kept_layers = [layer for layer in layers if not isinstance(layer, PagedLayer)]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedCache":
        self.settle()
        fork = copy.copy(self)
        memo[id(self)] = fork
        fork.groups = {reach: group.fork() for reach, group in self.groups.items()}
        fork.layers = [
            layer.fork(fork, fork.groups[layer.group.reach])
            if isinstance(layer, PagedLayer)
            else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]
        fork._take_layers(fork.layers)
        fork.lengths = list(self.lengths)
        fork._history = [bytearray(row) for row in self._history]
        fork.columns_tensor = self.columns_tensor.clone()
        return fork

    def _forget(self) -> None:
        self.lengths: list[int] = []
        self.columns = 0
        self.new_tokens = 0
        self.prepared = False
        self._real: list[list[bool]] | None = None
        self._history: list[bytearray] = []  # of each row, 1 for a column with a real token
        self._columns: ColumnMap | None = None
        self._packed_tokens: int | None = None  # of a prepared forward that is one row without padding
        self.forward_columns = 0  # of the prepared forward: new_tokens, and padding to a static size
        self.pending_layer: PagedLayer | None = None
        self.causal_step: Step | None = None  # the last one whose mask was to be causal, whatever the layers say
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
            RuntimeError: the forward before did not run through all layers, a compiled forward was not prepared, or the
                model made a mask without the padding that was prepared.
        """
        if torch.compiler.is_compiling():
            if not self.prepared or self.new_tokens != new_tokens or self.paged_layers[0].written:
                raise RuntimeError("PagedCache: call prepare() before each compiled forward")
            return
        if self._is_packed_forward(batch_size, new_tokens) or self._is_padded_forward(new_tokens):
            return
        self._finish_step()
        if self.prepared and self.new_tokens == new_tokens and mask is None:
            return
        if not self.lengths:
            self.lengths = [0] * batch_size
            self._history = [bytearray() for _ in range(batch_size)]
        if batch_size != len(self.lengths):
            raise ValueError(f"PagedCache: batch size must be {len(self.lengths)} as cached, got {batch_size}")
        real = real_columns(mask, new_tokens)
        if self.prepared and self.new_tokens == new_tokens and real is None and self._real is not None:
            raise RuntimeError(
                "PagedCache: attention_mask must mark the padding that this forward was prepared with, got no padding; "
                "after a forward that failed call settle()"
            )
        if not self.prepared or self.new_tokens != new_tokens or self._real != real:
            self._forget_preparation()
            self._lay_out(new_tokens, real)

    def _lay_out(self, new_tokens: int, real: list[list[bool]] | None) -> None:
        batch_size = len(self.lengths)
        counts = [new_tokens] * batch_size if real is None else [sum(row) for row in real]
        columns, forward = static_size(new_tokens, self.device), real
        if columns > 1 and compiles_each_shape(self.device):  # padded or not, the same program
            padding = [False] * (columns - new_tokens)
            forward = [row + padding for row in real or [[True] * new_tokens] * batch_size]
        for group in self.groups.values():
            if not group.started:
                group.start(counts, new_tokens, self.max_cache_length)
            group.extend(counts, forward)
        self._new_lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        positions = None
        if forward is not real or (real is not None and not padded_before_all_tokens(self.lengths, real)):
            positions = self._int32(query_positions(self.lengths, forward or []))
        self.step = Step(
            cu_seqlens_q=self._int32(range(0, (batch_size + 1) * columns, columns)),
            context_lens=self._int32(self._new_lengths),
            max_seqlen_q=columns,
            one_token_each=columns == 1 and positions is None,
            query_positions=positions,
        )
        self.columns_tensor.fill_(self.columns)
        self._columns = None
        self.new_tokens = new_tokens
        self.forward_columns = columns
        self._real = real
        self.prepared = True

    def prepare_packed(
        self, mask: Tensor, prompts: Sequence[Sequence[int]] | None = None, *, salt: bytes = b""
    ) -> list[int]:
        """Get ready for the first forward of a padded batch, given as one row (1, T) of its tokens without padding.

        Args:
            mask: (B, Q) True at real tokens.
            prompts: the token ids of each row. None: nothing is reused, nor kept for reuse.
            salt: what besides the ids decides the keys.

        Returns:
            For each row how many of its first tokens are in the cache already: leave them out.
        """
        real: list[list[bool]] = mask.tolist()
        counts = [sum(row) for row in real]
        self.lengths, self._history = [0] * len(real), [bytearray() for _ in real]
        groups = self.groups.values()
        held = [group.start(counts, mask.shape[1], self.max_cache_length, prompts, salt) for group in groups]
        reused = [min(lengths) for lengths in zip(*held, strict=True)]
        new = [count - length for count, length in zip(counts, reused, strict=True)]
        ids = None if prompts is None else [row[length:] for row, length in zip(prompts, reused, strict=True)]
        for group in groups:
            group.truncate(reused)
            group.extend(ids or new, None)
        starts = [0, *itertools.accumulate(new)]
        self.step = Step(self._int32(starts), self._int32(counts), max(new), max(new) == 1)
        self._new_lengths, self._real = counts, real
        self.new_tokens = self.forward_columns = mask.shape[1]
        self._packed_tokens = starts[-1]
        self.columns_tensor.fill_(self.columns)
        self._columns = None
        self.prepared = True
        return reused

    def _is_packed_forward(self, batch_size: int, new_tokens: int) -> bool:
        begun = any(layer.written for layer in self.paged_layers)
        done = begun and all(layer.written for layer in self.paged_layers)
        return self.is_packed and self.prepared and not done and (batch_size, new_tokens) == (1, self._packed_tokens)

    def _is_padded_forward(self, columns: int) -> bool:
        padded = self.prepared and self.forward_columns == columns != self.new_tokens
        return padded and not all(layer.written for layer in self.paged_layers)

    @property
    def is_packed(self) -> bool:
        """Whether the prepared forward is one row of several sequences."""
        return self._packed_tokens is not None

    def _int32(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def _finish_step(self) -> None:
        self.check_no_pending_handle()
        written = [layer.written for layer in self.paged_layers]
        if not any(written):
            return
        if not all(written):
            raise RuntimeError(
                f"PagedCache: the forward before wrote {sum(written)} of {len(written)} layers; "
                "call reset() and start again"
            )
        self.lengths = self._new_lengths
        self.columns += self.new_tokens
        for row, new in zip(self._history, self._new_columns(), strict=True):
            row += new
        self.prepared = False
        for layer in self.paged_layers:
            layer.written = False
        if self.is_packed:
            self._packed_tokens = None
            for group in self.groups.values():
                group.publish()

    def _new_columns(self) -> list[bytes]:
        if self._real is None:
            return [bytes([1]) * self.new_tokens] * len(self.lengths)
        return [bytes(row) for row in self._real]

    def columns_now(self) -> ColumnMap:
        """Return where the tokens lie in transformers' columns, those of a forward in progress included."""
        if self._columns is None:
            self._columns = self._columns_on(self.device)
        return self._columns

    def _columns_on(self, device: torch.device) -> ColumnMap:
        rows: list[bytes | bytearray] = list(self._history)
        if self.prepared:
            rows = [row + new for row, new in zip(rows, self._new_columns(), strict=True)]
        return column_map(rows, device)

    def hides_tokens(self, mask: Tensor | None) -> bool:
        """Say whether a mask of the prepared forward, (B, columns), hides tokens that were cached as real ones.

        Raises:
            ValueError: it shows a column that was padding, of which no key is kept.
        """
        if mask is None or torch.compiler.is_compiling() or mask.shape[1] != self.columns + self.new_tokens:
            return False
        if bool(mask.all()) and not any(0 in row for row in self._history):
            return False
        columns = self.columns_now() if mask.device == self.device else self._columns_on(mask.device)
        if columns.shows_padding(mask.bool()):
            raise ValueError(
                "PagedCache: attention_mask must hide what was padding in earlier forwards, got 1 where it was 0"
            )
        return columns.hides_tokens(mask.bool())

    def forgotten(self, reach: Reach) -> Tensor | None:
        """Return which columns, (B or 1, columns) bool, hold keys that layers forgot before the prepared forward."""
        size = reach.window or reach.chunk
        if size is None or self.columns < size:
            return None
        if reach.window is not None:
            return (torch.arange(self.columns + self.new_tokens, device=self.device) <= self.columns - size)[None]
        positions = self.columns_now().all_positions()
        chunk_begins = torch.tensor(self.lengths, device=self.device)[:, None] // size * size
        return (positions >= 0) & (positions < chunk_begins)

    def settle(self) -> None:
        """End the forward in progress, and forget one that was only prepared."""
        self._finish_step()
        self._forget_preparation()
        if self.lengths and self.columns:
            for group in self.groups.values():
                group.write_tables()
            self.step = dataclasses.replace(self.step, context_lens=self._int32(self.lengths))
        self._columns = None

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
        if self.config._attn_implementation not in (ATTENTION_NAME, LATENT_ATTENTION_NAME):
            raise ValueError(
                f"PagedCache: the model's attention implementation must be '{ATTENTION_NAME}', "
                f"got '{self.config._attn_implementation}'; call patch_model(model), and make the cache of model.config"
            )

    @property
    def is_compileable(self) -> bool:
        """Whether a forward can be compiled: every layer with keys is paged, and there is no other state."""
        only_paged = all(type(layer).__name__ == "DummyLayer" for layer in self.kept_layers)
        return self.may_compile and only_paged and not self.gathered and self._model_type not in _DENSE_MASKS_ONLY

    @property
    def batch_size(self) -> int:
        """Rows in the cache, -1 before the first forward."""
        return len(self.lengths) or -1

    def reset(self) -> None:
        """Forget all tokens; the pools stay."""
        for group in self.groups.values():
            group.clear()
        for layer in self.paged_layers:
            layer.written = False
        for layer in self.kept_layers:
            layer.reset()
        self._forget()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a layer, and return what its attention takes for them.

        Raises:
            ValueError: the cache was made of the config of a model with fewer layers.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"PagedCache: layer_idx must be < {len(self.layers)}, the layers of the config that the cache was made "
                f"of, got {layer_idx}"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let every row continue the row that ``beam_idx`` names; shared blocks are copied when they are written.

        Raises:
            ValueError: there is no such row.
        """
        beam_idx = torch.as_tensor(beam_idx)
        self._select(beam_idx.tolist())
        for layer in self.kept_layers:
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the named rows, ids or a bool mask.

        Raises:
            ValueError: there is no such row.
        """
        indices = torch.as_tensor(indices)
        # Indexing refuses a mask of another length, which would leave rows out unseen.
        rows = torch.arange(len(self.lengths))[indices.cpu()] if indices.dtype == torch.bool else indices
        self._select(rows.tolist())
        for layer in self.kept_layers:
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; the copies share their blocks until they are written."""
        self._select([row for row in range(len(self.lengths)) for _ in range(repeats)])
        for layer in self.kept_layers:
            layer.batch_repeat_interleave(repeats)

    def _forget_preparation(self) -> None:
        if self.prepared:
            for group in self.groups.values():
                group.truncate(self.lengths)
            self.prepared = False
            self._columns = self._packed_tokens = None

    def _select(self, rows: list[int]) -> None:
        check_rows(rows, len(self.lengths))
        self._finish_step()
        self._forget_preparation()
        for group in self.groups.values():
            group.select(rows)
        self.lengths = [self.lengths[row] for row in rows]
        self._history = [bytearray(self._history[row]) for row in rows]
        self._columns = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns; 0 forgets nothing.

        Before transformers named it so, 0 and above are the columns to keep.

        Raises:
            ValueError: a positive number, more columns than are cached, or columns whose window is gone.
        """
        self._finish_step()
        self._forget_preparation()
        columns = columns_after_crop(self.columns, tokens_to_remove)
        for layer in self.kept_layers:
            layer.crop(tokens_to_remove)
        lengths = [length - row.count(1, columns) for length, row in zip(self.lengths, self._history, strict=True)]
        for group in self.groups.values():
            group.crop(lengths)
        self.lengths, self.columns, self._columns = lengths, columns, None
        for row in self._history:
            del row[columns:]

    def activate_past_recording(self) -> None:
        """Keep blocks behind a window until the next ``crop``, which may then go back over several forwards."""
        for group in self.groups.values():
            group.recording = True
        for layer in self.kept_layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
