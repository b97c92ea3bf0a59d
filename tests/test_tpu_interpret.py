"""The interpreted TPU kernels on CPU tensors: the same functions and ops, and a quick part of the conformance cases.

``make test-tpu`` runs all conformance tests this way, and this part with every way to interpret.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_paged.backends.tpu import BACKEND, bridge_interpret
from torch_paged.testing import (
    AttentionCase,
    CopyCase,
    GatherCase,
    MergeCase,
    WriteCase,
    assert_attention,
    assert_merged,
    assert_same,
    build,
)
from torch_paged.testing.backends import REFERENCE, Backend, Refused
from torch_paged.testing.processes import run_python

BF16, INT8, E4M3 = torch.bfloat16, torch.int8, torch.float8_e4m3fn

DECODE = """
import torch, torch_paged
from torch_paged import dispatch
kv_cache = torch.full((2, 4, 1, 8, 128), float("nan"))
tables = torch.tensor([[2, 1], [-1, -1]], dtype=torch.int32)
lengths = torch.tensor([9, 0], dtype=torch.int32)
key = torch.randn(9, 1, 64)
slots = torch.tensor([*range(16, 24), 8])
query = torch.randn(2, 1, 64)
"""
PUBLIC = (
    DECODE
    + """
@torch.compile(fullgraph=True)
def step(key, query, slots, lengths):
    torch_paged.reshape_and_cache(key, -key, kv_cache, slots)
    return torch_paged.paged_attention(query, kv_cache, tables, lengths)

out = step(key, query, slots, lengths)
torch.testing.assert_close(torch_paged.paged_attention(query, kv_cache, tables, lengths), out)
weights = (key[:, 0] @ query[0, 0] / 8).softmax(0)
torch.testing.assert_close(out[0, 0], -weights @ key[:, 0])
assert (out[1] == 0).all()
print(dispatch.served()['cpu'], torch_paged.explain("paged_attention", query=query, kv_cache=kv_cache,
    block_tables=tables, context_lens=lengths))
"""
)


@cache
def interpreted() -> Backend:
    return Backend("tpu", torch.device("cpu"), kernels=bridge_interpret.kernels(BACKEND))


def test_public_functions_and_compiled_ones_run_the_kernels() -> None:
    printed = run_python(PUBLIC, TORCH_PAGED_TPU_INTERPRET="1").stdout.splitlines()[-1]
    assert printed == "tpu paged_attention on cpu: tpu, decode, v5e, interpreted, cache: float32"


@pytest.mark.parametrize("value", ["0", ""])
def test_the_setting_can_say_no(value: str) -> None:
    code = "from torch_paged import dispatch; import torch_paged; print(dispatch.served()['cpu'])"
    assert run_python(code, TORCH_PAGED_TPU_INTERPRET=value).stdout.strip() == "cpu"


@pytest.mark.parametrize("value", ["2", "on_wait,eager", "1,race"])
def test_a_wrong_setting_makes_each_call_raise(value: str) -> None:
    code = DECODE + "torch_paged.paged_attention(query, kv_cache, tables, lengths)"
    failed = run_python(code, check=False, TORCH_PAGED_TPU_INTERPRET=value).stderr.splitlines()[-1]
    assert failed == (
        "ValueError: torch_paged: TORCH_PAGED_TPU_INTERPRET must be 0, 1 or a list of on_wait, eager, races, but not "
        f"on_wait with eager, got {value!r}"
    )


def test_values_are_checked_when_debugging_and_harmless_otherwise() -> None:
    code = DECODE + "tables[0, 1] = 4\nprint(torch_paged.paged_attention(query, kv_cache * 0, tables, lengths).shape)"
    failed = run_python(code, check=False, TORCH_PAGED_DEBUG="1", TORCH_PAGED_TPU_INTERPRET="1").stderr.splitlines()[-1]
    rule = "block_tables must lie in [0, N = 4) where used, got 4 at index (0, 1)"
    assert failed == f"ValueError: paged_attention: {rule}"
    assert run_python(code, TORCH_PAGED_TPU_INTERPRET="1").stdout.strip() == "torch.Size([2, 1, 64])"


def test_a_write_outside_the_cache_is_dropped() -> None:
    arguments = build(WriteCase("dropped", num_tokens=8, head_dim=128))
    arguments["slot_mapping"] = torch.tensor([80, 81, -2, 2**31, 2**32 + 3, 2**40, -(2**40), 5])
    before = arguments["kv_cache"].clone()
    bridge_interpret.kernels(BACKEND)["reshape_and_cache"](**arguments)
    assert_same(arguments["kv_cache"][0, 0, :, 5], arguments["key"][7])
    arguments["kv_cache"][:, 0, :, 5] = before[:, 0, :, 5]
    assert_same(arguments["kv_cache"], before)


def test_copies_of_blocks_outside_the_cache_are_skipped() -> None:
    arguments = build(CopyCase("outside", pairs=((0, 6), (6, 1), (2**31, 2), (3, 4)), block_size=8, stored_dim=128))
    before = arguments["kv_cache"].clone()
    bridge_interpret.kernels(BACKEND)["copy_blocks"](**arguments)
    assert_same(arguments["kv_cache"][:, 4], before[:, 3])
    arguments["kv_cache"][:, 4] = before[:, 4]
    assert_same(arguments["kv_cache"], before)


WRITES = [
    WriteCase("rows", num_tokens=17, skipped_tokens=5, value_dim=48),
    WriteCase("bfloat16", head_dim=128, dtype=BF16, num_kv_heads=1, block_size=8),
    WriteCase("int8", cache_dtype=INT8, scales_rank=2, head_dim=80, value_dim=64, dtype=BF16),
    WriteCase("per token", cache_dtype=E4M3, scales_rank=4, skipped_tokens=2),
    WriteCase("per token, int8", cache_dtype=INT8, scales_rank=4, magnitude=3.0),
]


@pytest.mark.parametrize("case", WRITES, ids=lambda case: case.name)
def test_writes(case: WriteCase) -> None:
    arguments, expected = build(case), build(case)
    interpreted()(case.op, arguments)
    REFERENCE(case.op, expected)
    for name in ("kv_cache", "kv_scales"):
        if expected[name] is not None:
            assert_same(arguments[name], expected[name], name)


def test_copies_gathers_and_merges() -> None:
    copy = CopyCase("copy", pairs=((0, 1), (1, 2), (-1, 3)), block_size=8, cache_dtype=INT8, scales_rank=4)
    arguments, expected = build(copy), build(copy)
    interpreted()("copy_blocks", arguments)
    REFERENCE("copy_blocks", expected)
    for name in ("kv_cache", "kv_scales"):
        assert_same(arguments[name], expected[name], name)
    gather = build(GatherCase("gather", left_padded=True, missing_entries=True, cache_dtype=E4M3, scales_rank=4))
    for dense, wanted in zip(interpreted()("gather_cache", gather), REFERENCE("gather_cache", gather), strict=True):
        assert_same(dense, wanted)
    merge = build(MergeCase("merge", sinks=True, empty=True, dtype=BF16))
    assert_merged(merge, *interpreted()("merge_attention_states", merge))


QUERIES = (5, 0, 3)
ATTENTION = [
    AttentionCase("decode", context_lens=(17, 0, 40)),
    AttentionCase("decode, bfloat16", context_lens=(17, 0, 40), dtype=BF16, group=3, head_dim=80, sinks=True),
    AttentionCase("cache", context_lens=(17, 0, 40), query_lens=QUERIES),
    AttentionCase("both", context_lens=(17, 0, 40), query_lens=QUERIES, new_lens=QUERIES, dtype=BF16, sinks=True),
]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention(case: AttentionCase) -> None:
    arguments = build(case)
    assert_attention(case.op, arguments, *interpreted()(case.op, arguments, stats=True))


@pytest.mark.parametrize("lengths", [(4, 5, 5, 8), (0, -3, 2**31 - 1, 5), (0, 7, 3, 8), (-(2**31), 5, 5, 9)], ids=str)
def test_lengths_that_make_no_sense_leave_no_row_unwritten(lengths: tuple[int, ...]) -> None:
    arguments = build(AttentionCase("wild", context_lens=(17, 0, 40), query_lens=QUERIES))
    arguments["cu_seqlens_q"] = torch.tensor(lengths, dtype=torch.int32)
    arguments["context_lens"] = torch.tensor((2**31 - 1, -5, 40), dtype=torch.int32)
    arguments["kv_cache"] = arguments["kv_cache"].nan_to_num()
    for result in interpreted()("flash_attn_varlen", arguments, stats=True):
        assert not result.isnan().any()


def test_a_race_is_found_in_any_kernel_of_a_call() -> None:
    def copy(wait: bool) -> Any:
        def kernel(source: Any, out: Any, buffer: Any, semaphore: Any) -> None:
            transfer = pltpu.make_async_copy(source, buffer, semaphore)
            transfer.start()
            if wait:
                transfer.wait()
            out[...] = buffer[...]
            if not wait:
                transfer.wait()

        shape = (8, 128)
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32), pltpu.SemaphoreType.DMA],
            interpret=pltpu.InterpretParams(dma_execution_mode="eager", detect_races=True),
        )

    values = jnp.ones((8, 128))
    with bridge_interpret.no_races("both"):
        jax.block_until_ready(copy(wait=True)(copy(wait=True)(values)))
    with (
        pytest.raises(RuntimeError, match=r"^both: the interpreter found a race: RACE DETECTED"),
        bridge_interpret.no_races("both"),
    ):
        jax.block_until_ready(copy(wait=True)(copy(wait=False)(values)))


def test_what_is_refused_raises_its_sentence() -> None:
    for case in (AttentionCase("half", dtype=torch.float16), AttentionCase("blocks", block_size=3)):
        with pytest.raises(Refused, match=r"^paged_attention: backend 'tpu' does not support "):
            interpreted()(case.op, build(case))


def test_a_program_of_other_shapes_counts_among_those_that_are_kept() -> None:
    before = bridge_interpret._jitted.cache_info().misses
    for head_dim in (64, 64, 96):
        arguments = build(MergeCase("shapes", head_dim=head_dim))
        assert_merged(arguments, *interpreted()("merge_attention_states", arguments))
    assert bridge_interpret._jitted.cache_info().misses == before + 2
