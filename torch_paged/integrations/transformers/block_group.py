"""Which blocks hold which tokens, for all layers that see the same window."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_paged.cache import BlockAllocator, OutOfBlocks

if TYPE_CHECKING:
    from torch_paged.integrations.transformers.paged_layer import PagedLayer

UNUSED_ENTRY = -1


class BlockGroup:
    """One block table for the layers of one kind, and the pool of block ids that these layers share.

    Dimensions:
        B rows (sequences), Q new columns of each, M table width in blocks, S tokens in a block, N blocks in the pool.

    Attributes:
        window: tokens that a query sees, itself included; None for all.
        block_size: S.
        block_tables: (B, M) int32, what the ops read.
        slot_mapping: (B * Q,) int64, where the step's new tokens go, -1 at padding.
        peak_blocks: the most blocks that were in use at once.
    """

    block_tables: Tensor
    slot_mapping: Tensor

    def __init__(
        self, window: int | None, block_size: int, device: torch.device, *, prefix_reuse: bool = False
    ) -> None:
        self.window = window
        self.block_size = block_size
        self.device = device
        self.layers: list[PagedLayer] = []
        self.allocator = BlockAllocator(1, block_size, sliding_window=window, prefix_reuse=prefix_reuse)
        self._seqs: list[int] = []
        self.clear()

    def clear(self) -> None:
        """Forget all rows; the pool keeps its size, and what its blocks are published to hold."""
        for seq in self._seqs:
            self.allocator.free(seq)
        self.peak_blocks = 0
        self._seqs = []
        self._tables: list[tuple[int, ...]] = []
        self._width = 1

    @property
    def num_blocks(self) -> int:
        """N, the pool's size."""
        return self.allocator.num_blocks

    @property
    def started(self) -> bool:
        """Whether the rows exist."""
        return bool(self._seqs)

    @property
    def blocks_in_use(self) -> int:
        """Blocks that at least one row holds."""
        return self.num_blocks - self.allocator.num_free_blocks

    def start(self, row_tokens: list[int], new_tokens: int, max_length: int | None) -> None:
        """Make the rows, and size pool and table for them.

        Args:
            row_tokens: real tokens of each row's first step.
            new_tokens: columns of the first step, padding included.
            max_length: columns that the cache may reach. None: size for now, grow later.
        """
        self._seqs = [self.allocator.allocate() for _ in row_tokens]
        rest = 0 if max_length is None else max(0, max_length - new_tokens)
        blocks = [-(-(tokens + rest) // self.block_size) for tokens in row_tokens]
        self._width = max(1, *blocks)
        if self.window is not None:
            seen_blocks = -(-(self.window - 1 + new_tokens) // self.block_size) + 1
            blocks = [min(count, seen_blocks) for count in blocks]
        if sum(blocks) > self.num_blocks:
            self.grow(sum(blocks))

    def extend(self, counts: list[int], real: list[list[bool]] | None) -> None:
        """Give every row the slots of its new tokens; blocks that no coming query sees are reused.

        Args:
            counts: new tokens of each row.
            real: (B, Q), False at padding. None: no padding.
        """
        slots: list[int] = []
        for index, (seq, count) in enumerate(zip(self._seqs, counts, strict=True)):
            new_slots = self._append(seq, count)
            if real is not None:
                unused = iter(new_slots)
                new_slots = [next(unused) if is_real else UNUSED_ENTRY for is_real in real[index]]
            slots += new_slots
        self.peak_blocks = max(self.peak_blocks, self.blocks_in_use)
        sources, destinations = self.allocator.take_copies(self.device)
        if len(sources):
            for layer in self.layers:
                layer.copy_blocks(sources, destinations)
        self.slot_mapping = torch.tensor(slots, dtype=torch.int64, device=self.device)
        self._write_tables()

    def select(self, rows: list[int]) -> None:
        """Replace the rows by a selection of them; a row that is selected twice is shared until it is written."""
        selected = [self.allocator.fork(self._seqs[row]) for row in rows]
        for seq in self._seqs:
            self.allocator.free(seq)
        self._seqs = selected

    def truncate(self, lengths: list[int]) -> None:
        """Forget the tokens of each row from its length on."""
        for seq, length in zip(self._seqs, lengths, strict=True):
            self.allocator.truncate(seq, length)

    def _append(self, seq: int, count: int) -> list[int]:
        while True:
            try:
                return self.allocator.append(seq, count)
            except OutOfBlocks as error:
                self.grow(max(2 * self.num_blocks, self.num_blocks + error.needed))

    def grow(self, num_blocks: int) -> None:
        """Make the pool larger, in every layer."""
        self.allocator.grow(num_blocks)
        for layer in self.layers:
            layer.grow(num_blocks)

    def _write_tables(self) -> None:
        tables = [self.allocator.block_table(seq) for seq in self._seqs]
        if tables == self._tables:
            return
        longest = max(len(table) for table in tables)
        if longest > self._width:
            self._width = max(longest, 2 * self._width)
        padded = [list(table) + [UNUSED_ENTRY] * (self._width - len(table)) for table in tables]
        self.block_tables = torch.tensor(padded, dtype=torch.int32, device=self.device)
        self._tables = tables
