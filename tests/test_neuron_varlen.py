"""Packed queries on the NKI kernel, called directly on the simulator: what the shared cases leave out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from neuron_calls import GENERATIONS, assert_all_same, check, counted, run
from nki_sim_kernels import strict_only

from torch_paged.backends.neuron import bridge_simulator, varlen
from torch_paged.backends.neuron.launch import Launch
from torch_paged.backends.neuron.plan_varlen import VarlenPlan, varlen_plan
from torch_paged.testing import AttentionCase, assert_attention, assert_same, build, option_pairs, oracle
from torch_paged.testing.batches import take_sequences

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def served(case: AttentionCase) -> AttentionCase:
    return replace(case, block_size=max(8, case.block_size), layout="contiguous")


PAIRS = [served(case) for case in option_pairs() if case.op == "flash_attn_varlen" and case.head_dim <= 256]


@pytest.mark.parametrize(("number", "case"), list(enumerate(PAIRS))[::9], ids=lambda x: getattr(x, "name", ""))
def test_pairs_of_options(number: int, case: AttentionCase) -> None:
    check(case, GENERATIONS[number % 2], 1 + number // 2 % 2)


@pytest.mark.parametrize("cores", [1, 2])
def test_wide_and_narrow_tiles_and_every_body_of_a_loop(cores: int) -> None:
    case = AttentionCase(
        "bodies",
        context_lens=(2500, 5000, 40, 3400, 0, 0, 0),
        query_lens=(200, 1, 0, 40, 2, 3, 2),
        new_lens=(2300, 900, 0, 1500, 1100, 600, 100),
        num_kv_heads=1,
        group=6,
        head_dim=24,
        stored_dim=32,
        dtype=torch.bfloat16,
        padding_rows=2,
        sinks=True,
    )
    arguments = build(case)
    given = []

    def keep(kernel: Any, cores: int, *kernel_arguments: Any) -> Any:
        given.append(kernel_arguments)
        return bridge_simulator.run(kernel, cores, *kernel_arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
        results = varlen.flash_attn_varlen(Launch("trn2", cores, keep), arguments)
    assert_attention(case.op, arguments, *results)
    wide, middle, narrow = (given[0][place] for place in (10, 17, 24))
    each = (torch.cat((wide, middle, narrow)).reshape(-1, 2, 8) > 0).any(0)
    if cores == 1:
        assert each[0].tolist() == [True, False, True, True, False, False, False, True]
        assert each[1].all(), "a body does not run for new keys"
    assert wide.any()
    assert middle.any()
    assert narrow.any()


HIDDEN = {
    "causal": AttentionCase("hidden", context_lens=(600, 30), query_lens=(9, 30)),
    "mask": AttentionCase("hidden", context_lens=(70, 30), query_lens=(4, 25), new_lens=(4, 25), mask="heads"),
    "latent": AttentionCase("hidden", context_lens=(70,), query_lens=(9,), latent=True, value_dim=48, num_kv_heads=1),
}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("name", HIDDEN)
def test_rows_that_do_not_see_what_is_not_finite_keep_their_bits(name: str, side: int, poison: float) -> None:
    case = replace(HIDDEN[name], dtype=torch.bfloat16 if side else torch.float32)
    arguments, clean = build(case), build(case)
    context, new = case.context_lens[0] if case.context_lens else 0, case.new_lens
    key = context - 3
    block = int(arguments["block_tables"][0, key // case.block_size])
    arguments["kv_cache"][-1 if side else 0, block, 0, key % case.block_size, 5] = poison
    position = sum(part[0] for part in (case.context_lens, new) if part) - (case.query_lens or ())[0]
    sees = torch.zeros((arguments["query"].shape[0], case.num_heads), dtype=torch.bool)
    for row in range((case.query_lens or ())[0]):
        visible = torch.tensor(position + row >= key)
        if arguments["attn_mask"] is not None:
            visible = visible & arguments["attn_mask"][:, row, key]
        sees[row, : case.group] = visible if visible.dim() == 0 else visible[: case.group]
    assert sees.any()
    assert not sees[:, : case.group].all()
    results, expected = run(arguments), run(clean)
    assert_all_same(tuple(x[~sees] for x in results), tuple(x[~sees] for x in expected))
    if side and not case.latent:
        assert (results[0][sees][:, 5] == poison).all() or poison != poison
        others = torch.arange(case.head_dim) != 5
        assert_same(results[0][sees][:, others], expected[0][sees][:, others])
    if poison != poison:
        assert results[0][sees][:, 5].isnan().all()


INVARIANT = [
    AttentionCase("invariant", context_lens=(2300, 0, 5, 63), query_lens=(130, 33, 1, 0), sinks=True, num_kv_heads=1),
    AttentionCase(
        "invariant_both",
        context_lens=(600, 0, 5, 63),
        query_lens=(150, 33, 1, 0),
        new_lens=(150, 1100, 1, 4),
        dtype=torch.bfloat16,
        num_kv_heads=1,
    ),
    AttentionCase(
        "invariant_steps",
        context_lens=(0, 100, 0),
        query_lens=(700, 150, 1500),
        new_lens=(700, 150, 1500),
        dtype=torch.bfloat16,
        num_kv_heads=1,
    ),
    AttentionCase(
        "invariant_e4m3",
        context_lens=(700, 0, 63),
        query_lens=(40, 3, 2),
        new_lens=(40, 3, 2),
        cache_dtype=torch.float8_e4m3fn,
        scales_rank=2,
        alibi=True,
        mask="kv_heads",
        positions="anywhere",
    ),
]


@pytest.mark.parametrize("case", INVARIANT, ids=lambda case: case.name)
def test_same_bits_alone_in_any_batch_and_on_two_cores(case: AttentionCase) -> None:
    arguments = build(case)
    expected = run(arguments)
    assert_attention(case.op, arguments, *expected)
    assert_all_same(run(arguments, cores=2), expected)
    for order in ([case.num_seqs - 1, 1, 0], [1], [0]):
        taken, rows = take_sequences(arguments, order)
        taken["max_seqlen_q"] = max((case.query_lens or ())[seq] for seq in order)
        assert_all_same(run(taken, cores=1 + len(order) % 2), tuple(result[rows] for result in expected))


@pytest.mark.parametrize("heads", [None, 2, 4])
@pytest.mark.parametrize("columns", [0, 37, 700])
def test_masks_of_any_width_and_strides(columns: int, heads: int | None) -> None:
    case = AttentionCase(
        "mask", context_lens=(600, 40), query_lens=(3, 20), new_lens=(90, 20), group=2, head_dim=40, causal=False
    )
    arguments = build(case)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand((columns + 3, 23), generator=generator).T[:, 1 : columns + 1] < 0.5
    arguments["attn_mask"] = mask if heads is None else mask.expand(heads, 23, columns)
    assert_attention(case.op, arguments, *run(arguments))


def test_what_is_outside_of_tables_and_cache_holds_no_keys() -> None:
    case = AttentionCase("outside", context_lens=(600, 40, 64), query_lens=(5, 3, 2), mask="shared", causal=False)
    arguments = build(case)
    width = arguments["block_tables"].shape[1]
    mask = torch.ones((10, width * case.block_size), dtype=torch.bool)
    outside = dict(arguments, attn_mask=None, block_tables=arguments["block_tables"].clone())
    for seq, block, block_id in ((0, 3, arguments["kv_cache"].shape[1]), (0, 37, -7), (2, 0, 2**31 - 1)):
        outside["block_tables"][seq, block] = block_id
        first = int(arguments["cu_seqlens_q"][seq])
        rows = slice(first, int(arguments["cu_seqlens_q"][seq + 1]))
        mask[rows, block * case.block_size : (block + 1) * case.block_size] = False
    outside["context_lens"] = torch.tensor([600, -5, 64], dtype=torch.int32)
    mask[5:8] = False
    out, lse, max_logits = run(outside)
    arguments["attn_mask"] = mask
    assert_attention(case.op, arguments, out, lse, max_logits)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["query", "kv_cache", "block_tables"])
def test_calls_without_keys(name: str, sinks: bool) -> None:
    case = AttentionCase(
        "nothing", context_lens=(0, 0), query_lens=(3, 1), sinks=sinks, value_dim=40, padding_rows=2 * (name != "query")
    )
    arguments = build(case)
    if name == "query":
        arguments = take_sequences(arguments, [])[0]
    elif name == "kv_cache":
        arguments["kv_cache"] = arguments["kv_cache"][:, :0]
    else:
        arguments["block_tables"] = arguments["block_tables"][:, :0]
    assert_attention(case.op, arguments, *run(arguments))


def test_the_layers_of_a_step_share_a_plan() -> None:
    case = AttentionCase("layers", context_lens=(40, 17), query_lens=(3, 2), new_lens=(3, 2), mask="shared")
    arguments = build(case)
    made = []

    def counted(*given: Any) -> VarlenPlan:
        made.append(given)
        return varlen_plan(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_plan", counted)
        for step in range(1, 3):
            for layer in range(3):
                arguments["key"] = build(case, seed=layer)["key"]
                assert_attention(case.op, arguments, *run(arguments))
            assert len(made) == step
            arguments["context_lens"].sub_(1)


@strict_only
def test_work_follows_the_keys_that_are_seen_and_not_what_tables_and_caches_could_hold() -> None:
    case = AttentionCase("capacity", context_lens=(700, 40), query_lens=(9, 30), num_kv_heads=1)
    arguments = build(case)

    tables = torch.nn.functional.pad(arguments["block_tables"], (0, 3000), value=-1)
    cache = torch.nn.functional.pad(arguments["kv_cache"], (0, 0) * 3 + (0, 300), value=float("nan"))
    tallies, expected = counted(arguments)
    more_tallies, found = counted(dict(arguments, block_tables=tables, kv_cache=cache, max_seqlen_k=2**20))
    assert_all_same(found, expected)
    assert more_tallies == tallies


@pytest.mark.parametrize("scale", [1e-10, 1e-15, 1e-30])
def test_rows_without_keys_see_none_however_small_the_scales_are(scale: float) -> None:
    case = AttentionCase("tiny", (40, 0, 20), (5, 3, 7), cache_dtype=torch.int8, scales_rank=2, block_size=8)
    arguments = build(case)
    arguments["kv_scales"][0] = torch.tensor([scale, 0.01])
    arguments["query_positions"] = torch.arange(15, dtype=torch.int32)
    arguments["query_positions"][::2] = -5
    assert_attention(case.op, arguments, *run(arguments))


def test_half_precision_keys_times_scales_of_their_own_may_be_large() -> None:
    case = AttentionCase(
        "large", (40, 20), (5, 7), (5, 7), dtype=torch.float16, cache_dtype=torch.int8, scales_rank=4, block_size=8
    )
    arguments = build(case)
    arguments["kv_scales"][0] *= 600 / arguments["kv_scales"][0].nan_to_num().max()
    arguments["query"] *= 1e-3
    out, lse, _ = run(arguments)
    expected, expected_lse, _ = oracle(case.op, arguments)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "starts", [[0, 5, 0, 5, 0, 12], [3, 5, 4, 9, 12, 12], [7, 7, 7, 7, 7, 7], [-9, 40, 3, 12, 99, 5]]
)
def test_starts_that_are_none_do_no_harm(starts: list[int]) -> None:
    case = AttentionCase("wild", (40, 0, 20, 8, 9), (5, 3, 2, 1, 1), block_size=8)
    arguments = build(case)
    arguments["cu_seqlens_q"] = torch.tensor(starts, dtype=torch.int32)
    for part in run(arguments):
        assert not part.isnan().any()


def test_the_widest_heads_of_a_long_prompt_fit_on_chip() -> None:
    """What fits is seen by running: numbers are other tests' affair."""
    case = AttentionCase(
        "widest", (0,), (256,), (1500,), num_kv_heads=8, group=4, head_dim=256, dtype=torch.bfloat16, block_size=8
    )
    assert all(part.isfinite().all() for part in run(build(case)))
