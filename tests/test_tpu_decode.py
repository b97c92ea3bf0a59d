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


def check(case: AttentionCase, interpret: Any, chip: str = "v5e") -> None:
    """Assert that a case gives what the reference gives."""
    arguments = build(case)
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    results = paged_attention(
        *map(to_jax, tensors), softmax_scale=scale, stats=True, chip=CHIPS[chip], interpret=interpret
    )
    assert_attention(case.op, arguments, *map(to_torch, results))


@pytest.mark.parametrize("interpret", INTERPRETERS.values(), ids=INTERPRETERS)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("float32", stored_dim=128),
        AttentionCase("bfloat16", stored_dim=128, dtype=torch.bfloat16),
        AttentionCase(
            "empty_between", context_lens=(0, 600, 0, 0, 1300, 512, 0), head_dim=128, dtype=torch.bfloat16, group=1
        ),
        AttentionCase("all_empty", context_lens=(0, 0), head_dim=192, stored_dim=256, block_size=8, group=8),
    ],
    ids=lambda case: case.name,
)
def test_decode(case: AttentionCase, interpret: Any) -> None:
    check(case, interpret)
