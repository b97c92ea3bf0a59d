"""A context of a million tokens: decode, and a chunk of a prefill, against the reference."""

from typing import Any

import pytest
import torch

from torch_paged import dispatch
from torch_paged.testing import AttentionCase, assert_attention, assert_same, build
from torch_paged.testing.backends import Backend

pytestmark = pytest.mark.skipif(
    dispatch.served().get("cpu") != "cpu", reason="the CPU kernels are not what serves this process"
)

MILLION = 2**20
INT8: dict[str, Any] = {"cache_dtype": torch.int8, "scales_rank": 2}


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("million_decode", (MILLION,), num_kv_heads=1, group=1, head_dim=16),
        AttentionCase("million_int8", (MILLION, 3), num_kv_heads=1, group=1, head_dim=16, dtype=torch.bfloat16, **INT8),
        AttentionCase("million_chunk", (MILLION,), (18,), num_kv_heads=1, group=1, head_dim=16, **INT8),
        AttentionCase("million_window", (MILLION,), num_kv_heads=1, group=1, head_dim=16, sliding_window=70_000),
    ],
    ids=lambda case: case.name,
)
def test_a_million_tokens(backend: Backend, case: AttentionCase) -> None:
    arguments = build(case)
    results = backend(case.op, arguments, stats=True)
    assert_attention(case.op, arguments, *results)
    torch.set_num_threads(2)
    for actual, expected in zip(backend(case.op, arguments, stats=True), results, strict=True):
        assert_same(actual, expected)
