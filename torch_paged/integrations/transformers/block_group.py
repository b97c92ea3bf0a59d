"""Which blocks hold which tokens, for all layers that see the same keys."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from torch_paged.cache import BlockAllocator, OutOfBlocks
from torch_paged.integrations.transformers.layer_plan import Reach
from torch_paged.integrations.transformers.shared_blocks import SharedBlocks
from torch_paged.integrations.transformers.static_sizes import static_size

UNUSED_ENTRY = -1
_LEAST_WIDTH = 2  # a compiled forward takes a size of 1 for another case


class BlockGroup:
    """One block table for the layers of one kind. The pool of block ids is shared with the forks of the cache.

    Dimensions:
        B rows (sequences), Q new columns of each, M table width in blocks, S tokens in a block, N blocks in the pool.

    Attributes:
        reach: which keys a query sees.
        block_size: S.
        blocks: the pool.
        block_tables: (B, M) int32, what the ops read.
        slot_mapping: (B * Q,) int64, where the step's new tokens go, -1 at padding.
        recording: whether hidden blocks are kept until the next ``crop``, which may go back over several steps.
    """

    block_tables: Tensor
    slot_mapping: Tensor

    def __init__(self, reach: Reach, blocks: SharedBlocks, device: torch.device) -> None:
        self._seqs: list[int] = []
        self.reach = reach
        self.blocks = blocks
        self.block_size = blocks.allocator.block_size
        self.device = device
        self.recording = False
        self._cropped = False
        self._forget_tables()

    def __del__(self) -> None:
        self._free_rows()

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, itself included; None without a window."""
        return self.reach.window

    @property
    def allocator(self) -> BlockAllocator:
        """The pool's allocator."""
        return self.blocks.allocator

    @property
    def blocks_in_use(self) -> int:
        """Blocks of the pool that at least one sequence holds, here or in a fork."""
        return self.blocks.in_use

    def note_peak(self) -> None:
        """Remember how many blocks are in use, where it is the most so far."""
        self.blocks.peak_blocks = max(self.blocks.peak_blocks, self.blocks.in_use)

    @property
    def peak_blocks(self) -> int:
        """The most blocks of the pool that were in use at once."""
        return self.blocks.peak_blocks

    @property
    def num_blocks(self) -> int:
        """N, the pool's size."""
        return self.blocks.num_blocks

    @property
    def started(self) -> bool:
        """Whether the rows exist."""
        return bool(self._seqs)

    def clear(self) -> None:
        """Free all rows; the pool keeps its size, and what its blocks are published to hold."""
        self._free_rows()
        self._seqs = []
        self.blocks.peak_blocks = self.blocks.in_use
        self._forget_tables()

    def fork(self) -> "BlockGroup":
        """Return a group with the same rows on the same pool, sharing blocks until one of the two writes."""
        group = BlockGroup(self.reach, self.blocks, self.device)
        group._seqs = [self.allocator.fork(seq) for seq in self._seqs]
        group._width = self._width
        group.recording = self.recording
        return group

    def start(
        self,
        row_tokens: list[int],
        new_tokens: int,
        max_length: int | None,
        prompts: Sequence[Sequence[int]] | None = None,
        salt: bytes = b"",
    ) -> list[int]:
        """Make the rows, and size pool and table for them.

        Args:
            row_tokens: real tokens of each row's first step.
            new_tokens: columns of the first step, padding included.
            max_length: columns that the cache may reach. None: size for now, grow later.
            prompts: token ids of each row, which may begin with blocks that are published. None: nothing is reused.
            salt: what besides the ids decides the keys.

        Returns:
            For each row the tokens that its reused blocks hold.
        """
        self._seqs = [self.allocator.allocate(prompt, salt=salt) for prompt in prompts or [()] * len(row_tokens)]
        rest = 0 if max_length is None else max(0, max_length - new_tokens)
        blocks = [-(-(tokens + rest) // self.block_size) for tokens in row_tokens]
        self._width = static_size(max(_LEAST_WIDTH, *blocks), self.device)
        seen = self.reach.window or self.reach.chunk
        if seen is not None and not self.recording:
            seen_blocks = -(-(seen - 1 + new_tokens) // self.block_size) + 1
            blocks = [min(count, seen_blocks) for count in blocks]
        wanted = self.blocks.in_use + sum(blocks)
        if wanted > self.num_blocks:
            kept = sum(blocks) if self.allocator.prefix_reuse else 0  # room for the prefixes of another call
            self.grow(wanted + kept)
        return [self.allocator.context_len(seq) for seq in self._seqs]

    def extend(self, tokens: Sequence[int | Sequence[int]], real: list[list[bool]] | None) -> None:
        """Give every row the slots of its new tokens; blocks that no coming query sees are reused.

        Args:
            tokens: new tokens of each row: how many, or their ids.
            real: (B, Q), False at padding. None: no padding.
        """
        slots: list[int] = []
        with self._hidden_blocks_kept() if self.recording and not self._cropped else nullcontext():
            for index, (seq, new) in enumerate(zip(self._seqs, tokens, strict=True)):
                new_slots = self._append(seq, new)
                if real is not None:
                    unused = iter(new_slots)
                    new_slots = [next(unused) if is_real else UNUSED_ENTRY for is_real in real[index]]
                slots += new_slots
        self._cropped = False
        self.note_peak()
        self.blocks.copy_pending(self.device)
        self.slot_mapping = torch.tensor(slots, dtype=torch.int64, device=self.device)
        self.write_tables()

    def select(self, rows: list[int]) -> None:
        """Replace the rows by a selection of them; a row that is selected twice is shared until it is written."""
        selected = [self.allocator.fork(self._seqs[row]) for row in rows]
        self._free_rows()
        self._seqs = selected

    def publish(self) -> None:
        """Let coming rows reuse the full blocks of these rows, as far as their token ids are known."""
        for seq in self._seqs:
            self.allocator.publish(seq)

    def truncate(self, lengths: list[int]) -> None:
        """Forget the tokens of each row from its length on."""
        for seq, length in zip(self._seqs, lengths, strict=True):
            self.allocator.truncate(seq, length)

    def crop(self, lengths: list[int]) -> None:
        """Truncate; what comes before these lengths will not be cropped later, so hidden blocks may go."""
        self.truncate(lengths)
        self._cropped = True

    @property
    def lost_blocks(self) -> bool:
        """Whether a block of a row was freed because its coming queries do not see it."""
        return any(UNUSED_ENTRY in table for table in self._tables)

    def _free_rows(self) -> None:
        for seq in self._seqs:
            self.allocator.free(seq)

    def _forget_tables(self) -> None:
        self._tables: list[tuple[int, ...]] = []
        self._width = _LEAST_WIDTH

    @contextmanager
    def _hidden_blocks_kept(self) -> Iterator[None]:
        self.allocator.sliding_window = self.allocator.attention_chunk = None
        yield
        self.allocator.sliding_window, self.allocator.attention_chunk = self.reach

    def grow(self, num_blocks: int) -> None:
        """Make the pool larger, in every layer."""
        self.blocks.grow(static_size(num_blocks, self.device))

    def _append(self, seq: int, tokens: int | Sequence[int]) -> list[int]:
        while True:
            try:
                return self.allocator.append(seq, tokens)
            except OutOfBlocks as error:
                self.grow(max(2 * self.num_blocks, self.num_blocks + error.needed))

    @torch.compiler.disable
    def write_tables(self) -> None:
        """Make ``block_tables`` say what the allocator knows."""
        tables = [self.allocator.block_table(seq) for seq in self._seqs]
        if tables == self._tables:
            return
        longest = max(len(table) for table in tables)
        if longest > self._width:
            self._width = static_size(max(longest, 2 * self._width), self.device)
        padded = [list(table) + [UNUSED_ENTRY] * (self._width - len(table)) for table in tables]
        self.block_tables = torch.tensor(padded, dtype=torch.int32, device=self.device)
        torch._dynamo.maybe_mark_dynamic(self.block_tables, 1)
        self._tables = tables
