"""Deterministic random tensors for the cases: poisoned where nothing may be read, in the layouts that callers have."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torch_paged.contract.reference_cache import QMAX, quantize

GARBAGE_ENTRIES = (-1, -7, 2**31 - 1, -(2**31), 1_000_003)
"""What lies in table entries that no query uses."""

LAYOUTS = ("contiguous", "nhd", "strided")
"""How a cache lies in memory: (C, N, KH, S, DS), tokens before heads, or block-major with gaps."""


def generator_for(name: str, seed: int) -> torch.Generator:
    """Return a generator that depends on the case and the seed alone."""
    return torch.Generator().manual_seed(zlib.crc32(f"{name}/{seed}".encode()))


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor that spoils every result it reaches: NaN, or 127 in int8."""
    if dtype.itemsize == 1:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(dtype)  # NaN in both fp8 formats
    return torch.full(shape, float("nan"), dtype=dtype)


def random_rows(
    shape: tuple[int, int, int], live_rows: int, dtype: torch.dtype, generator: torch.Generator, strided: bool = False
) -> Tensor:
    """Return (T, heads, width) rows, poison from ``live_rows`` on; ``strided`` rows are a slice of a fused buffer."""
    tokens, heads, width = shape
    buffer = poison((tokens, heads + 3, width + 5) if strided else shape, dtype)
    rows = buffer[:, 2 : 2 + heads, :width] if strided else buffer
    rows[:live_rows] = torch.randn((live_rows, heads, width), generator=generator).to(dtype)
    return rows


def lay_out(cache: Tensor, layout: str) -> Tensor:
    """Return the same (C, N, KH, S, DS) cache in another memory layout, with a unit last stride."""
    sides, num_blocks, kv_heads, block_size, stored_dim = cache.shape
    if layout == "nhd":
        return cache.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "strided":
        buffer = poison((num_blocks, sides, kv_heads, block_size + 1, stored_dim + 3), cache.dtype)
        view = buffer.transpose(0, 1)[:, :, :, :block_size, :stored_dim]
        view.copy_(cache)
        return view
    return cache


def random_cache(
    live: Tensor,  # (N, S) bool
    widths: tuple[int, ...],  # live lanes of each side
    kv_heads: int,
    stored_dim: int,
    dtype: torch.dtype,
    scales_rank: int | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """Return a contiguous (C, N, KH, S, DS) cache and its scales, poison wherever ``live`` and ``widths`` say dead."""
    num_blocks, block_size = live.shape
    sides = len(widths)
    content = torch.randn((sides, num_blocks, kv_heads, block_size, stored_dim), generator=generator)
    scales = None
    if scales_rank is not None:
        shape = {1: (sides,), 2: (sides, kv_heads), 4: (sides, num_blocks, kv_heads, block_size)}[scales_rank]
        scales = (0.5 + torch.rand(shape, generator=generator)) * 2 / QMAX[dtype]
        full = scales if scales_rank == 4 else scales.reshape(sides, 1, -1, 1)
        content = quantize(content, full[..., None], dtype)
        if scales_rank == 4:
            scales = scales.masked_fill(~live[None, :, None, :], float("nan"))
    lanes = torch.arange(stored_dim) < torch.tensor(widths)[:, None]  # (C, DS)
    keep = live[None, :, None, :, None] & lanes[:, None, None, None, :]
    cache = torch.where(keep, content.to(dtype), poison((1,), dtype))
    return cache, scales


def storage_of(view: Tensor) -> Tensor:
    """Return all bytes of the memory below a view, to see what was written beside it."""
    return torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make torch.empty return NaN (or the largest integer), so that an element that a kernel forgot is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all(), "torch.utils.deterministic.fill_uninitialized_memory is off"
        yield
    finally:
        torch.use_deterministic_algorithms(before)
