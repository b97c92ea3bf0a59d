"""Attention small enough to be worked out by hand: given logits, and values that show the weights.

What is worked out is the last head of the last sequence. Around it are three heads, another kv head and a sequence in
front, whose keys, values, slopes, sinks, masks and positions differ; these are compared with the reference.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_paged.testing.backends import Backend
from torch_paged.testing.cases import AttentionCase, cumulative
from torch_paged.testing.compare import assert_attention, assert_stats, oracle
from torch_paged.testing.tensors import poison

LANES = 8
_SCALES = (0.5, 0.25)
"""Of keys and values in quantised caches: powers of two, so that small integers are stored as they are."""
_QUERIES = (-1.0, 0.5, 2.0, 1.0)
"""The first lane of each query head; the others are 0."""
_FRONT = (2.0, 1.0, 3.0)
"""Logits of the sequence in front."""
_FRONT_POSITIONS = (0, 2)
_TABLES = ((4, 1, 3, 6), (5, 2, 7, 0))
_OTHER_HEADS = (2.0, 1.25, 0.125)
"""Slopes and sinks of the heads before the last."""


def query_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of queries and new keys beside a cache of this one."""
    return torch.float32 if dtype.itemsize == 1 else dtype


def typed(case: AttentionCase, dtype: torch.dtype) -> AttentionCase:
    """Return a case with a cache of this dtype, and queries that go with it."""
    if dtype.itemsize > 1:
        return replace(case, dtype=dtype)
    return replace(case, dtype=query_dtype(dtype), cache_dtype=dtype, scales_rank=1)


def sourced(case: AttentionCase, source: str) -> AttentionCase:
    """Return a case whose keys come from this source; packed sequences get 5, 0, 17 and 3 queries."""
    if source == "decode":
        return case
    queries = (5, 0, 17, 3)
    lengths: dict[str, dict[str, Any]] = {
        "cache": {},
        "new": {"context_lens": None, "new_lens": case.context_lens},
        "both": {"new_lens": queries},
    }
    return replace(case, query_lens=queries, **lengths[source])


def attend(
    backend: Backend,
    dtype: torch.dtype,
    logits: list[float],
    queries: int,
    source: str = "new",
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to keys whose logits are given; the output lanes are the weights of the keys.

    Args:
        backend: what runs it.
        dtype: of the cache, or of the new keys where there is none.
        logits: one for each key, before cap, bias and mask (with ``softmax_scale=1.0``).
        queries: number of queries, the last of which sits at the last key. In decode each is a sequence of its own,
            which sees the keys up to its position.
        source: "decode", "cache", "new", or "both" (the first half of the keys is cached).
        options: further arguments of ``flash_attn_varlen``: of slopes and sinks that of the last head, of masks and
            positions the rows of the queries. ``mask_heads``: rows of the mask, where it has one for each kv head (2)
            or head (4); those before the last hide what the last shows.

    Returns:
        weights (queries, keys), lse and max_logits (queries,).
    """
    decode, keys, rows = source == "decode", len(logits), query_dtype(dtype)
    before = 1 if decode else len(_FRONT_POSITIONS)  # queries in front
    query = torch.zeros(before + queries, len(_QUERIES), LANES)
    query[..., 0] = torch.tensor(_QUERIES)
    tokens = [_tokens(list(_FRONT), rows), _tokens(logits, rows)]
    cached = [{"new": 0, "both": length // 2}.get(source, length) for length in (len(_FRONT), keys)]
    size = backend.block_size(2)
    cache = poison((2, 8, 2, size, LANES), dtype)
    scales = torch.tensor(_SCALES) if dtype.itemsize == 1 else torch.ones(2)
    for table, sequence, length in zip(_TABLES, tokens, cached, strict=True):
        for position in range(length):
            row = sequence[:, position] / scales[:, None, None]
            cache[:, table[position // size], :, position % size] = row.to(dtype)
    tables, lengths = torch.tensor(_TABLES, dtype=torch.int32), torch.tensor(cached, dtype=torch.int32)
    arguments: dict[str, Any] = {"query": query.to(rows), "softmax_scale": 1.0}
    if decode:
        options.pop("causal", None)
        tables = tables[[0] + [1] * queries]
        lengths = torch.tensor([len(_FRONT), *range(keys - queries + 1, keys + 1)], dtype=torch.int32).clamp(min=0)
    else:
        new = [sequence[:, length:] for sequence, length in zip(tokens, cached, strict=True)]
        packed: tuple[Tensor | None, ...] = (None, None)
        if source != "cache":
            packed = torch.cat(new, 1).unbind()
        arguments |= {
            "key": packed[0],
            "value": packed[1],
            "cu_seqlens_q": cumulative((before, queries)),
            "cu_seqlens_k": None if source == "cache" else cumulative((new[0].size(1), new[1].size(1))),
            "kv_cache": None,
            "block_tables": None,
            "context_lens": None,
            "max_seqlen_q": max(before, queries),
            "max_seqlen_k": max(len(_FRONT), keys),
        }
    if source != "new":
        arguments |= {"kv_cache": cache, "block_tables": tables, "context_lens": lengths}
        if dtype.itemsize == 1:
            arguments["kv_scales"] = scales
    arguments |= _around(options, before)
    op = "paged_attention" if decode else "flash_attn_varlen"
    results = backend(op, arguments, stats=True)
    out, lse, max_logits = (result[before:, -1] for result in results)
    try:
        assert_attention(op, arguments, *results)
    except AssertionError as error:
        expected = oracle(op, arguments)[0][before:, -1, :keys]
        saw = f"the last head weighs the keys {_rounded(out[:, :keys])}, the reference {_rounded(expected)}"
        raise AssertionError(f"{error}; {saw}") from None
    assert out.dtype == rows, f"out is {out.dtype}, the query is {rows}"
    return out[:, :keys], lse, max_logits


def _tokens(logits: list[float], dtype: torch.dtype) -> Tensor:
    """Return keys and values (2, keys, 2, LANES): of the last kv head logits and unit rows, of the other one more."""
    tokens = torch.zeros(2, len(logits), 2, LANES)
    tokens[0, :, 1, 0] = torch.tensor(logits)
    tokens[0, :, 0, 0] = torch.tensor(logits).flip(0) + 1
    tokens[1, :, 1] = torch.eye(LANES)[: len(logits)]
    tokens[1, :, 0] = tokens[1, :, 1].flip(-1) * 2
    return tokens.to(dtype)


def _around(options: dict[str, Any], before: int) -> dict[str, Any]:
    """Return options of the last head and sequence with those of the other heads, and of the queries in front."""
    heads = options.pop("mask_heads", None)
    for name in ("alibi_slopes", "sinks"):
        if name in options:
            options[name] = torch.cat([torch.tensor(_OTHER_HEADS), options[name]])
    if "query_positions" in options:
        front = torch.tensor(_FRONT_POSITIONS, dtype=torch.int32)
        options["query_positions"] = torch.cat([front, options["query_positions"]])
    if "attn_mask" in options:
        mask = torch.cat([~options["attn_mask"][:1].expand(before, -1), options["attn_mask"]])
        mask = mask if heads is None else torch.stack([~mask] * (heads - 1) + [mask])
        options["attn_mask"] = torch.nn.functional.pad(mask, (0, 3), value=True)[..., : mask.size(-1)]
    return options


def _rounded(weights: Tensor) -> list[list[float]]:
    return [[round(weight, 4) for weight in row] for row in weights.tolist()]


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
