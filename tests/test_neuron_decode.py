"""Decode on the NKI kernels, called directly on the simulator: what the shared cases leave out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from neuron_calls import GENERATIONS, assert_all_same, check, counted, run
from nki_sim_kernels import strict_only

from torch_paged.backends.neuron import bridge_simulator, decode, plan
from torch_paged.backends.neuron.launch import Launch
from torch_paged.testing import AttentionCase, assert_attention, assert_same, build, option_pairs
from torch_paged.testing.batches import take_sequences

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def served(case: AttentionCase) -> AttentionCase:
    size = case.block_size
    return replace(case, block_size=size if size >= 8 else 8)


PAIRS = [served(case) for case in option_pairs() if case.op == "paged_attention" and case.head_dim <= 256]


@pytest.mark.parametrize(("number", "case"), list(enumerate(PAIRS))[::3], ids=lambda x: getattr(x, "name", ""))
def test_pairs_of_options(number: int, case: AttentionCase) -> None:
    check(case, GENERATIONS[number % 2], 1 + number // 2 % 2)


def test_every_length_of_turn_and_the_values_that_are_not_finite() -> None:
    """Loops over 4, 2 and 1 tiles, and all tiles once more because of one infinity."""
    case = AttentionCase("turns", context_lens=(1000, 17, 700, 513, 0, 600), num_kv_heads=1, group=256, head_dim=40)
    arguments = build(case)
    turns: list[Any] = []

    def keep(kernel: Any, cores: int, *given: Any) -> Any:
        if not turns:
            turns.append(given[4].tolist())
        return bridge_simulator.run(kernel, cores, *given)

    block = int(arguments["block_tables"][0, 2])
    arguments["kv_cache"][1, block, 0, 5, 9] = float("inf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
        out, *stats = decode.paged_attention(Launch("trn2", 1, keep), arguments)
    assert plan.turn_tiles(1, 256) == (8, 4, 2, 1)
    assert turns[0] == [[0, 1, 1, 1, 7]]
    assert (out[0, :, 9] == float("inf")).all()
    assert out.isfinite().sum() == out.numel() - 256
    arguments["kv_cache"][1, block, 0, 5, 9] = 0.0
    clean = run(arguments)
    assert_attention(case.op, arguments, *clean)
    out[0, :, 9] = clean[0][0, :, 9]
    assert_all_same((out, *stats), clean)


def test_rows_of_many_chunks_are_merged_in_turns() -> None:
    """Turns of 8 chunks of 256 tokens, of many groups of rows in a loop, and of two without one."""
    case = AttentionCase("turns", context_lens=(17, 2600, 300), num_kv_heads=1, group=256, head_dim=32, sinks=True)
    arguments = build(case)
    expected = run(arguments)
    assert_attention(case.op, arguments, *expected)
    taken, rows = take_sequences(arguments, [1])
    assert_all_same(run(taken), tuple(result[rows] for result in expected))


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("mask", [None, "heads"])
def test_a_sequence_of_nan_leaves_its_neighbours_their_bits(mask: str | None, cache_dtype: torch.dtype | None) -> None:
    case = AttentionCase(
        "neighbours",
        context_lens=(40, 300, 70, 1),
        head_dim=40,
        dtype=torch.bfloat16,
        cache_dtype=cache_dtype,
        scales_rank=None if cache_dtype is None else 2,
        mask=mask,
    )
    arguments = build(case)
    cores = 1 if mask is None else 2
    clean = run(arguments, cores=cores)
    blocks = arguments["block_tables"][1, : -(-300 // 16)].long()
    arguments["kv_cache"].view(torch.uint8)[:, blocks] = 0xFF
    spoilt = run(arguments, cores=cores)
    others = torch.tensor([0, 2, 3])
    assert_all_same(tuple(x[others] for x in spoilt), tuple(x[others] for x in clean))
    assert spoilt[0][1].isnan().all()
    assert spoilt[1][1].isnan().all()


INVARIANT = [
    AttentionCase("invariant", context_lens=(700, 0, 5, 1100, 63), sinks=True, alibi=True),
    AttentionCase("invariant_mask", context_lens=(700, 40, 5, 300), mask="heads", group=3, dtype=torch.bfloat16),
    AttentionCase("invariant_e4m3", context_lens=(300, 9, 5), cache_dtype=torch.float8_e4m3fn, scales_rank=4),
    AttentionCase("invariant_window", context_lens=(700, 1000, 5, 300), sliding_window=400, head_dim=256),
]


@pytest.mark.parametrize("case", INVARIANT, ids=lambda case: case.name)
def test_same_bits_alone_in_any_batch_and_on_two_cores(case: AttentionCase) -> None:
    arguments = build(case)
    expected = run(arguments)
    assert_all_same(run(arguments, cores=2), expected)
    for order in ([case.num_seqs - 1, 0], [1], [0]):
        taken, rows = take_sequences(arguments, order)
        assert_all_same(run(taken, cores=1 + len(order) % 2), tuple(result[rows] for result in expected))


@pytest.mark.parametrize("heads", [None, 2, 4])
@pytest.mark.parametrize("columns", [0, 37, 300, 1000])
def test_masks_of_any_width_and_strides(columns: int, heads: int | None) -> None:
    case = AttentionCase("mask", context_lens=(300, 40, 17), group=2, head_dim=40)
    arguments = build(case)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand((columns + 3, 3), generator=generator).T[:, 1 : columns + 1] < 0.5
    arguments["attn_mask"] = mask if heads is None else mask.expand(heads, 3, columns)
    assert_attention(case.op, arguments, *run(arguments))


def test_what_is_outside_of_tables_and_cache_holds_no_keys() -> None:
    case = AttentionCase("outside", context_lens=(300, 40, 17, 64))
    arguments = build(case)
    width = arguments["block_tables"].shape[1]
    outside = dict(arguments, context_lens=torch.tensor([300, -5, 2**30, 64], dtype=torch.int32))
    outside["block_tables"] = arguments["block_tables"].clone()
    outside["block_tables"][0, 3] = arguments["kv_cache"].shape[1]
    outside["block_tables"][2, 2:] = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32).repeat(width)[
        : width - 2
    ]
    outside["block_tables"][3, 0] = -1
    mask = torch.ones((4, width * case.block_size), dtype=torch.bool)
    mask[0, 48:64] = mask[3, :16] = False
    blocks = arguments["block_tables"][2, :2].long()
    arguments["kv_cache"][:, blocks] = 0.25  # nothing is stale in blocks that are full now
    arguments.update(attn_mask=mask, context_lens=torch.tensor([300, 0, 32, 64], dtype=torch.int32))
    results = list(run(outside))
    expected = run(dict(arguments, attn_mask=None, context_lens=arguments["context_lens"] * 0))
    assert_all_same(tuple(x[1:2] for x in results), tuple(x[1:2] for x in expected))
    far = results[0][2], results[1][2], results[2][2]  # at another position, so that all its keys are as far as may be
    near = run(arguments)
    assert_attention(case.op, arguments, *near)
    for a, b in zip(results, near, strict=True):
        assert_same(a[[0, 3]], b[[0, 3]])
    assert_same(far[2], near[2][2])


@pytest.mark.parametrize(("kv_heads", "cache_dtype"), [(1, None), (3, torch.int8), (3, torch.float8_e4m3fn)])
def test_latent_caches(kv_heads: int, cache_dtype: torch.dtype | None) -> None:
    case = AttentionCase(
        "latent",
        context_lens=(300, 0, 40),
        latent=True,
        head_dim=144,
        stored_dim=160,
        value_dim=128,
        num_kv_heads=kv_heads,
        cache_dtype=cache_dtype,
        scales_rank=None if cache_dtype is None else 4,
        dtype=torch.bfloat16,
    )
    check(case)


def test_a_sink_that_is_none() -> None:
    case = AttentionCase("sink", context_lens=(40, 0), sinks=True)
    arguments = build(case)
    arguments["sinks"][:3] = float("-inf")
    assert_attention(case.op, arguments, *run(arguments))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["query", "kv_cache", "block_tables"])
def test_calls_without_keys(name: str, sinks: bool) -> None:
    case = AttentionCase("nothing", context_lens=(0, 0), sinks=sinks, value_dim=40)
    arguments = build(case)
    if name == "query":
        arguments = take_sequences(arguments, [])[0]
    elif name == "kv_cache":
        arguments["kv_cache"] = arguments["kv_cache"][:, :0]
    else:
        arguments["block_tables"] = arguments["block_tables"][:, :0]
    assert_attention(case.op, arguments, *run(arguments))


def test_the_layers_of_a_step_share_a_plan() -> None:
    case = AttentionCase("layers", context_lens=(40, 17), mask="shared")
    arguments = build(case)
    made = []

    def counted(*given: Any) -> plan.DecodePlan:
        made.append(given)
        return plan.decode_plan(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "decode_plan", counted)
        for step in range(1, 3):
            for layer in range(4):
                arguments["kv_cache"] = build(case, seed=layer)["kv_cache"]
                arguments["kv_cache"][:] = arguments["kv_cache"].nan_to_num()
                assert_attention(case.op, arguments, *run(arguments))
            assert len(made) == step
            arguments["context_lens"].add_(1)


@strict_only
def test_work_follows_the_keys_that_are_seen_and_not_what_tables_and_caches_could_hold() -> None:
    case = AttentionCase("capacity", context_lens=(700, 40, 17))
    arguments = build(case)

    def wide(columns: int, blocks: int) -> dict[str, Any]:
        tables = torch.nn.functional.pad(arguments["block_tables"], (0, columns), value=-1)
        cache = torch.nn.functional.pad(arguments["kv_cache"], (0, 0) * 3 + (0, blocks), value=float("nan"))
        return dict(arguments, block_tables=tables, kv_cache=cache)

    tallies, expected = counted(wide(9000, 0))
    more_tallies, found = counted(wide(18000, 300))
    assert_all_same(found, expected)
    assert_all_same(found, run(arguments))
    assert more_tallies == tallies
