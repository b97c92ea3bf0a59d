"""Decode, against the reference."""

from typing import Any

import pytest
import torch

from conftest import Backend
from torch_paged.testing import AttentionCase, assert_attention, assert_same, build, take_sequences
from torch_paged.testing.named import ATTENTION_CASES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = [case for case in ATTENTION_CASES if case.op == "paged_attention"]
INVARIANT = [
    AttentionCase("invariant_decode", context_lens=(1030, 0, 5, 2100, 63, 257), sinks=True, num_kv_heads=2),
    AttentionCase("invariant_decode_bfloat16", context_lens=(1030, 0, 5, 2100, 63, 257), dtype=torch.bfloat16),
    AttentionCase("invariant_decode_window", context_lens=(1030, 0, 5, 2100, 63, 257), sliding_window=600, block_size=3),
    AttentionCase(
        "invariant_decode_int8", context_lens=(1030, 0, 5, 2100, 63, 257), cache_dtype=torch.int8, scales_rank=4, alibi=True
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(backend: Backend, case: AttentionCase) -> None:
    arguments = build(case)
    out, lse, max_logits = backend(case.op, arguments, stats=True)
    assert_attention(case.op, arguments, out, lse, max_logits)
    assert_same(backend(case.op, arguments), out, "out without statistics")


@pytest.mark.parametrize("case", INVARIANT, ids=lambda case: case.name)
def test_same_bits_alone_reordered_and_on_two_threads(backend: Backend, case: AttentionCase) -> None:
    arguments = build(case)
    results = backend(case.op, arguments, stats=True)
    assert_attention(case.op, arguments, *results)
    everything = list(range(case.num_seqs))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for order in (everything, everything[::-1], everything[2:4], *([seq] for seq in everything)):
            taken, rows = take_sequences(arguments, order)
            for name, actual, expected in zip(
                ("out", "lse", "max_logits"), backend(case.op, taken, stats=True), results, strict=True
            ):
                assert_same(actual, expected[rows], f"{name} of {order} on {threads} threads")


def test_inputs_are_not_written(backend: Backend) -> None:
    case = AttentionCase("untouched", cache_dtype=torch.int8, scales_rank=4, sinks=True, alibi=True, mask="heads")
    arguments, before = build(case), build(case)
    backend(case.op, arguments)
    _assert_untouched(arguments, before)


def test_the_rule_sees_a_fault() -> None:
    """The positive control: a result with one wrong key is outside the rule."""
    case = AttentionCase("control", context_lens=(17, 100))
    arguments = build(case)
    wrong = dict(arguments, sliding_window=99)
    out, lse, max_logits = _reference(case.op, wrong)
    with pytest.raises(AssertionError, match="tolerance"):
        assert_attention(case.op, arguments, out)
    right = _reference(case.op, arguments)
    with pytest.raises(AssertionError, match="lse"):
        assert_attention(case.op, arguments, right[0], lse)


def _reference(op: str, arguments: dict[str, Any]) -> Any:
    from conftest import REFERENCE

    return REFERENCE(op, arguments, stats=True)


def _assert_untouched(arguments: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            assert_same(value, before[name], name)
