"""Which block holds which tokens of which sequence. Host integers only: one allocator serves all layers of a model."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_paged.cache.batch import Batch, build_batch, is_int, slots_of
from torch_paged.cache.pool import BlockPool, OutOfBlocks


@dataclass
class _Sequence:
    """One sequence: its table, and of its leading tokens the ids, as far as they are known."""

    root: bytes
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    first_live: int = 0
    token_ids: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """What an append will do: free table entries up to ``first_live``, copy the tail, take ``new_blocks``."""

    first_live: int
    copy_tail: bool
    new_blocks: int
    available: int


class BlockAllocator:
    """Hand out the blocks of a paged cache: allocate, append, fork with copy-on-write, free, reuse prefixes.

    One step of a model, in this order: ``append`` for each sequence, ``take_copies`` and ``copy_blocks`` in every
    layer's cache, write the new tokens to their slots, attend, ``publish``. Fork and truncate between steps; a
    sequence that is freed within a step takes its unwritten slots with it.

    Args:
        num_blocks: N of the cache, >= 1 and < 2^31, as block tables are int32.
        block_size: S of the cache, tokens, >= 1.
        sliding_window: tokens; blocks that no coming query can see are freed by ``append``, their table entries become
            -1. Only where *all* layers that use the table have this window. None: keep everything.
        attention_chunk: tokens; the same for chunked attention.
        prefix_reuse: True to let ``allocate`` share published blocks.

    Raises:
        ValueError: a size below 1, or more blocks than int32 can name.

    Source:
        Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, arXiv 2309.06180.

    Example:
        >>> from torch_paged.cache import BlockAllocator
        >>> allocator = BlockAllocator(num_blocks=8, block_size=4)
        >>> prompt = allocator.allocate()
        >>> allocator.append(prompt, 6)
        [0, 1, 2, 3, 4, 5]
        >>> beam = allocator.fork(prompt)
        >>> allocator.append(beam, 1), allocator.take_copies()
        ([10], (tensor([1]), tensor([2])))
        >>> allocator.batch([prompt, beam], [1, 1]).block_tables
        tensor([[0, 1],
                [0, 2]], dtype=torch.int32)
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        sliding_window: int | None = None,
        attention_chunk: int | None = None,
        prefix_reuse: bool = False,
    ) -> None:
        sizes = {"num_blocks": num_blocks, "block_size": block_size}
        options = {"sliding_window": sliding_window, "attention_chunk": attention_chunk}
        for name, size in {**sizes, **{name: size for name, size in options.items() if size is not None}}.items():
            if not is_int(size) or size < 1:
                raise ValueError(f"BlockAllocator: {name} must be an int >= 1, got {size!r}")
        _check_ids("BlockAllocator", num_blocks)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.sliding_window = sliding_window
        self.attention_chunk = attention_chunk
        self.prefix_reuse = prefix_reuse
        self._pool = BlockPool(num_blocks)
        self._sequences: dict[int, _Sequence] = {}
        self._next_seq = 0
        self._copies: dict[int, int] = {}  # destination -> source

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a sequence can get, those kept for prefix reuse included."""
        return self._pool.available

    def grow(self, num_blocks: int) -> None:
        """Add blocks to the pool, because the cache was made larger; ids and contents stay.

        Args:
            num_blocks: N of the larger cache.

        Raises:
            ValueError: no int, fewer blocks than there are, or more than int32 can name.
        """
        if not is_int(num_blocks) or num_blocks < self.num_blocks:
            raise ValueError(f"grow: num_blocks must be an int >= {self.num_blocks}, got {num_blocks!r}")
        _check_ids("grow", num_blocks)
        self._pool.grow(num_blocks)
        self.num_blocks = num_blocks

    def allocate(self, prompt: Sequence[int] = (), *, salt: bytes | str = b"") -> int:
        """Start a sequence; with prefix reuse, on the published blocks that already hold the start of its prompt.

        Append ``prompt[context_len(seq):]`` next. The last token of a prompt is never reused: its query has to run.

        Args:
            prompt: token ids. Empty: nothing to reuse.
            salt: what besides the ids decides a token's key and value (adapter, image, tenant); only equal salts share.
                A str stands for its UTF-8 bytes.

        Returns:
            The sequence's number, never used again.

        Raises:
            ValueError: a token id that is not an int of 64 bits, a salt that is neither bytes nor a str.
        """
        ids = _token_ids("allocate", "prompt", prompt)
        sequence = _Sequence(root=_root(salt))
        if self.prefix_reuse:
            for start in range(0, len(ids) - self.block_size, self.block_size):
                digest = self._digest(sequence, ids[start : start + self.block_size])
                block = self._pool.find(digest)
                if block is None:
                    break
                self._pool.share(block)
                sequence.blocks.append(block)
                sequence.digests.append(digest)
            sequence.length = len(sequence.blocks) * self.block_size
            sequence.token_ids = ids[: sequence.length].tolist()
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        self._sequences[seq] = sequence
        return seq

    def append(self, seq: int, tokens: int | Sequence[int]) -> list[int]:
        """Make room for new tokens and return their slots.

        A partly filled last block that another sequence shares is replaced by a copy: ``take_copies`` returns the pair.
        Blocks behind the window of the first new token are freed.

        Args:
            seq: from ``allocate`` or ``fork``.
            tokens: how many, or their ids. Only tokens with ids can be reused as a prefix.

        Returns:
            One slot for each token, ``block_id * block_size + offset``.

        Raises:
            OutOfBlocks: not enough free blocks; nothing was changed.
            ValueError: an unknown sequence, a negative number of tokens, an id that is not an int.
        """
        sequence = self._get("append", seq)
        ids = array("q") if isinstance(tokens, int) else _token_ids("append", "tokens", tokens)
        count = tokens if isinstance(tokens, int) else len(ids)
        _check_count("append", "tokens", count)
        plan = self._plan(sequence, count)
        if plan.new_blocks > plan.available:
            raise OutOfBlocks(plan.new_blocks, plan.available, self.num_blocks)
        if count == 0:
            return []
        for index in range(sequence.first_live, plan.first_live):
            self._release(sequence.blocks[index])
            sequence.blocks[index] = -1
        sequence.first_live = plan.first_live
        start, stop = sequence.length, sequence.length + count
        if plan.copy_tail:
            source, sequence.blocks[-1] = sequence.blocks[-1], self._pool.take()
            self._pool.release(source)
            self._copies[sequence.blocks[-1]] = source
        elif start % self.block_size:
            self._pool.unpublish(sequence.blocks[-1])
        while len(sequence.blocks) * self.block_size < stop:
            sequence.blocks.append(self._pool.take())
        sequence.length = stop
        if self.prefix_reuse and len(sequence.token_ids) == start:
            sequence.token_ids += ids
        return slots_of(sequence.blocks, start, stop, self.block_size)

    def blocks_needed(self, seq: int, num_tokens: int) -> int:
        """Return how many free blocks ``append`` would take, those that it would free itself taken off.

        Raises:
            ValueError: an unknown sequence, a negative number of tokens.
        """
        sequence = self._get("blocks_needed", seq)
        _check_count("blocks_needed", "num_tokens", num_tokens)
        plan = self._plan(sequence, num_tokens)
        return max(0, plan.new_blocks - (plan.available - self._pool.available))

    def take_copies(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return and forget the block copies that appends have asked for: arguments of ``copy_blocks``.

        Copy before writing the slots of those appends, in every layer's cache.

        Returns:
            src_blocks and dst_blocks, (P,) int64; P is 0 when there is nothing to copy.
        """
        pairs, self._copies = self._copies, {}
        return (
            torch.tensor(list(pairs.values()), dtype=torch.int64).to(device),
            torch.tensor(list(pairs), dtype=torch.int64).to(device),
        )

    def fork(self, seq: int) -> int:
        """Start a sequence with the same tokens, sharing all blocks until one of them writes.

        The slots of the last append must have been written before.

        Returns:
            The new sequence's number.

        Raises:
            ValueError: an unknown sequence, or one whose last append waits for its copy.
        """
        parent = self._get("fork", seq)
        if parent.blocks and parent.blocks[-1] in self._copies:
            raise ValueError(f"fork: seq must have its block copied and its slots written (take_copies), got {seq}")
        for block in parent.blocks[parent.first_live :]:
            self._pool.share(block)
        child, self._next_seq = self._next_seq, self._next_seq + 1
        self._sequences[child] = _Sequence(
            parent.root,
            list(parent.blocks),
            parent.length,
            parent.first_live,
            list(parent.token_ids),
            list(parent.digests),
        )
        return child

    def publish(self, seq: int) -> None:
        """Let coming sequences reuse the full blocks of this one: all its slots have been written.

        Does nothing without ``prefix_reuse``, and nothing beyond the first token whose id is unknown.

        Raises:
            ValueError: an unknown sequence.
        """
        sequence = self._get("publish", seq)
        for index in range(len(sequence.digests), len(sequence.token_ids) // self.block_size):
            ids = array("q", sequence.token_ids[index * self.block_size : (index + 1) * self.block_size])
            sequence.digests.append(self._digest(sequence, ids))
            if sequence.blocks[index] >= 0:
                self._pool.publish(sequence.blocks[index], sequence.digests[index])

    def truncate(self, seq: int, length: int) -> None:
        """Forget the tokens from position ``length`` on (rejected speculative tokens, a cropped turn).

        Back to the length before the last append always works.

        Raises:
            ValueError: an unknown sequence, a length outside [0, context_len], or one that needs blocks freed before.
        """
        sequence = self._get("truncate", seq)
        if not is_int(length) or not 0 <= length <= sequence.length:
            raise ValueError(f"truncate: length must be an int in [0, {sequence.length}], got {length!r}")
        num_blocks = -(-length // self.block_size)
        if self._first_visible(length) // self.block_size < min(sequence.first_live, num_blocks):
            raise ValueError(
                f"truncate: length must leave a window whose blocks are still there (block {sequence.first_live} on), "
                f"got {length}"
            )
        for block in reversed(sequence.blocks[max(num_blocks, sequence.first_live) :]):
            self._release(block)
        del sequence.blocks[num_blocks:]
        del sequence.token_ids[length:]
        del sequence.digests[length // self.block_size :]
        sequence.length = length
        sequence.first_live = min(sequence.first_live, num_blocks)

    def free(self, seq: int) -> None:
        """End a sequence. Blocks that were published stay findable until their memory is wanted.

        Raises:
            ValueError: an unknown sequence, or one that was freed before.
        """
        sequence = self._get("free", seq)
        del self._sequences[seq]
        for block in reversed(sequence.blocks[sequence.first_live :]):  # a prefix outlives what follows it
            self._release(block)

    def context_len(self, seq: int) -> int:
        """Return the tokens of a sequence, those without a block (behind the window) included."""
        return self._get("context_len", seq).length

    def block_table(self, seq: int) -> tuple[int, ...]:
        """Return the block ids of a sequence, -1 where freed."""
        return tuple(self._get("block_table", seq).blocks)

    def batch(
        self,
        seqs: Sequence[int],
        query_lens: Sequence[int],
        *,
        num_seqs: int | None = None,
        num_tokens: int | None = None,
        max_blocks: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Build the tensors of one call on these sequences, whose last ``query_lens`` tokens are this step's.

        For new keys beside the cache (not in it), take ``query_lens`` off ``context_lens``.

        Args:
            seqs: the sequences, in batch order.
            query_lens: tokens of this step, for each sequence; 0 is legal.
            num_seqs: B to pad to, with empty sequences. None: no padding.
            num_tokens: T to pad to, with slots of -1. None: no padding.
            max_blocks: M, the width of the table. None: the widest sequence, at least 1.
            device: where the tensors go.

        Returns:
            ``Batch``: block_tables (B, M), context_lens (B,), slot_mapping (T,), cu_seqlens_q (B + 1,), two maxima.

        Raises:
            ValueError: an unknown sequence, query_lens of another length or outside [0, context_len], a size too small.
        """
        seqs, query_lens = _as_list("seqs", seqs), _as_list("query_lens", query_lens)
        sequences = [self._get("batch", seq) for seq in seqs]
        if len(query_lens) != len(sequences):
            raise ValueError(
                f"batch: query_lens must have one entry for each of {len(sequences)} sequences, got {len(query_lens)}"
            )
        for index, (sequence, query_len) in enumerate(zip(sequences, query_lens, strict=True)):
            if not is_int(query_len) or not 0 <= query_len <= sequence.length:
                raise ValueError(
                    f"batch: query_lens must be an int in [0, {sequence.length}], got {query_len!r} at index {index}"
                )
        return build_batch(
            [sequence.blocks for sequence in sequences],
            [sequence.length for sequence in sequences],
            query_lens,
            self.block_size,
            num_seqs=num_seqs,
            num_tokens=num_tokens,
            max_blocks=max_blocks,
            device=device,
        )

    def _plan(self, sequence: _Sequence, count: int) -> _Plan:
        start, references = sequence.length, self._pool.references
        first_live = max(sequence.first_live, self._first_visible(start) // self.block_size)
        dead = sequence.blocks[sequence.first_live : first_live]
        copy_tail = count > 0 and start % self.block_size > 0 and references[sequence.blocks[-1]] > 1
        new_blocks = max(0, -(-(start + count) // self.block_size) - len(sequence.blocks)) + copy_tail
        freed = sum(references[block] == 1 for block in dead) if count else 0
        return _Plan(first_live, copy_tail, new_blocks, self._pool.available + freed)

    def _first_visible(self, position: int) -> int:
        """Return the first key that a query at ``position``, or any later one, can see."""
        first = 0
        if self.sliding_window is not None:
            first = max(first, position - self.sliding_window + 1)
        if self.attention_chunk is not None:
            first = max(first, position // self.attention_chunk * self.attention_chunk)
        return first

    def _release(self, block: int) -> None:
        if self._pool.release(block):
            self._copies.pop(block, None)  # nobody will read it

    def _digest(self, sequence: _Sequence, ids: array) -> bytes:  # type: ignore[type-arg]
        parent = sequence.digests[-1] if sequence.digests else sequence.root
        return hashlib.sha256(parent + ids.tobytes()).digest()

    def _get(self, function: str, seq: int) -> _Sequence:
        try:
            return self._sequences[seq]
        except (KeyError, TypeError):
            raise ValueError(f"{function}: seq must be an allocated sequence, got {seq!r}") from None


def _check_ids(function: str, num_blocks: int) -> None:
    if num_blocks >= 2**31:
        raise ValueError(f"{function}: num_blocks must be < 2^31, as block tables are int32, got {num_blocks}")


def _check_count(function: str, name: str, count: int) -> None:
    if not is_int(count) or count < 0:
        raise ValueError(f"{function}: {name} must be an int >= 0, got {count!r}")


def _as_list(name: str, values: Sequence[int]) -> list[int]:
    try:
        return list(values)
    except TypeError:
        raise ValueError(f"batch: {name} must be a list of ints, got {values!r}") from None


def _root(salt: bytes | str) -> bytes:
    """Return the digest before a sequence's first token."""
    if isinstance(salt, str):
        salt = salt.encode(errors="surrogatepass")
    if not isinstance(salt, bytes):
        raise ValueError(f"allocate: salt must be bytes or a str, got {salt!r}")
    # Hashed twice: what a digest of blocks is made of is longer than a digest, so that no salt can stand for tokens.
    return hashlib.sha256(hashlib.sha256(salt).digest()).digest()


def _token_ids(function: str, name: str, tokens: Sequence[int]) -> "array[int]":
    try:
        return array("q", iter(tokens))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{function}: {name} must hold ints of 64 bits, got {tokens!r}") from error
