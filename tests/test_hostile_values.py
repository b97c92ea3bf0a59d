"""What numbers of one request can do where they are not checked: nothing to other requests, nothing outside the cache.

The interpreted TPU kernels and the simulated NKI kernels get what the CPU refuses. SECURITY.md has the list.
"""

import importlib.util
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_paged
from torch_paged.backends import discover
from torch_paged.backends.neuron import bridge_simulator
from torch_paged.backends.python_kernels import python_kernels
from torch_paged.testing import (
    AttentionCase,
    CopyCase,
    GatherCase,
    WriteCase,
    assert_attention,
    assert_same,
    build,
    take_sequences,
)
from torch_paged.testing.backends import Backend, backends_here
from torch_paged.testing.bad_input import VALUES, Break

LEAST, MOST = -(2**31), 2**31 - 1
BAD_SCALES = (float("nan"), float("inf"), 0.0, -1.0, 1e-45, 3e38)
HOSTILE = 1
"""The sequence whose numbers are hostile, of three."""
ACCELERATORS = ["neuron"] + ["tpu"] * (importlib.util.find_spec("jax") is not None)


@cache
def accelerated(name: str) -> Backend:
    """Return an accelerator's kernels, for CPU tensors."""
    bridge: Any = bridge_simulator
    if name == "tpu":
        from torch_paged.backends.tpu import bridge_interpret

        bridge = bridge_interpret
    return Backend(name, torch.device("cpu"), kernels=bridge.kernels(discover()[name]))


@pytest.fixture(params=ACCELERATORS)
def accelerator(request: pytest.FixtureRequest) -> Backend:
    return accelerated(request.param)


def changed(arguments: dict[str, Any], name: str, index: Any, value: float | Tensor) -> dict[str, Any]:
    """Return arguments with one value, or some, put into a copy of a tensor."""
    tensor = arguments[name].clone()
    tensor[index] = value
    return {**arguments, name: tensor}


def rows_of(case: AttentionCase) -> list[slice]:
    """Return the rows of each sequence."""
    ends = torch.tensor(case.query_lens or (1,) * case.num_seqs).cumsum(0).tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def assert_neighbours(case: AttentionCase, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Assert that all sequences but the hostile one keep their bits."""
    for seq, rows in enumerate(rows_of(case)):
        if seq != HOSTILE:
            for result, wanted in zip(results, expected, strict=True):
                assert_same(result[rows], wanted[rows])


QUERIES = (2, 3, 2)
DECODE = AttentionCase("hostile decode", (17, 96, 33), group=1, cache_dtype=torch.int8, scales_rank=4)
VARLEN = AttentionCase(
    "hostile", (17, 40, 33), QUERIES, QUERIES, num_kv_heads=1, group=2, sliding_window=30, positions="shuffled"
)


def with_bad_scales(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with scales that make no sense for all tokens of the hostile sequence."""
    blocks = arguments["block_tables"][HOSTILE, : len(BAD_SCALES)].long()
    return changed(arguments, "kv_scales", (slice(None), blocks), torch.tensor(BAD_SCALES)[:, None, None])


@pytest.mark.parametrize("case", [DECODE, VARLEN], ids=lambda case: case.name)
def test_numbers_of_a_sequence_stay_with_it(case: AttentionCase, accelerator: Backend) -> None:
    arguments = build(case)
    for name in ("kv_cache", "kv_scales"):  # a length that is too large reaches stale slots
        arguments[name] = arguments[name] if arguments[name] is None else arguments[name].nan_to_num()
    expected = accelerator(case.op, arguments, stats=True)
    if case.scales_rank:
        assert_neighbours(case, accelerator(case.op, with_bad_scales(arguments), stats=True), expected)
    capacity = arguments["block_tables"].size(1) * arguments["kv_cache"].size(3)
    for length, block_id, position in ((LEAST, 0, LEAST), (MOST, 0, capacity + 5), (17, MOST, MOST)):
        wrong, meant = (
            changed(changed(arguments, "context_lens", HOSTILE, tokens), "block_tables", HOSTILE, block)
            for tokens, block in ((length, block_id), (min(max(length, 0), capacity), -1 if block_id else 0))
        )
        if case.positions:
            where = rows_of(case)[HOSTILE]
            wrong, meant = (changed(each, "query_positions", where, position) for each in (wrong, meant))
            wrong["max_seqlen_k"] = 2**62
        results = accelerator(case.op, wrong, stats=True)
        assert_neighbours(case, results, expected)
        for result, wanted in zip(results, accelerator(case.op, meant, stats=True), strict=True):
            assert_same(result, wanted)
        assert not any(result.isnan().any() for result in results)
    if case.new_lens:
        bounds = torch.tensor((LEAST, MOST, -5, 3), dtype=torch.int32)
        results = accelerator(case.op, {**arguments, "cu_seqlens_k": bounds}, stats=True)
        assert not any(result.isnan().any() for result in results)


@pytest.mark.parametrize("query_lens", [None, QUERIES], ids=["decode", "varlen"])
def test_bad_scales_of_tokens_stay_with_their_sequence_where_indices_are_checked(
    query_lens: tuple[int, ...] | None,
) -> None:
    """No backend checks these scales: there are as many as keys."""
    case = replace(DECODE, query_lens=query_lens)
    backend, arguments = backends_here()[0], build(case)
    expected = backend(case.op, arguments, stats=True)
    assert_neighbours(case, backend(case.op, with_bad_scales(arguments), stats=True), expected)


def test_gathered_rows_of_other_sequences_keep_their_bits(accelerator: Backend) -> None:
    arguments = build(GatherCase("hostile", (17, 40, 33), left_padded=True))
    arguments["kv_cache"] = arguments["kv_cache"].nan_to_num()
    expected = accelerator("gather_cache", arguments)
    for name in ("starts", "context_lens", "block_tables"):
        for value in (-1, LEAST, MOST):
            results = accelerator("gather_cache", changed(arguments, name, HOSTILE, value))
            assert_neighbours(DECODE, results, expected)


def test_a_destination_given_twice_spoils_no_other_block(accelerator: Backend) -> None:
    arguments = build(CopyCase("twice", pairs=((0, 3), (1, 3), (4, 2)), block_size=8))
    before = arguments["kv_cache"].clone()
    accelerator("copy_blocks", arguments)
    before[:, 2] = before[:, 4]
    others = [0, 1, 2, 4, 5]
    assert_same(arguments["kv_cache"][:, others], before[:, others])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_write_with_bad_scales_touches_its_own_slots_alone(dtype: torch.dtype, accelerator: Backend) -> None:
    case = WriteCase("bad scales", num_tokens=5, cache_dtype=dtype, scales_rank=2)
    for scale in BAD_SCALES:
        arguments = build(case)
        before = arguments["kv_cache"].clone()
        arguments["kv_scales"][:, 0] = scale
        accelerator(case.op, arguments)
        written = torch.zeros(before.size(1) * before.size(3), dtype=torch.bool)
        written[arguments["slot_mapping"]] = True
        kept = ~written.reshape(before.size(1), 1, before.size(3), 1)
        after, before = arguments["kv_cache"].view(torch.uint8), before.view(torch.uint8)
        assert torch.equal(after * kept, before * kept)


def test_bad_scales_sinks_and_slopes_of_a_head_stay_with_it(accelerator: Backend) -> None:
    kv_heads = len(BAD_SCALES) + 2
    case = AttentionCase("bad head", (17, 40), num_kv_heads=kv_heads, group=2, cache_dtype=torch.int8, scales_rank=2)
    arguments = build(replace(case, sinks=True, alibi=True))
    expected = accelerator(case.op, arguments, stats=True)
    bad = changed(arguments, "kv_scales", (slice(None), slice(2, None)), torch.tensor(BAD_SCALES))
    for value in (float("nan"), float("inf")):
        bad = changed(changed(bad, "sinks", 1, value), "alibi_slopes", 3, value)
        for result, wanted in zip(accelerator(case.op, bad, stats=True), expected, strict=True):
            assert_same(result[:, [0, 2]], wanted[:, [0, 2]])


def test_bounds_that_are_too_small(accelerator: Backend) -> None:
    case = AttentionCase("small bounds", (17, 40, 33), (1, 3, 1), group=2)
    arguments = build(case)
    out = accelerator(case.op, {**arguments, "max_seqlen_q": 1, "max_seqlen_k": 1})
    others, rows = take_sequences(arguments, [0, 2])
    assert_attention(case.op, others, out[rows])
    if accelerator.name == "tpu":
        assert (out[rows_of(case)[HOSTILE]] == 0).all()
    else:
        assert_attention(case.op, arguments, out)


def test_sizes_whose_product_has_no_64_bits() -> None:
    kv_cache = torch.ones(64).expand(2, 1, 1, 2**54, 64)
    tables, lengths = torch.zeros((1, 2**10), dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    key, _ = torch_paged.gather_cache(kv_cache, tables, lengths, 7)
    assert key[0, 0, :, 0].tolist() == [1.0] * 5 + [0.0] * 2
    with pytest.raises((RuntimeError, MemoryError)):
        torch_paged.gather_cache(kv_cache, tables, lengths, 2**62)


@pytest.mark.parametrize("broken", VALUES, ids=lambda broken: f"{broken.op}-{broken.rule}-{broken.base}")
def test_debugging_checks_all_that_the_cpu_checks(broken: Break) -> None:
    """TORCH_PAGED_DEBUG=1: before anything runs, or is refused."""
    kernels = python_kernels(discover()["neuron"], lambda name, arguments: pytest.fail("it ran"), check_values=True)
    with pytest.raises(ValueError) as caught:
        kernels[broken.op](**broken.arguments())
    assert str(caught.value) == f"{broken.op}: {broken.says}"
