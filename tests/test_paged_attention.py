"""Decode, against the reference."""

from typing import Any

import pytest
import torch

from torch_paged.testing import AttentionCase, assert_attention, assert_same, build
from torch_paged.testing.backends import REFERENCE, Backend
from torch_paged.testing.named import ATTENTION_CASES, QUANTIZED_DTYPES
from torch_paged.testing.tensors import poison

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LONG = (1030, 0, 5, 2100, 63, 257)
INVARIANT = [
    AttentionCase("invariant_decode", context_lens=LONG, sinks=True),
    AttentionCase("invariant_decode_bfloat16", context_lens=LONG, dtype=torch.bfloat16),
    AttentionCase("invariant_decode_window", context_lens=LONG, sliding_window=600, block_size=3),
    AttentionCase("invariant_decode_int8", context_lens=LONG, cache_dtype=torch.int8, scales_rank=4, alibi=True),
    AttentionCase(
        "invariant_decode_int8_bfloat16",
        context_lens=LONG,
        dtype=torch.bfloat16,
        cache_dtype=torch.int8,
        scales_rank=4,
        num_kv_heads=4,
    ),
    AttentionCase(
        "invariant_decode_mask", context_lens=LONG, dtype=torch.float16, mask="heads", group=3, num_kv_heads=1
    ),
    AttentionCase("invariant_decode_shared", context_lens=LONG, shared_blocks=True, layout="nhd", attention_chunk=700),
]


@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if c.op == "paged_attention"], ids=lambda case: case.name)
def test_case(backend: Backend, case: AttentionCase) -> None:
    backend.check(case)


@pytest.mark.parametrize("case", INVARIANT, ids=lambda case: case.name)
def test_same_bits_alone_reordered_and_on_two_threads(backend: Backend, case: AttentionCase) -> None:
    backend.check_batch_invariance(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache_dtype", QUANTIZED_DTYPES, ids=str)
def test_every_stored_byte_is_multiplied_as_torch_reads_it(
    backend: Backend, cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """NaN and infinities included: each sequence has one key, which holds one byte, and whose value holds 64."""
    byte = torch.arange(256)
    cache = poison((2, 256, 1, backend.block_size(4), 64), cache_dtype)
    key, value = cache.view(torch.uint8)[:, :, 0, 0]  # (256, 64) each
    arguments: dict[str, Any] = {
        "query": torch.ones(256, 4, 64, dtype=dtype),
        "kv_cache": cache,
        "block_tables": byte[:, None].int(),
        "context_lens": torch.ones(256, dtype=torch.int32),
        "kv_scales": torch.ones(2),
        "softmax_scale": 1.0,
    }
    for last_head in (1.0, float("nan")):  # kernels that need finite queries give way to others
        arguments["query"][:, 3] = last_head
        key.zero_()
        value.zero_()
        key[byte, byte % 64] = byte.to(torch.uint8)
        lse = backend("paged_attention", arguments, stats=True)[1][:, :3]
        expected = byte.to(torch.uint8).view(cache_dtype).float()[:, None].expand(256, 3)
        finite = expected.isfinite()
        torch.testing.assert_close(lse[finite], expected[finite], rtol=0, atol=0)
        assert not lse[~finite].isfinite().any()

        key.zero_()
        value.copy_(byte[:, None] + torch.arange(64))
        out = backend("paged_attention", arguments)[:, :3]
        expected = value.view(cache_dtype).to(dtype)[:, None].expand(256, 3, 64)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 4, 8])
def test_int8_rows_of_very_different_sizes(backend: Backend, group: int, dtype: torch.dtype) -> None:
    """Fixed point must not lose a small query row, small lanes beside a large one, or small scales of values."""
    case = AttentionCase(
        "sizes",
        context_lens=(70, 1000),
        head_dim=80,
        group=group,
        dtype=dtype,
        cache_dtype=torch.int8,
        scales_rank=4,
        # logits of 38 are rounded by more than the rule forgives, where float32 sums take another order
        softmax_scale=2.0**-8 if dtype == torch.float32 else None,
    )
    arguments = build(case)
    arguments["query"][0] *= 2.0**-12
    arguments["query"][1, :, 7] *= 64
    arguments["kv_scales"][1, ..., ::2] *= 1e-4
    assert_attention(case.op, arguments, *backend(case.op, arguments, stats=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scales_rank", [1, 4])
@pytest.mark.parametrize("sinks", [1, 2])
def test_a_key_that_takes_the_weight_leaves_the_others_their_bits(
    backend: Backend, sinks: int, scales_rank: int, dtype: torch.dtype
) -> None:
    """Attention sinks: first keys with nearly all the weight and values near zero."""
    case = AttentionCase(
        "sink", context_lens=(500,), head_dim=72, dtype=dtype, cache_dtype=torch.int8, scales_rank=scales_rank
    )
    arguments = build(case)
    first_block = arguments["block_tables"][0, 0]
    query = arguments["query"][0].float().unflatten(0, (case.num_kv_heads, case.group)).mean(1)
    arguments["kv_cache"][0, first_block, :, :sinks] = (80 * query).clamp(-127, 127).to(torch.int8)[:, None]
    arguments["kv_cache"][1, first_block, :, :sinks] = 0
    assert_attention(case.op, arguments, *backend(case.op, arguments, stats=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache_dtype", QUANTIZED_DTYPES, ids=str)
def test_zero_rows_have_a_scale_above_all_others(
    backend: Backend, cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    case = AttentionCase(
        "zero rows", context_lens=(300,), head_dim=72, dtype=dtype, cache_dtype=cache_dtype, scales_rank=4
    )
    arguments = build(case)
    arguments["kv_scales"][1] *= 1e-4
    arguments["kv_cache"][1, ..., 1::2, :] = 0
    arguments["kv_scales"][1, ..., 1::2] = 1.0
    assert_attention(case.op, arguments, *backend(case.op, arguments, stats=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cache_dtype", QUANTIZED_DTYPES, ids=str)
def test_a_query_that_is_not_finite_spoils_its_own_row(backend: Backend, cache_dtype: torch.dtype, bad: float) -> None:
    case = AttentionCase(
        "bad query", context_lens=(70, 600), dtype=torch.bfloat16, cache_dtype=cache_dtype, scales_rank=1
    )
    arguments = build(case)
    arguments["query"][1, 2, 3] = bad
    out = backend("paged_attention", arguments)
    spoilt = out.isnan().any(-1)
    assert spoilt[1, 2]
    assert spoilt.sum() == 1


def test_inputs_are_not_written(backend: Backend) -> None:
    case = AttentionCase("untouched", cache_dtype=torch.int8, scales_rank=4, sinks=True, alibi=True, mask="heads")
    arguments = build(case)
    backend(case.op, arguments)
    for name, before in build(case).items():
        if isinstance(before, torch.Tensor):
            assert_same(arguments[name], before, name)


def test_the_rule_sees_one_wrong_key() -> None:
    case = AttentionCase("control", context_lens=(17, 100))
    arguments = build(case)
    right = REFERENCE(case.op, arguments, stats=True)
    wrong = REFERENCE(case.op, dict(arguments, sliding_window=99), stats=True)
    assert_attention(case.op, arguments, *right)
    with pytest.raises(AssertionError, match="tolerance"):
        assert_attention(case.op, arguments, wrong[0])
    with pytest.raises(AssertionError, match="lse"):
        assert_attention(case.op, arguments, right[0], wrong[1])
