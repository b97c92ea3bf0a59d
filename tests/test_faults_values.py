"""Live data at the ends of a dtype: subnormal numbers, infinite queries, sinks and slopes.

Keys and values that are not finite: test_hidden_keys.py.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from torch_paged.backends.cpu.support import isa
from torch_paged.testing import AttentionCase, MergeCase, assert_attention, assert_same, build
from torch_paged.testing.backends import Backend, backends_here
from torch_paged.testing.semantics.attend import sourced
from torch_paged.testing.semantics.registry import SOURCES

CASES = (
    AttentionCase("ends_decode", (100, 17, 1)),
    AttentionCase("ends_prefill", (100, 60, 1), (40, 33, 1)),
    AttentionCase("ends_new", None, (40, 33, 1), new_lens=(100, 40, 1)),
)
SUBNORMAL = {
    torch.float32: (2.0**-130, 2.0**127),
    torch.bfloat16: (2.0**-130, 2.0**127),
    torch.float16: (2.0**-17, 2.0**15),
}
"""A subnormal number of each dtype, and one whose product with it is near 1."""

keys_and_queries = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize("dtype", SUBNORMAL, ids=str)


def _signs(x: Tensor, magnitude: float) -> None:
    """Give every number that is no poison the magnitude."""
    x.copy_(torch.where(x.isnan(), x, (torch.sign(x.float()) * magnitude).to(x.dtype)))


TOKEN, HEAD = 1, 3
"""Of the row that may have other results."""


def _assert_others(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    others = torch.ones(results[1].shape, dtype=torch.bool)
    others[TOKEN, HEAD] = False
    for actual, wanted in zip(results, expected, strict=True):
        assert_same(actual[others], wanted[others])


def _drops_subnormals(backend: Backend, dtype: torch.dtype) -> bool:
    """Return whether the products take subnormal operands for zero, as the bfloat16 instruction of AVX-512 does."""
    return backend.name == "cpu" and dtype == torch.bfloat16 and isa() == "avx512"


@keys_and_queries
@by_dtype
def test_subnormal_keys(backend: Backend, case: AttentionCase, dtype: torch.dtype) -> None:
    case = backend.served(replace(case, dtype=dtype))
    small, large = SUBNORMAL[case.dtype]
    arguments = build(case)
    keys = arguments["key"] if arguments["kv_cache"] is None else arguments["kv_cache"][0]
    _signs(arguments["query"], large)
    _signs(keys, 0.0 if _drops_subnormals(backend, case.dtype) else small)
    results = backend(case.op, arguments, stats=True)
    assert_attention(case.op, arguments, *results)
    if _drops_subnormals(backend, case.dtype):
        _signs(arguments["query"], large)
        keys.copy_(torch.where(keys == 0, torch.tensor(small, dtype=dtype), keys))
        for actual, expected in zip(backend(case.op, arguments, stats=True), results, strict=True):
            assert_same(actual, expected)


@keys_and_queries
@by_dtype
def test_subnormal_values(backend: Backend, case: AttentionCase, dtype: torch.dtype) -> None:
    """A single key has the weight 1: its value comes out as it is."""
    case = backend.served(replace(case, dtype=dtype))
    arguments = build(case)
    values = arguments["value"] if arguments["kv_cache"] is None else arguments["kv_cache"][1]
    _signs(values, SUBNORMAL[case.dtype][0])
    out, *stats = backend(case.op, arguments, stats=True)
    assert_attention(case.op, arguments, out, *stats)
    alone = out[-1]  # of the sequence with one key
    expected = 0.0 if _drops_subnormals(backend, case.dtype) else SUBNORMAL[case.dtype][0]
    if backend.name == "cpu":
        assert (alone.abs() == expected).all()


@keys_and_queries
@by_dtype
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_query_spoils_its_own_rows(
    backend: Backend, case: AttentionCase, dtype: torch.dtype, bad: float
) -> None:
    case = backend.served(replace(case, dtype=dtype))
    arguments = build(case)
    expected = backend(case.op, arguments, stats=True)
    arguments["query"][TOKEN, HEAD, 5] = bad
    results = backend(case.op, arguments, stats=True)
    assert results[0][TOKEN, HEAD].isnan().all()
    _assert_others(results, expected)


@keys_and_queries
@by_dtype
def test_huge_logits_change_no_bits_of_other_rows(backend: Backend, case: AttentionCase, dtype: torch.dtype) -> None:
    """Such logits are scaled otherwise; a scale that is no power of two shows how."""
    case = backend.served(replace(case, dtype=dtype, softmax_scale=37.0))
    arguments = build(case)
    expected = backend(case.op, arguments, stats=True)
    arguments["query"][TOKEN, HEAD] *= 1e4
    _assert_others(backend(case.op, arguments, stats=True), expected)


on_cpu = pytest.mark.parametrize("backend", [b for b in backends_here() if b.name == "cpu"], ids=lambda b: b.name)


@on_cpu
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("largest", [0, 65])
def test_keys_of_little_weight_are_weighed_as_exactly(backend: Backend, source: str, largest: int) -> None:
    """Their values are so large that they are the result, however far a head's keys are below the largest.

    The exponentials of accelerators are less exact.
    """
    heads = 8
    case = AttentionCase("little", (80, 0, 95, 90), num_kv_heads=heads, group=1, softmax_scale=1.0)
    case = sourced(case, source)
    arguments = build(case)
    distances = 10.0 * torch.arange(1, heads + 1)
    arguments["query"] = torch.zeros_like(arguments["query"])
    arguments["query"][..., 0] = 1
    if source != "new":
        cache = arguments["kv_cache"]
        _weigh_little(cache[0].transpose(1, 2), cache[1].transpose(1, 2), distances)
        size = cache.size(3)
        blocks = arguments["block_tables"][arguments["context_lens"] > largest, largest // size].long()
        cache[:, blocks, :, largest % size] = 0
    if source in ("new", "both"):
        _weigh_little(arguments["key"], arguments["value"], distances)
    if source == "new":
        for new in (arguments["key"], arguments["value"]):
            new[arguments["cu_seqlens_k"][:-1].long() + largest] = 0
    assert_attention(case.op, arguments, *backend(case.op, arguments, stats=True))


def _weigh_little(keys: Tensor, values: Tensor, distances: Tensor) -> None:
    """Set keys (..., KH, D) to logits of minus the heads' distances, and values so large that the products are not."""
    keys.mul_(0)[..., 0].sub_(distances)
    values.abs_().add_(1).mul_(distances.exp()[:, None])


@on_cpu
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("no_keys_decode", (0, 9, 0), sinks=True),
        AttentionCase("no_keys_few", (0, 9, 0), (2, 3, 1), sinks=True),
        AttentionCase("no_keys_prefill", (0, 60, 0), (40, 50, 20), sinks=True),
    ],
    ids=lambda case: case.name,
)
def test_a_sink_that_is_no_number_leaves_rows_without_keys_zero(
    backend: Backend, case: AttentionCase, bad: float
) -> None:
    arguments = build(case)
    arguments["sinks"][:] = bad
    out, lse, max_logits = backend(case.op, arguments, stats=True)
    nothing = max_logits == float("-inf")
    assert 0 < nothing.sum() < nothing.numel()
    assert (out[nothing] == 0).all()
    assert_same(lse[nothing], torch.full_like(lse[nothing], bad))
    assert out[~nothing].isnan().all()


@on_cpu
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_sink_that_is_no_number_leaves_merged_rows_without_keys_zero(backend: Backend, bad: float) -> None:
    arguments = build(MergeCase("no keys", parts=3, sinks=True, empty=True))
    arguments["sinks"][:] = bad
    out, lse = backend("merge_attention_states", arguments)
    nothing = (arguments["lses"] == float("-inf")).all(0)
    assert 0 < nothing.sum() < nothing.numel()
    assert (out[nothing] == 0).all()
    assert_same(lse[nothing], torch.full_like(lse[nothing], bad))


@on_cpu
@pytest.mark.parametrize("slope", [1e30, 1e37, 1e38, 2e38, 3e38])
@keys_and_queries
def test_steep_slopes_leave_a_row_its_nearest_key(backend: Backend, case: AttentionCase, slope: float) -> None:
    """Distances times slopes end within float32 or beyond it."""
    arguments = build(replace(case, alibi=True))
    arguments["alibi_slopes"][:] = slope
    assert_attention(case.op, arguments, *backend(case.op, arguments, stats=True))


@pytest.mark.parametrize("size", [1e7, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("mask", [None, "shared"])
@keys_and_queries
def test_huge_logits_leave_a_row_its_best_key(
    backend: Backend, case: AttentionCase, mask: str | None, size: float
) -> None:
    """Keys are so far apart that one of them has all the weight; the scale is no power of two."""
    arguments = build(backend.served(replace(case, mask=mask, softmax_scale=0.1)))
    for name in ("query", "key", "kv_cache"):
        tensor = arguments.get(name)
        if tensor is not None:
            tensor = tensor[0] if name == "kv_cache" else tensor
            tensor *= size**0.5
    assert_attention(case.op, arguments, *backend(case.op, arguments, stats=True))
