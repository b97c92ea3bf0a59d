"""Prefill: ``flash_attn_varlen`` beside SDPA for each sequence and the peak of the multiply-add units."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import torch_paged
from benchmarks.inputs import attention_pools, ragged
from benchmarks.limits import peak_call
from benchmarks.machine import huge_copy
from benchmarks.timing import Call
from benchmarks.work import DTYPES, OURS, PEAK, Settings, Work, attention_check, attention_columns
from torch_paged.testing import AttentionCase

APART = ("decodes apart", "chunk apart")


def works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Yield every case of the benchmark, unbuilt."""
    tiny = settings.size == "tiny"
    unit = 8 if tiny else 512
    shapes: dict[str, dict[str, Any]] = {
        f"{unit}": {"query_lens": (unit,)},
        f"{4 * unit}": {"query_lens": (4 * unit,)},
        f"8x{unit // 8}": {"query_lens": (unit // 8,) * 8},
        f"{unit}_after_{3 * unit}": {"query_lens": (unit,), "context_lens": (3 * unit,)},
    }
    if settings.size == "quick":
        del shapes[f"{4 * unit}"]
    for dtype in DTYPES.values():
        base = AttentionCase(
            "prefill",
            context_lens=None,
            num_kv_heads=8,
            group=4,
            head_dim=32 if tiny else 128,
            dtype=dtype,
        )
        for name, changes in shapes.items():
            case = replace(base, name=f"{name}_{dtype_name(dtype)}", new_lens=changes["query_lens"], **changes)
            yield partial(prefill_work, case, settings, variant=name)
        mixed = replace(
            base,
            name=f"31_decodes_and_{unit}_{dtype_name(dtype)}",
            query_lens=(1,) * 31 + (unit,),
            context_lens=(*ragged(31, 4 * unit, settings.seed), 2 * unit),
        )
        yield partial(mixed_work, mixed, settings)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def visible_flops(case: AttentionCase) -> int:
    """Return the operations of both products, counted on the pairs that a query sees."""
    assert case.query_lens is not None
    pairs = sum(
        q_len * kv_len - q_len * (q_len - 1) // 2 for q_len, kv_len in zip(case.query_lens, case.kv_lens, strict=True)
    )
    return 4 * case.head_dim * case.num_heads * pairs


def prefill_work(case: AttentionCase, settings: Settings, variant: str) -> Work:
    """Build a case whose new keys lie beside the cache."""
    pools = attention_pools(case, settings.seed)
    calls: dict[str, Call] = {
        OURS: lambda pool: torch_paged.flash_attn_varlen(**pools[pool]),
        "SDPA": sdpa_for_each_sequence(case, pools),
        PEAK: peak_call(case.dtype),
    }
    return Work(
        "prefill",
        "prefill",
        case.name,
        attention_columns(case),
        calls,
        len(pools),
        attention_check("flash_attn_varlen", pools[0]),
        flops=visible_flops(case),
        variant=variant,
    )


def sdpa_for_each_sequence(case: AttentionCase, pools: list[dict[str, Any]]) -> Call:
    """SDPA, one call for each sequence, on contiguous heads-first tensors that are made outside of the call."""
    prepared: list[list[Callable[[], Tensor]]] = []
    for arguments in pools:
        dense = None
        if case.context_lens is not None:
            cache = {name: arguments[name] for name in ("kv_cache", "block_tables", "context_lens")}
            dense = torch_paged.gather_cache(**cache, max_len=max(case.context_lens))
        sequences: list[Callable[[], Tensor]] = []
        rows = 0
        assert case.query_lens is not None
        for seq, q_len in enumerate(case.query_lens):
            new = slice(rows, rows + q_len)
            query, key, value = (
                arguments[name][new].transpose(0, 1).unsqueeze(0) for name in ("query", "key", "value")
            )  # (1, H, T, D)
            mask = None
            if dense is not None:
                context = case.context_lens[seq] if case.context_lens else 0
                key, value = (
                    torch.cat([old[seq : seq + 1, :, :context], rows_], 2)
                    for old, rows_ in zip(dense, (key, value), strict=True)
                )
                mask = torch.ones(q_len, context + q_len, dtype=torch.bool).tril(context)
            query, key, value = map(huge_copy, (query, key, value))
            options: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": True}
            sequences.append(partial(scaled_dot_product_attention, query, key, value, **options))
            rows += q_len
        prepared.append(sequences)

    def call(pool: int) -> Tensor:
        outs = [sequence() for sequence in prepared[pool]]
        return torch.cat([out[0].transpose(0, 1) for out in outs])  # (T, H, D)

    return call


def mixed_work(case: AttentionCase, settings: Settings) -> Work:
    """Build a batch of decodes and one chunk, all keys in the cache, and the two halves as calls of their own."""
    pools = attention_pools(case, settings.seed)
    decodes = len(case.query_lens or ()) - 1
    taken = attention_check("flash_attn_varlen", pools[0])
    apart: dict[str, list[dict[str, Any]]] = {name: [] for name in APART}
    for arguments in pools:
        decode = {name: arguments[name] for name in ("kv_cache", "kv_scales", "softmax_scale")}
        decode |= {name: arguments[name][:decodes] for name in ("query", "block_tables", "context_lens")}
        apart[APART[0]].append(decode)
        chunk = {name: arguments[name][decodes:] for name in ("query", "block_tables", "context_lens")}
        chunk["cu_seqlens_q"] = arguments["cu_seqlens_q"][decodes:] - decodes
        apart[APART[1]].append(arguments | chunk)
    expected = torch_paged.flash_attn_varlen(**pools[0])

    def check(name: str, result: Any) -> None:
        if name == APART[0]:
            result = torch.cat([result, expected[decodes:]])
        elif name == APART[1]:
            result = torch.cat([expected[:decodes], result])
        taken(name, result)

    calls: dict[str, Call] = {
        OURS: lambda pool: torch_paged.flash_attn_varlen(**pools[pool]),
        APART[0]: lambda pool: torch_paged.paged_attention(**apart[APART[0]][pool]),
        APART[1]: lambda pool: torch_paged.flash_attn_varlen(**apart[APART[1]][pool]),
    }
    return Work("prefill", "mixed", case.name, attention_columns(case), calls, len(pools), check)
