"""Lines 11 to 14: what must not be read, large caches, equal bits, and gradients."""

import math
import mmap
import resource
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_paged.testing.backends import REFERENCE, Backend, NotRun
from torch_paged.testing.cases import AttentionCase, build, cumulative
from torch_paged.testing.compare import assert_attention, assert_same
from torch_paged.testing.semantics.attend import query_dtype, typed
from torch_paged.testing.semantics.registry import SIZES, check

_LARGE = 2**31
_MEMORY_LIMIT_BYTES = 2**28
_QUERIES = (None, (5, 0, 17, 3))


@check(11, queries=_QUERIES)
def dead_slots_never_arrive(backend: Backend, dtype: torch.dtype, queries: tuple[int, ...] | None) -> None:
    """NaN, infinities and zeros there give equal bits; in caches of one byte so do the scales."""
    case = AttentionCase("dead", query_lens=queries, stored_dim=80, block_size=3, sliding_window=9, padding_rows=2)
    case = typed(case, dtype)
    case = backend.served(replace(case, scales_rank=4) if dtype.itemsize == 1 else case)
    arguments = build(case)
    cache, scales, query = (arguments[name] for name in ("kv_cache", "kv_scales", "query"))
    dead = cache.isnan() if scales is None else scales.isnan()[..., None].expand(cache.shape).clone()
    dead[..., case.head_dim :] = True
    padding = query.isnan()
    expected = backend(case.op, arguments, stats=True)
    for filling in (float("nan"), float("inf"), float("-inf"), 0.0):
        arguments["query"] = torch.where(padding, filling, query)
        arguments["kv_cache"] = torch.where(dead, _stored(filling, dtype), cache)
        if scales is not None:
            arguments["kv_scales"] = torch.where(scales.isnan(), filling, scales)
        for name, actual, wanted in zip(
            ("out", "lse", "max_logits"), backend(case.op, arguments, stats=True), expected, strict=True
        ):
            assert_same(actual, wanted, f"{name} with {filling} in dead slots")


def _stored(value: float, dtype: torch.dtype) -> Tensor:
    """Return a value as a cache holds it; in int8 NaN is 127 and infinities are the largest integers."""
    if dtype == torch.int8:
        return torch.tensor(value).nan_to_num(nan=127, posinf=127, neginf=-128).to(dtype)
    return torch.tensor(value).to(dtype)


@check(11, queries=_QUERIES)
def unused_entries_may_hold_anything(backend: Backend, dtype: torch.dtype, queries: tuple[int, ...] | None) -> None:
    """Block ids behind the keys, and before the window."""
    case = backend.served(typed(AttentionCase("entries", query_lens=queries, block_size=8, sliding_window=9), dtype))
    arguments = build(case)
    tables = arguments["block_tables"]
    unused = (tables < 0) | (tables >= arguments["kv_cache"].size(1))
    assert unused.any(), "the case has no unused entries"
    expected = backend(case.op, arguments)
    for entry in (-1, 0, 2**31 - 1, -(2**31)):
        assert_same(
            backend(case.op, arguments | {"block_tables": torch.where(unused, entry, tables)}),
            expected,
            f"out with unused entries of {entry}",
        )


@check(12, dtypes=(torch.bfloat16, torch.int8), of_ops=True)
def blocks_behind_two_to_the_31_are_reached(backend: Backend, dtype: torch.dtype) -> None:
    """Writes, quantises, copies, gathers and attends there; only blocks that are touched take memory."""
    if backend.device.type != "cpu" or backend.interprets(AttentionCase("any")):
        raise NotRun("a cache of more than 2^31 elements would be copied")
    heads, block_size, head_dim, length = 1, 16, 128, 40
    num_blocks = _LARGE // (heads * block_size * head_dim) + 5  # each side alone is beyond 2^31 elements
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = _untouched((2, num_blocks, heads, block_size, head_dim), dtype)
    scales = torch.tensor([0.03, 0.02]) if dtype.itemsize == 1 else None
    last = num_blocks - 1
    tables = torch.tensor([[last, 3, last - 1]], dtype=torch.int32)
    positions = torch.arange(length)
    slots = tables[0, positions // block_size].long() * block_size + positions % block_size
    generator = torch.Generator().manual_seed(0)
    rows = query_dtype(dtype)
    key, value = (torch.randn((length, heads, head_dim), generator=generator).to(rows) for _ in range(2))
    write = {"key": key, "value": value, "kv_cache": cache, "slot_mapping": slots, "kv_scales": scales}
    backend("reshape_and_cache", write)

    small = torch.empty((2, 3, heads, block_size, head_dim), dtype=dtype)
    REFERENCE("reshape_and_cache", write | {"kv_cache": small, "slot_mapping": positions})
    lengths = torch.tensor([length], dtype=torch.int32)
    near = {"block_tables": torch.tensor([[0, 1, 2]], dtype=torch.int32), "context_lens": lengths, "kv_scales": scales}
    far = near | {"block_tables": tables}
    query = {"query": torch.randn((1, 4, head_dim), generator=generator).to(rows)}
    results = backend("paged_attention", query | {"kv_cache": cache} | far, stats=True)
    assert_attention("paged_attention", query | {"kv_cache": small} | near, *results)
    beside = {"key": key[:5], "value": value[:5], "cu_seqlens_k": cumulative((5,)), "max_seqlen_k": length + 5}
    packed = {
        "query": torch.randn((5, 4, head_dim), generator=generator).to(rows),
        "cu_seqlens_q": cumulative((5,)),
        "max_seqlen_q": 5,
        "causal": True,
    }
    packed |= beside
    results = backend("flash_attn_varlen", packed | {"kv_cache": cache} | far, stats=True)
    assert_attention("flash_attn_varlen", packed | {"kv_cache": small} | near, *results)

    pair = {"src_blocks": torch.tensor([last]), "dst_blocks": torch.tensor([last - 2])}
    backend("copy_blocks", {"kv_cache": cache, "kv_scales": scales} | pair)
    copied = far | {"block_tables": torch.tensor([[last - 2, 3, last - 1]], dtype=torch.int32), "max_len": length}
    dense = backend("gather_cache", {"kv_cache": cache} | copied)
    expected = REFERENCE("gather_cache", {"kv_cache": small} | near | {"max_len": length})
    for name, actual, wanted in zip(("key", "value"), dense, expected, strict=True):
        assert_same(actual, wanted, name)
    if dtype.itemsize == 1:
        _quantises_far(backend, write, tables)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert taken < _MEMORY_LIMIT_BYTES, f"{taken} bytes of memory were touched"


def _quantises_far(backend: Backend, write: dict[str, Any], tables: Tensor) -> None:
    """Assert that rows written with scales of their own are found behind 2^31 elements."""
    cache = write["kv_cache"]
    scales = _untouched(cache.shape[:-1], torch.float32)
    backend("quantize_and_cache", write | {"kv_scales": scales})
    blocks = tables[0].long()
    expected = write | {
        "kv_cache": torch.empty_like(cache[:, blocks]),
        "kv_scales": torch.empty_like(scales[:, blocks]),
    }
    expected["slot_mapping"] = torch.arange(write["key"].size(0))
    REFERENCE("quantize_and_cache", expected)
    written = expected["slot_mapping"].numel()
    for name, whole in (("kv_cache", cache), ("kv_scales", scales)):
        actual, wanted = (x.flatten(1, 3)[:, :written] for x in (whole[:, blocks], expected[name]))
        assert_same(actual, wanted, name)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros that takes memory only where it is written."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


@check(13, queries=_QUERIES)
def a_sequence_gives_equal_bits_in_any_batch(
    backend: Backend, dtype: torch.dtype, queries: tuple[int, ...] | None
) -> None:
    """Alone, reordered, on one thread and on two."""
    case = AttentionCase("alone", query_lens=queries, context_lens=(37, 0, 20, 300), sinks=True)
    backend.check_batch_invariance(typed(case, dtype))


@check(13, dtypes=SIZES, queries=(None, (5, 17, 3)))
def a_long_sequence_gives_equal_bits_in_any_batch(
    backend: Backend, dtype: torch.dtype, queries: tuple[int, ...] | None
) -> None:
    """Where kernels split it into parts."""
    case = AttentionCase("long", query_lens=queries, context_lens=(1100, 5, 600), num_kv_heads=1)
    backend.check_batch_invariance(typed(case, dtype))


@check(14, of_ops=True, op=("paged_attention", "flash_attn_varlen"))
def backward_raises(backend: Backend, dtype: torch.dtype, op: str) -> None:
    """Instead of dropping the gradient."""
    queries = None if op == "paged_attention" else (5, 0, 17, 3)
    case = backend.served(typed(AttentionCase("backward", query_lens=queries), dtype))
    if backend.kernels is not None:
        raise NotRun("its kernels are called past the dispatcher, which refuses the backward")
    arguments: dict[str, Any] = build(case)
    arguments["query"].requires_grad_()
    said = "nothing"
    try:
        backend(case.op, arguments).sum().backward()
    except NotImplementedError as error:
        said = str(error)
    assert said.startswith(f"{case.op}: "), f"backward must raise NotImplementedError in our words, raised {said}"
