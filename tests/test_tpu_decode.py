"""The TPU's decode kernel against the reference, interpreted on the CPU."""

from functools import partial
from typing import Any

import jax
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu
from jax_arrays import to_jax, to_torch

from torch_paged.backends.tpu import block_sizes, decode
from torch_paged.backends.tpu.block_sizes import CHIPS, Blocks, Chip, Page, decode_blocks
from torch_paged.backends.tpu.bridge_interpret import COMPILER_OPTIONS, no_races
from torch_paged.backends.tpu.decode import paged_attention
from torch_paged.backends.tpu.logits import dot
from torch_paged.testing import AttentionCase, assert_attention, assert_same, build

SIMULATED: dict[str, Any] = {
    "on_wait": pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan"),
    "eager": pltpu.InterpretParams(dma_execution_mode="eager", detect_races=True, uninitialized_memory="nan"),
}
_ARRAYS = (
    *("query", "kv_cache", "block_tables", "context_lens"),
    *("kv_scales", "sinks", "alibi_slopes", "attn_mask"),
)
_OPTIONS = ("logits_soft_cap", "sliding_window", "attention_chunk", "value_dim")


def run(arguments: dict[str, Any], interpret: Any, chip: str = "v5e") -> tuple[torch.Tensor, ...]:
    """Return out, lse and max_logits of the kernel."""
    arrays: list[Any] = [None if arguments[name] is None else to_jax(arguments[name]) for name in _ARRAYS]
    options = {name: arguments[name] for name in _OPTIONS}
    options["softmax_scale"] = arguments["softmax_scale"] or arguments["query"].shape[-1] ** -0.5
    call = partial(paged_attention, **options, stats=True, chip=CHIPS[chip], interpret=interpret)
    with no_races("paged_attention"):
        results = jax.jit(call, compiler_options=COMPILER_OPTIONS)(*arrays)
        return tuple(map(to_torch, results))


def test_generic_interpreter() -> None:
    case = AttentionCase("float32", (17, 0, 63, 130), stored_dim=128)
    arguments = build(case)
    assert_attention(case.op, arguments, *run(arguments, True))


def test_many_lanes_of_float32_are_as_exact_as_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(rows, 640, generator=generator) for rows in (300, 64))
    exact = query.double() @ keys.double().T
    error = to_torch(jax.jit(lambda a, b: dot(a, b, (1, 1)))(to_jax(query), to_jax(keys))) - exact
    assert error.square().mean() < 1.5 * (query @ keys.T - exact).square().mean()


@pytest.mark.parametrize("copies", SIMULATED)
def test_copies_of_many_blocks_at_once_and_as_late_as_they_may(copies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 tokens, full ones among them, are multiplied in halves."""
    monkeypatch.setattr(decode, "decode_blocks", lambda *_: Blocks(pages=4, tile_pages=2, buffers=2))
    case = AttentionCase("many_blocks", (0, 100, 0, 0, 210, 128, 0), head_dim=128, dtype=torch.bfloat16)
    arguments = build(case)
    assert_attention(case.op, arguments, *run(arguments, SIMULATED[copies]))


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("all_empty", context_lens=(0, 0), head_dim=192, stored_dim=256, block_size=8, sinks=True),
        AttentionCase("window", context_lens=(17, 0, 63, 130), stored_dim=128, sliding_window=20, sinks=True, group=3),
        AttentionCase("alibi_cap", stored_dim=128, alibi=True, logits_soft_cap=3.0, dtype=torch.bfloat16, group=17),
        AttentionCase("mask", stored_dim=128, mask="heads", sliding_window=33, group=5),
        AttentionCase("mask_long", context_lens=(300, 3), head_dim=128, mask="kv_heads", block_size=8),
        AttentionCase("int8", stored_dim=128, cache_dtype=torch.int8, scales_rank=1, dtype=torch.bfloat16),
        AttentionCase("e4m3", stored_dim=128, cache_dtype=torch.float8_e4m3fn, scales_rank=2, value_dim=40),
        AttentionCase("e5m2", stored_dim=128, cache_dtype=torch.float8_e5m2, scales_rank=4, mask="shared"),
    ],
    ids=lambda case: case.name,
)
def test_options(case: AttentionCase) -> None:
    arguments = build(case)
    assert_attention(case.op, arguments, *run(arguments, SIMULATED["on_wait"]))


def test_a_chunk_begins_within_a_page() -> None:
    arguments = build(
        AttentionCase("chunk", context_lens=(17, 33, 24), stored_dim=128, attention_chunk=12, block_size=8)
    )
    assert_attention("paged_attention", arguments, *run(arguments, True))


def test_one_key_in_the_window_and_a_chunk_that_begins_with_the_query() -> None:
    case = AttentionCase("nearest", context_lens=(17, 33, 1), stored_dim=128, sliding_window=1, block_size=8)
    for arguments in (build(case), {**build(case), "sliding_window": 9, "attention_chunk": 16}):
        assert_attention(case.op, arguments, *run(arguments, True))


def test_block_ids_outside_of_the_cache_hold_no_keys_and_lengths_end_with_the_table() -> None:
    case = AttentionCase("outside", context_lens=(600, 33, 48), stored_dim=128, mask="shared")
    arguments = build(case)
    arguments["block_tables"] = arguments["block_tables"][:, : -(-600 // case.block_size)].contiguous()
    arguments["attn_mask"] = torch.ones((3, 608), dtype=torch.bool)
    wild = {**arguments, "block_tables": arguments["block_tables"].clone(), "attn_mask": None}
    for seq, block, block_id in ((0, 1, -7), (0, 36, arguments["kv_cache"].shape[1]), (1, 0, 2**31 - 1)):
        wild["block_tables"][seq, block] = block_id
        arguments["attn_mask"][seq, block * case.block_size : (block + 1) * case.block_size] = False
    assert_attention(case.op, arguments, *run(wild, SIMULATED["on_wait"]))
    arguments["kv_cache"] = wild["kv_cache"] = wild["kv_cache"].nan_to_num()
    arguments["context_lens"], wild["context_lens"] = (
        torch.tensor([length, 33, 48], dtype=torch.int32) for length in (608, 2**31 - 1)
    )
    assert_attention(case.op, arguments, *run(wild, True))
    wild["context_lens"] = torch.tensor([-5, 33, 48], dtype=torch.int32)
    out, lse, max_logits = run(wild, True)
    assert not out[0].any()
    assert (lse[0] == max_logits[0]).all()
    assert (lse[0] == -torch.inf).all()


def test_short_sequences_are_multiplied_several_at_a_time() -> None:
    """All of the first four, and of the last, and three of the others."""
    case = AttentionCase(
        "short",
        context_lens=(64, 17, 63, 1, 0, 64, 33, 48, 5, 16, 64, 2),
        num_kv_heads=1,
        stored_dim=128,
        sinks=True,
        alibi=True,
    )
    arguments = build(case)
    assert_attention(case.op, arguments, *run(arguments, SIMULATED["on_wait"]))


@pytest.mark.parametrize("num_seqs", [1, 3])
def test_two_cores_share_the_sequences_or_the_heads_of_one(num_seqs: int) -> None:
    case = AttentionCase("cores", context_lens=(40, 0, 21)[:num_seqs], stored_dim=128, alibi=True, sinks=True)
    arguments = build(case)
    assert_attention(case.op, arguments, *run(arguments, SIMULATED["on_wait"], "v4"))


def test_heads_of_two_cores_sum_in_the_order_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sizes, "_MULTIPLIED_ROWS", 256)
    batch = build(AttentionCase("order", context_lens=(300, 20), stored_dim=128))
    alone = {**batch, **{name: batch[name][:1] for name in ("query", "block_tables", "context_lens")}}
    for actual, expected in zip(run(alone, True, "v4"), run(batch, True, "v4"), strict=True):
        assert_same(actual, expected[:1])


def test_a_table_too_long_for_smem_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = build(AttentionCase("long_table", context_lens=(40, 0, 21), stored_dim=128, mask="kv_heads"))
    expected = run(arguments, True)
    monkeypatch.setattr(decode, "TABLE_WORDS", 2 * arguments["block_tables"].shape[1])
    for actual, whole in zip(run(arguments, True), expected, strict=True):
        assert_same(actual, whole)


def test_no_columns_no_keys() -> None:
    arguments = build(AttentionCase("empty", context_lens=(0, 0), stored_dim=128, sinks=True))
    arguments["block_tables"] = arguments["block_tables"][:, :0]
    out, lse, max_logits = run(arguments, True)
    assert not out.any()
    assert torch.equal(lse, arguments["sinks"].expand_as(lse))
    assert (max_logits == -torch.inf).all()


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("kv_heads", [1, 8, 16, 64])
def test_blocks_fit_vmem(chip: Chip, kv_heads: int) -> None:
    page = Page(kv_heads, block_size=128, stored_dim=256, itemsize=4)
    blocks = decode_blocks(chip, page, width=4096, rows=kv_heads * 8, key_bytes=64, num_seqs=8)
    assert blocks.buffers >= 2
    assert blocks.pages % blocks.tile_pages == 0
    if page.vmem_bytes < chip.kernel_bytes * 3 // 8:
        assert blocks.buffers * blocks.pages * page.vmem_bytes <= chip.kernel_bytes
    assert decode_blocks(chip, page, width=1, rows=8, key_bytes=0, num_seqs=3).pages == 1
    small = Page(kv_heads, block_size=16, stored_dim=128, itemsize=1)
    blocks = decode_blocks(chip, small, width=4096, rows=kv_heads * 8, key_bytes=64)
    assert blocks.tile_pages in (blocks.pages, max(8, blocks.tile_pages))  # parts of a block begin at whole lanes
