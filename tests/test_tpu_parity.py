"""The TPU kernels beside those that jax ships: identical inputs in their layouts, all within the one tolerance rule."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as jax_paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as jax_ragged
from jax_arrays import to_jax, to_torch

from torch_paged.backends.tpu.block_sizes import CHIPS
from torch_paged.backends.tpu.decode import paged_attention
from torch_paged.backends.tpu.varlen import flash_attn_varlen
from torch_paged.testing import AttentionCase, assert_attention, build

BF16 = torch.bfloat16
DECODE = (
    AttentionCase("group_4", context_lens=(17, 64, 130, 1), head_dim=128, logits_soft_cap=5.0, dtype=BF16),
    AttentionCase("group_8", context_lens=(100, 16, 33), head_dim=256, group=8, block_size=32, dtype=BF16),
)
MIXED = AttentionCase("mixed", context_lens=(100, 33, 18), query_lens=(1, 20, 1), head_dim=128, dtype=BF16)
RAGGED = (
    replace(MIXED, name="modified", sliding_window=9, logits_soft_cap=3.0),
    AttentionCase("prefill", context_lens=(40, 3), query_lens=(40, 3), head_dim=128),
)


def clean(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Return cache and table without NaN and wild block ids, which the kernels of jax would read."""
    cache, tables = arguments["kv_cache"].nan_to_num(), arguments["block_tables"]
    used = torch.arange(tables.size(1)) * cache.size(3) < arguments["context_lens"][:, None]
    return to_jax(cache), to_jax(torch.where(used, tables, 0).int())


def ours(case: AttentionCase, arguments: dict[str, Any]) -> torch.Tensor:
    names = ("query", "kv_cache", "block_tables", "context_lens")
    query, cache, tables, lengths = (to_jax(arguments[name]) for name in names)
    options = {
        "softmax_scale": case.head_dim**-0.5,
        "logits_soft_cap": case.logits_soft_cap,
        "sliding_window": case.sliding_window,
        "chip": CHIPS["v5e"],
        "interpret": True,
    }
    if case.query_lens is None:
        return to_torch(paged_attention(query, cache, tables, lengths, **options))
    cumulative = to_jax(arguments["cu_seqlens_q"])
    longest: dict[str, Any] = {"max_seqlen_q": 64, "max_seqlen_k": 128, "causal": True}
    out = flash_attn_varlen(query, None, None, cumulative, None, cache, tables, lengths, **longest, **options)
    return to_torch(out)


@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.name)
def test_paged_attention_of_jax(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    arguments = build(case)
    cache, tables = clean(arguments)
    keys, values = (side.transpose(1, 0, 2, 3) for side in cache)  # (KH, N, S, D)
    width = -(-tables.shape[1] // 4) * 4
    theirs = jax_paged_attention(
        to_jax(arguments["query"]) * case.head_dim**-0.5,
        keys,
        values,
        to_jax(arguments["context_lens"]),
        jnp.pad(tables, ((0, 0), (0, width - tables.shape[1]))),
        pages_per_compute_block=4,
        attn_logits_soft_cap=case.logits_soft_cap or None,
    )
    monkeypatch.undo()
    for out in (ours(case, arguments), to_torch(theirs)):
        assert_attention(case.op, arguments, out)


@pytest.mark.parametrize("case", RAGGED, ids=lambda case: case.name)
def test_reference_of_ragged_paged_attention_of_jax(case: AttentionCase) -> None:
    arguments = build(case)
    cache, tables = clean(arguments)
    sides, num_blocks, heads, size, dim = cache.shape
    pages = cache.transpose(1, 3, 2, 0, 4).reshape(num_blocks, size, heads * sides, dim)
    theirs = jax_ragged.ref_ragged_paged_attention(
        to_jax(arguments["query"]),
        pages,
        to_jax(arguments["context_lens"]),
        tables,
        to_jax(arguments["cu_seqlens_q"]),
        jnp.array([case.num_seqs], jnp.int32),
        sm_scale=case.head_dim**-0.5,
        sliding_window=case.sliding_window,
        soft_cap=case.logits_soft_cap or None,
    )
    for out in (ours(case, arguments), to_torch(theirs)):
        assert_attention(case.op, arguments, out)
