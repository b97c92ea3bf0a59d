"""Contract line 12: caches of more than 2^31 elements, of which only the touched blocks take memory."""

import resource

import pytest
import torch

from torch_paged.testing import assert_attention, assert_same
from torch_paged.testing.backends import REFERENCE, Backend

KV_HEADS, BLOCK_SIZE, HEAD_DIM = 1, 16, 128
LENGTH = 40
MEMORY_LIMIT_BYTES = 2**28


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(("dtype", "quantised"), [(torch.int8, True), (torch.bfloat16, False)])
def test_blocks_behind_two_to_the_31(backend: Backend, dtype: torch.dtype, quantised: bool) -> None:
    block_elements = KV_HEADS * BLOCK_SIZE * HEAD_DIM
    num_blocks = 2**31 // block_elements + 5  # each side alone is beyond 2^31 elements
    cache = torch.empty((2, num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM), dtype=dtype)
    before = _peak_bytes()
    assert cache[0].numel() > 2**31
    scales = torch.tensor([0.03, 0.02]) if quantised else None
    last = num_blocks - 1
    tables = torch.tensor([[last, 3, last - 1]], dtype=torch.int32)
    positions = torch.arange(LENGTH)
    slots = tables[0, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    generator = torch.Generator().manual_seed(0)
    row_dtype = torch.float32 if quantised else dtype
    key, value = (torch.randn((LENGTH, 1, HEAD_DIM), generator=generator).to(row_dtype) for _ in range(2))
    write = {"key": key, "value": value, "kv_cache": cache, "slot_mapping": slots, "kv_scales": scales}
    backend("reshape_and_cache", write)

    small = torch.empty((2, 3, KV_HEADS, BLOCK_SIZE, HEAD_DIM), dtype=dtype)
    REFERENCE("reshape_and_cache", write | {"kv_cache": small, "slot_mapping": positions})
    lengths = torch.tensor([LENGTH], dtype=torch.int32)
    near = {"block_tables": torch.tensor([[0, 1, 2]], dtype=torch.int32), "context_lens": lengths, "kv_scales": scales}
    far = near | {"block_tables": tables}
    query = {"query": torch.randn((1, 4, HEAD_DIM), generator=generator).to(row_dtype)}
    results = backend("paged_attention", query | {"kv_cache": cache} | far, stats=True)
    assert_attention("paged_attention", query | {"kv_cache": small} | near, *results)

    pair = {"src_blocks": torch.tensor([last]), "dst_blocks": torch.tensor([last - 2])}
    backend("copy_blocks", {"kv_cache": cache, "kv_scales": scales} | pair)
    copied = far | {"block_tables": torch.tensor([[last - 2, 3, last - 1]], dtype=torch.int32), "max_len": LENGTH}
    dense = backend("gather_cache", {"kv_cache": cache} | copied)
    expected = REFERENCE("gather_cache", {"kv_cache": small} | near | {"max_len": LENGTH})
    for actual, wanted in zip(dense, expected, strict=True):
        assert_same(actual, wanted)
    assert _peak_bytes() - before < MEMORY_LIMIT_BYTES
