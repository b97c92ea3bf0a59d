"""Attention small enough to be worked out by hand: one head, logits that are given, values that show the weights."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_paged.testing.backends import Backend
from torch_paged.testing.cases import AttentionCase, cumulative
from torch_paged.testing.compare import assert_stats
from torch_paged.testing.tensors import poison

LANES = 8
_SCALES = (0.5, 0.25)
"""Of keys and values in quantised caches: powers of two, so that small integers are stored as they are."""


def query_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of queries and new keys beside a cache of this one."""
    return torch.float32 if dtype.itemsize == 1 else dtype


def typed(case: AttentionCase, dtype: torch.dtype) -> AttentionCase:
    """Return a case with a cache of this dtype, and queries that go with it."""
    if dtype.itemsize > 1:
        return replace(case, dtype=dtype)
    return replace(case, dtype=query_dtype(dtype), cache_dtype=dtype, scales_rank=1)


def attend(
    backend: Backend, dtype: torch.dtype, logits: list[float], queries: int, source: str = "new", **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with one head to keys whose logits are given; the output lanes are the weights of the keys.

    Args:
        backend: what runs it.
        dtype: of the cache, or of the new keys where there is none.
        logits: one for each key, before cap, bias and mask (with ``softmax_scale=1.0``).
        queries: number of queries, the last of which sits at the last key. In decode each is a sequence of its own,
            which sees the keys up to its position.
        source: "decode", "cache", "new", or "both" (the first half of the keys is cached).
        options: further arguments of ``flash_attn_varlen``.

    Returns:
        weights (queries, keys), lse and max_logits (queries,).
    """
    keys = len(logits)
    query = torch.zeros(queries, 1, LANES)
    query[..., 0] = 1.0
    key = torch.zeros(keys, 1, LANES)
    key[:, 0, 0] = torch.tensor(logits)
    value = torch.eye(LANES)[:keys, None]
    rows = query_dtype(dtype)
    query, key, value = query.to(rows), key.to(rows), value.to(rows)
    cached = {"new": 0, "both": keys // 2}.get(source, keys)
    size = backend.block_size(2)
    cache = poison((2, 8, 1, size, LANES), dtype)
    tables = torch.tensor([[5, 2, 7, 0]], dtype=torch.int32)
    scales = torch.tensor(_SCALES) if dtype.itemsize == 1 else torch.ones(2)
    for position in range(cached):
        block, offset = tables[0, position // size], position % size
        for side, row in enumerate((key, value)):
            cache[side, block, 0, offset] = (row[position, 0] / scales[side]).to(dtype)
    softmax: dict[str, Any] = {"softmax_scale": 1.0}
    if dtype.itemsize == 1 and source != "new":
        softmax["kv_scales"] = scales
    arguments: dict[str, Any] = {"query": query}
    if source == "decode":
        options.pop("causal", None)
        lengths = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32).clamp(min=0)
        arguments |= {"kv_cache": cache, "block_tables": tables.expand(queries, -1).contiguous()}
        results = backend("paged_attention", arguments | {"context_lens": lengths} | softmax | options, stats=True)
    else:
        arguments |= {
            "key": None,
            "value": None,
            "cu_seqlens_q": cumulative((queries,)),
            "cu_seqlens_k": None,
            "kv_cache": None,
            "block_tables": None,
            "context_lens": None,
            "max_seqlen_q": queries,
            "max_seqlen_k": keys,
        }
        if source != "cache":
            arguments |= {"key": key[cached:], "value": value[cached:], "cu_seqlens_k": cumulative((keys - cached,))}
        if source != "new":
            length = torch.tensor([cached], dtype=torch.int32)
            arguments |= {"kv_cache": cache, "block_tables": tables, "context_lens": length}
        results = backend("flash_attn_varlen", arguments | softmax | options, stats=True)
    out, lse, max_logits = results
    assert out.dtype == rows, f"out is {out.dtype}, the query is {rows}"
    return out[:, 0, :keys], lse[:, 0], max_logits[:, 0]


def seen(backend: Backend, dtype: torch.dtype, queries: int, keys: int, source: str, **options: Any) -> list[str]:
    """Return which of the keys each query saw, as a string of 0 and 1 for each query."""
    weights, _, _ = attend(backend, dtype, [0.0] * keys, queries, source, **options)
    return ["".join("1" if weight > 0 else "0" for weight in row) for row in weights.tolist()]


def assert_seen(actual: list[str], expected: list[str]) -> None:
    """Assert which keys the queries saw."""
    assert actual == expected, f"the queries saw the keys {actual}, expected {expected}"


def assert_weights(actual: Tensor, logits: list[float], sink: float | None = None) -> None:
    """Assert the softmax of visible logits (-inf where hidden), worked out with the math module."""
    total = sum(math.exp(x) for x in logits) + (0.0 if sink is None else math.exp(sink))
    expected = torch.tensor([math.exp(x) / total for x in logits]).double()
    assert_stats(actual, expected, 1.0 if actual.dtype != torch.float32 else 0.0, actual.dtype, "weights")
