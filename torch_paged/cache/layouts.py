"""Cache layouts of other projects, to and from ``(2, N, KH, S, DS)``: a view where strides allow, else a copy.

vLLM's NHD and HND differ in the strides of its tensors, not in their shapes: one name serves both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LANES = 128
"""Width of a TPU tile, which ``rpa_v3`` pads head_dim to."""


class Converted(NamedTuple):
    """A cache in another layout.

    Attributes:
        cache: the tensor, or the pair (keys, values) where the layout has two.
        is_view: True where ``cache`` shares its memory with the source (writes show in both), False for a copy.
    """

    cache: Tensor | tuple[Tensor, Tensor]
    is_view: bool


@dataclass(frozen=True)
class Layout:
    """A layout's shape in words, and both ways.

    Attributes:
        shape: legend, in the letters of the contract.
        used_by: who has it.
        pair: True for two tensors.
        rank: dimensions of a tensor.
    """

    shape: str
    used_by: str
    pair: bool
    rank: int
    read: Callable[[Tensor, int | None], Tensor]
    write: Callable[[Tensor], Tensor]


def from_layout(
    cache: Tensor | tuple[Tensor, Tensor], layout: str, *, num_kv_heads: int | None = None
) -> tuple[Tensor, bool]:
    """Return a cache of another project as ``(2, N, KH, S, DS)``.

    A pair becomes one tensor without a copy where both lie in one storage with equal strides, as from ``to_layout``.
    A view has a unit last stride and suits the CPU ops as it is; accelerators want ``.contiguous()``.

    Dimensions:
        N blocks, KH kv heads, S tokens in a block, D head_dim as that project stores it.

    Args:
        cache: the tensor, or for a layout of two tensors the pair (keys, values). Any strides.
        layout: one of ``LAYOUTS``:
            ``"jax"`` two of (KH, N, S, D);
            ``"nhd_pair"`` two of (N, S, KH, D); ``"hnd_pair"`` two of (N, KH, S, D);
            ``"vllm_kv_first"`` (2, N, S, KH, D); ``"vllm_blocks_first"`` and ``"flashinfer_nhd"`` (N, 2, S, KH, D);
            ``"vllm_packed"`` (N, KH, S, 2 D), keys in the first half;
            ``"flashinfer_hnd"`` (N, 2, KH, S, D);
            ``"rpa_v2"`` (N, S, 2 KH, D), keys at even heads; ``"rpa_v3"`` (N, S, P, packing, D), the same heads packed;
            ``"mla"`` (N, S, D), a latent cache, which becomes (1, N, 1, S, D).
        num_kv_heads: KH, needed where ``rpa_v3`` pads its heads. None: all heads that are there.

    Returns:
        The tensor (2, N, KH, S, D), or (1, N, 1, S, D) for ``"mla"``, and True for a view, False for a copy.

    Raises:
        ValueError: an unknown layout, a wrong rank, one tensor for a pair or the reverse, two tensors that differ.

    Source:
        See docs/migration.md, which cites the document behind each shape.

    Example:
        >>> import torch
        >>> from torch_paged.cache import from_layout
        >>> kv_cache, is_view = from_layout(torch.zeros(2, 10, 16, 8, 64), "vllm_kv_first")
        >>> kv_cache.shape, is_view
        (torch.Size([2, 10, 8, 16, 64]), True)
    """
    rule = _rule("from_layout", layout)
    for name, tensor in _named(cache, rule, layout):
        if tensor.dim() != rule.rank:
            raise ValueError(
                f"from_layout: {name} must have {rule.rank} dimensions {rule.shape} for '{layout}', "
                f"got {tuple(tensor.shape)}"
            )
    if isinstance(cache, Tensor):
        kv_cache = rule.read(cache, num_kv_heads)
        return kv_cache, _shares_memory(kv_cache, cache)
    stacked, is_view = _stack(*cache)
    return rule.read(stacked, num_kv_heads), is_view


def to_layout(kv_cache: Tensor, layout: str, *, contiguous: bool = False) -> Converted:
    """Return ``(2, N, KH, S, DS)`` as the cache of another project.

    Args:
        kv_cache: (2, N, KH, S, DS); (1, N, 1, S, DS) for ``"mla"``. Any strides.
        layout: as for ``from_layout``.
        contiguous: True for contiguous memory in that layout, which a kernel may want; a copy unless it is already.

    Returns:
        ``Converted(cache, is_view)``; ``cache`` is the pair (keys, values) where the layout has two tensors.
        Rows that only padding adds (``rpa_v3`` heads and lanes) are zero.

    Raises:
        ValueError: an unknown layout, a wrong rank, a latent cache for another layout than ``"mla"`` or the reverse,
            a dtype that ``rpa_v3`` cannot pack.

    Example:
        >>> import torch
        >>> from torch_paged.cache import to_layout
        >>> keys_and_values, is_view = to_layout(torch.zeros(2, 10, 8, 16, 64), "jax")
        >>> keys_and_values[0].shape, is_view
        (torch.Size([8, 10, 16, 64]), True)
    """
    rule = _rule("to_layout", layout)
    if not isinstance(kv_cache, Tensor):
        raise ValueError(f"to_layout: kv_cache must be a tensor, got {kv_cache!r}")
    sides = 1 if layout == "mla" else 2
    if kv_cache.dim() != 5 or kv_cache.size(0) != sides or (sides == 1 and kv_cache.size(2) != 1):
        legend = "(1, N, 1, S, DS)" if sides == 1 else "(2, N, KH, S, DS)"
        raise ValueError(f"to_layout: kv_cache must be {legend} for '{layout}', got {tuple(kv_cache.shape)}")
    whole = rule.write(kv_cache)
    parts = whole.unbind(0) if rule.pair else (whole,)
    if contiguous:
        parts = tuple(part.contiguous() for part in parts)
    is_view = all(_shares_memory(part, kv_cache) for part in parts)
    return Converted((parts[0], parts[1]) if rule.pair else parts[0], is_view)


def _rule(function: str, layout: str) -> Layout:
    if layout not in LAYOUTS:
        raise ValueError(f"{function}: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return LAYOUTS[layout]


def _named(cache: Tensor | tuple[Tensor, Tensor], rule: Layout, layout: str) -> list[tuple[str, Tensor]]:
    if isinstance(cache, Tensor):
        if rule.pair:
            raise ValueError(f"from_layout: cache must be a pair (keys, values) for '{layout}', got one tensor")
        return [("cache", cache)]
    if not isinstance(cache, tuple | list) or not all(isinstance(part, Tensor) for part in cache):
        raise ValueError(f"from_layout: cache must be a tensor or a pair of tensors, got {cache!r}")
    if not rule.pair or len(cache) != 2:
        wanted = "a pair (keys, values)" if rule.pair else "one tensor"
        raise ValueError(f"from_layout: cache must be {wanted} for '{layout}', got {len(cache)} tensors")
    keys, values = cache
    if (keys.shape, keys.dtype, keys.device) != (values.shape, values.dtype, values.device):
        raise ValueError(
            "from_layout: cache must hold keys and values of one shape, dtype and device, got "
            f"{tuple(keys.shape)} {keys.dtype} {keys.device} and {tuple(values.shape)} {values.dtype} {values.device}"
        )
    return [("cache[0]", keys), ("cache[1]", values)]


def _stack(keys: Tensor, values: Tensor) -> tuple[Tensor, bool]:
    """Return (2, ...) without a copy where both lie in one storage at a constant positive distance."""
    distance = values.storage_offset() - keys.storage_offset()
    one_storage = keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    if one_storage and keys.stride() == values.stride() and distance > 0 and keys.numel() > 0:
        return keys.as_strided((2, *keys.shape), (distance, *keys.stride()), keys.storage_offset()), True
    return torch.stack((keys, values)), False


def _shares_memory(part: Tensor, source: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


def _read_packed(cache: Tensor, num_kv_heads: int | None) -> Tensor:
    if cache.size(-1) % 2:
        raise ValueError(f"from_layout: cache must have an even last dimension for 'vllm_packed', got {cache.size(-1)}")
    return cache.unflatten(-1, (2, cache.size(-1) // 2)).permute(3, 0, 1, 2, 4)


def _read_interleaved(cache: Tensor, num_kv_heads: int | None) -> Tensor:
    """(N, S, 2 KH, D): head h has its keys at 2 h and its values at 2 h + 1."""
    heads = cache.size(2) // 2 if num_kv_heads is None else num_kv_heads
    if cache.size(2) < 2 * heads or (num_kv_heads is None and cache.size(2) % 2):
        raise ValueError(
            f"from_layout: cache must hold 2 x num_kv_heads heads, got {cache.size(2)} for num_kv_heads {num_kv_heads}"
        )
    return cache[:, :, : 2 * heads].unflatten(2, (heads, 2)).permute(3, 0, 2, 1, 4)


def _write_interleaved(kv_cache: Tensor) -> Tensor:
    return kv_cache.permute(1, 3, 2, 0, 4).flatten(2, 3)  # (N, S, 2 KH, D)


def _write_rpa_v3(kv_cache: Tensor) -> Tensor:
    packing, rest = divmod(4, kv_cache.dtype.itemsize)
    if rest or not packing:
        raise ValueError(f"to_layout: kv_cache must have a dtype of 1, 2 or 4 bytes for 'rpa_v3', got {kv_cache.dtype}")
    heads = _write_interleaved(kv_cache)
    padding = (0, -heads.size(-1) % LANES, 0, -heads.size(2) % packing)
    if any(padding):
        heads = _pad_zeros(heads, padding)
    return heads.unflatten(2, (heads.size(2) // packing, packing))


def _pad_zeros(heads: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    blocks, tokens, rows, lanes = heads.shape  # fp8 has no constant_pad_nd
    padded = heads.new_zeros((blocks, tokens, rows + padding[3], lanes + padding[1]))
    padded[:, :, :rows, :lanes] = heads
    return padded


def _permutation(read: tuple[int, ...]) -> tuple[Callable[[Tensor, int | None], Tensor], Callable[[Tensor], Tensor]]:
    write = tuple(read.index(dim) for dim in range(len(read)))
    return (lambda cache, _: cache.permute(read)), (lambda kv_cache: kv_cache.permute(write))


_SIDE_N_S_KH = _permutation((0, 1, 3, 2, 4))
_N_SIDE_S_KH = _permutation((1, 0, 3, 2, 4))
_N_SIDE_KH_S = _permutation((1, 0, 2, 3, 4))

LAYOUTS: dict[str, Layout] = {
    "jax": Layout(
        "(KH, N, S, D)", "jax paged_attention, ejkernel page_attention on TPU", True, 4, *_permutation((0, 2, 1, 3, 4))
    ),
    "nhd_pair": Layout(
        "(N, S, KH, D)", "flash-attn, FlashInfer NHD, ejkernel unified_attention", True, 4, *_SIDE_N_S_KH
    ),
    "hnd_pair": Layout(
        "(N, KH, S, D)", "FlashInfer HND, ejkernel page_attention on GPU", True, 4, *_permutation((0, 1, 2, 3, 4))
    ),
    "vllm_kv_first": Layout(
        "(2, N, S, KH, D)", "vLLM flash-attn and CPU backends, before blocks came first", False, 5, *_SIDE_N_S_KH
    ),
    "vllm_blocks_first": Layout("(N, 2, S, KH, D)", "vLLM, blocks first", False, 5, *_N_SIDE_S_KH),
    "vllm_packed": Layout(
        "(N, KH, S, 2 D)",
        "vLLM, keys and values packed",
        False,
        4,
        _read_packed,
        lambda kv_cache: kv_cache.permute(1, 2, 3, 0, 4).flatten(3, 4),
    ),
    "flashinfer_nhd": Layout("(N, 2, S, KH, D)", "FlashInfer NHD", False, 5, *_N_SIDE_S_KH),
    "flashinfer_hnd": Layout("(N, 2, KH, S, D)", "FlashInfer HND", False, 5, *_N_SIDE_KH_S),
    "rpa_v2": Layout(
        "(N, S, 2 KH, D)", "jax ragged_paged_attention, ejkernel v2", False, 4, _read_interleaved, _write_interleaved
    ),
    "rpa_v3": Layout(
        "(N, S, P, packing, D)",
        "tpu-inference ragged_paged_attention v3, ejkernel v3",
        False,
        5,
        lambda cache, num_kv_heads: _read_interleaved(cache.flatten(2, 3), num_kv_heads),
        _write_rpa_v3,
    ),
    "mla": Layout(
        "(N, S, D)",
        "vLLM and FlashInfer MLA",
        False,
        3,
        lambda cache, _: cache[None, :, None],
        lambda kv_cache: kv_cache[0, :, 0],
    ),
}
"""Layouts by name. ``from_layout`` and ``to_layout`` take these."""
