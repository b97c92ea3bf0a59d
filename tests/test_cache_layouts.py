"""Layouts of other projects: each against indexing written out by hand, views that are views, round trips, real ops."""

from typing import Any

import pytest
import torch
from torch import Tensor

from torch_paged.cache import LAYOUTS, from_layout, to_layout
from torch_paged.testing import assert_attention, assert_same
from torch_paged.testing.backends import Backend

N, KH, S, D = 3, 2, 4, 6
PAIRS = ("jax", "nhd_pair", "hnd_pair")
SINGLE = tuple(name for name in LAYOUTS if name not in (*PAIRS, "mla"))
COPIES = ("vllm_packed", "rpa_v2", "rpa_v3")
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def shape_of(layout: str, dtype: torch.dtype) -> tuple[int, ...]:
    packing = 4 // dtype.itemsize
    return {
        "jax": (KH, N, S, D),
        "nhd_pair": (N, S, KH, D),
        "hnd_pair": (N, KH, S, D),
        "vllm_kv_first": (2, N, S, KH, D),
        "vllm_blocks_first": (N, 2, S, KH, D),
        "vllm_packed": (N, KH, S, 2 * D),
        "flashinfer_nhd": (N, 2, S, KH, D),
        "flashinfer_hnd": (N, 2, KH, S, D),
        "rpa_v2": (N, S, 2 * KH, D),
        "rpa_v3": (N, S, 2 * KH // packing, packing, D),
    }[layout]


def element(cache: Any, layout: str, side: int, block: int, head: int, token: int) -> Tensor:
    """The row (D,) of one token, by that project's own indexing."""
    packing = cache.size(3) if layout == "rpa_v3" else 1
    row = 2 * head + side
    index: dict[str, tuple[Any, ...]] = {
        "jax": (side, head, block, token),
        "nhd_pair": (side, block, token, head),
        "hnd_pair": (side, block, head, token),
        "vllm_kv_first": (side, block, token, head),
        "vllm_blocks_first": (block, side, token, head),
        "vllm_packed": (block, head, token, slice(side * D, side * D + D)),
        "flashinfer_nhd": (block, side, token, head),
        "flashinfer_hnd": (block, side, head, token),
        "rpa_v2": (block, token, row),
        "rpa_v3": (block, token, row // packing, row % packing, slice(D)),
    }
    place = index[layout]
    return cache[place[0]][place[1:]] if layout in PAIRS else cache[place]


def distinct(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bits, so that every row differs in every dtype."""
    generator = torch.Generator().manual_seed(len(shape))
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 120, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def assert_rows_equal(kv_cache: Tensor, cache: Any, layout: str) -> None:
    for side in range(2):
        for block in range(N):
            for head in range(KH):
                for token in range(S):
                    row = kv_cache[side, block, head, token, :D]
                    assert_same(row, element(cache, layout, side, block, head, token))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", SINGLE)
def test_from_one_tensor_is_a_view_of_it(layout: str, dtype: torch.dtype) -> None:
    cache = distinct(shape_of(layout, dtype), dtype)
    kv_cache, is_view = from_layout(cache, layout)
    assert kv_cache.shape == (2, N, KH, S, D)
    assert kv_cache.stride(-1) == 1
    assert_rows_equal(kv_cache, cache, layout)
    assert is_view
    kv_cache[1, 2, 1, 3] = torch.zeros(D, dtype=dtype)
    assert not element(cache, layout, 1, 2, 1, 3).view(torch.uint8).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", PAIRS)
def test_from_two_tensors_is_a_copy(layout: str, dtype: torch.dtype) -> None:
    both = distinct((2, *shape_of(layout, dtype)), dtype)
    pair = both[0].clone(), both[1].clone()
    kv_cache, is_view = from_layout(pair, layout)
    assert kv_cache.shape == (2, N, KH, S, D)
    assert_rows_equal(kv_cache, pair, layout)
    assert not is_view
    before = pair[0].clone()
    kv_cache.view(torch.uint8).fill_(1)
    assert_same(pair[0], before)


@pytest.mark.parametrize("layout", PAIRS)
def test_from_two_tensors_of_one_storage_is_a_view(layout: str) -> None:
    both = distinct((2, *shape_of(layout, torch.float32)), torch.float32)
    kv_cache, is_view = from_layout((both[0], both[1]), layout)
    assert is_view
    assert_rows_equal(kv_cache, both, layout)
    kv_cache[1].fill_(7)
    assert (both[1] == 7).all()
    assert not (both[0] == 7).any()
    swapped, is_view = from_layout((both[1], both[0]), layout)
    assert not is_view
    assert_rows_equal(swapped, both.flip(0), layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", PAIRS + SINGLE)
@pytest.mark.parametrize("contiguous", [False, True])
def test_to_layout_and_back(layout: str, dtype: torch.dtype, contiguous: bool) -> None:
    source = distinct((2, N, KH, S, D), dtype)
    kv_cache = source.clone()
    cache, is_view = to_layout(kv_cache, layout, contiguous=contiguous)
    parts = cache if isinstance(cache, tuple) else (cache,)
    expected_shape = shape_of(layout, dtype)
    if layout == "rpa_v3":
        expected_shape = (*expected_shape[:-1], 128)
        assert not parts[0][..., D:].contiguous().view(torch.uint8).any()
    assert all(part.shape == expected_shape for part in parts)
    assert_rows_equal(source, cache, layout)
    assert is_view == (layout not in COPIES and (layout == "hnd_pair" or not contiguous))
    assert not contiguous or all(part.is_contiguous() for part in parts)
    back, _ = from_layout(cache, layout)
    assert_same(back[..., :D], source)
    kv_cache.view(torch.uint8).fill_(0)
    assert (not parts[0].contiguous().view(torch.uint8).any()) == is_view


@pytest.mark.parametrize("layout", COPIES)
def test_to_layout_is_a_view_of_what_came_from_there(layout: str) -> None:
    shape = (N, S, 2, 2, 128) if layout == "rpa_v3" else shape_of(layout, torch.bfloat16)
    cache = distinct(shape, torch.bfloat16)
    kv_cache, _ = from_layout(cache, layout)
    again, is_view = to_layout(kv_cache, layout, contiguous=True)
    assert is_view
    assert isinstance(again, Tensor)
    assert_same(again, cache)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 6), (torch.bfloat16, 6), (torch.int8, 8)], ids=str)
def test_rpa_v3_pads_heads_to_the_packing(dtype: torch.dtype, rows: int) -> None:
    kv_cache = distinct((2, N, 3, S, 128), dtype)
    cache, _ = to_layout(kv_cache, "rpa_v3")
    assert isinstance(cache, Tensor)
    packing = 4 // dtype.itemsize
    assert cache.shape == (N, S, rows // packing, packing, 128)
    assert not cache.flatten(2, 3)[:, :, 6:].contiguous().view(torch.uint8).any()
    back, is_view = from_layout(cache, "rpa_v3", num_kv_heads=3)
    assert is_view
    assert_same(back, kv_cache)


def test_latent_cache() -> None:
    cache = distinct((N, S, 20), torch.bfloat16)
    kv_cache, is_view = from_layout(cache, "mla")
    assert is_view
    assert kv_cache.shape == (1, N, 1, S, 20)
    again, is_view = to_layout(kv_cache, "mla")
    assert is_view
    assert isinstance(again, Tensor)
    assert_same(again, cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", PAIRS + SINGLE)
def test_ops_write_and_read_a_foreign_cache(layout: str, dtype: torch.dtype, implementation: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    foreign, _ = to_layout(torch.randn((2, N, KH, S, D), generator=generator).to(dtype), layout, contiguous=True)
    view, _ = from_layout(foreign, layout)
    key, value = torch.randn((2, 2, KH, D), generator=generator).to(dtype)
    slots = torch.tensor([0 * S + 2, 1 * S + 2])
    write = {"key": key, "value": value, "kv_cache": view, "slot_mapping": slots, "kv_scales": None}
    implementation("reshape_and_cache", write)
    for side, rows in enumerate((key, value)):
        for token, block in enumerate((0, 1)):
            for head in range(KH):
                row = view[side, block, head, 2, :D]
                assert_same(row, rows[token, head])
                if layout not in PAIRS:
                    assert_same(element(foreign, layout, side, block, head, 2), row)

    arguments: dict[str, Any] = {
        "query": torch.randn((2, 2 * KH, D), generator=generator).to(dtype),
        "kv_cache": view,
        "block_tables": torch.tensor([[2, 0, -1], [1, -1, -1]], dtype=torch.int32),
        "context_lens": torch.tensor([7, 3], dtype=torch.int32),
    }
    out = implementation("paged_attention", arguments)
    assert_attention("paged_attention", arguments, out)
    own = {**arguments, "kv_cache": view[..., :D].contiguous()}
    assert_same(out, implementation("paged_attention", own))


@pytest.mark.parametrize(
    ("cache", "layout", "message"),
    [
        (torch.zeros(1), "sglang", "layout must be one of jax, .*mla, got 'sglang'"),
        (torch.zeros(2, 3, 4, 5), "vllm_kv_first", r"cache must have 5 dimensions \(2, N, S, KH, D\) for 'vllm_kv"),
        (torch.zeros(2, 3, 4, 5), "jax", r"cache must be a pair \(keys, values\) for 'jax', got one tensor"),
        ((torch.zeros(1),) * 2, "rpa_v2", "cache must be one tensor for 'rpa_v2', got 2 tensors"),
        ((torch.zeros(1),) * 3, "jax", r"cache must be a pair \(keys, values\) for 'jax', got 3 tensors"),
        ((torch.zeros(1), torch.zeros(2)), "jax", "cache must hold keys and values of one shape, dtype and device"),
        ((torch.zeros(1), torch.zeros(1)), "jax", r"cache\[0\] must have 4 dimensions \(KH, N, S, D\)"),
        (torch.zeros(2, 3, 4, 5), "vllm_packed", "cache must have an even last dimension for 'vllm_packed', got 5"),
        (torch.zeros(2, 3, 5, 4), "rpa_v2", "cache must hold 2 x num_kv_heads heads, got 5 for num_kv_heads None"),
    ],
)
def test_bad_foreign_cache(cache: Any, layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^from_layout: {message}"):
        from_layout(cache, layout)


@pytest.mark.parametrize(
    ("kv_cache", "layout", "message"),
    [
        (torch.zeros(2, 1, 1, 1, 1), "flat", "layout must be one of jax"),
        (torch.zeros(1, 1, 1, 1, 1), "jax", r"kv_cache must be \(2, N, KH, S, DS\) for 'jax', got \(1, 1, 1, 1, 1\)"),
        (torch.zeros(2, 1, 1, 1, 1), "mla", r"kv_cache must be \(1, N, 1, S, DS\) for 'mla', got \(2, 1, 1, 1, 1\)"),
        (torch.zeros(1, 1, 2, 1, 1), "mla", r"kv_cache must be \(1, N, 1, S, DS\) for 'mla'"),
        (torch.zeros(2, 1, 1, 1), "jax", r"kv_cache must be \(2, N, KH, S, DS\) for 'jax'"),
        (torch.zeros(2, 1, 1, 1, 1).double(), "rpa_v3", "kv_cache must have a dtype of 1, 2 or 4 bytes for 'rpa_v3'"),
    ],
)
def test_bad_own_cache(kv_cache: Tensor, layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^to_layout: {message}"):
        to_layout(kv_cache, layout)
