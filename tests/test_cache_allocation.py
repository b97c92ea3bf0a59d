"""Allocation: shapes, padding, scales, alignment, huge pages, and what it costs."""

import itertools
import math
import mmap
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_paged.backends import discover
from torch_paged.cache import KVCache, allocate_kv_cache, allocation, blocks_that_fit, cache_bytes
from torch_paged.cache.allocation import HUGE_PAGE_BYTES

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
LARGE = (300, 2, 16, 128)


def total_bytes(cache: KVCache) -> int:
    scales = cache.kv_scales
    return cache.kv_cache.nbytes + (0 if scales is None else scales.nbytes)


@pytest.mark.parametrize("dtype", PLAIN + QUANTISED, ids=str)
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("blocks", [3, 300])
def test_shape_zeros_and_scales(dtype: torch.dtype, latent: bool, blocks: int) -> None:
    sides = 1 if latent else 2
    shapes: dict[Any, Any] = {"tensor": (sides,), "head": (sides, 2), "token": (sides, blocks, 2, 16)}
    for scales in shapes if dtype in QUANTISED else [None]:
        cache = allocate_kv_cache(blocks, 2, 16, 72, dtype=dtype, latent=latent, scales=scales)
        assert cache.kv_cache.shape == (sides, blocks, 2, 16, 72)
        assert cache.kv_cache.dtype == dtype
        assert cache.kv_cache.is_contiguous()
        assert not cache.kv_cache.view(torch.uint8).any()
        assert total_bytes(cache) == cache_bytes(blocks, 2, 16, 72, dtype=dtype, latent=latent, scales=scales)
        if scales is None:
            assert cache.kv_scales is None
        else:
            assert cache.kv_scales is not None
            assert cache.kv_scales.shape == shapes[scales]
            assert cache.kv_scales.dtype == torch.float32
            assert (cache.kv_scales == 1).all()


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a backend that stores 128 lanes or a multiple of them."""
    known = discover()
    wide = replace(known["reference"], name="wide", head_dim_multiple=128)
    monkeypatch.setattr(allocation, "discover", lambda: {**known, "wide": wide})


@pytest.mark.parametrize(
    ("backend", "head_dim", "stored"),
    [("cpu", 80, 80), ("reference", 1, 1), ("wide", 1, 128), ("wide", 128, 128), ("wide", 129, 256)],
)
def test_padding_per_backend(backend: str, head_dim: int, stored: int) -> None:
    cache = allocate_kv_cache(2, 1, 4, head_dim, dtype=torch.bfloat16, backend=backend)
    assert cache.kv_cache.size(-1) == stored
    assert cache_bytes(2, 1, 4, head_dim, dtype=torch.bfloat16, backend=backend) == cache.kv_cache.nbytes


def test_large_cache_is_aligned_writable_and_owned() -> None:
    cache = allocate_kv_cache(*LARGE, dtype=torch.float32).kv_cache
    assert cache.data_ptr() % HUGE_PAGE_BYTES == 0
    others = [allocate_kv_cache(*LARGE, dtype=torch.float32).kv_cache for _ in range(3)]
    for index, tensor in enumerate([cache, *others]):
        tensor.fill_(index)
    view = cache[1, -1]
    del cache
    assert (view == 0).all()
    assert all((tensor == index).all() for index, tensor in enumerate(others, 1))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this platform has no huge-page advice")
def test_kernel_was_asked_for_huge_pages() -> None:
    asked = allocate_kv_cache(*LARGE, dtype=torch.float32)
    ordinary = allocate_kv_cache(*LARGE, dtype=torch.float32, huge_pages=False)
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert not asked.huge_pages
        return
    assert asked.huge_pages
    assert not ordinary.huge_pages
    if sys.platform == "linux":
        assert "hg" in vm_flags(asked.kv_cache.data_ptr())
        assert "hg" in vm_flags(asked.kv_cache.data_ptr() + asked.kv_cache.nbytes - 1)


def vm_flags(address: int) -> list[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(bound, 16) for bound in head.split("-"))
            inside = first <= address < last
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"address {address:#x} is not mapped")


@pytest.mark.parametrize("advice", ["missing", "refused"])
def test_platform_without_huge_pages_gets_ordinary_memory(monkeypatch: pytest.MonkeyPatch, advice: str) -> None:
    if advice == "missing":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)
    cache = allocate_kv_cache(*LARGE, dtype=torch.float16)
    assert not cache.huge_pages
    assert cache.kv_cache.shape == (2, *LARGE)
    assert not cache.kv_cache.any()


def test_meta_device_allocates_nothing() -> None:
    cache = allocate_kv_cache(10**9, 8, 16, 128, dtype=torch.int8, scales="token", device="meta")
    assert cache.kv_cache.device.type == "meta"
    assert cache.kv_scales is not None
    assert cache.kv_scales.device.type == "meta"
    assert cache.kv_cache.shape == (2, 10**9, 8, 16, 128)


@pytest.mark.parametrize(
    ("dtype", "scales", "latent"),
    [(torch.bfloat16, None, False), (torch.float32, None, True)]
    + [
        (torch.int8, scales, latent) for scales, latent in itertools.product(("tensor", "head", "token"), (False, True))
    ],
    ids=str,
)
def test_blocks_that_fit_is_the_largest_that_fits(dtype: torch.dtype, scales: Any, latent: bool) -> None:
    shape, layers = (3, 16, 40), 5
    options: dict[str, Any] = {
        "dtype": dtype,
        "scales": scales,
        "latent": latent,
        "num_layers": layers,
        "backend": "wide",
    }
    for num_blocks in (1, 2, 17, 1000):
        exact = cache_bytes(num_blocks, *shape, **options)
        assert blocks_that_fit(exact, *shape, **options) == num_blocks
        assert blocks_that_fit(exact - 1, *shape, **options) == num_blocks - 1
        assert blocks_that_fit(exact + layers, *shape, **options) == num_blocks
    assert blocks_that_fit(0, *shape, **options) == 0


def test_bytes_are_those_of_the_formula() -> None:
    assert cache_bytes(7, 3, 16, 64, dtype=torch.float32) == 2 * 7 * 3 * 16 * 64 * 4
    token_scales = 2 * 7 * 3 * 16 * 4
    assert cache_bytes(7, 3, 16, 64, dtype=torch.int8, scales="token") == 2 * 7 * 3 * 16 * 64 + token_scales
    assert cache_bytes(7, 3, 16, 64, dtype=torch.float32, num_layers=3) == 3 * math.prod((2, 7, 3, 16, 64, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be an int >= 1, got 0"),
        ({"num_kv_heads": -1}, "num_kv_heads must be an int >= 1, got -1"),
        ({"block_size": True}, "block_size must be an int >= 1, got True"),
        ({"head_dim": 2.0}, "head_dim must be an int >= 1, got 2.0"),
        ({"dtype": torch.int32}, "dtype must be one of float32, bfloat16, .*, got torch.int32"),
        ({"dtype": torch.int8}, "scales must be 'tensor', 'head' or 'token' for a torch.int8 cache, got None"),
        ({"scales": "head"}, "scales must be None for a torch.bfloat16 cache, got 'head'"),
        ({"dtype": torch.int8, "scales": "block"}, "scales must be 'tensor', 'head', 'token' or None, got 'block'"),
        ({"backend": "gpu"}, f"backend must be one of {', '.join(discover())}, wide, got 'gpu'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    sizes = {"num_blocks": 2, "num_kv_heads": 1, "block_size": 4, "head_dim": 8, "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=f"^allocate_kv_cache: {message}$"):
        allocate_kv_cache(**{**sizes, **change})
    with pytest.raises(ValueError, match=f"^cache_bytes: {message}$"):
        cache_bytes(**{**sizes, **change})


def test_bad_number_of_layers() -> None:
    with pytest.raises(ValueError, match=r"^blocks_that_fit: num_layers must be an int >= 1, got 0$"):
        blocks_that_fit(100, 1, 1, 1, dtype=torch.float32, num_layers=0)
