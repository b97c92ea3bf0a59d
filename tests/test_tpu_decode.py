"""The TPU's decode kernel against the reference, interpreted on the CPU."""

from typing import Any

import pytest
import torch
from jax.experimental.pallas import tpu as pltpu
from jax_arrays import to_jax, to_torch

from torch_paged.backends.tpu.block_sizes import CHIPS
from torch_paged.backends.tpu.decode import paged_attention
from torch_paged.testing import AttentionCase, assert_attention, build

INTERPRETERS: dict[str, Any] = {
    "generic": True,
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
    scale = arguments["softmax_scale"] or arguments["query"].shape[-1] ** -0.5
    options = {name: arguments[name] for name in _OPTIONS}
    results = paged_attention(
        *arrays, softmax_scale=scale, **options, stats=True, chip=CHIPS[chip], interpret=interpret
    )
    return tuple(map(to_torch, results))


@pytest.mark.parametrize("interpret", INTERPRETERS.values(), ids=INTERPRETERS)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("float32", context_lens=(17, 0, 63, 130), stored_dim=128, dtype=torch.float32),
        AttentionCase("empty_between", context_lens=(0, 600, 0, 0, 1300, 512, 0), head_dim=128, dtype=torch.bfloat16),
    ],
    ids=lambda case: case.name,
)
def test_every_interpreter(case: AttentionCase, interpret: Any) -> None:
    arguments = build(case)
    assert_attention(case.op, arguments, *run(arguments, interpret))


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("all_empty", context_lens=(0, 0), head_dim=192, stored_dim=256, block_size=8, sinks=True),
        AttentionCase("window", context_lens=(17, 0, 63, 130), stored_dim=128, sliding_window=20, sinks=True, group=3),
        AttentionCase("chunk", context_lens=(17, 63, 130), stored_dim=128, attention_chunk=16, sliding_window=9),
        AttentionCase("alibi_cap", stored_dim=128, alibi=True, logits_soft_cap=3.0, dtype=torch.bfloat16, group=17),
        AttentionCase("mask", stored_dim=128, mask="heads", sliding_window=33, group=5),
        AttentionCase("mask_long", context_lens=(700, 3), head_dim=128, mask="kv_heads", block_size=8),
        AttentionCase("int8", stored_dim=128, cache_dtype=torch.int8, scales_rank=1, dtype=torch.bfloat16),
        AttentionCase("e4m3", stored_dim=128, cache_dtype=torch.float8_e4m3fn, scales_rank=2, value_dim=40),
        AttentionCase("e5m2", stored_dim=128, cache_dtype=torch.float8_e5m2, scales_rank=4, mask="shared"),
    ],
    ids=lambda case: case.name,
)
def test_options(case: AttentionCase) -> None:
    arguments = build(case)
    assert_attention(case.op, arguments, *run(arguments, INTERPRETERS["on_wait"]))
