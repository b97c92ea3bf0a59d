"""Merging attention over parts of the keys, against the reference."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_paged.contract import reference
from torch_paged.testing import MergeCase, assert_close, assert_merged, assert_same, assert_stats, build
from torch_paged.testing.backends import REFERENCE, Backend, backends_here
from torch_paged.testing.named import MERGE_CASES

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", MERGE_CASES, ids=lambda case: case.name)
def test_case(backend: Backend, case: MergeCase) -> None:
    backend.check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_part_is_returned_as_it_is(backend: Backend, dtype: torch.dtype) -> None:
    arguments = build(MergeCase("one", parts=1, dtype=dtype))
    out, lse = backend("merge_attention_states", arguments)
    assert_same(out, arguments["outs"][0])
    assert_same(lse, arguments["lses"][0])


def test_parts_that_saw_nothing_weigh_nothing(backend: Backend) -> None:
    arguments = build(MergeCase("nothing", parts=2, sinks=True))
    arguments["lses"][1] = float("-inf")
    arguments["outs"][1] = float("nan")
    out, lse = backend("merge_attention_states", arguments)
    assert_merged(arguments, out, lse)
    assert out.isfinite().all()
    arguments.update(sinks=None, lses=torch.full_like(arguments["lses"], float("-inf")))
    out, lse = backend("merge_attention_states", arguments)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


def test_a_part_that_is_no_number_shows(backend: Backend) -> None:
    arguments = build(MergeCase("nan", parts=3))
    arguments["lses"][1, 2] = float("nan")
    out, lse = backend("merge_attention_states", arguments)
    assert out[2].isnan().all()
    assert lse[2].isnan().all()
    others = torch.arange(out.size(0)) != 2
    assert out[others].isfinite().all()


def test_a_part_of_little_weight_is_weighed_as_exactly(backend: Backend) -> None:
    """Its values are so large that they are the result."""
    arguments = build(MergeCase("little weight", parts=2))
    for distance in range(1, 50):
        arguments["lses"][0], arguments["lses"][1] = 0.0, -distance
        arguments["outs"][1] = arguments["outs"][1].sign() * 1e35
        assert_merged(arguments, *backend("merge_attention_states", arguments))


def test_parts_of_the_same_lse_weigh_alike_however_large_it_is(backend: Backend) -> None:
    """The logarithm of their number is lost beside it."""
    arguments = build(MergeCase("huge", parts=4))
    arguments["lses"][:] = 1e20
    for each in (backend, REFERENCE):
        out, lse = each("merge_attention_states", arguments)
        assert_close(out, arguments["outs"].double().mean(0), arguments["outs"].mean(0))
        assert (lse == 1e20).all()


def test_large_lse_does_not_overflow(backend: Backend) -> None:
    arguments = build(MergeCase("large"))
    arguments["lses"] += 1e4
    assert_merged(arguments, *backend("merge_attention_states", arguments))


@pytest.mark.parametrize(
    "backend", [backend for backend in backends_here() if backend.name != "reference"], ids=lambda backend: backend.name
)
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_for_a_row_alone(backend: Backend, threads: int) -> None:
    arguments = build(MergeCase("alone", tokens=300, parts=5, sinks=True, empty=True))
    out, lse = backend("merge_attention_states", arguments)
    torch.set_num_threads(threads)
    for row in (0, 150, 299):
        alone = dict(
            arguments,
            outs=arguments["outs"][:, row : row + 1].contiguous(),
            lses=arguments["lses"][:, row : row + 1].contiguous(),
        )
        out_alone, lse_alone = backend("merge_attention_states", alone)
        assert_same(out_alone, out[row : row + 1])
        assert_same(lse_alone, lse[row : row + 1])


@pytest.mark.parametrize("backend", backends_here(), ids=lambda backend: backend.name)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(split=st.integers(1, 5), sinks=st.booleans(), seed=st.integers(0, 1000))
def test_merging_in_two_steps_is_merging_at_once(backend: Backend, split: int, sinks: bool, seed: int) -> None:
    arguments = build(MergeCase("associative", parts=6, sinks=sinks, empty=True), seed)
    out, lse = _in_two_steps(backend, arguments, split)
    plain, _ = _in_two_steps(REFERENCE, arguments, split)
    doubled = dict(arguments, outs=arguments["outs"].double())
    expected, expected_lse = reference.merge_attention_states(**doubled, compute_dtype=torch.float64)
    assert_close(out, expected, plain)
    assert_stats(lse, expected_lse)


def _in_two_steps(backend: Backend, arguments: dict[str, Any], split: int) -> tuple[torch.Tensor, torch.Tensor]:
    steps = [
        backend("merge_attention_states", {"outs": arguments["outs"][part], "lses": arguments["lses"][part]})
        for part in (slice(None, split), slice(split, None))
    ]
    outs, lses = (torch.stack(states) for states in zip(*steps, strict=True))
    return backend("merge_attention_states", {"outs": outs, "lses": lses, "sinks": arguments["sinks"]})
