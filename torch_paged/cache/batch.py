"""The integer tensors of one call, built from what the allocator knows."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The metadata of one step, as the ops take it.

    Attributes:
        block_tables: (B, M) int32, -1 behind the blocks of a sequence and where blocks were freed.
        context_lens: (B,) int32, tokens of a sequence in the cache, those of this step included.
        slot_mapping: (T,) int64, the slots of this step's tokens, -1 at padding.
        cu_seqlens_q: (B + 1,) int32, where each sequence's tokens of this step start.
        max_seqlen_q: longest query, tokens.
        max_seqlen_k: longest context, tokens.
    """

    block_tables: Tensor
    context_lens: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def build_batch(
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    query_lens: Sequence[int],
    block_size: int,
    *,
    num_seqs: int | None,
    num_tokens: int | None,
    max_blocks: int | None,
    device: torch.device | str,
) -> Batch:
    """Return the tensors of ``BlockAllocator.batch``, padded with empty sequences and slots of -1."""
    total = sum(query_lens)
    rows = _padded_size("num_seqs", num_seqs, len(tables))
    tokens = _padded_size("num_tokens", num_tokens, total)
    width = _padded_size("max_blocks", max_blocks, max([len(table) for table in tables] + [1]))
    entries: list[int] = []
    for table in tables:
        entries += table
        entries += [-1] * (width - len(table))
    entries += [-1] * (width * (rows - len(tables)))
    slots: list[int] = []
    starts = [0]
    for table, length, query_len in zip(tables, lengths, query_lens, strict=True):
        slots += slots_of(table, length - query_len, length, block_size)
        starts.append(starts[-1] + query_len)
    starts += [total] * (rows - len(tables))
    return Batch(
        block_tables=_tensor(entries, torch.int32).reshape(rows, width).to(device),
        context_lens=_tensor([*lengths, *[0] * (rows - len(tables))], torch.int32).to(device),
        slot_mapping=_tensor(slots + [-1] * (tokens - total), torch.int64).to(device),
        cu_seqlens_q=_tensor(starts, torch.int32).to(device),
        max_seqlen_q=max(query_lens, default=0),
        max_seqlen_k=max(lengths, default=0),
    )


def slots_of(table: Sequence[int], start: int, stop: int, block_size: int) -> list[int]:
    """Return the slots of positions ``start`` to ``stop``; -1 where the block was freed."""
    slots = []
    for position in range(start, stop):
        block = table[position // block_size]
        slots.append(-1 if block < 0 else block * block_size + position % block_size)
    return slots


def is_int(value: object) -> bool:
    """Say whether a value counts something; True and False do not, though Python calls them ints."""
    return isinstance(value, int) and not isinstance(value, bool)


def _tensor(values: list[int], dtype: torch.dtype) -> Tensor:
    """Return a 1-D tensor; through an array, because torch.tensor is ten times slower on a long list."""
    if not values:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(array("i" if dtype == torch.int32 else "q", values), dtype=dtype)


def _padded_size(name: str, wanted: int | None, needed: int) -> int:
    if wanted is None:
        return needed
    if not is_int(wanted) or wanted < needed:
        raise ValueError(f"batch: {name} must be an int >= {needed} for these sequences, got {wanted!r}")
    return wanted
