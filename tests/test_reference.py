"""The oracle itself: against scaled_dot_product_attention, and against a scalar loop that shares no line with it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from torch_paged.contract import reference
from torch_paged.testing import (
    AttentionCase,
    GatherCase,
    WriteCase,
    assert_double_close,
    assert_same,
    build,
    option_pairs,
    oracle,
    random_case,
)
from torch_paged.testing.cases import cumulative


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (3, 17), (17, 63)])
def test_causal_attention_is_sdpa(group: int, queries: int, keys: int) -> None:
    query, key, value = _rows(queries, keys, 2 * group, 2)
    out = _varlen(query, key, value, causal=True)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    assert_double_close(out, _sdpa(query, key, value, mask))


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_masks_alibi_and_scale_are_sdpa_with_a_bias(heads: int) -> None:
    query, key, value = _rows(9, 20, 8, 2)
    mask = torch.rand(heads, 9, 20) < 0.6
    mask[..., 3] = True  # SDPA gives NaN where nothing is visible
    slopes = torch.rand(8)
    distances = (torch.arange(11, 20)[:, None] - torch.arange(20)).abs()
    bias = (-slopes.double()[:, None, None] * distances).masked_fill(
        ~mask.repeat_interleave(8 // heads, 0), float("-inf")
    )
    attn_mask = mask[0] if heads == 1 else mask
    out = _varlen(query, key, value, attn_mask=attn_mask, alibi_slopes=slopes, softmax_scale=0.2)
    assert_double_close(out, _sdpa(query, key, value, bias, scale=0.2))


def test_a_sink_is_a_key_without_a_value() -> None:
    query, key, value = _rows(5, 12, 2, 2)
    sinks = torch.tensor([0.5, -1.0])
    out = _varlen(query, key, value, sinks=sinks)
    with_sink = torch.cat([torch.zeros(1, 2, 16).double(), value])
    bias = torch.zeros(2, 5, 13).double()
    bias[:, :, 0] = sinks.double()[:, None]
    keys = torch.cat([torch.zeros(1, 2, 16).double(), key])
    assert_double_close(out, _sdpa(query, keys, with_sink, bias))


def _small(case: AttentionCase) -> AttentionCase:
    """Return the case with lengths, and dimensions, that a scalar loop can afford."""
    queries = None if case.op == "paged_attention" else (2, 0, 5, 1)
    contexts = None if case.context_lens is None else (5, 3, 9, 0)
    head_dim = min(case.head_dim, 5)
    value_dim = None if case.value_dim is None else max(1, head_dim - 1)
    return replace(
        case,
        context_lens=contexts,
        query_lens=queries,
        new_lens=None if case.new_lens is None else (3, 0, 5, 2),
        head_dim=head_dim,
        stored_dim=None if case.stored_dim is None else 7,
        value_dim=value_dim,
        num_kv_heads=min(case.num_kv_heads, 2),
        group=min(case.group, 2),
        block_size=min(case.block_size, 3),
    )


@pytest.mark.parametrize(
    "case",
    [_small(case) for case in option_pairs()] + [_small(random_case(seed)) for seed in range(60)],
    ids=lambda case: case.name,
)
def test_attention_is_the_scalar_loop(case: AttentionCase) -> None:
    arguments = build(case)
    out, lse, max_logits = oracle(case.op, arguments)
    expected = _scalar_loop(case, arguments)
    for actual, wanted in zip((out, lse, max_logits), expected, strict=True):
        assert_double_close(actual, wanted)


def test_a_hidden_key_may_be_nan() -> None:
    query, key, value = _rows(4, 4, 2, 2)
    clean = _varlen(query, key, value, causal=True)
    key[3], value[3] = float("nan"), float("inf")
    out = _varlen(query, key, value, causal=True)
    assert torch.equal(out[:3], clean[:3])
    assert out[3].isnan().all()


@pytest.mark.parametrize("rank", [None, 1, 2, 4])
def test_writes_are_the_scalar_loop(rank: int | None) -> None:
    case = WriteCase(
        "scalar",
        num_tokens=7,
        skipped_tokens=2,
        head_dim=5,
        value_dim=3,
        stored_dim=6,
        block_size=3,
        cache_dtype=None if rank is None else torch.int8,
        scales_rank=rank,
    )
    arguments, before = build(case), build(case)
    getattr(reference, case.op)(**arguments)
    cache, scales = before["kv_cache"], before["kv_scales"]
    for side, rows in enumerate((before["key"], before["value"])):
        for token, slot in enumerate(before["slot_mapping"].tolist()):
            if slot < 0:
                continue
            for head in range(2):
                row = [rows[token, head, lane].item() for lane in range(rows.size(2))]
                if rank is not None:
                    if rank == 4:
                        scale = torch.tensor(max(abs(x) for x in row)) / 127
                        scales[side, slot // 3, head, slot % 3] = scale
                    else:
                        scale = scales[side] if rank == 1 else scales[side, head]
                    row = [max(-127, min(127, round((torch.tensor(x) / scale).item()))) for x in row]
                cache[side, slot // 3, head, slot % 3] = torch.tensor(row + [0] * (6 - len(row)))
    assert_same(arguments["kv_cache"], cache)
    if scales is not None:
        assert_same(arguments["kv_scales"], scales)


@pytest.mark.parametrize("left_padded", [False, True])
def test_gather_is_the_scalar_loop(left_padded: bool) -> None:
    case = GatherCase("scalar", (5, 0, 9), left_padded, missing_entries=True, block_size=2, stored_dim=3)
    arguments = build(case)
    key, value = reference.gather_cache(**arguments)
    expected = torch.zeros(2, 3, 2, 12, 3)
    for seq, length in enumerate(case.context_lens):
        for position in range(length):
            block = int(arguments["block_tables"][seq, position // 2])
            column = position + (12 - length if left_padded else 0)
            if block >= 0:
                expected[:, seq, :, column] = arguments["kv_cache"][:, block, :, position % 2]
    assert torch.equal(torch.stack([key, value]), expected)


def test_copies_read_all_sources_first() -> None:
    cache = torch.arange(4.0).reshape(1, 4, 1, 1, 1).repeat(2, 1, 1, 1, 1)
    reference.copy_blocks(cache, torch.tensor([0, 1, -1, 2]), torch.tensor([1, 0, 3, -1]))
    assert cache[0].flatten().tolist() == [1.0, 0.0, 2.0, 3.0]


def test_merging_parts_is_attention_over_all_keys() -> None:
    query, key, value = _rows(5, 12, 2, 2)
    sinks = torch.tensor([0.5, -1.0])
    whole = _stats(query, key, value, sinks=sinks)
    parts = [_stats(query, key[part], value[part]) for part in (slice(0, 4), slice(4, 5), slice(5, 12))]
    out, lse = reference.merge_attention_states(
        torch.stack([part[0] for part in parts]),
        torch.stack([part[1] for part in parts]),
        sinks,
        compute_dtype=torch.float64,
    )
    assert_double_close(out, whole[0])
    assert_double_close(lse, whole[1])


def _rows(queries: int, keys: int, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = ((queries, heads, 16), (keys, kv_heads, 16), (keys, kv_heads, 16))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query, key, value


def _stats(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    lengths = query.size(0), key.size(0)
    cu_seqlens_q, cu_seqlens_k = cumulative(lengths[:1]), cumulative(lengths[1:])
    options["compute_dtype"] = torch.float64
    return reference.flash_attn_varlen_with_stats(
        query, key, value, cu_seqlens_q, cu_seqlens_k, None, None, None, *lengths, **options
    )


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    return _stats(query, key, value, **options)[0]


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options: Any
) -> torch.Tensor:
    query, key, value = (rows.transpose(0, 1)[None] for rows in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, **options)[0].transpose(
        0, 1
    )


def _scalar_loop(case: AttentionCase, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Compute an attention call one logit at a time, straight from the numbered lines of the contract."""
    query = arguments["query"].double()
    rows, heads, head_dim = query.shape
    width = case.value_dim or head_dim
    out = torch.zeros(rows, heads, width, dtype=torch.float64)
    lse = torch.full((rows, heads), float("-inf"), dtype=torch.float64)
    max_logits = lse.clone()
    query_lens = case.query_lens or (1,) * case.num_seqs
    row = new = 0
    for seq, (q_len, kv_len) in enumerate(zip(query_lens, case.kv_lens, strict=True)):
        context = case.context_lens[seq] if case.context_lens else 0
        for i in range(q_len):
            p = kv_len - q_len + i
            if arguments.get("query_positions") is not None:
                p = int(arguments["query_positions"][row])
            for head in range(heads):
                logits, values = [], []
                for j in range(kv_len):
                    if not _sees(case, arguments, p, j, row, head):
                        continue
                    key, value = _token(case, arguments, seq, j, context, new, head // case.group)
                    scale = head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
                    logit = scale * sum((query[row, head] * key[:head_dim]).tolist())
                    if case.logits_soft_cap:
                        logit = case.logits_soft_cap * math.tanh(logit / case.logits_soft_cap)
                    if case.alibi:
                        logit -= arguments["alibi_slopes"][head].item() * abs(p - j)
                    logits.append(logit)
                    values.append(value[:width])
                total = sum(math.exp(logit) for logit in logits)
                if case.sinks:
                    total += math.exp(arguments["sinks"][head].item())
                for logit, value in zip(logits, values, strict=True):
                    out[row, head] += math.exp(logit) / total * value
                lse[row, head] = math.log(total) if total else float("-inf")
                max_logits[row, head] = max(logits, default=float("-inf"))
            row += 1
        new += kv_len - context
    return out, lse, max_logits


def _sees(case: AttentionCase, arguments: dict[str, Any], p: int, j: int, row: int, head: int) -> bool:
    causal = case.causal or case.op == "paged_attention"
    if causal and j > p:
        return False
    if case.sliding_window is not None and abs(p - j) >= case.sliding_window:
        return False
    if case.attention_chunk is not None and (
        j > p or math.floor(p / case.attention_chunk) != j // case.attention_chunk
    ):
        return False
    mask = arguments["attn_mask"]
    if mask is None:
        return True
    if mask.dim() == 2:
        return bool(mask[row, j])
    return bool(mask[head if case.mask == "heads" else head // case.group, row, j])


def _token(
    case: AttentionCase, arguments: dict[str, Any], seq: int, j: int, context: int, new: int, kv_head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if j >= context:
        key = arguments["key"][new + j - context, kv_head].double()
        return key, key if case.latent else arguments["value"][new + j - context, kv_head].double()
    block, offset = int(arguments["block_tables"][seq, j // case.block_size]), j % case.block_size
    sides = []
    for side in (0, 0 if case.latent else 1):
        token = arguments["kv_cache"][side, block, kv_head, offset].double()
        scales = arguments["kv_scales"]
        if scales is not None:
            index = {1: (side,), 2: (side, kv_head), 4: (side, block, kv_head, offset)}[scales.dim()]
            token = token * scales[index].double()
        sides.append(token)
    return sides[0], sides[1]
