"""The block allocator step by step: slots, copy-on-write, windows, prefix reuse, batches, errors, and real tensors."""

import copy
import hashlib
from array import array
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_paged
from torch_paged import reference
from torch_paged.cache import BlockAllocator, OutOfBlocks
from torch_paged.testing import assert_close, assert_same


def state(allocator: BlockAllocator) -> dict[str, Any]:
    """Everything that the allocator knows, comparable."""
    return copy.deepcopy({**vars(allocator), "_pool": vars(allocator._pool)})


def test_append_fills_blocks_in_order() -> None:
    allocator = BlockAllocator(4, 4)
    seq = allocator.allocate()
    assert allocator.append(seq, 3) == [0, 1, 2]
    assert allocator.append(seq, 0) == []
    assert allocator.append(seq, 3) == [3, 4, 5]
    assert allocator.block_table(seq) == (0, 1)
    assert allocator.context_len(seq) == 6
    assert allocator.num_free_blocks == 2


def test_sequences_do_not_share_by_themselves() -> None:
    allocator = BlockAllocator(4, 2)
    first, second = allocator.allocate(), allocator.allocate()
    slots = allocator.append(first, 3) + allocator.append(second, 3) + allocator.append(first, 1)
    assert len(set(slots)) == 7


def test_fork_copies_a_shared_tail_once() -> None:
    allocator = BlockAllocator(6, 4)
    parent = allocator.allocate()
    allocator.append(parent, 6)
    child = allocator.fork(parent)
    assert allocator.block_table(child) == (0, 1)
    assert allocator.num_free_blocks == 4
    assert allocator.append(child, 1) == [2 * 4 + 2]
    assert allocator.append(parent, 1) == [1 * 4 + 2]
    src, dst = allocator.take_copies()
    assert (src.tolist(), dst.tolist()) == ([1], [2])
    assert src.dtype == dst.dtype == torch.int64
    assert [tensor.numel() for tensor in allocator.take_copies()] == [0, 0]


def test_fork_at_a_block_boundary_copies_nothing() -> None:
    allocator = BlockAllocator(6, 4)
    parent = allocator.allocate()
    allocator.append(parent, 8)
    child = allocator.fork(parent)
    allocator.append(child, 1)
    allocator.append(parent, 1)
    assert allocator.take_copies()[0].numel() == 0
    assert allocator.block_table(parent)[:2] == allocator.block_table(child)[:2] == (0, 1)
    assert allocator.block_table(parent)[2] != allocator.block_table(child)[2]


def test_each_fork_gets_a_copy_of_its_own() -> None:
    allocator = BlockAllocator(6, 4)
    first = allocator.allocate()
    allocator.append(first, 2)
    second, third = allocator.fork(first), allocator.fork(first)
    allocator.append(second, 1)
    allocator.append(third, 1)
    src, dst = allocator.take_copies()
    assert src.tolist() == [0, 0]
    assert sorted(dst.tolist()) == [1, 2]


def test_copy_for_a_freed_sequence_is_dropped() -> None:
    allocator = BlockAllocator(3, 4)
    parent = allocator.allocate()
    allocator.append(parent, 2)
    child = allocator.fork(parent)
    allocator.append(child, 1)
    allocator.free(child)
    assert allocator.take_copies()[0].numel() == 0


def test_fork_before_the_copy_is_refused() -> None:
    allocator = BlockAllocator(4, 4)
    parent = allocator.allocate()
    allocator.append(parent, 2)
    child = allocator.fork(parent)
    allocator.append(child, 1)
    before = state(allocator)
    with pytest.raises(ValueError, match=r"^fork: seq must have its block copied and its slots written .*, got 1$"):
        allocator.fork(child)
    assert state(allocator) == before
    allocator.take_copies()
    allocator.fork(child)


def test_out_of_blocks_says_how_many_and_changes_nothing() -> None:
    allocator = BlockAllocator(3, 4)
    seq = allocator.allocate()
    allocator.append(seq, 6)
    child = allocator.fork(seq)
    before = state(allocator)
    with pytest.raises(
        OutOfBlocks, match=r"^append: needs 2 blocks, 1 of 3 are free; free a sequence or make"
    ) as error:
        allocator.append(child, 4)
    assert (error.value.needed, error.value.available) == (2, 1)
    assert state(allocator) == before
    assert allocator.blocks_needed(child, 4) == 2
    assert allocator.blocks_needed(child, 2) == 1
    allocator.append(child, 2)
    assert allocator.num_free_blocks == 0


def test_window_frees_what_no_coming_query_sees() -> None:
    allocator = BlockAllocator(3, 2, sliding_window=3)
    seq = allocator.allocate()
    for length in range(1, 40):
        allocator.append(seq, 1)
        table = allocator.block_table(seq)
        first_visible = max(0, (length - 1) - 3 + 1)
        assert [block >= 0 for block in table] == [index >= first_visible // 2 for index in range(len(table))]
    assert allocator.num_free_blocks == 1


def test_window_counts_the_blocks_it_frees_as_available() -> None:
    allocator = BlockAllocator(2, 4, sliding_window=1)
    seq = allocator.allocate()
    allocator.append(seq, 8)
    assert allocator.blocks_needed(seq, 8) == 0
    assert len(allocator.append(seq, 8)) == 8
    assert allocator.block_table(seq)[:2] == (-1, -1)


def test_attention_chunk_frees_earlier_chunks() -> None:
    allocator = BlockAllocator(4, 2, attention_chunk=4)
    seq = allocator.allocate()
    allocator.append(seq, 4)
    allocator.append(seq, 3)
    assert allocator.block_table(seq)[:2] == (-1, -1)
    assert allocator.num_free_blocks == 2
    allocator.append(seq, 1)
    assert allocator.block_table(seq)[2:] != (-1, -1)


def test_truncate_gives_back_blocks_and_slots() -> None:
    allocator = BlockAllocator(4, 4)
    seq = allocator.allocate()
    first = allocator.append(seq, 10)
    allocator.truncate(seq, 5)
    assert allocator.num_free_blocks == 2
    assert allocator.append(seq, 1) == [first[5]]
    allocator.truncate(seq, 0)
    assert allocator.num_free_blocks == 4
    assert allocator.block_table(seq) == ()


def test_truncate_cannot_bring_back_a_window() -> None:
    allocator = BlockAllocator(8, 2, sliding_window=4)
    seq = allocator.allocate()
    allocator.append(seq, 9)
    allocator.append(seq, 3)
    allocator.truncate(seq, 9)
    before = state(allocator)
    with pytest.raises(
        ValueError, match=r"^truncate: length must leave a window whose blocks are still there .*got 8$"
    ):
        allocator.truncate(seq, 8)
    assert state(allocator) == before


def publish_prompt(allocator: BlockAllocator, prompt: list[int], salt: bytes = b"") -> int:
    seq = allocator.allocate(prompt, salt=salt)
    allocator.append(seq, prompt[allocator.context_len(seq) :])
    allocator.publish(seq)
    return seq


def test_prefix_reuse_shares_full_blocks_but_never_the_last_token() -> None:
    allocator = BlockAllocator(16, 4, prefix_reuse=True)
    first = publish_prompt(allocator, list(range(10)))
    cases = {10: 8, 9: 8, 8: 4, 5: 4, 4: 0, 1: 0}
    for length, reused in cases.items():
        seq = allocator.allocate(list(range(length)))
        assert allocator.context_len(seq) == reused
        assert allocator.block_table(seq) == allocator.block_table(first)[: reused // 4]
    assert allocator.context_len(allocator.allocate([0, 1, 2, 3, 4, 5, 6, 99, 8])) == 4
    assert allocator.context_len(allocator.allocate([9, 1, 2, 3, 4, 5, 6, 7, 8])) == 0
    assert allocator.context_len(allocator.allocate([4, 5, 6, 7, 8])) == 0, "the same block after another prefix"
    assert allocator.context_len(allocator.allocate(list(range(10)), salt=b"adapter")) == 0


def test_only_equal_salts_share() -> None:
    allocator = BlockAllocator(16, 4, prefix_reuse=True)
    prompt = list(range(9))
    publish_prompt(allocator, prompt, "tenant é".encode())
    assert allocator.context_len(allocator.allocate(prompt, salt="tenant é")) == 8
    for salt in ("", "tenant", "tenant e", "\ud800", b"tenant"):
        assert allocator.context_len(allocator.allocate(prompt, salt=salt)) == 0
    with pytest.raises(ValueError, match=r"^allocate: salt must be bytes or a str, got 5$"):
        allocator.allocate(prompt, salt=5)  # type: ignore[arg-type]


def test_a_salt_cannot_stand_for_the_start_of_a_prompt() -> None:
    allocator = BlockAllocator(16, 4, prefix_reuse=True)
    publish_prompt(allocator, list(range(9)))
    first_block = array("q", range(4)).tobytes()
    for salt in (b"", hashlib.sha256(b"").digest(), hashlib.sha256(hashlib.sha256(b"").digest()).digest()):
        forged = allocator.allocate(list(range(4, 9)), salt=salt + first_block)
        assert allocator.context_len(forged) == 0


def test_nothing_is_reused_before_it_is_published_or_without_ids() -> None:
    allocator = BlockAllocator(16, 2, prefix_reuse=True)
    first = allocator.allocate()
    allocator.append(first, [1, 2])
    assert allocator.context_len(allocator.allocate([1, 2, 3])) == 0
    allocator.publish(first)
    assert allocator.context_len(allocator.allocate([1, 2, 3])) == 2
    allocator.append(first, 1)
    allocator.append(first, [4, 5, 6])
    allocator.publish(first)
    assert allocator.context_len(allocator.allocate([1, 2, 4, 5, 6])) == 2
    plain = BlockAllocator(16, 2)
    publish_prompt(plain, [1, 2, 3, 4])
    assert plain.context_len(plain.allocate([1, 2, 3, 4, 5])) == 0


def test_freed_prefixes_are_kept_until_their_memory_is_wanted() -> None:
    allocator = BlockAllocator(4, 2, prefix_reuse=True)
    old, new = publish_prompt(allocator, [1, 2, 3, 4]), publish_prompt(allocator, [5, 6])
    allocator.free(old)
    allocator.free(new)
    assert allocator.num_free_blocks == 4
    again = allocator.allocate([1, 2, 0])
    assert allocator.context_len(again) == 2
    allocator.free(again)  # [1, 2] is now the most recently used; [3, 4] left before it, and [5, 6] after that
    taker = allocator.allocate()
    allocator.append(taker, 4)
    assert allocator.context_len(allocator.allocate([1, 2, 3, 4, 0])) == 2, "the tail of a chain goes first"
    assert allocator.context_len(allocator.allocate([5, 6, 0])) == 2


def test_overwriting_a_published_block_forgets_it() -> None:
    allocator = BlockAllocator(4, 2, prefix_reuse=True)
    seq = publish_prompt(allocator, [1, 2, 3, 4])
    allocator.truncate(seq, 3)
    allocator.append(seq, [9])
    allocator.publish(seq)
    assert allocator.context_len(allocator.allocate([1, 2, 3, 4, 0])) == 2
    assert allocator.context_len(allocator.allocate([1, 2, 3, 9, 0])) == 4


def test_overwriting_a_reused_block_copies_it() -> None:
    allocator = BlockAllocator(4, 2, prefix_reuse=True)
    first = publish_prompt(allocator, [1, 2])
    second = allocator.allocate([1, 2, 3])
    allocator.truncate(second, 1)
    allocator.append(second, [7])
    assert [tensor.tolist() for tensor in allocator.take_copies()] == [[0], [1]]
    assert allocator.block_table(first) == (0,)


def test_grow_adds_blocks() -> None:
    allocator = BlockAllocator(1, 2)
    seq = allocator.allocate()
    allocator.append(seq, 2)
    allocator.grow(3)
    assert allocator.num_blocks == 3
    assert allocator.append(seq, 4) == [2, 3, 4, 5]
    with pytest.raises(OutOfBlocks, match="0 of 3"):
        allocator.append(seq, 1)


def test_batch() -> None:
    allocator = BlockAllocator(8, 4, sliding_window=4)
    long, empty, short = (allocator.allocate() for _ in range(3))
    allocator.append(long, 9)
    allocator.append(long, 2)
    allocator.append(short, 1)
    batch = allocator.batch([short, long, empty], [1, 2, 0])
    assert batch.block_tables.tolist() == [[0, -1, -1], [-1, 1, 2], [-1, -1, -1]]
    assert batch.context_lens.tolist() == [1, 11, 0]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 3, 3]
    assert batch.slot_mapping.tolist() == [0, 9, 10]
    assert (batch.max_seqlen_q, batch.max_seqlen_k) == (2, 11)
    dtypes = [tensor.dtype for tensor in (batch.block_tables, batch.context_lens, batch.cu_seqlens_q)]
    assert dtypes == [torch.int32] * 3
    assert batch.slot_mapping.dtype == torch.int64

    padded = allocator.batch([short, long], [1, 2], num_seqs=4, num_tokens=5, max_blocks=5)
    assert padded.block_tables.tolist() == [[0, -1, -1, -1, -1], [-1, 1, 2, -1, -1], [-1] * 5, [-1] * 5]
    assert padded.context_lens.tolist() == [1, 11, 0, 0]
    assert padded.cu_seqlens_q.tolist() == [0, 1, 3, 3, 3]
    assert padded.slot_mapping.tolist() == [0, 9, 10, -1, -1]

    nothing = allocator.batch([], [])
    assert nothing.block_tables.shape == (0, 1)
    assert nothing.cu_seqlens_q.tolist() == [0]
    assert (nothing.max_seqlen_q, nothing.max_seqlen_k) == (0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, s: BlockAllocator(0, 1), "BlockAllocator: num_blocks must be an int >= 1, got 0"),
        (lambda a, s: BlockAllocator(1, False), "BlockAllocator: block_size must be an int >= 1, got False"),
        (
            lambda a, s: BlockAllocator(1, 1, sliding_window=0),
            "BlockAllocator: sliding_window must be an int >= 1, got 0",
        ),
        (lambda a, s: BlockAllocator(1, 1, attention_chunk=-1), "BlockAllocator: attention_chunk must be an int >= 1"),
        (lambda a, s: a.append(99, 1), "append: seq must be an allocated sequence, got 99"),
        (lambda a, s: a.append(s, -1), "append: tokens must be an int >= 0, got -1"),
        (lambda a, s: a.append(s, True), "append: tokens must be an int >= 0, got True"),
        (lambda a, s: a.append(s, 1.5), "append: tokens must hold ints of 64 bits, got 1.5"),
        (lambda a, s: a.blocks_needed(s, 2.0), "blocks_needed: num_tokens must be an int >= 0, got 2.0"),
        (lambda a, s: a.truncate(s, 1.5), r"truncate: length must be an int in \[0, 3\], got 1.5"),
        (lambda a, s: a.truncate(s, True), r"truncate: length must be an int in \[0, 3\], got True"),
        (lambda a, s: a.grow(5.5), "grow: num_blocks must be an int >= 4, got 5.5"),
        (lambda a, s: a.batch([s], [1.5]), r"batch: query_lens must be an int in \[0, 3\], got 1.5 at index 0"),
        (
            lambda a, s: a.batch([s], [1], num_tokens=2.5),
            "batch: num_tokens must be an int >= 1 for these sequences, got 2.5",
        ),
        (lambda a, s: a.append(s, [0.5]), r"append: tokens must hold ints of 64 bits, got \[0.5\]"),
        (lambda a, s: a.append(s, [2**63]), "append: tokens must hold ints of 64 bits"),
        (lambda a, s: a.allocate(["a"]), "allocate: prompt must hold ints of 64 bits"),
        (lambda a, s: a.blocks_needed(s, -3), "blocks_needed: num_tokens must be an int >= 0, got -3"),
        (lambda a, s: a.fork(99), "fork: seq must be an allocated sequence, got 99"),
        (lambda a, s: a.publish(99), "publish: seq must be an allocated sequence, got 99"),
        (lambda a, s: a.free(99), "free: seq must be an allocated sequence, got 99"),
        (lambda a, s: a.truncate(s, 4), r"truncate: length must be an int in \[0, 3\], got 4"),
        (lambda a, s: a.truncate(s, -1), r"truncate: length must be an int in \[0, 3\], got -1"),
        (lambda a, s: a.context_len(99), "context_len: seq must be an allocated sequence, got 99"),
        (lambda a, s: a.block_table(99), "block_table: seq must be an allocated sequence, got 99"),
        (lambda a, s: a.grow(3), "grow: num_blocks must be an int >= 4, got 3"),
        (lambda a, s: a.batch([s], [4]), r"batch: query_lens must be an int in \[0, 3\], got 4 at index 0"),
        (lambda a, s: a.batch([s], []), "batch: query_lens must have one entry for each of 1 sequences, got 0"),
        (
            lambda a, s: a.batch([s], [2], num_tokens=1),
            "batch: num_tokens must be an int >= 2 for these sequences, got 1",
        ),
        (lambda a, s: a.batch([s], [2], num_seqs=0), "batch: num_seqs must be an int >= 1 for these sequences, got 0"),
        (
            lambda a, s: a.batch([s], [2], max_blocks=1),
            "batch: max_blocks must be an int >= 2 for these sequences, got 1",
        ),
    ],
)
def test_bad_arguments_change_nothing(call: Any, message: str) -> None:
    allocator = BlockAllocator(4, 2, prefix_reuse=True)
    seq = publish_prompt(allocator, [1, 2, 3])
    before = state(allocator)
    with pytest.raises(ValueError, match=f"^{message}"):
        call(allocator, seq)
    assert state(allocator) == before


def test_a_freed_sequence_is_gone() -> None:
    allocator = BlockAllocator(4, 2)
    seq = allocator.allocate()
    allocator.free(seq)
    with pytest.raises(ValueError, match=f"^free: seq must be an allocated sequence, got {seq}$"):
        allocator.free(seq)
    assert allocator.allocate() != seq


@pytest.mark.parametrize("ops", [torch_paged, reference], ids=["ops", "reference"])
def test_forked_sequences_attend_to_their_own_tokens(ops: Any) -> None:
    """Prompt, two beams, several steps: attention through tables equals attention over each beam's own keys."""
    heads, kv_heads, head_dim, block_size = 4, 2, 8, 4
    generator = torch.Generator().manual_seed(1)
    allocator = BlockAllocator(12, block_size)
    kv_cache = torch.full((2, 12, kv_heads, block_size, head_dim), float("nan"))
    history: dict[int, Tensor] = {}

    def step(lengths: dict[int, int]) -> None:
        slots = [slot for seq, count in lengths.items() for slot in allocator.append(seq, count)]
        rows = torch.randn((2, len(slots), kv_heads, head_dim), generator=generator)
        ops.copy_blocks(kv_cache, *allocator.take_copies())
        batch = allocator.batch(list(lengths), list(lengths.values()))
        assert batch.slot_mapping.tolist() == slots
        ops.reshape_and_cache(rows[0], rows[1], kv_cache, batch.slot_mapping)
        for seq, new in zip(lengths, rows.split(list(lengths.values()), 1), strict=True):
            history[seq] = torch.cat([history.get(seq, new[:, :0]), new], 1)

        query = torch.randn((len(slots), heads, head_dim), generator=generator)
        sizes: dict[str, Any] = {"max_seqlen_q": batch.max_seqlen_q, "max_seqlen_k": batch.max_seqlen_k}
        out = ops.flash_attn_varlen(
            query,
            None,
            None,
            cu_seqlens_q=batch.cu_seqlens_q,
            cu_seqlens_k=None,
            kv_cache=kv_cache,
            block_tables=batch.block_tables,
            context_lens=batch.context_lens,
            causal=True,
            **sizes,
        )
        ends = torch.tensor([0] + [history[seq].size(1) for seq in lengths]).cumsum(0).int()
        dense = torch.cat([history[seq] for seq in lengths], 1)
        expected, plain = (
            reference.flash_attn_varlen(
                query.to(dtype),
                dense[0].to(dtype),
                dense[1].to(dtype),
                cu_seqlens_q=batch.cu_seqlens_q,
                cu_seqlens_k=ends,
                kv_cache=None,
                block_tables=None,
                context_lens=None,
                causal=True,
                compute_dtype=dtype,
                **sizes,
            )
            for dtype in (torch.float64, torch.float32)
        )
        assert_close(out, expected, plain)
        dense_keys, dense_values = ops.gather_cache(
            kv_cache, batch.block_tables, batch.context_lens, batch.max_seqlen_k
        )
        for index, seq in enumerate(lengths):
            length = history[seq].size(1)
            assert_same(dense_keys[index, :, :length].transpose(0, 1), history[seq][0])
            assert_same(dense_values[index, :, :length].transpose(0, 1), history[seq][1])

    prompt = allocator.allocate()
    step({prompt: 6})
    beam = allocator.fork(prompt)
    history[beam] = history[prompt]
    for _ in range(3):
        step({prompt: 1, beam: 1})
    allocator.free(prompt)
    step({beam: 3})
