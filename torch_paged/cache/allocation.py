"""Memory for a paged cache: shape and padding per backend, scales, huge pages on the CPU, and what it all costs."""

import math
import mmap
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_paged.backends import discover

Scales = Literal["tensor", "head", "token"]

HUGE_PAGE_BYTES = 2 * 1024 * 1024
"""Size and alignment of a transparent huge page on x86-64 and on aarch64 with 4 KiB base pages."""

_QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class KVCache:
    """The cache of one layer.

    Attributes:
        kv_cache: (2, N, KH, S, DS), or (1, N, KH, S, DS) for a latent cache.
        kv_scales: float32 (2,), (2, KH) or (2, N, KH, S) as asked for (1 in front when latent), or None.
        huge_pages: True where the kernel was asked for 2 MiB pages; whether it had some to give is its own business.
    """

    kv_cache: Tensor
    kv_scales: Tensor | None
    huge_pages: bool


@dataclass(frozen=True)
class _Shapes:
    cache: tuple[int, ...]
    scales: tuple[int, ...] | None

    def num_bytes(self, dtype: torch.dtype) -> int:
        scale_bytes = 0 if self.scales is None else math.prod(self.scales) * torch.float32.itemsize
        return math.prod(self.cache) * dtype.itemsize + scale_bytes


def allocate_kv_cache(
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    latent: bool = False,
    scales: Scales | None = None,
    backend: str = "cpu",
    huge_pages: bool = True,
) -> KVCache:
    """Allocate the cache of one layer, filled with zeros, in the layout that every op takes.

    The tensor is contiguous ``(2, N, KH, S, DS)``, ``DS`` being head_dim padded to what the backend wants. On the CPU,
    from 2 MiB on, it starts at a 2 MiB boundary and asks for huge pages (random 4 KiB reads miss the TLB otherwise);
    memory is taken from the system only where it is written. A platform without huge pages gives ordinary memory.

    Dimensions:
        N blocks, KH kv heads, S tokens in a block, DS stored head_dim, DS >= head_dim.

    Args:
        num_blocks: N >= 1.
        num_kv_heads: KH >= 1.
        block_size: S >= 1, tokens.
        head_dim: D >= 1; for a latent cache the width of the whole latent row.
        dtype: float32, bfloat16, float16, or with ``scales`` int8, float8_e4m3fn, float8_e5m2.
        device: where the tensors live. ``"meta"`` allocates nothing.
        latent: True for a latent cache (MLA): one side, which is key and value.
        scales: granularity of the scales of a quantised cache: ``"tensor"``, ``"head"`` or ``"token"`` (per token and
            head; written by ``quantize_and_cache``). They start at 1. None: not quantised.
        backend: whose padding to use, by name: ``"cpu"``, ``"reference"`` or any other of ``torch_paged.backends``.
        huge_pages: False for ordinary memory.

    Returns:
        ``KVCache(kv_cache, kv_scales, huge_pages)``.

    Raises:
        ValueError: a size below 1, a dtype that no cache has, scales missing for a quantised cache or given for
            another, a backend that does not exist.
        MemoryError: more bytes than can be counted or, on the CPU, than there are.

    Source:
        Transparent Hugepage Support, https://docs.kernel.org/admin-guide/mm/transhuge.html

    Example:
        >>> import torch
        >>> from torch_paged.cache import allocate_kv_cache
        >>> cache = allocate_kv_cache(4, 2, 16, 80, dtype=torch.int8, scales="head")
        >>> cache.kv_cache.shape, cache.kv_scales.shape
        (torch.Size([2, 4, 2, 16, 80]), torch.Size([2, 2]))
    """
    shapes = _shapes(
        "allocate_kv_cache", num_blocks, num_kv_heads, block_size, head_dim, dtype, latent, scales, backend
    )
    device = torch.device(device)
    num_bytes = shapes.num_bytes(dtype)
    if num_bytes >= 2**63:
        raise _no_memory(num_bytes)
    try:
        kv_scales = None if shapes.scales is None else torch.ones(shapes.scales, dtype=torch.float32, device=device)
        if device.type == "cpu" and huge_pages and math.prod(shapes.cache) * dtype.itemsize >= HUGE_PAGE_BYTES:
            kv_cache, advised = _mapped_zeros(shapes.cache, dtype)
            return KVCache(kv_cache, kv_scales, advised)
        return KVCache(torch.zeros(shapes.cache, dtype=dtype, device=device), kv_scales, False)
    except (OSError, RuntimeError) as error:  # of mmap, of torch
        if device.type != "cpu":
            raise
        raise _no_memory(num_bytes) from error


def cache_bytes(
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    num_layers: int = 1,
    latent: bool = False,
    scales: Scales | None = None,
    backend: str = "cpu",
) -> int:
    """Return the bytes of ``num_layers`` caches, padding and scales included.

    Args:
        num_layers: layers with a cache of this shape each. The others are those of ``allocate_kv_cache``.

    Returns:
        Bytes.

    Raises:
        ValueError: as ``allocate_kv_cache``.

    Example:
        >>> import torch
        >>> from torch_paged.cache import cache_bytes
        >>> cache_bytes(100, 8, 16, 128, dtype=torch.bfloat16)
        6553600
    """
    shapes = _shapes("cache_bytes", num_blocks, num_kv_heads, block_size, head_dim, dtype, latent, scales, backend)
    _check_positive("cache_bytes", "num_layers", num_layers)
    return num_layers * shapes.num_bytes(dtype)


def blocks_that_fit(
    num_bytes: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    num_layers: int = 1,
    latent: bool = False,
    scales: Scales | None = None,
    backend: str = "cpu",
) -> int:
    """Return the largest ``num_blocks`` whose caches fit into ``num_bytes``.

    Args:
        num_bytes: memory for all layers together, bytes. The others are those of ``cache_bytes``.

    Returns:
        Blocks for each layer; 0 where not even one fits.

    Raises:
        ValueError: as ``cache_bytes``.

    Example:
        >>> import torch
        >>> from torch_paged.cache import blocks_that_fit
        >>> blocks_that_fit(2**30, 8, 16, 128, dtype=torch.bfloat16, num_layers=32)
        512
    """
    shapes = _shapes("blocks_that_fit", 1, num_kv_heads, block_size, head_dim, dtype, latent, scales, backend)
    _check_positive("blocks_that_fit", "num_layers", num_layers)
    block_bytes = math.prod(shapes.cache) * dtype.itemsize
    fixed_bytes = 0
    if scales == "token":
        block_bytes += math.prod(shapes.scales or ()) * torch.float32.itemsize
    elif shapes.scales is not None:
        fixed_bytes = math.prod(shapes.scales) * torch.float32.itemsize
    return max(0, (num_bytes // num_layers - fixed_bytes) // block_bytes)


def _shapes(
    function: str,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    latent: bool,
    scales: Scales | None,
    backend: str,
) -> _Shapes:
    sizes = {"num_blocks": num_blocks, "num_kv_heads": num_kv_heads, "block_size": block_size, "head_dim": head_dim}
    for name, size in sizes.items():
        _check_positive(function, name, size)
    if dtype not in _PLAIN + _QUANTISED:
        allowed = ", ".join(str(known).removeprefix("torch.") for known in _PLAIN + _QUANTISED)
        raise ValueError(f"{function}: dtype must be one of {allowed}, got {dtype}")
    if scales not in (None, "tensor", "head", "token"):
        raise ValueError(f"{function}: scales must be 'tensor', 'head', 'token' or None, got {scales!r}")
    if (dtype in _QUANTISED) != (scales is not None):
        rule = "'tensor', 'head' or 'token'" if dtype in _QUANTISED else "None"
        raise ValueError(f"{function}: scales must be {rule} for a {dtype} cache, got {scales!r}")
    known = discover()
    if backend not in known:
        raise ValueError(f"{function}: backend must be one of {', '.join(known)}, got {backend!r}")
    sides = 1 if latent else 2
    multiple = known[backend].head_dim_multiple
    stored_dim = -(-head_dim // multiple) * multiple
    per_scale = {
        "tensor": (sides,),
        "head": (sides, num_kv_heads),
        "token": (sides, num_blocks, num_kv_heads, block_size),
    }
    return _Shapes(
        (sides, num_blocks, num_kv_heads, block_size, stored_dim), None if scales is None else per_scale[scales]
    )


def _check_positive(function: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{function}: {name} must be an int >= 1, got {value!r}")


def _no_memory(num_bytes: int) -> MemoryError:
    return MemoryError(f"allocate_kv_cache: no memory for {num_bytes} bytes; use fewer blocks")


def _mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Return zeros that start at a 2 MiB boundary, and whether huge pages were asked for."""
    num_elements = math.prod(shape)
    num_bytes = -(-num_elements * dtype.itemsize // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    # Private: a shared anonymous mapping is tmpfs, which has its own huge-page switch, mostly off.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, **private)
    offset = -torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE_BYTES
    advised = False
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE, offset, num_bytes)
            advised = True
        except OSError:  # a kernel without transparent huge pages: EINVAL
            advised = False
    flat = torch.frombuffer(mapping, dtype=dtype, count=num_elements, offset=offset)
    return flat.view(shape), advised
