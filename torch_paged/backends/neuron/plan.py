"""What a kernel computes in a step, laid out by torch ops on the device: from lengths and tables alone, for all layers.

Decode: a *unit* is some consecutive tokens of a block, what one descriptor of a gather fetches. A *chunk* is
``CHUNK_UNITS`` units of a sequence, counted from its first key, so that a sequence is cut in the same way in any batch.
A *tile* is ``TILE_CHUNKS`` chunks of any sequences, one unit a partition. Shapes depend on shapes alone; how many
tiles there are is a value, the trip count of the kernel's loops.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PARTITIONS = 128
CHUNK_UNITS = 32
TILE_CHUNKS = PARTITIONS // CHUNK_UNITS
DESCRIPTOR_BYTES = 4096
"""Bytes of a unit where blocks are large enough: DMA engines lose little with that much in a descriptor."""


NOTHING = -(2**30)
"""A row that is none, whatever small number a kernel adds to it."""


@dataclass(frozen=True)
class DecodePlan:
    """The tiles of a decode step; ``X`` slots for chunks, ``TILE_CHUNKS`` of which are a tile.

    Attributes:
        units: (X * CHUNK_UNITS, 2) int32: row of a unit's keys and values in the cache, seen as rows of a unit of a
            head, of head 0; ``NOTHING``: nothing is read.
        bounds: (X * CHUNK_UNITS, 2) float32: the tokens of a unit that the query sees, from and to (exclusive).
        positions: (X * CHUNK_UNITS, 1) int32: position of a unit's first token.
        sequences: (X, 1) int32: whose chunk it is; -1: no one's.
        slots: (B, C) int32: the slots of a sequence's chunks in the order of its keys; -1 behind the last.
        num_tiles: (1, 1) int32: tiles that hold a chunk.
    """

    units: Tensor
    bounds: Tensor
    positions: Tensor
    sequences: Tensor
    slots: Tensor
    num_tiles: Tensor


def unit_tokens(block_size: int, row_bytes: int) -> int:
    """Return how many tokens a unit has: a power of two that divides the block size.

    Args:
        block_size: S, a power of two.
        row_bytes: of a stored row of a head.
    """
    tokens = block_size
    while tokens > 1 and tokens * row_bytes > DESCRIPTOR_BYTES:
        tokens //= 2
    return tokens


def decode_plan(
    block_tables: Tensor,  # (B, M) int32
    context_lens: Tensor,  # (B,) int32
    *,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    unit: int,
    sliding_window: int | None,
    attention_chunk: int | None,
) -> DecodePlan:
    """Return the plan of a decode step.

    Args:
        block_tables: ids outside of ``[0, num_blocks)`` hold no keys.
        context_lens: clamped to what the tables hold.
        num_blocks: N.
        num_kv_heads: KH.
        block_size: S.
        unit: tokens of a unit, see ``unit_tokens``.
        sliding_window: as the op takes it.
        attention_chunk: as the op takes it.
    """
    num_seqs, columns = block_tables.shape
    device, chunk = block_tables.device, CHUNK_UNITS * unit
    end = context_lens.clamp(0, columns * block_size)
    begin = torch.zeros_like(end)
    most = -(-columns * block_size // chunk)
    if sliding_window is not None:
        begin = (end - min(sliding_window, columns * block_size)).clamp(min=0)
        most = min(most, -(-sliding_window // chunk) + 1)
    if attention_chunk is not None:
        position = (end - 1).clamp(min=0)
        begin = torch.maximum(begin, position - position % min(attention_chunk, columns * block_size))
        most = min(most, -(-attention_chunk // chunk) + 1)
    first = begin // chunk
    counts = torch.where(end > begin, (end + chunk - 1) // chunk - first, 0)
    ends = counts.cumsum(0, dtype=torch.int32)  # (B,)

    num_slots = -(-num_seqs * most // TILE_CHUNKS) * TILE_CHUNKS
    slot = torch.arange(num_slots, dtype=torch.int32, device=device)
    seq = (slot[:, None] >= ends).sum(1)  # (X,)
    live = seq < num_seqs
    seq = seq.clamp(max=num_seqs - 1)
    index = first[seq] + slot - (ends - counts)[seq]
    unit_index = index[:, None] * CHUNK_UNITS + torch.arange(CHUNK_UNITS, dtype=torch.int32, device=device)
    position = unit_index * unit  # (X, CHUNK_UNITS)
    seen_from, seen_to = begin[seq][:, None] - position, end[seq][:, None] - position
    column = (position // block_size).clamp(0, columns - 1)
    block = block_tables[seq[:, None], column]
    used = live[:, None] & (seen_from < unit) & (seen_to > 0) & (block >= 0) & (block < num_blocks)
    parts = block_size // unit
    row = block * (num_kv_heads * parts) + position % block_size // unit
    side = num_blocks * num_kv_heads * parts
    units = torch.where(used[..., None], torch.stack((row, row + side), -1), NOTHING)
    bounds = torch.stack((seen_from.clamp(0, unit), seen_to.clamp(0, unit)), -1)
    bounds = torch.where(used[..., None], bounds, 0)

    place = torch.arange(most, dtype=torch.int32, device=device)
    slots = torch.where(place < counts[:, None], (ends - counts)[:, None] + place, -1)
    return DecodePlan(
        units=units.reshape(-1, 2).to(torch.int32),
        bounds=bounds.reshape(-1, 2).to(torch.float32),
        positions=position.reshape(-1, 1).to(torch.int32),
        sequences=torch.where(live, seq, -1).reshape(-1, 1).to(torch.int32),
        slots=slots.to(torch.int32),
        num_tiles=((ends[-1:] + TILE_CHUNKS - 1) // TILE_CHUNKS).reshape(1, 1).to(torch.int32),
    )
