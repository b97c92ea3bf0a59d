"""What holds for attention whatever the options are: drawn full combinations, changed in a way that must not matter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torch_paged.testing import (
    AttentionCase,
    assert_attention,
    assert_close,
    assert_same,
    assert_stats,
    build,
    oracle,
    permute_blocks,
    random_case,
    take_sequences,
)
from torch_paged.testing.backends import REFERENCE, Backend, backends_here

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.parametrize("backend", backends_here(), ids=lambda backend: backend.name),
]

few = settings(max_examples=25, deadline=None, derandomize=True)
cases = st.integers(1000, 10**6).map(random_case)
NAMES = ("out", "lse", "max_logits")


def _assert_same_results(actual: Any, expected: Any) -> None:
    for name, new, old in zip(NAMES, actual, expected, strict=True):
        assert_same(new, old, name)


@few
@given(case=cases, seed=st.integers(0, 1000))
def test_moving_blocks_with_their_table_changes_no_bit(backend: Backend, case: AttentionCase, seed: int) -> None:
    assume(case.context_lens is not None)
    case = backend.served(case)
    arguments = build(case)
    blocks = arguments["kv_cache"].size(1)
    moved = permute_blocks(arguments, torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)))
    _assert_same_results(backend(case.op, moved, stats=True), backend(case.op, arguments, stats=True))


@few
@given(case=cases, data=st.data())
def test_the_order_of_the_batch_changes_no_bit(backend: Backend, case: AttentionCase, data: st.DataObject) -> None:
    case = backend.served(case)
    arguments = build(case)
    order = data.draw(st.permutations(range(case.num_seqs)))
    results = backend(case.op, arguments, stats=True)
    taken, rows = take_sequences(arguments, order[: data.draw(st.integers(1, case.num_seqs))])
    _assert_same_results(backend(case.op, taken, stats=True), [result[rows] for result in results])


@few
@given(case=cases, columns=st.integers(1, 5), rows=st.integers(1, 5))
def test_padding_changes_no_bit(backend: Backend, case: AttentionCase, columns: int, rows: int) -> None:
    """Wider tables, and more rows behind the last sequence, full of NaN."""
    case = backend.served(case)
    arguments = build(case)
    results = backend(case.op, arguments, stats=True)
    padded = dict(arguments)
    if case.context_lens is not None:
        padded["block_tables"] = torch.nn.functional.pad(arguments["block_tables"], (0, columns), value=-1)
    if case.op == "flash_attn_varlen":
        query = arguments["query"]
        padded["query"] = torch.cat([query, torch.full((rows, *query.shape[1:]), float("nan"), dtype=query.dtype)])
        if case.positions is not None:
            padded["query_positions"] = torch.nn.functional.pad(arguments["query_positions"], (0, rows), value=-5)
        if case.mask is not None:
            padded["attn_mask"] = torch.nn.functional.pad(arguments["attn_mask"], (0, 0, 0, rows), value=True)
    kept = arguments["query"].size(0)
    new = backend(case.op, padded, stats=True)
    _assert_same_results([result[:kept] for result in new], results)
    assert (new[0][kept:] == 0).all()
    assert (new[1][kept:] == float("-inf")).all()


@few
@given(case=cases, poison=st.sampled_from([0.0, float("inf")]))
def test_what_dead_slots_hold_changes_no_bit(backend: Backend, case: AttentionCase, poison: float) -> None:
    assume(case.cache_dtype is None)
    case = backend.served(case)
    arguments = build(case)
    other = {
        name: torch.where(value.isnan(), poison, value)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    _assert_same_results(backend(case.op, other, stats=True), backend(case.op, arguments, stats=True))


@few
@given(case=cases, slack=st.integers(0, 1000))
def test_a_window_that_covers_everything_is_no_window(backend: Backend, case: AttentionCase, slack: int) -> None:
    case = backend.served(case)
    arguments = build(replace(case, sliding_window=None))
    wide = dict(arguments, sliding_window=max(case.kv_lens, default=0) + 50 + slack)
    assert_attention(case.op, arguments, *backend(case.op, wide, stats=True))


@few
@given(case=cases)
def test_a_mask_of_ones_is_no_mask(backend: Backend, case: AttentionCase) -> None:
    case = backend.served(case)
    arguments = build(replace(case, mask=None))
    columns = max(case.kv_lens, default=0)
    ones = torch.ones((case.num_heads, arguments["query"].size(0), columns), dtype=torch.bool)
    assert_attention(case.op, arguments, *backend(case.op, dict(arguments, attn_mask=ones), stats=True))


@few
@given(case=cases, data=st.data())
def test_parts_merge_to_the_whole(backend: Backend, case: AttentionCase, data: st.DataObject) -> None:
    """Split the keys with masks, attend to each part, merge by lse: the sink is counted once, here in the merge."""
    case = replace(case, dtype=torch.float32, mask=None, sinks=True)
    case = backend.served(case)
    arguments = build(case)
    columns = max(case.kv_lens, default=0)
    split = data.draw(st.integers(0, columns))
    low = (torch.arange(columns) < split).expand(arguments["query"].size(0), columns)

    def merged(implementation: Backend) -> Any:
        parts = [
            implementation(case.op, dict(arguments, sinks=None, attn_mask=mask.contiguous()), stats=True)
            for mask in (low, ~low)
        ]
        outs, lses, _ = (torch.stack(states) for states in zip(*parts, strict=True))
        return implementation("merge_attention_states", {"outs": outs, "lses": lses, "sinks": arguments["sinks"]})

    live = sum(case.query_lens) if case.query_lens is not None else case.num_seqs
    out, lse = merged(backend)
    expected, expected_lse, _ = oracle(case.op, arguments)
    assert_close(out[:live], expected[:live], merged(REFERENCE)[0][:live])
    assert_stats(lse[:live], expected_lse[:live])
