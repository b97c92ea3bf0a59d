"""The plan of packed ragged queries, laid out by torch ops on the device (``plan`` is that of decode).

The *rows* of a sequence are its query tokens times the members of a group, members fastest. A *tile* is up to
``row_tiles * PARTITIONS`` rows of one sequence; all kv heads have the same tiles. Each row sees an interval of key
positions, so that a tile needs an interval too, which is cut into *steps* of ``STEP_KEYS`` keys, apart for each source.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_paged.backends.neuron.plan import NOTHING, PARTITIONS

UNIT = 4
"""Tokens that one descriptor fetches; prefill computes longer than it fetches."""
STEP_KEYS = PARTITIONS * UNIT
FAR = 2**24 - 1
"""Positions end here: compared as float32."""


@dataclass(frozen=True)
class VarlenPlan:
    """The tiles of packed queries; ``X`` tiles of ``R`` rows.

    Attributes:
        query_rows: (X * R, 1) int32: row of a query in (T * H, D), of kv head 0; ``NOTHING``: no row.
        bounds: (X * R, 2) float32: the key positions that a row sees, from and to (exclusive).
        sequences: (X, 1) int32: whose tile it is.
        steps: (X, 4) int32: first step and number of steps in the cache, then among the new keys.
        num_tiles: (1, 1) int32.
    """

    query_rows: Tensor
    bounds: Tensor
    sequences: Tensor
    steps: Tensor
    num_tiles: Tensor


def varlen_plan(
    cu_seqlens_q: Tensor,  # (B + 1,)
    contexts: Tensor,  # (B,) int32: keys in the cache
    new_lens: Tensor,  # (B,) int32: keys beside it
    query_positions: Tensor | None,  # (T,)
    *,
    num_tokens: int,
    num_heads: int,
    group: int,
    row_tiles: int,
    causal: bool,
    sliding_window: int | None,
    attention_chunk: int | None,
) -> VarlenPlan:
    """Return the plan of packed queries.

    Args:
        cu_seqlens_q: what lies behind ``num_tokens`` is cut off.
        contexts: clamped already.
        new_lens: clamped already.
        query_positions: of the tokens; None: the last of their sequence's keys.
        num_tokens: T.
        num_heads: H.
        group: query heads of a kv head.
        row_tiles: 128 rows each, of a tile.
        causal: as the op takes it.
        sliding_window: as the op takes it.
        attention_chunk: as the op takes it.
    """
    device, num_seqs = cu_seqlens_q.device, cu_seqlens_q.shape[0] - 1
    size = row_tiles * PARTITIONS
    begins = cu_seqlens_q.clamp(0, num_tokens).to(torch.int32)
    lens = begins.diff()
    kv_lens = contexts + new_lens
    counts = (lens * group + size - 1) // size
    ends = counts.cumsum(0, dtype=torch.int32)
    num_tiles = num_tokens * group // size + num_seqs

    tile = torch.arange(num_tiles, dtype=torch.int32, device=device)
    seq = (tile[:, None] >= ends).sum(1)
    live = seq < num_seqs
    seq = seq.clamp(max=num_seqs - 1)
    row = (tile - (ends - counts)[seq])[:, None] * size + torch.arange(size, dtype=torch.int32, device=device)
    token = row // group  # in the sequence (X, R)
    used = live[:, None] & (token < lens[seq][:, None])
    place = (begins[:-1][seq][:, None] + token).clamp(0, max(num_tokens - 1, 0))
    query_rows = torch.where(used, place * num_heads + row % group, NOTHING)

    if query_positions is None:
        position = (kv_lens - lens)[seq][:, None] + token
    else:
        position = query_positions.to(torch.int32)[place]
    low, high = _interval(position, causal, sliding_window, attention_chunk)
    last = kv_lens[seq][:, None]
    low, high = low.clamp(min=0), torch.minimum(high, last)
    used &= low < high
    low, high = torch.where(used, low, 0), torch.where(used, high, 0)

    begin = torch.where(used, low, FAR).amin(1)
    end = high.amax(1)
    context = contexts[seq]
    steps = torch.stack(
        (*_steps(begin, torch.minimum(end, context)), *_steps((begin - context).clamp(min=0), end - context)), 1
    )
    return VarlenPlan(
        query_rows=query_rows.reshape(-1, 1).to(torch.int32),
        bounds=torch.stack((low, high), -1).reshape(-1, 2).to(torch.float32),
        sequences=seq.reshape(-1, 1).to(torch.int32),
        steps=steps.to(torch.int32),
        num_tiles=ends[-1:].reshape(1, 1).to(torch.int32),
    )


def _interval(position: Tensor, causal: bool, window: int | None, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Return the first key position that a query at a position sees, and the one behind the last."""
    low = torch.full_like(position, -FAR)
    high = torch.full_like(position, FAR)
    if causal or chunk is not None:
        high = torch.minimum(high, position + 1)
    if window is not None:
        low = torch.maximum(low, position - min(window, FAR) + 1)
        high = torch.minimum(high, position + min(window, FAR))
    if chunk is not None:
        size = min(chunk, FAR)
        low = torch.maximum(low, torch.div(position, size, rounding_mode="floor") * size)
    return low, high


def _steps(begin: Tensor, end: Tensor) -> tuple[Any, Any]:
    """Return the first step of keys, and how many there are."""
    first = begin // STEP_KEYS
    return first, torch.where(end > begin, (end + STEP_KEYS - 1) // STEP_KEYS - first, 0)
