"""NaN and infinity in keys and values that some rows see: they reach these rows, and no other."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from torch_paged.testing import AttentionCase, assert_attention, build
from torch_paged.testing.backends import Backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HIDING: dict[str, AttentionCase] = {
    "causal": AttentionCase("hidden", context_lens=(70, 600), query_lens=(4, 3)),
    "causal_both": AttentionCase("hidden", context_lens=(70, 600), query_lens=(4, 3), new_lens=(4, 3)),
    "window": AttentionCase("hidden", context_lens=(70, 600, 30), query_lens=(4, 3, 25), sliding_window=2),
    "window_not_causal": AttentionCase(
        "hidden", context_lens=(70, 30), query_lens=(4, 25), sliding_window=2, causal=False
    ),
    "chunk": AttentionCase("hidden", context_lens=(70, 601, 30), query_lens=(4, 3, 25), attention_chunk=2),
    "mask_shared": AttentionCase("hidden", context_lens=(70, 600), query_lens=(4, 7), mask="shared", causal=False),
    "mask_kv_heads": AttentionCase("hidden", context_lens=(70, 600), query_lens=(4, 7), mask="kv_heads"),
    "mask_heads": AttentionCase("hidden", context_lens=(70, 30), query_lens=(4, 25), mask="heads", sinks=True),
    "latent": AttentionCase(
        "hidden", context_lens=(70, 30), query_lens=(4, 25), mask="heads", latent=True, value_dim=48, num_kv_heads=1
    ),
    "long_prefill": AttentionCase("hidden", context_lens=(300,), query_lens=(300,), head_dim=16),
    "long_prefill_mask": AttentionCase(
        "hidden", context_lens=(2100, 90), query_lens=(40, 90), head_dim=16, mask="heads"
    ),
    "long_prefill_new": AttentionCase("hidden", context_lens=(90,), query_lens=(150,), new_lens=(150,), head_dim=17),
    "long_prefill_window": AttentionCase("hidden", context_lens=(90,), query_lens=(80,), head_dim=16, sliding_window=2),
    "decode_mask_shared": AttentionCase("hidden", context_lens=(70, 700, 17, 16, 15), mask="shared"),
    "decode_mask_kv_heads": AttentionCase("hidden", context_lens=(70, 700, 17, 16, 15), mask="kv_heads"),
    "decode_mask_heads": AttentionCase("hidden", context_lens=(70, 700, 17, 16, 15), mask="heads", group=17),
    "decode_window": AttentionCase("hidden", context_lens=(70, 700, 17, 16, 15), sliding_window=2),
    "decode_chunk": AttentionCase("hidden", context_lens=(70, 703, 19, 31, 15), attention_chunk=2),
}
"""Calls in which the third key from the end is in a block that is read, and hidden from some rows at least."""

STORED: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "e4m3": {"cache_dtype": torch.float8_e4m3fn, "scales_rank": 2},
    "e4m3_scale": {"cache_dtype": torch.float8_e4m3fn, "scales_rank": 4, "dtype": torch.bfloat16},
    "e4m3_bfloat16": {"cache_dtype": torch.float8_e4m3fn, "scales_rank": 1, "dtype": torch.bfloat16},
    "e5m2_bfloat16": {"cache_dtype": torch.float8_e5m2, "scales_rank": 2, "dtype": torch.bfloat16},
    "int8_scale": {"cache_dtype": torch.int8, "scales_rank": 4},
    "int8_scale_bfloat16": {"cache_dtype": torch.int8, "scales_rank": 4, "dtype": torch.bfloat16},
}
"""How the keys are stored; where a scale belongs to each token, the scale is spoilt instead of the row."""


def spoil(case: AttentionCase, arguments: dict[str, Any], side: int, poison: float) -> torch.Tensor:
    """Spoil the third key (or value) from the end of each sequence in kv head 0; return (T, H) which rows see it."""
    query_lens = case.query_lens or (1,) * case.num_seqs
    reached = torch.zeros(arguments["query"].shape[:2], dtype=torch.bool)
    first = 0
    for seq, (q_len, kv_len) in enumerate(zip(query_lens, case.kv_lens, strict=True)):
        key = kv_len - 3
        for row in range(q_len):
            distance = kv_len - q_len + row - key
            sees = abs(distance) < (case.sliding_window or kv_len)
            sees &= distance >= 0 or not (case.causal or case.attention_chunk)
            sees &= (
                case.attention_chunk is None or (key + distance) // case.attention_chunk == key // case.attention_chunk
            )
            reached[first + row, : case.group] = sees
        if case.mask is not None:
            mask = arguments["attn_mask"]
            mask = mask[None] if mask.dim() == 2 else mask
            heads = mask.repeat_interleave(case.num_heads // mask.size(0), 0)[:, first : first + q_len, key]
            reached[first : first + q_len] &= heads.T
        context = 0 if case.context_lens is None else case.context_lens[seq]
        if key >= context:
            new = arguments["value" if side else "key"]
            new[int(arguments["cu_seqlens_k"][seq]) + key - context, 0] = poison
        else:
            block, offset = int(arguments["block_tables"][seq, key // case.block_size]), key % case.block_size
            where = arguments["kv_scales"] if case.scales_rank == 4 else arguments["kv_cache"]
            where[side % where.size(0), block, 0, offset] = poison
        first += q_len
    return reached


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("hiding", HIDING)
def test_a_live_key_reaches_only_the_rows_that_see_it(
    implementation: Backend, hiding: str, stored: str, side: int, poison: float
) -> None:
    case = replace(HIDING[hiding], **STORED[stored])
    clean, arguments = build(case), build(case)
    reached = spoil(case, arguments, side, poison)
    assert not reached[:, : case.group].all()
    assert reached.any() or case.query_lens is None
    results = implementation(case.op, arguments, stats=True)
    if math.isnan(poison):
        assert results[0][reached].isnan().all()
        if side == 0:
            assert results[1][reached].isnan().all()
    hidden = []
    for result, unspoilt in zip(results, implementation(case.op, clean, stats=True), strict=True):
        result[reached] = unspoilt[reached]
        hidden.append(result)
    assert_attention(case.op, clean, *hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_value_spoils_its_own_lane_whatever_ran_before(backend: Backend, dtype: torch.dtype) -> None:
    case = AttentionCase(
        "lane", context_lens=(64,), query_lens=(32,), num_kv_heads=1, group=1, dtype=dtype, mask="shared"
    )
    arguments = build(case)
    mask = (torch.arange(64) < 16).repeat(32, 1)
    mask[:8] = torch.arange(64) >= 48
    arguments.update(causal=False, attn_mask=mask)
    clean = dict(arguments, kv_cache=arguments["kv_cache"].clone())
    block, offset = int(arguments["block_tables"][0, 60 // case.block_size]), 60 % case.block_size
    arguments["kv_cache"][1, block, 0, offset, 0] = math.inf
    backend(case.op, dict(arguments, query=torch.full_like(arguments["query"], math.nan), attn_mask=None))
    out, expected = backend(case.op, arguments), backend(case.op, clean)
    assert (out[:8, 0, 0] == math.inf).all()
    out[:8, 0, 0] = expected[:8, 0, 0]
    torch.testing.assert_close(out, expected)
