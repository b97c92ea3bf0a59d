"""The numbered lines of the contract, one test or more for each, with results small enough to work out by hand."""

import math
from typing import Any

import pytest
import torch

import torch_paged
from torch_paged.testing import AttentionCase, assert_same, assert_stats, build, take_sequences
from torch_paged.testing.backends import Backend
from torch_paged.testing.cases import cumulative

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LANES = 8


@pytest.fixture(params=["new", "cache", "both"])
def source(request: pytest.FixtureRequest) -> str:
    """Where the keys come from."""
    return request.param


def attend(
    implementation: Backend, logits: list[list[float]] | list[float], queries: int, source: str = "new", **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend with one head to keys whose logits are given; the output lanes are the weights of the keys.

    Args:
        implementation: What runs it.
        logits: One value per key: the logit before cap, bias and mask (with ``softmax_scale=1.0``).
        queries: Number of queries, the last of which sits at the last key.
        source: "new", "cache", or "both" (the first half of the keys is cached).
        options: Further arguments of ``flash_attn_varlen``.
    """
    keys = len(logits)
    query = torch.zeros(queries, 1, LANES)
    query[..., 0] = 1.0
    key = torch.zeros(keys, 1, LANES)
    key[:, 0, 0] = torch.tensor(logits)
    value = torch.eye(LANES)[:keys, None]
    cached = {"new": 0, "cache": keys, "both": keys // 2}[source]
    size = implementation.block_size(2)
    cache = torch.full((2, 8, 1, size, LANES), float("nan"))
    tables = torch.tensor([[5, 2, 7, 0]], dtype=torch.int32)
    for position in range(cached):
        block, offset = tables[0, position // size], position % size
        cache[0, block, 0, offset], cache[1, block, 0, offset] = key[position, 0], value[position, 0]
    arguments: dict[str, Any] = {
        "query": query,
        "key": None,
        "value": None,
        "cu_seqlens_q": cumulative((queries,)),
        "cu_seqlens_k": None,
        "kv_cache": None,
        "block_tables": None,
        "context_lens": None,
        "max_seqlen_q": queries,
        "max_seqlen_k": keys,
        "softmax_scale": 1.0,
    }
    if source != "cache":
        arguments.update(key=key[cached:], value=value[cached:], cu_seqlens_k=cumulative((keys - cached,)))
    if source != "new":
        arguments.update(kv_cache=cache, block_tables=tables, context_lens=torch.tensor([cached], dtype=torch.int32))
    out, lse, max_logits = implementation("flash_attn_varlen", arguments | options, stats=True)
    return out[:, 0, :keys], lse[:, 0], max_logits[:, 0]


def drawing(weights: torch.Tensor) -> list[str]:
    """Return which keys each row saw, as 0/1 rows."""
    return ["".join("1" if weight > 0 else "0" for weight in row) for row in weights.tolist()]


def assert_weights(actual: torch.Tensor, logits: list[float], sink: float | None = None) -> None:
    """Assert the softmax of visible logits (-inf where hidden), worked out with the math module."""
    total = sum(math.exp(x) for x in logits) + (0.0 if sink is None else math.exp(sink))
    assert_stats(actual, torch.tensor([math.exp(x) / total for x in logits]).double(), name="weights")


def seen(implementation: Backend, queries: int, keys: int, source: str, **options: Any) -> list[str]:
    return drawing(attend(implementation, [0.0] * keys, queries, source, **options)[0])


def test_1_scale_is_one_over_the_root_of_the_logical_head_dim(implementation: Backend, source: str) -> None:
    weights, _, _ = attend(implementation, [0.0, 2.0], 1, source, softmax_scale=None)
    assert_weights(weights[0], [0.0, 2.0 / math.sqrt(LANES)])
    case = AttentionCase("logical", head_dim=40, stored_dim=128)
    arguments = build(case)
    assert_same(
        implementation(case.op, arguments), implementation(case.op, dict(arguments, softmax_scale=1 / math.sqrt(40)))
    )


def test_2_order_is_scale_cap_alibi_mask_softmax(implementation: Backend, source: str) -> None:
    weights, _, max_logits = attend(
        implementation,
        [8.0, -3.0, 5.0, 9.0],
        1,
        source,
        softmax_scale=0.5,
        logits_soft_cap=2.0,
        alibi_slopes=torch.tensor([0.75]),
        attn_mask=torch.tensor([[True, True, True, False]]),
        sinks=torch.tensor([0.25]),
    )
    logits = [2 * math.tanh(x / 4) - 0.75 * distance for x, distance in ((8, 3), (-3, 2), (5, 1))]
    assert_weights(weights[0], [*logits, float("-inf")], sink=0.25)
    assert_stats(max_logits, torch.tensor([max(logits)]).double())


def test_3_queries_sit_at_the_end_of_the_keys(implementation: Backend, source: str) -> None:
    assert seen(implementation, 3, 5, source, causal=True) == ["11100", "11110", "11111"]
    assert seen(implementation, 3, 5, source) == ["11111", "11111", "11111"]


def test_3_rows_at_negative_positions_see_nothing(implementation: Backend, source: str) -> None:
    assert seen(implementation, 4, 2, source, causal=True) == ["00", "00", "10", "11"]


def test_3_query_positions_replace_the_default(implementation: Backend, source: str) -> None:
    positions = torch.tensor([7, -1, 0, 2], dtype=torch.int32)
    rows = seen(implementation, 4, 4, source, causal=True, query_positions=positions)
    assert rows == ["1111", "0000", "1000", "1110"]


def test_3_alibi_uses_the_distance_from_the_position(implementation: Backend, source: str) -> None:
    weights, _, _ = attend(
        implementation,
        [0.0, 0.0, 0.0],
        1,
        source,
        alibi_slopes=torch.tensor([0.5]),
        query_positions=torch.tensor([1], dtype=torch.int32),
    )
    assert_weights(weights[0], [-0.5, 0.0, -0.5])


def test_4_window_counts_the_token_itself(implementation: Backend, source: str) -> None:
    assert seen(implementation, 4, 4, source, causal=True, sliding_window=2) == ["1000", "1100", "0110", "0011"]
    assert seen(implementation, 4, 4, source, causal=True, sliding_window=1) == ["1000", "0100", "0010", "0001"]


def test_4_window_without_causal_looks_both_ways(implementation: Backend, source: str) -> None:
    assert seen(implementation, 4, 4, source, sliding_window=2) == ["1100", "1110", "0111", "0011"]


@pytest.mark.parametrize("option", ["sliding_window", "attention_chunk"])
@pytest.mark.parametrize("queries", [None, (5, 0, 17, 3)])
@pytest.mark.parametrize("power", [31, 32, 33, 62])
def test_4_window_and_chunk_beyond_the_keys_hide_nothing(
    implementation: Backend, option: str, queries: tuple[int, ...] | None, power: int
) -> None:
    case = AttentionCase("wide", query_lens=queries)
    arguments = build(case)
    expected = implementation(case.op, arguments, stats=True)
    for size in (2**power, 2**power + 1):
        for actual, wanted in zip(
            implementation(case.op, arguments | {option: size}, stats=True), expected, strict=True
        ):
            assert_same(actual, wanted)


@pytest.mark.parametrize("option", ["sliding_window", "attention_chunk"])
@pytest.mark.parametrize("value", [0, -1])
def test_4_window_and_chunk_are_none_or_positive(backend: Backend, option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"flash_attn_varlen: {option} must .* got {value}"):
        seen(backend, 2, 2, "new", **{option: value})


@pytest.mark.parametrize("causal", [False, True])
def test_5_chunk_is_causal_inside_a_chunk(implementation: Backend, source: str, causal: bool) -> None:
    rows = seen(implementation, 5, 5, source, attention_chunk=2, causal=causal)
    assert rows == ["10000", "11000", "00100", "00110", "00001"]


def test_5_chunk_of_a_negative_position_is_floored(implementation: Backend, source: str) -> None:
    positions = torch.tensor([-1, -2, 1], dtype=torch.int32)
    assert seen(implementation, 3, 4, source, attention_chunk=2, query_positions=positions) == ["0000", "0000", "1100"]


def test_6_mask_columns_are_key_positions(implementation: Backend, source: str) -> None:
    mask = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 0, 1]]).bool()
    assert seen(implementation, 2, 4, source, attn_mask=mask) == ["1011", "0110"]
    assert seen(implementation, 2, 4, source, attn_mask=mask, causal=True) == ["1010", "0110"]


@pytest.mark.parametrize("heads", ["shared", "kv_heads", "heads"])
def test_6_mask_has_three_ranks(implementation: Backend, heads: str) -> None:
    """One masked-out key in one row of the mask changes just the query heads that the row belongs to."""
    case = AttentionCase("ranks", context_lens=(9, 20), mask=heads)
    arguments = build(case)
    arguments["attn_mask"] = torch.ones_like(arguments["attn_mask"])
    before = implementation(case.op, arguments)
    arguments["attn_mask"].view(-1, *arguments["attn_mask"].shape[-2:])[-1, 1, 5] = False
    after = implementation(case.op, arguments)
    changed = (before != after).any(-1)
    assert changed[0].tolist() == [False] * 8
    assert (
        changed[1].tolist()
        == [False] * {"shared": 0, "kv_heads": 4, "heads": 7}[heads]
        + [True]
        * {
            "shared": 8,
            "kv_heads": 4,
            "heads": 1,
        }[heads]
    )


def test_7_a_sink_takes_weight_and_gives_no_value(implementation: Backend, source: str) -> None:
    weights, lse, max_logits = attend(implementation, [1.0, 2.0], 1, source, sinks=torch.tensor([1.5]))
    assert_weights(weights[0], [1.0, 2.0], sink=1.5)
    assert_stats(lse, torch.tensor([math.log(math.exp(1.0) + math.exp(2.0) + math.exp(1.5))]).double())
    assert max_logits.tolist() == [2.0]


def test_7_merge_counts_the_sink_once(implementation: Backend) -> None:
    outs, lses = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1), torch.tensor([0.5, 1.0]).reshape(2, 1, 1)
    out, lse = implementation("merge_attention_states", {"outs": outs, "lses": lses, "sinks": torch.tensor([2.0])})
    total = math.exp(0.5) + math.exp(1.0) + math.exp(2.0)
    assert_stats(out, torch.tensor([[[(math.exp(0.5) + 3 * math.exp(1.0)) / total]]]).double())
    assert_stats(lse, torch.tensor([[math.log(total)]]).double())


def test_8_a_row_without_keys_is_zero(implementation: Backend, source: str) -> None:
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    weights, lse, max_logits = attend(implementation, [1.0] * 4, 2, source, attn_mask=nothing)
    assert (weights == 0).all()
    assert lse.tolist() == max_logits.tolist() == [float("-inf")] * 2
    weights, lse, max_logits = attend(
        implementation, [1.0] * 4, 2, source, attn_mask=nothing, sinks=torch.tensor([0.75])
    )
    assert (weights == 0).all()
    assert lse.tolist() == [0.75] * 2
    assert max_logits.tolist() == [float("-inf")] * 2


def test_8_padding_rows_are_zero_and_ignore_the_sink(implementation: Backend) -> None:
    case = AttentionCase("padding", query_lens=(2, 0, 3, 1), sinks=True, padding_rows=3)
    out, lse, max_logits = implementation(case.op, build(case), stats=True)
    assert (out[6:] == 0).all()
    assert (lse[6:] == float("-inf")).all()
    assert (max_logits[6:] == float("-inf")).all()


def test_9_lse_is_natural_and_max_logits_come_after_cap_and_alibi(implementation: Backend, source: str) -> None:
    _, lse, max_logits = attend(
        implementation,
        [6.0, 1.0],
        1,
        source,
        logits_soft_cap=3.0,
        alibi_slopes=torch.tensor([0.5]),
        sinks=torch.tensor([50.0]),
    )
    assert_stats(max_logits, torch.tensor([3 * math.tanh(2.0) - 0.5]).double())
    assert_stats(lse, torch.tensor([50.0]).double())
    assert lse.dtype == max_logits.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_10_out_has_the_query_dtype_and_statistics_do_not(implementation: Backend, dtype: torch.dtype) -> None:
    case = AttentionCase("dtypes", dtype=dtype)
    out, lse, max_logits = implementation(case.op, build(case), stats=True)
    assert (out.dtype, lse.dtype, max_logits.dtype) == (dtype, torch.float32, torch.float32)
    keys = torch.zeros(2, 1, 1, 3, 8, dtype=dtype)
    _, lse, _ = implementation(
        "paged_attention",
        {
            "query": torch.zeros(1, 1, 8, dtype=dtype),
            "kv_cache": keys,
            "block_tables": torch.zeros(1, 1, dtype=torch.int32),
            "context_lens": torch.tensor([3], dtype=torch.int32),
        },
        stats=True,
    )
    assert_stats(lse, torch.tensor([[math.log(3.0)]]).double())


def test_10_float32_is_not_rounded(implementation: Backend, source: str) -> None:
    weights, _, _ = attend(implementation, [1.0 + 2.0**-12, 1.0], 1, source, softmax_scale=2.0**12)
    assert_weights(weights[0], [1.0, 0.0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 0.0])
@pytest.mark.parametrize("queries", [None, (5, 0, 17, 3)])
def test_11_dead_slots_never_arrive(implementation: Backend, poison: float, queries: tuple[int, ...] | None) -> None:
    case = AttentionCase("dead", query_lens=queries, stored_dim=80, block_size=3, sliding_window=9, padding_rows=2)
    case = implementation.served(case)
    arguments = build(case)
    expected = implementation(case.op, arguments, stats=True)
    for name in ("query", "kv_cache"):
        arguments[name] = torch.where(arguments[name].isnan(), poison, arguments[name])
    for actual, wanted in zip(implementation(case.op, arguments, stats=True), expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("queries", [None, (5, 0, 17, 3)])
def test_13_a_sequence_gives_the_same_bits_alone(implementation: Backend, queries: tuple[int, ...] | None) -> None:
    case = AttentionCase("alone", query_lens=queries)
    arguments = build(case)
    out = implementation(case.op, arguments)
    for seq in range(4):
        taken, rows = take_sequences(arguments, [seq])
        assert_same(implementation(case.op, taken), out[rows])


def test_14_backward_raises(backend: Backend) -> None:
    arguments = build(AttentionCase("backward"))
    arguments["query"].requires_grad_()
    names = ("query", "kv_cache", "block_tables", "context_lens")
    with pytest.raises(NotImplementedError, match="paged_attention"):
        torch_paged.paged_attention(*(arguments[name] for name in names)).sum().backward()


def test_query_heads_read_their_group(implementation: Backend) -> None:
    """Query head h reads kv head h // G."""
    cache = torch.zeros(2, 1, 2, 1, 8)
    cache[1, 0, 0], cache[1, 0, 1] = 1.0, 2.0
    out = implementation(
        "paged_attention",
        {
            "query": torch.zeros(1, 6, 8),
            "kv_cache": cache,
            "block_tables": torch.zeros(1, 1, dtype=torch.int32),
            "context_lens": torch.ones(1, dtype=torch.int32),
        },
    )
    assert out[0, :, 0].tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
