"""Writes, copies and gathers on the NKI kernels, called directly on the simulator: what the shared cases leave out."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import nki
import pytest
import torch
from nki_sim_kernels import strict_only

from torch_paged.backends.neuron import bridge_simulator, cache, copy_kernel, gather_kernel, write_kernel
from torch_paged.backends.neuron.launch import Launch
from torch_paged.contract import reference
from torch_paged.testing import CopyCase, GatherCase, WriteCase, assert_same, build

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, F16, INT8, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
BLOCK_SIZE = 8


@pytest.fixture(params=[("trn2", 1), ("trn3", 2)], ids=["trn2-1", "trn3-2"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """A generation, and the cores that share a kernel."""
    generation, cores = request.param
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", generation)
    monkeypatch.delenv("NEURON_LOGICAL_NC_CONFIG", raising=False)
    return Launch(generation, cores, bridge_simulator.run)


def check(launch: Launch, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Assert that an op writes the bytes that the reference writes, and return its arguments."""
    expected = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    getattr(cache, op)(launch, arguments)
    getattr(reference, op)(**expected)
    for name in ("kv_cache", "kv_scales"):
        if expected.get(name) is not None:
            assert_same(arguments[name], expected[name], name)
    return arguments


def check_gather(launch: Launch, arguments: dict[str, Any], expected: Mapping[str, Any] | None = None) -> None:
    for name, dense, wanted in zip(
        ("key", "value"),
        cache.gather_cache(launch, arguments),
        reference.gather_cache(**(expected or arguments)),
        strict=True,
    ):
        assert_same(dense, wanted, name)


def rows_and_cache(
    num_tokens: int, cache_dtype: torch.dtype, row_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows (T, 2, 24) of very different sizes, an empty cache with room for them, and their slots."""
    generator = torch.Generator().manual_seed(num_tokens)
    rows = torch.randn((num_tokens, 2, 24), generator=generator)
    rows *= torch.exp(6 * torch.randn((num_tokens, 2, 1), generator=generator))
    blocks = -(-num_tokens // BLOCK_SIZE)
    slots = torch.randperm(blocks * BLOCK_SIZE, generator=generator)[:num_tokens]
    return rows.to(row_dtype), torch.zeros((2, blocks, 2, BLOCK_SIZE, 32)).to(cache_dtype), slots


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("num_tokens", [128, 1024, 1025, 2047, 2048, 2600])
def test_every_number_of_tiles(launch: Launch, num_tokens: int, cores: int) -> None:
    """None, one or more turns of the loop, and rests of all kinds."""
    assert write_kernel.P * write_kernel.TILES == 1024
    rows, kv_cache, slots = rows_and_cache(num_tokens, BF16, BF16)
    arguments = {"key": rows, "value": -rows[..., :9], "kv_cache": kv_cache, "slot_mapping": slots, "kv_scales": None}
    check(replace(launch, cores=cores), "reshape_and_cache", arguments)


@pytest.mark.parametrize("heads", [3, 70])
def test_more_lanes_than_are_quantised_at_a_time(launch: Launch, heads: int) -> None:
    case = WriteCase("wide", num_tokens=5, num_kv_heads=heads, head_dim=100, cache_dtype=E4M3, scales_rank=4)
    assert write_kernel.WIDTH < 70 * 100
    check(launch, case.op, build(case))
    case = replace(case, scales_rank=2, cache_dtype=INT8)
    check(launch, case.op, build(case))


@pytest.mark.parametrize("dtype", [INT8, E4M3, E5M2])
@pytest.mark.parametrize("magnitude", [3e-39, 1e-30, 1e-5, 1e30, 3e38])
def test_scales_of_any_magnitude(launch: Launch, dtype: torch.dtype, magnitude: float) -> None:
    rows, kv_cache, slots = rows_and_cache(40, dtype)
    scales = torch.tensor([[magnitude, 0.77 * magnitude], [0.0123, 1.7]])
    arguments = {"key": rows * magnitude, "value": rows, "kv_cache": kv_cache, "slot_mapping": slots}
    check(launch, "reshape_and_cache", {**arguments, "kv_scales": scales})


@pytest.mark.parametrize("dtype", [INT8, E4M3, E5M2])
@pytest.mark.parametrize("source", [torch.float32, BF16, F16])
def test_scales_of_rows_of_any_magnitude(launch: Launch, dtype: torch.dtype, source: torch.dtype) -> None:
    rows, kv_cache, slots = rows_and_cache(300, dtype, source)
    scales = torch.full((2, *kv_cache.shape[1:4]), float("nan"))
    small = 2.0**-80 if source == torch.float32 else 1.0
    arguments = {"key": rows * small, "value": rows, "kv_cache": kv_cache, "kv_scales": scales, "slot_mapping": slots}
    check(launch, "quantize_and_cache", arguments)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_bytes_of_what_is_not_finite(launch: Launch, dtype: torch.dtype) -> None:
    rows = torch.tensor([[[float("nan"), float("inf"), float("-inf"), -0.0, 0.0, -1e-30]]])
    kv_cache = torch.ones((2, 1, 1, BLOCK_SIZE, 6)).to(dtype)
    arguments = {"key": rows, "value": rows, "kv_cache": kv_cache, "slot_mapping": torch.tensor([2])}
    check(launch, "reshape_and_cache", {**arguments, "kv_scales": torch.tensor([1.0, 1e-3])})


def test_slots_outside_write_nothing(launch: Launch) -> None:
    rows, kv_cache, _ = rows_and_cache(8, torch.float32)
    slots = torch.tensor([3, -1, BLOCK_SIZE, 2**33 + 4, -5, 2**31, -(2**40) + 6, 6])
    inside = torch.tensor([3, -1, -1, -1, -1, -1, -1, 6])
    arguments: dict[str, Any] = {"key": rows, "value": rows, "kv_cache": kv_cache, "kv_scales": None}
    expected = {**arguments, "kv_cache": kv_cache.clone()}
    cache.reshape_and_cache(launch, {**arguments, "slot_mapping": slots})
    reference.reshape_and_cache(**expected, slot_mapping=inside)
    assert_same(kv_cache, expected["kv_cache"])
    scales = torch.zeros(kv_cache.shape[:4])
    arguments |= {"kv_cache": kv_cache.to(INT8), "kv_scales": scales}
    cache.quantize_and_cache(launch, {**arguments, "slot_mapping": slots.clamp(-1, BLOCK_SIZE).int()})
    assert scales.count_nonzero() == 2 * 2 * 2


@pytest.mark.parametrize(("dtype", "rank"), [(BF16, None), (E4M3, 4), (INT8, 2)])
@pytest.mark.parametrize("cores", [1, 2])
def test_a_cycle_of_many_blocks(launch: Launch, dtype: torch.dtype, rank: int | None, cores: int) -> None:
    """Some in turns of a loop, some behind it: each block goes where another comes from."""
    order = random.Random(0).sample(range(300), 260)
    pairs = tuple((order[number - 1], order[number]) for number in range(260))
    case = CopyCase("cycle", pairs, 300, num_kv_heads=5, block_size=8, cache_dtype=dtype, scales_rank=rank)
    assert 2 * copy_kernel.P * copy_kernel.TILES < 2 * 260 * 5
    check(replace(launch, cores=cores), "copy_blocks", build(case))


def test_blocks_larger_than_a_descriptor(launch: Launch) -> None:
    case = CopyCase("large", ((0, 3), (3, 1), (1, 0)), 4, num_kv_heads=2, stored_dim=256, block_size=64)
    assert cache.UNIT_BYTES < 256 * 64 * 4
    check(launch, "copy_blocks", build(case))


def test_blocks_outside_are_not_copied(launch: Launch) -> None:
    case = CopyCase("outside", pairs=(), num_blocks=4, block_size=8, cache_dtype=E5M2, scales_rank=4)
    arguments, expected = build(case), build(case)
    sources, targets = torch.tensor([4, 0, 2**40, 1, -7, 2]), torch.tensor([1, 9, 2, 3, 0, -(2**33)])
    cache.copy_blocks(launch, {**arguments, "src_blocks": sources, "dst_blocks": targets})
    reference.copy_blocks(**{**expected, "src_blocks": torch.tensor([1]), "dst_blocks": torch.tensor([3])})
    for name in ("kv_cache", "kv_scales"):
        assert_same(arguments[name], expected[name], name)


def test_a_block_that_is_copied_to_twice_holds_one_source(launch: Launch) -> None:
    case = CopyCase(
        "twice", pairs=((0, 3), (1, 2), (2, 3)), num_blocks=4, block_size=8, cache_dtype=E5M2, scales_rank=4
    )
    arguments = build(case)
    cache.copy_blocks(launch, arguments)
    possible = []
    for pairs in (((0, 3), (1, 2)), ((1, 2), (2, 3))):
        expected = build(replace(case, pairs=pairs))
        reference.copy_blocks(**expected)
        possible.append(expected)
    (same,) = (one for one in possible if arguments["kv_scales"].equal(one["kv_scales"]))
    assert_same(arguments["kv_cache"], same["kv_cache"])


def test_scales_of_any_strides(launch: Launch) -> None:
    case = WriteCase("strided", num_tokens=9, block_size=8, cache_dtype=INT8, scales_rank=4)
    written = build(case)
    written["kv_scales"] = written["kv_scales"].transpose(2, 3).contiguous().transpose(2, 3)
    arguments = check(launch, "quantize_and_cache", written)
    pairs = {"src_blocks": torch.tensor([0, 1]), "dst_blocks": torch.tensor([3, 0])}
    check(launch, "copy_blocks", {name: arguments[name] for name in ("kv_cache", "kv_scales")} | pairs)


@pytest.mark.parametrize(("dtype", "rank"), [(BF16, None), (E4M3, 4), (INT8, 2), (E5M2, 1)])
@pytest.mark.parametrize("columns", [0, 3, 4])
def test_units_of_every_size(launch: Launch, dtype: torch.dtype, rank: int | None, columns: int) -> None:
    """1700 columns are whole units of 4 tokens, 1703 of 1, 1704 of 8; the longest sequence ends within one."""
    case = GatherCase("units", (1700, 0, 333, 64), extra_columns=columns, num_kv_heads=3, stored_dim=24, block_size=32)
    arguments = build(replace(case, cache_dtype=dtype, scales_rank=rank))
    assert 2 * gather_kernel.P * gather_kernel.TILES < 4 * 3 * 1700 // 8
    check_gather(launch, arguments)


def test_entries_and_lengths_outside(launch: Launch) -> None:
    kv_cache = torch.randn((2, 4, 2, BLOCK_SIZE, 16))
    arguments = {"kv_cache": kv_cache, "kv_scales": None, "starts": None, "max_len": 32}
    outside = {
        "block_tables": torch.tensor([[1, 4, 3], [2, -1, 2**31 - 1]], dtype=torch.int32),
        "context_lens": torch.tensor([99, 24], dtype=torch.int32),
    }
    inside = {
        "block_tables": torch.tensor([[1, -1, 3], [2, -1, -1]], dtype=torch.int32),
        "context_lens": torch.tensor([24, 24], dtype=torch.int32),
    }
    check_gather(launch, arguments | outside, arguments | inside)


def test_tables_without_columns(launch: Launch) -> None:
    arguments = {
        "kv_cache": torch.randn((2, 4, 2, BLOCK_SIZE, 16)),
        "kv_scales": None,
        "starts": None,
        "max_len": 3,
        "block_tables": torch.zeros((2, 0), dtype=torch.int32),
        "context_lens": torch.zeros(2, dtype=torch.int32),
    }
    check_gather(launch, arguments)


@strict_only
@pytest.mark.parametrize("cores", [1, 2])
def test_work_follows_the_tokens_in_turns_that_are_alike(launch: Launch, cores: int) -> None:
    """A further turn of a loop adds the same instructions: the code does not grow with the tokens."""
    simulated = []

    def count(kernel: Any, asked: int, *arguments: Any) -> Any:
        simulated.append(nki.simulate(kernel[asked]))
        return simulated[-1](*arguments)

    scales = torch.tensor([0.5, 0.25])
    for turns in (1, 2, 3):
        rows, kv_cache, slots = rows_and_cache(write_kernel.P * write_kernel.QUANTISED_TILES * cores * turns, INT8)
        arguments = {"key": rows, "value": rows, "kv_cache": kv_cache, "slot_mapping": slots, "kv_scales": scales}
        cache.reshape_and_cache(replace(launch, cores=cores, run=count), arguments)
    counts = [[sum(core.tally.values()) for core in run.cores] for run in simulated]
    assert len(counts[0]) == cores
    for first, second, third in zip(*counts, strict=True):
        assert third - second == second - first > 0
