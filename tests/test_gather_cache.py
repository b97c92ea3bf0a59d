"""Dense copies of paged sequences: the same bytes as the reference, and the inverse of a write."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_paged.testing import GatherCase, assert_same
from torch_paged.testing.backends import Backend, backends_here
from torch_paged.testing.named import GATHER_CASES, QUANTIZED_DTYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", GATHER_CASES, ids=lambda case: case.name)
def test_case(backend: Backend, case: GatherCase) -> None:
    backend.check(case)


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=str)
def test_every_stored_byte_is_read_as_torch_reads_it(backend: Backend, dtype: torch.dtype) -> None:
    """NaN and infinities included."""
    stored = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    size = backend.block_size(4)
    cache = stored.reshape(2, 1, 1, size, 128 // size).clone()
    scales = torch.tensor([0.5, 3.0])
    lens = torch.tensor([size], dtype=torch.int32)
    arguments = {"kv_cache": cache, "block_tables": lens[:, None] - size, "context_lens": lens, "max_len": size}
    dense = backend("gather_cache", {**arguments, "kv_scales": scales, "starts": None})
    for side, read in enumerate(dense):
        expected = cache[side].float() * scales[side]
        torch.testing.assert_close(read, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", backends_here(), ids=lambda backend: backend.name)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 3, 8, 16]),
    head_dim=st.sampled_from([1, 17, 64]),
    padding=st.integers(0, 3),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_write_then_gather(
    backend: Backend, lengths: list[int], block_size: int, head_dim: int, padding: int, threads: int, seed: int
) -> None:
    """What was written to the slots comes back, whatever the blocks are."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in lengths]
    ids = torch.randperm(sum(counts) + 2, generator=generator)
    width = max(counts) + 1
    tables = torch.full((len(lengths), width), -1, dtype=torch.int32)
    slots = []
    for seq, (length, mine) in enumerate(zip(lengths, ids.split([*counts, 2]), strict=False)):
        tables[seq, : mine.numel()] = mine
        positions = torch.arange(length)
        slots.append(mine[positions // block_size] * block_size + positions % block_size)
    key = torch.randn((sum(lengths), 2, head_dim), generator=generator)
    cache = torch.full((2, ids.numel(), 2, block_size, head_dim + padding), float("nan"))
    write = {"key": key, "value": -key, "kv_cache": cache, "slot_mapping": torch.cat(slots), "kv_scales": None}
    backend("reshape_and_cache", write)
    starts = torch.tensor([max(lengths) - length for length in lengths], dtype=torch.int32)
    dense_key, dense_value = backend(
        "gather_cache",
        {
            "kv_cache": cache,
            "block_tables": tables,
            "context_lens": torch.tensor(lengths, dtype=torch.int32),
            "max_len": max(lengths),
            "starts": starts,
        },
    )
    expected = torch.zeros_like(dense_key)
    for seq, (start, rows) in enumerate(zip(starts.tolist(), key.split(lengths), strict=True)):
        expected[seq, :, start:, :head_dim] = rows.transpose(0, 1)
    assert_same(dense_key, expected, "key")
    assert_same(dense_value, torch.where(expected == 0, expected, -expected), "value")
