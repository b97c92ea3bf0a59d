"""Lines 1, 2, 6 and 7: scale, the order of what becomes of a logit, masks and sinks."""

import math

import torch

from torch_paged.testing.backends import Backend
from torch_paged.testing.cases import AttentionCase, build
from torch_paged.testing.compare import assert_same, assert_stats
from torch_paged.testing.semantics.attend import LANES, assert_seen, assert_weights, attend, seen, typed
from torch_paged.testing.semantics.registry import FLOATS, PACKED, SIZES, SOURCES, check


@check(1, SOURCES)
def scale_is_one_over_the_root_of_the_logical_head_dim(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """Stored lanes behind head_dim do not count."""
    weights, _, _ = attend(backend, dtype, [0.0, 2.0], 1, source, softmax_scale=None)
    assert_weights(weights[0], [0.0, 2.0 / math.sqrt(LANES)])


@check(1)
def a_scale_of_none_is_the_default_scale(backend: Backend, dtype: torch.dtype) -> None:
    """Bit for bit, with lanes behind head_dim."""
    case = backend.served(typed(AttentionCase("logical", head_dim=40, stored_dim=128), dtype))
    arguments = build(case)
    given = backend(case.op, arguments | {"softmax_scale": 1 / math.sqrt(40)})
    assert_same(backend(case.op, arguments), given)


@check(2, SOURCES)
def order_is_scale_cap_alibi_mask_softmax(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """All of them in one call."""
    weights, _, max_logits = attend(
        backend,
        dtype,
        [8.0, -3.0, 5.0, 10.0],
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
    assert_stats(max_logits, torch.tensor([max(logits)]).double(), name="max_logits")


@check(6, PACKED)
def mask_columns_are_key_positions(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """A mask is ANDed with causality; columns behind the keys do not matter."""
    mask = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 0, 1]]).bool()
    assert_seen(seen(backend, dtype, 2, 4, source, attn_mask=mask), ["1011", "0110"])
    assert_seen(seen(backend, dtype, 2, 4, source, attn_mask=mask, causal=True), ["1010", "0110"])


@check(6)
def mask_columns_are_key_positions_in_decode(backend: Backend, dtype: torch.dtype) -> None:
    """A row of the mask for each sequence."""
    mask = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 0, 1]]).bool()
    assert_seen(seen(backend, dtype, 2, 4, "decode", attn_mask=mask), ["1010", "0110"])


@check(6, PACKED, SIZES, heads=(2, 4))
def a_mask_may_differ_between_heads(backend: Backend, dtype: torch.dtype, source: str, heads: int) -> None:
    """A mask for each kv head, and for each head."""
    mask = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 0, 1]]).bool()
    assert_seen(seen(backend, dtype, 2, 4, source, attn_mask=mask, mask_heads=heads), ["1011", "0110"])


@check(6, heads=("shared", "kv_heads", "heads"))
def mask_has_three_ranks(backend: Backend, dtype: torch.dtype, heads: str) -> None:
    """One masked-out key in one row of the mask changes just the query heads that the row belongs to."""
    case = backend.served(typed(AttentionCase("ranks", context_lens=(9, 20), mask=heads), dtype))
    arguments = build(case)
    arguments["attn_mask"] = torch.ones_like(arguments["attn_mask"])
    before = backend(case.op, arguments)
    arguments["attn_mask"].view(-1, *arguments["attn_mask"].shape[-2:])[-1, 1, 5] = False
    changed = (before != backend(case.op, arguments)).any(-1).tolist()
    kept = {"shared": 0, "kv_heads": 4, "heads": 7}[heads]
    assert changed == [[False] * 8, [False] * kept + [True] * (8 - kept)], f"the changed heads are {changed}"


@check(7, SOURCES)
def a_sink_takes_weight_and_gives_no_value(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """It counts in lse, and not in max_logits."""
    weights, lse, max_logits = attend(backend, dtype, [1.0, 2.0], 1, source, sinks=torch.tensor([1.5]))
    assert_weights(weights[0], [1.0, 2.0], sink=1.5)
    assert_stats(lse, torch.tensor([math.log(math.exp(1.0) + math.exp(2.0) + math.exp(1.5))]).double())
    assert max_logits.tolist() == [2.0], f"max_logits is {max_logits.tolist()}"


@check(7, dtypes=FLOATS)
def merging_counts_a_sink_once(backend: Backend, dtype: torch.dtype) -> None:
    """Parts without a sink, merged with one."""
    outs = torch.tensor([1.0, 3.0], dtype=dtype).reshape(2, 1, 1, 1)
    lses = torch.tensor([0.5, 1.0]).reshape(2, 1, 1)
    out, lse = backend("merge_attention_states", {"outs": outs, "lses": lses, "sinks": torch.tensor([2.0])})
    total = math.exp(0.5) + math.exp(1.0) + math.exp(2.0)
    expected = torch.tensor([[[(math.exp(0.5) + 3 * math.exp(1.0)) / total]]]).double()
    assert_stats(out, expected, 1.0 if dtype != torch.float32 else 0.0, dtype, "out")
    assert_stats(lse, torch.tensor([[math.log(total)]]).double())
