"""Lines 0 and 15: heads, layouts and scales, before all else; and the ops that write and read caches, and merge."""

from dataclasses import replace
from typing import Any

import torch

from torch_paged.testing.backends import Backend
from torch_paged.testing.cache_cases import CopyCase, GatherCase, MergeCase, WriteCase
from torch_paged.testing.cases import AttentionCase
from torch_paged.testing.semantics.attend import LANES, assert_weights, attend, query_dtype, sourced, typed
from torch_paged.testing.semantics.registry import DTYPES, FLOATS, QUANTIZED, SIZES, SOURCES, check
from torch_paged.testing.tensors import poison


@check(0)
def query_heads_read_the_kv_head_of_their_group(backend: Backend, dtype: torch.dtype) -> None:
    """Head h reads kv head h // G."""
    cache = torch.zeros(2, 1, 2, 1, LANES).to(dtype)
    cache[1, 0, 0], cache[1, 0, 1] = 1.0, 2.0
    arguments = {
        "query": torch.zeros(1, 6, LANES, dtype=query_dtype(dtype)),
        "kv_cache": cache.repeat(1, 1, 1, backend.block_size(1), 1),
        "block_tables": torch.zeros(1, 1, dtype=torch.int32),
        "context_lens": torch.ones(1, dtype=torch.int32),
    }
    if dtype.itemsize == 1:
        arguments["kv_scales"] = torch.ones(2)
    heads = backend("paged_attention", arguments)[0, :, 0].tolist()
    assert heads == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0], f"the heads read {heads}"


@check(0, SOURCES)
def a_kv_head_has_its_own_keys_and_values(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """In the cache, and beside it."""
    weights, _, _ = attend(backend, dtype, [0.0, 2.0, 1.0], 1, source)
    assert_weights(weights[0], [0.0, 2.0, 1.0])


@check(0, ("decode", "cache", "both"))
def a_latent_cache_holds_the_value_in_the_key(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """Its first lanes; one side, one kv head, and values of fewer lanes."""
    case = AttentionCase("latent", latent=True, head_dim=96, value_dim=64, num_kv_heads=1)
    backend.check(sourced(typed(case, dtype), source))


@check(0, ("decode", "both"), QUANTIZED, rank=(1, 2, 4))
def scales_belong_to_a_side_a_head_or_a_token(backend: Backend, dtype: torch.dtype, source: str, rank: int) -> None:
    """What is read is q * scale."""
    backend.check(sourced(replace(typed(AttentionCase("scaled"), dtype), scales_rank=rank), source))


@check(0, ("decode", "cache"), SIZES, layout=("nhd", "strided"))
def caches_and_rows_may_be_views(backend: Backend, dtype: torch.dtype, source: str, layout: str) -> None:
    """Tokens before heads, gaps between blocks, queries that are slices of a larger buffer."""
    backend.check(sourced(typed(AttentionCase("views", layout=layout, fused_rows=True), dtype), source))


@check(15, dtypes=FLOATS)
def written_rows_lie_in_their_slots(backend: Backend, dtype: torch.dtype) -> None:
    """-1 skips; behind head_dim are zeros; nothing else is written."""
    backend.check(WriteCase("rows", dtype=dtype, skipped_tokens=3, head_dim=40, stored_dim=48))


@check(15, dtypes=QUANTIZED, rank=(1, 2, 4))
def written_rows_are_quantised(backend: Backend, dtype: torch.dtype, rank: int) -> None:
    """By scales that are given, or, of each token and head, computed and written as well."""
    backend.check(WriteCase("quantised", cache_dtype=dtype, scales_rank=rank, skipped_tokens=3, magnitude=3.0))


_TIES: dict[torch.dtype, tuple[list[float], list[float]]] = {
    torch.int8: ([127, 2.5, 3.5, -2.5, -3.5, 0.5, 126, 0], [127, 2, 4, -2, -4, 0, 126, 0]),
    torch.float8_e4m3fn: ([448, 17, 19, -17, -19, 2.5, 416, 0], [448, 16, 20, -16, -20, 2.5, 416, 0]),
    torch.float8_e5m2: ([57344, 9, 11, -9, -11, 2.5, 49152, 0], [57344, 8, 12, -8, -12, 2.5, 49152, 0]),
}
"""A row whose scale is 1, with ties, and what is stored."""


@check(15, dtypes=QUANTIZED)
def quantising_rounds_ties_to_even(backend: Backend, dtype: torch.dtype) -> None:
    """The largest lane becomes the largest number of the cache; a row of zeros has the scale 1."""
    row, stored = (torch.tensor(lanes) for lanes in _TIES[dtype])
    size = backend.block_size(4)
    slots = torch.tensor([size + 1, 2, size])
    arguments: dict[str, Any] = {
        "key": torch.stack([row, 2 * row, 0 * row])[:, None],
        "value": torch.stack([row / 4, -row, 8 * row])[:, None],
        "kv_cache": poison((2, 2, 1, size, LANES), dtype),
        "kv_scales": torch.full((2, 2, 1, size), float("nan")),
        "slot_mapping": slots,
    }
    backend("quantize_and_cache", arguments)
    expected = torch.stack([torch.stack([stored, stored, 0 * stored]), torch.stack([stored, -stored, stored])])
    actual = arguments["kv_cache"].float().flatten(1, 3)[:, slots]
    assert (actual == expected).all(), f"stored are {actual.tolist()}, expected {expected.tolist()}"
    scales = arguments["kv_scales"].flatten(1)[:, slots].tolist()
    assert scales == [[1.0, 2.0, 1.0], [0.25, 1.0, 8.0]], f"kv_scales are {scales}"


@check(15, dtypes=DTYPES)
def copies_read_what_was_there_before(backend: Backend, dtype: torch.dtype) -> None:
    """Blocks change places, with their scales."""
    rank = 4 if dtype in QUANTIZED else None
    backend.check(CopyCase("swap", pairs=((0, 1), (1, 0), (2, 5), (-1, 3)), cache_dtype=dtype, scales_rank=rank))


@check(15, dtypes=DTYPES, left_padded=(False, True))
def gathering_widens_what_is_stored(backend: Backend, dtype: torch.dtype, left_padded: bool) -> None:
    """Zeros where there is no token."""
    rank = 2 if dtype in QUANTIZED else None
    backend.check(GatherCase("dense", cache_dtype=dtype, scales_rank=rank, left_padded=left_padded))


@check(15, dtypes=FLOATS)
def merged_parts_are_weighted_by_their_lse(backend: Backend, dtype: torch.dtype) -> None:
    """Parts, and rows, without keys among them."""
    backend.check(MergeCase("parts", dtype=dtype, sinks=True, empty=True))
