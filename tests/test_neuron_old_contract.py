"""Parity with the kernels that this project grew from: their batches and masks, through ``flash_attn_varlen``."""

from typing import Any

import numpy as np
import pytest
import torch
from old_neuron_contract import PUBLISHED, Array, Batch, Call, Case, attention, draw, padded, plan

from torch_paged.backends.neuron import bridge_simulator
from torch_paged.backends.neuron.launch import Launch
from torch_paged.backends.neuron.varlen import flash_attn_varlen
from torch_paged.contract.schema import NAMESPACE
from torch_paged.testing.compare import assert_close, assert_stats, plain_attention

DEFAULTS = {x.name: x.default_value for x in getattr(torch.ops, NAMESPACE).flash_attn_varlen.default._schema.arguments}
QUICK = [case for case in PUBLISHED if case.group == 16 or case.block_size == 8]


def paged(batch: Batch, block_size: int) -> tuple[Array, Array]:
    """Return cache and tables with the context of a batch in blocks of another size, and NaN where there is none."""
    blocks = [-(-length // block_size) for length in batch.context_lens]
    sides, _, key_heads, old_size, head_dim = batch.kv_cache.shape
    cache = np.full((sides, sum(blocks), key_heads, block_size, head_dim), np.nan, np.float32)
    tables = np.full((len(blocks), max(blocks)), -1, np.int32)
    ids = iter(np.random.default_rng(1).permutation(sum(blocks)).tolist())
    for seq, length in enumerate(batch.context_lens):
        tables[seq, : blocks[seq]] = [next(ids) for _ in range(blocks[seq])]
        for position in range(length):
            old = batch.kv_cache[:, batch.block_tables[seq, position // old_size], :, position % old_size]
            cache[:, tables[seq, position // block_size], :, position % block_size] = old
    return cache, tables


def arguments_of(batch: Batch, block_size: int, mask: Array | None = None) -> dict[str, Any]:
    """Return the arguments of ``flash_attn_varlen``; with a mask (T, C) of positions, not causal beside it."""
    cache, tables = paged(batch, max(block_size, 8))
    starts = torch.tensor(np.cumsum((0, *batch.query_lens)), dtype=torch.int32)
    longest = max(q + c for q, c in zip(batch.query_lens, batch.context_lens, strict=True))
    return DEFAULTS | {
        "query": torch.from_numpy(batch.query),
        "key": torch.from_numpy(batch.key),
        "value": torch.from_numpy(batch.value),
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "kv_cache": torch.from_numpy(cache),
        "block_tables": torch.from_numpy(tables),
        "context_lens": torch.tensor(batch.context_lens, dtype=torch.int32),
        "max_seqlen_q": max(batch.query_lens),
        "max_seqlen_k": longest,
        "causal": mask is None,
        "attn_mask": None if mask is None else torch.from_numpy(mask),
    }


def assert_same_attention(batch: Batch, call: Call, arguments: dict[str, Any], tokens: int) -> None:
    out, lse, _ = flash_attn_varlen(Launch("trn2", 1, bridge_simulator.run), arguments)
    query, key, value = padded(batch, tokens)
    old, old_lse = attention(query, key, value, batch.kv_cache, call)
    rows = len(batch.query)
    expected, expected_lse = (torch.from_numpy(x[:rows].copy()) for x in (old[0].transpose(1, 0, 2), old_lse[0].T))
    assert_close(out, expected, plain_attention("flash_attn_varlen", arguments))
    assert_stats(lse, expected_lse)


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.neuron_matrix) for case in PUBLISHED],
    ids=str,
)
def test_published_batches(case: Case) -> None:
    batch = draw(case, most_context=70, most_queries=17)
    tokens = -(-len(batch.query) // 128) * 128
    call = plan(batch.query_lens, batch.context_lens, batch.block_tables, case.block_size, case.tile_tokens, tokens)
    assert_same_attention(batch, call, arguments_of(batch, case.block_size), tokens)


def test_any_mask() -> None:
    """The old kernels took a mask of any pattern over context and new tokens: a tree of drafts, say."""
    case = PUBLISHED[2]
    batch = draw(case, seed=3, most_context=70, most_queries=17)
    call = plan(batch.query_lens, batch.context_lens, batch.block_tables, case.block_size, case.tile_tokens, 128)
    rng = np.random.default_rng(4)
    lens = [q + c for q, c in zip(batch.query_lens, batch.context_lens, strict=True)]
    mask = rng.random((len(batch.query), max(lens))) < 0.4
    mask[:, 0] = True
    old = np.zeros_like(call.mask)
    context = call.mask.shape[1] - len(call.mask)
    row = column = 0
    for query_len, context_len in zip(batch.query_lens, batch.context_lens, strict=True):
        rows = slice(row, row + query_len)
        old[rows, column : column + context_len] = mask[rows, :context_len]
        old[rows, context + row : context + row + query_len] = mask[rows, context_len : context_len + query_len]
        row += query_len
        column += -(-context_len // case.block_size) * case.block_size
    changed = Call(call.block_table, old)
    assert_same_attention(batch, changed, arguments_of(batch, case.block_size, mask), 128)
