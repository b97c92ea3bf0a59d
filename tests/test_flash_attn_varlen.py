"""Packed ragged queries with the three key sources, against the reference."""

import math

import pytest
import torch

from torch_paged.testing import AttentionCase, assert_attention, assert_same, build
from torch_paged.testing.backends import Backend
from torch_paged.testing.named import ATTENTION_CASES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CONTEXTS = (700, 0, 5, 63)
QUERIES = (130, 33, 1, 0)
INVARIANT = [
    AttentionCase("invariant_split_tiles", context_lens=(4200, 2049, 30, 2500), query_lens=(40, 20, 33, 17)),
    AttentionCase(
        "invariant_split_few_rows",
        context_lens=(1300, 513, 2, 700),
        query_lens=(3, 4, 2, 1),
        dtype=torch.bfloat16,
        sliding_window=600,
    ),
    AttentionCase("invariant_cache", context_lens=CONTEXTS, query_lens=QUERIES, sinks=True),
    AttentionCase("invariant_both", context_lens=CONTEXTS, query_lens=QUERIES, new_lens=QUERIES, dtype=torch.bfloat16),
    AttentionCase("invariant_new", context_lens=None, query_lens=QUERIES, new_lens=(130, 600, 1, 4), group=3),
    AttentionCase("invariant_window", context_lens=CONTEXTS, query_lens=QUERIES, sliding_window=300, block_size=3),
    AttentionCase(
        "invariant_e4m3",
        context_lens=CONTEXTS,
        query_lens=QUERIES,
        new_lens=QUERIES,
        cache_dtype=torch.float8_e4m3fn,
        scales_rank=2,
        alibi=True,
        mask="kv_heads",
        positions="anywhere",
    ),
    AttentionCase("invariant_float16", context_lens=CONTEXTS, query_lens=QUERIES, dtype=torch.float16, causal=False),
]


@pytest.mark.parametrize(
    "case", [c for c in ATTENTION_CASES if c.op == "flash_attn_varlen"], ids=lambda case: case.name
)
def test_case(backend: Backend, case: AttentionCase) -> None:
    backend.check(case)


@pytest.mark.parametrize("case", INVARIANT, ids=lambda case: case.name)
def test_same_bits_alone_reordered_and_on_two_threads(backend: Backend, case: AttentionCase) -> None:
    backend.check_batch_invariance(case)


@pytest.mark.parametrize("slack", [0, 1, 1000])
def test_upper_bounds_change_nothing(backend: Backend, slack: int) -> None:
    case = AttentionCase("bounds", query_lens=(3, 0, 17, 1), new_lens=(3, 0, 17, 1))
    arguments = dict(build(case), max_seqlen_q=17, max_seqlen_k=80)
    expected = backend(case.op, arguments)
    arguments.update(max_seqlen_q=17 + slack, max_seqlen_k=80 + slack)
    assert_same(backend(case.op, arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_new_keys_beside_the_cache_equal_the_same_keys_in_it(backend: Backend, dtype: torch.dtype) -> None:
    queries = (3, 0, 17, 1)
    both = AttentionCase("sources", query_lens=queries, new_lens=queries, dtype=dtype, block_size=3, sliding_window=40)
    both = backend.served(both)
    size = both.block_size
    arguments = build(both)
    tables = torch.nn.functional.pad(arguments["block_tables"], (0, 10), value=-1)
    spare = arguments["kv_cache"].size(1)
    cache = torch.cat([arguments["kv_cache"], torch.full_like(arguments["kv_cache"], float("nan"))], 1)
    slots = []
    for seq, (context, count) in enumerate(zip(both.context_lens or (), queries, strict=True)):
        for position in range(context, context + count):
            if position % size == 0:
                tables[seq, position // size] = spare
                spare += 1
            slots.append(int(tables[seq, position // size]) * size + position % size)
    backend(
        "reshape_and_cache",
        {"key": arguments["key"], "value": arguments["value"], "kv_cache": cache, "slot_mapping": torch.tensor(slots)},
    )
    written = dict(
        arguments,
        key=None,
        value=None,
        cu_seqlens_k=None,
        kv_cache=cache,
        block_tables=tables,
        context_lens=arguments["context_lens"] + torch.tensor(queries, dtype=torch.int32),
    )
    assert_attention(both.op, arguments, *backend(both.op, written, stats=True))


@pytest.mark.parametrize("query_len", [1, 64])
def test_two_equal_peaks_far_apart_weigh_the_same(backend: Backend, query_len: int) -> None:
    num_keys, peak = 16384, 97.3
    key, value = torch.zeros(num_keys, 1, 16), torch.zeros(num_keys, 1, 16)
    key[0, 0, 0] = key[-query_len, 0, 0] = peak
    value[0, 0, 0] = value[-query_len, 0, 1] = 1.0
    query = torch.zeros(query_len, 1, 16)
    query[:, :, 0] = 1.0
    out, lse, _ = backend(
        "flash_attn_varlen",
        {
            "query": query,
            "cu_seqlens_q": torch.tensor([0, query_len], dtype=torch.int32),
            "key": key,
            "value": value,
            "cu_seqlens_k": torch.tensor([0, num_keys], dtype=torch.int32),
            "kv_cache": None,
            "block_tables": None,
            "context_lens": None,
            "max_seqlen_q": query_len,
            "max_seqlen_k": num_keys,
            "softmax_scale": 1.0,
            "causal": True,
        },
        stats=True,
    )
    torch.testing.assert_close(out[:, 0, :2], torch.full((query_len, 2), 0.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(lse[:, 0], torch.full((query_len,), peak + math.log(2.0)), rtol=0, atol=3e-5)


def test_inputs_are_not_written(backend: Backend) -> None:
    case = AttentionCase(
        "untouched",
        query_lens=(3, 0, 17, 1),
        new_lens=(3, 0, 17, 1),
        mask="heads",
        sinks=True,
        padding_rows=3,
        alibi=True,
    )
    arguments = build(case)
    backend(case.op, arguments)
    for name, before in build(case).items():
        if isinstance(before, torch.Tensor):
            assert_same(arguments[name], before, name)
