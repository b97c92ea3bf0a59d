"""A cache whose sequences come and go: every forward is one row of packed tokens, some of each sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_paged.cache import OutOfBlocks
from torch_paged.integrations.transformers.block_group import BlockGroup
from torch_paged.integrations.transformers.checks import check_sizes
from torch_paged.integrations.transformers.paged_cache import PagedCache
from torch_paged.integrations.transformers.paged_layer import PagedLayer
from torch_paged.integrations.transformers.step import Step
from torch_paged.integrations.transformers.versions import PreTrainedConfig


@dataclass(eq=False)
class CachedSequence:
    """One sequence in the cache.

    Attributes:
        seqs: its number in the allocator of each group of layers.
        length: tokens in the cache, those of a step that is being prepared included.
    """

    seqs: tuple[int, ...]
    length: int


class PackedCache(PagedCache):
    """Keep the keys and values of sequences that start and end at any time.

    One step, in this order: ``append`` tokens to some sequences, ``pack`` them, run the model on the packed row,
    ``finish``; ``roll_back`` instead of ``finish`` when the model raised.

    Args:
        config: the model's config; its attention implementation must be ``"torch_paged"``.
        num_blocks: blocks of each group of layers, at the most.
        block_size: tokens in a block.
        device: the model's device.
        prefix_reuse: True to share and keep the blocks of prompts that begin alike.

    Raises:
        ValueError: a size below 1.
        NotImplementedError: a layer that cannot take packed tokens.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        num_blocks: int,
        block_size: int = 16,
        device: torch.device | str = "cpu",
        prefix_reuse: bool = False,
    ) -> None:
        check_sizes("PackedCache", num_blocks=num_blocks)
        super().__init__(config, block_size=block_size, device=device, prefix_reuse=prefix_reuse)
        for index, layer in enumerate(self.layers):
            if layer in self.kept_layers and type(layer).__name__ != "DummyLayer":
                raise NotImplementedError(
                    f"generate_batch: layer {index} of {self.config.model_type} is a {type(layer).__name__}, which "
                    "takes no packed tokens; use generate()"
                )
        self.block_size = block_size
        self._pools: list[BlockGroup] = list(self.groups.values())
        self._row: list[tuple[CachedSequence, int]] = []
        self._step_tokens = 0
        self.grow(num_blocks)

    @property
    def is_packed(self) -> bool:
        """True: every forward is."""
        return True

    def grow(self, num_blocks: int) -> None:
        """Make the pools larger; smaller is not possible."""
        for group in self._pools:
            if num_blocks > group.num_blocks:
                group.grow(num_blocks)

    @property
    def num_blocks(self) -> int:
        """Blocks of each group of layers."""
        return self._pools[0].num_blocks

    def add(self, token_ids: Sequence[int], *, salt: bytes = b"") -> CachedSequence:
        """Start a sequence, on blocks that hold the start of its tokens already if there are such blocks.

        Append ``token_ids[sequence.length:]`` next.
        """
        seqs = tuple(group.allocator.allocate(token_ids, salt=salt) for group in self._pools)
        length = min(group.allocator.context_len(seq) for group, seq in zip(self._pools, seqs, strict=True))
        for group, seq in zip(self._pools, seqs, strict=True):
            group.allocator.truncate(seq, length)
        return CachedSequence(seqs, length)

    def free(self, sequence: CachedSequence) -> None:
        """End a sequence."""
        for group, seq in zip(self._pools, sequence.seqs, strict=True):
            group.allocator.free(seq)

    def can_hold(self, num_tokens: int) -> bool:
        """Say whether a sequence of that length fits when it is alone."""
        return all(group.window is not None or num_tokens <= self._tokens_of(group) for group in self._pools)

    def _tokens_of(self, group: BlockGroup) -> int:
        return group.num_blocks * group.block_size

    def fits(self, sequence: CachedSequence, num_tokens: int, step_tokens: int, spare_tokens: int) -> bool:
        """Say whether ``num_tokens`` more fit now, and ``spare_tokens`` of other sequences with them.

        Args:
            sequence: that waits for a place.
            num_tokens: that it has to append before its first new token.
            step_tokens: that it can append in one step.
            spare_tokens: that others have to append before theirs.
        """
        for group, seq in zip(self._pools, sequence.seqs, strict=True):
            tokens = num_tokens if group.window is None else min(num_tokens, step_tokens)
            spare = 0 if group.window is not None else -(-spare_tokens // group.block_size)
            if group.allocator.blocks_needed(seq, tokens) + spare > group.allocator.num_free_blocks:
                return False
        return True

    def append(self, sequence: CachedSequence, token_ids: Sequence[int]) -> bool:
        """Give tokens of this step their slots; return False, with nothing changed, when blocks are missing."""
        for done, (group, seq) in enumerate(zip(self._pools, sequence.seqs, strict=True)):
            try:
                group.allocator.append(seq, token_ids)
            except OutOfBlocks:
                for earlier, earlier_seq in zip(self._pools[:done], sequence.seqs, strict=False):
                    earlier.allocator.truncate(earlier_seq, sequence.length)
                return False
        sequence.length += len(token_ids)
        return True

    def pack(self, row: list[tuple[CachedSequence, int]]) -> Tensor:
        """Make the metadata of a step.

        Args:
            row: each sequence of the step, in packed order, and how many tokens it appended.

        Returns:
            position_ids, (1, T) int64.
        """
        counts = [count for _, count in row]
        for index, group in enumerate(self._pools):
            batch = group.allocator.batch([sequence.seqs[index] for sequence, _ in row], counts, device=self.device)
            group.block_tables, group.slot_mapping = batch.block_tables, batch.slot_mapping
            group.note_peak()
        self.step = Step(
            cu_seqlens_q=batch.cu_seqlens_q,
            context_lens=batch.context_lens,
            max_seqlen_q=batch.max_seqlen_q,
            one_token_each=batch.max_seqlen_q == 1,
        )
        self._row, self._step_tokens = row, sum(counts)
        ends = torch.tensor([sequence.length for sequence, _ in row], device=self.device)
        if batch.max_seqlen_q == 1:
            return ends[None] - 1
        begins = ends - batch.cu_seqlens_q[1:]
        each = torch.tensor(counts, device=self.device)
        return (torch.arange(self._step_tokens, device=self.device) + begins.repeat_interleave(each))[None]

    def prepare(self, batch_size: int, new_tokens: int, mask: Tensor | None = None) -> None:
        """Check that the forward is the packed one: ``pack`` has prepared it.

        Raises:
            RuntimeError: another forward.
        """
        if batch_size != 1 or new_tokens != self._step_tokens:
            raise RuntimeError(
                f"PackedCache: the forward must be the packed row of {self._step_tokens} tokens, "
                f"got ({batch_size}, {new_tokens})"
            )
        if mask is not None and not bool(mask.all()):  # some models make a mask of ones where they are given none
            raise RuntimeError("PackedCache: attention_mask must be None or hide nothing, got one with zeros")

    def ensure_prepared(self, layer: PagedLayer, batch_size: int, new_tokens: int) -> None:
        """Check the same for a model that asked for no mask."""
        self.prepare(batch_size, new_tokens)

    def finish(self) -> None:
        """End the step: every layer has written its tokens, and other sequences may reuse them.

        Raises:
            RuntimeError: a layer's handle was lost, or a layer did not run.
        """
        self.check_no_pending_handle()
        missing = [layer.index for layer in self.paged_layers if not layer.written]
        if missing:
            raise RuntimeError(f"PackedCache: the forward must write every layer, layers {missing} were not")
        if self.prefix_reuse:
            for index, group in enumerate(self._pools):
                for sequence, _ in self._row:
                    group.allocator.publish(sequence.seqs[index])
        self._end_step()

    def roll_back(self, row: list[tuple[CachedSequence, int]]) -> None:
        """Forget the tokens that were appended for a step that did not run to its end."""
        for sequence, count in row:
            sequence.length -= count
            for group, seq in zip(self._pools, sequence.seqs, strict=True):
                group.allocator.truncate(seq, sequence.length)
        self.pending_layer = None
        self._end_step()

    def _end_step(self) -> None:
        for layer in self.paged_layers:
            layer.written = False
        self._row, self._step_tokens = [], 0
