"""A quick part of the conformance cases, and calls that the contract bounds, by the NKI kernels on the simulator.

``make test-neuron`` runs all conformance tests this way.
"""

from functools import cache

import pytest
import torch

from torch_paged.backends.neuron import BACKEND, bridge_simulator
from torch_paged.testing import (
    AttentionCase,
    CopyCase,
    GatherCase,
    MergeCase,
    WriteCase,
    assert_attention,
    assert_same,
    build,
)
from torch_paged.testing.backends import Backend, Refused

BF16, F16, INT8, E4M3 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn


@cache
def simulated() -> Backend:
    return Backend("neuron", torch.device("cpu"), kernels=bridge_simulator.kernels(BACKEND))


@pytest.fixture(params=[("trn2", "1"), ("trn3", "2")], ids="-".join, autouse=True)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation, and the cores that share a kernel."""
    generation, cores = request.param
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", generation)
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", cores)


WRITES = [
    WriteCase("rows", num_tokens=17, skipped_tokens=5, value_dim=48),
    WriteCase("bfloat16", head_dim=128, dtype=BF16, num_kv_heads=1, block_size=8),
    WriteCase("int8", cache_dtype=INT8, scales_rank=2, head_dim=80, value_dim=64, dtype=BF16),
    WriteCase("per token", cache_dtype=E4M3, scales_rank=4, skipped_tokens=2),
]


@pytest.mark.parametrize("case", WRITES, ids=lambda case: case.name)
def test_writes(case: WriteCase) -> None:
    simulated().check(case)


def test_copies_gathers_and_merges() -> None:
    simulated().check(CopyCase("copy", pairs=((0, 1), (1, 2), (-1, 3)), block_size=8, cache_dtype=INT8, scales_rank=4))
    simulated().check(
        GatherCase("gather", block_size=8, left_padded=True, missing_entries=True, cache_dtype=E4M3, scales_rank=4)
    )
    simulated().check(MergeCase("merge", sinks=True, empty=True, dtype=BF16))


QUERIES = (5, 0, 3)
ATTENTION = [
    AttentionCase("decode", context_lens=(17, 0, 40)),
    AttentionCase("decode, bfloat16", context_lens=(17, 0, 40), dtype=BF16, group=3, head_dim=80, sinks=True),
    AttentionCase("decode, float16", context_lens=(17, 0, 40), dtype=F16, cache_dtype=E4M3, scales_rank=2),
    AttentionCase("latent", context_lens=(17, 0, 40), latent=True, value_dim=48, num_kv_heads=1),
    AttentionCase(
        "decode, window",
        context_lens=(17, 0, 40),
        sliding_window=9,
        alibi=True,
        logits_soft_cap=3.0,
        mask="heads",
    ),
    AttentionCase("decode, chunk", context_lens=(17, 0, 40), attention_chunk=12, cache_dtype=INT8, scales_rank=4),
    AttentionCase("decode, chunks of keys", context_lens=(600, 0, 3), num_kv_heads=1, group=2, block_size=8),
    AttentionCase("cache", context_lens=(17, 0, 40), query_lens=QUERIES),
    AttentionCase("both", context_lens=(17, 0, 40), query_lens=QUERIES, new_lens=QUERIES, dtype=BF16, sinks=True),
    AttentionCase(
        "window",
        context_lens=(17, 0, 40),
        query_lens=QUERIES,
        sliding_window=9,
        alibi=True,
        logits_soft_cap=3.0,
        mask="kv_heads",
        positions="shuffled",
    ),
]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention(case: AttentionCase) -> None:
    arguments = build(case)
    assert_attention(case.op, arguments, *simulated()(case.op, arguments, stats=True))


def test_a_write_outside_the_cache_is_dropped() -> None:
    arguments = build(WriteCase("dropped", num_tokens=8, block_size=16))
    arguments["slot_mapping"] = torch.tensor([80, 81, -2, 2**31, 2**32 + 3, 2**40, -(2**40), 5])
    before = arguments["kv_cache"].clone()
    simulated()("reshape_and_cache", arguments)
    assert_same(arguments["kv_cache"][0, 0, :, 5], arguments["key"][7])
    arguments["kv_cache"][:, 0, :, 5] = before[:, 0, :, 5]
    assert_same(arguments["kv_cache"], before)


def test_copies_of_blocks_outside_the_cache_are_skipped() -> None:
    arguments = build(CopyCase("outside", pairs=((0, 6), (6, 1), (2**31, 2), (3, 4)), block_size=8))
    before = arguments["kv_cache"].clone()
    simulated()("copy_blocks", arguments)
    assert_same(arguments["kv_cache"][:, 4], before[:, 3])
    arguments["kv_cache"][:, 4] = before[:, 4]
    assert_same(arguments["kv_cache"], before)


def test_what_is_refused_raises_its_sentence() -> None:
    arguments = build(AttentionCase("blocks", block_size=3))
    with pytest.raises(Refused, match=r"^paged_attention: backend 'neuron' does not support kv_cache with S = 3 "):
        simulated()("paged_attention", arguments)
