"""Merging attention states on the NKI kernel, called directly on the simulator: what the shared cases leave out."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from torch_paged.backends.neuron import bridge_simulator, merge, merge_states_kernel
from torch_paged.backends.neuron.launch import Launch
from torch_paged.testing import MergeCase, assert_merged, assert_same, build

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=[("trn2", 1), ("trn3", 2)], ids=["trn2-1", "trn3-2"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """A generation, and the cores that share a kernel."""
    generation, cores = request.param
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", generation)
    monkeypatch.delenv("NEURON_LOGICAL_NC_CONFIG", raising=False)
    return Launch(generation, cores, bridge_simulator.run)


def check(launch: Launch, case: MergeCase) -> None:
    arguments = build(case)
    assert_merged(arguments, *merge.merge_attention_states(launch, arguments))


@pytest.mark.parametrize("parts", [1, 7, 8, 9, 16, 17, 40])
def test_any_number_of_parts(launch: Launch, parts: int) -> None:
    """Turns of ``CHUNK`` parts, and some behind them, in the loop over rows and for the rows behind that."""
    assert merge_states_kernel.CHUNK == 8
    case = MergeCase("parts", parts=parts, tokens=90, num_heads=3, head_dim=1100, sinks=parts % 2 == 0, empty=True)
    assert 2 * merge.PARTITIONS < 90 * 3
    assert merge.LANES // 2 < 1100
    check(launch, case)


@pytest.mark.parametrize("rows", [1, 127, 129, 1023, 1025, 2000, 4099])
def test_any_number_of_rows(launch: Launch, rows: int) -> None:
    """Some rows of a token's heads on a partition: whole tiles, partitions behind them and rows behind those."""
    check(launch, MergeCase("rows", parts=2, tokens=rows, num_heads=1, head_dim=200, empty=True))


@pytest.mark.parametrize("parts", [2, 19])
def test_equal_bits_alone_and_on_any_cores(launch: Launch, parts: int) -> None:
    arguments = build(MergeCase("alone", tokens=300, num_heads=3, parts=parts, sinks=True, empty=True))
    results = merge.merge_attention_states(launch, arguments)
    others = merge.merge_attention_states(replace(launch, cores=3 - launch.cores), arguments)
    for actual, expected in zip(others, results, strict=True):
        assert_same(actual, expected)
    for row in (0, 150, 299):
        alone: dict[str, Any] = {name: arguments[name][:, row : row + 1] for name in ("outs", "lses")}
        one = merge.merge_attention_states(launch, {**alone, "sinks": arguments["sinks"]})
        for actual, expected in zip(one, results, strict=True):
            assert_same(actual, expected[row : row + 1])


def test_sinks_that_weigh_nothing(launch: Launch) -> None:
    arguments = build(MergeCase("sinks", sinks=True, empty=True))
    arguments["sinks"][::2] = float("-inf")
    assert_merged(arguments, *merge.merge_attention_states(launch, arguments))


def test_parts_in_any_layout(launch: Launch) -> None:
    arguments = build(MergeCase("strided", tokens=9))
    strided = {name: arguments[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("outs", "lses")}
    results = merge.merge_attention_states(launch, {**strided, "sinks": None})
    for actual, expected in zip(results, merge.merge_attention_states(launch, arguments), strict=True):
        assert torch.equal(actual, expected)
