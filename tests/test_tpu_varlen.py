"""The TPU's kernel of packed ragged queries against the reference, interpreted on the CPU."""

from typing import Any

import jax
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu
from jax_arrays import to_jax, to_torch

from torch_paged.backends.tpu.block_sizes import CHIPS
from torch_paged.backends.tpu.calls import jax_call
from torch_paged.backends.tpu.varlen import flash_attn_varlen
from torch_paged.testing import AttentionCase, assert_attention, build


def case(name: str, **fields: Any) -> AttentionCase:
    """Return a case of four sequences, one without queries, one longer than a block of keys."""
    shape: dict[str, Any] = {"context_lens": (37, 63, 0, 700), "query_lens": (17, 0, 5, 40), "stored_dim": 128}
    return AttentionCase(name, **{**shape, "block_size": 64, **fields})


def check(case: AttentionCase, interpret: Any = True) -> None:
    """Assert that a case gives what the reference gives, with and without statistics."""
    arguments = build(case)
    call = jax_call("flash_attn_varlen.with_stats", arguments)
    function = jax.jit(
        lambda *arrays: flash_attn_varlen(*arrays, **call.options, chip=CHIPS["v5e"], interpret=interpret)
    )
    arrays = [None if array is None else to_jax(array) for array in call.arrays]
    assert_attention(case.op, arguments, *map(to_torch, function(*arrays)))


BOTH = case("both", new_lens=(17, 0, 5, 40))


@pytest.mark.parametrize(
    "case",
    [
        BOTH,
        case("new", context_lens=None, new_lens=(37, 0, 3, 140), num_kv_heads=1, group=3, dtype=torch.bfloat16),
        case("everything", positions="anywhere", sinks=True, alibi=True, padding_rows=5, logits_soft_cap=5.0),
        case("window", sliding_window=20, causal=False, head_dim=128, value_dim=40, block_size=8),
        case("chunk", attention_chunk=16, new_lens=(17, 0, 5, 40), dtype=torch.bfloat16),
    ],
    ids=lambda case: case.name,
)
def test_varlen(case: AttentionCase) -> None:
    check(case)


@pytest.mark.parametrize("copies", ["on_wait", "eager"])
def test_copies_and_races(copies: Any) -> None:
    check(BOTH, pltpu.InterpretParams(dma_execution_mode=copies, detect_races=True, uninitialized_memory="nan"))
