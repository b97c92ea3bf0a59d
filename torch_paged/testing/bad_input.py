"""Every rule of the contract, broken once: which call, how it is broken, and what every way in says about it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_paged.contract.validate import RULES
from torch_paged.testing.cache_cases import CopyCase, GatherCase, MergeCase, WriteCase
from torch_paged.testing.cases import AttentionCase, build

INT8 = torch.int8
BASES: dict[str, Any] = {
    "decode": AttentionCase("decode", sinks=True, alibi=True, mask="shared"),
    "decode, no options": AttentionCase("decode, no options"),
    "decode, int8": AttentionCase("decode, int8", cache_dtype=INT8, scales_rank=2),
    "decode, latent": AttentionCase("decode, latent", latent=True, value_dim=32),
    "decode, window": AttentionCase("decode, window", sliding_window=20),
    "varlen": AttentionCase(
        "varlen",
        query_lens=(3, 0, 5, 1),
        new_lens=(3, 0, 5, 1),
        cache_dtype=INT8,
        scales_rank=1,
        sinks=True,
        alibi=True,
        mask="kv_heads",
        positions="shuffled",
    ),
    "varlen, cache": AttentionCase("varlen, cache", query_lens=(3, 0, 5, 1)),
    "varlen, chunk": AttentionCase("varlen, chunk", query_lens=(3, 0, 5, 1), attention_chunk=16),
    "varlen, new": AttentionCase("varlen, new", context_lens=None, query_lens=(3, 0, 5), new_lens=(3, 0, 5)),
    "varlen, narrow": AttentionCase(
        "varlen, narrow", context_lens=None, query_lens=(3, 0, 5), new_lens=(3, 0, 5), new_value_dim=40
    ),
    "varlen, latent": AttentionCase(
        "varlen, latent", query_lens=(3, 0, 5, 1), new_lens=(3, 0, 5, 1), latent=True, value_dim=32
    ),
    "write": WriteCase("write"),
    "write, int8": WriteCase("write, int8", cache_dtype=INT8, scales_rank=2, slot_dtype=torch.int32),
    "write, latent": WriteCase("write, latent", latent=True),
    "quantize": WriteCase("quantize", cache_dtype=INT8, scales_rank=4),
    "quantize, latent": WriteCase("quantize, latent", cache_dtype=INT8, scales_rank=4, latent=True),
    "copy": CopyCase("copy"),
    "copy, int8": CopyCase("copy, int8", cache_dtype=INT8, scales_rank=4, id_dtype=torch.int32),
    "gather": GatherCase("gather", left_padded=True),
    "gather, int8": GatherCase("gather, int8", cache_dtype=INT8, scales_rank=2),
    "merge": MergeCase("merge", sinks=True),
}
BASE_OPS = {
    name: {CopyCase: "copy_blocks", GatherCase: "gather_cache", MergeCase: "merge_attention_states"}.get(type(case))
    or case.op
    for name, case in BASES.items()
}


@dataclass(frozen=True)
class Break:
    """One broken rule: how, and what every way in says about it."""

    rule: str
    base: str
    changes: dict[str, Any]
    """Argument -> its value, or a function of the valid value."""
    says: str

    @property
    def op(self) -> str:
        return BASE_OPS[self.base]

    def arguments(self) -> dict[str, Any]:
        """Return the broken arguments."""
        arguments = build(BASES[self.base], 0)
        for name, change in self.changes.items():
            value = change(arguments[name]) if callable(change) else change
            arguments[name] = value
        return arguments


def put(value: float, *index: int) -> Callable[[Tensor], Tensor]:
    """Return a function that sets one element of a copy."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def every_other(tensor: Tensor) -> Tensor:
    """Return the same shape with a last stride of 2."""
    return torch.cat([tensor, tensor], -1)[..., ::2]


def expanded(tensor: Tensor) -> Tensor:
    """Return the same shape, all blocks in one place."""
    return tensor[:, :1].expand(tensor.shape)


def first(count: int, axis: int = 0) -> Callable[[Tensor], Tensor]:
    """Return a function that keeps the first elements of an axis."""
    return lambda tensor: tensor.narrow(axis, 0, count)


ONE_CACHE = "have shape (2, N, KH, S, DS) or (1, N, KH, S, DS)"
SHAPES = [
    Break(
        "query.shape", "decode", {"query": first(0, 1)}, "query must have shape (B, H, D) with H >= 1, got (4, 0, 64)"
    ),
    Break(
        "query.shape",
        "varlen, cache",
        {"query": first(0, 2)},
        "query must have shape (T, H, D) with D >= 1, got (9, 8, 0)",
    ),
    Break(
        "kv_cache.shape",
        "decode",
        {"kv_cache": first(0, 2)},
        "kv_cache must have shape (2, N, KH, S, DS) with KH >= 1, got (2, 10, 0, 16, 64)",
    ),
    Break(
        "kv_cache.shape",
        "decode",
        {"kv_cache": lambda t: torch.cat([t, t])},
        f"kv_cache must {ONE_CACHE}, got (4, 10, 2, 16, 64)",
    ),
    Break("kv_cache.shape", "copy", {"kv_cache": first(0)}, f"kv_cache must {ONE_CACHE}, got (0, 6, 2, 3, 40)"),
    Break(
        "kv_cache.shape",
        "write",
        {"kv_cache": first(1, 2)},
        "kv_cache must have shape (2, N, KH, S, DS) with KH = 2 as in key, got (2, 5, 1, 16, 64)",
    ),
    Break(
        "block_tables.shape",
        "decode",
        {"block_tables": first(3)},
        "block_tables must have shape (B, M) with B = 4 as in query, got (3, 6)",
    ),
    Break(
        "block_tables.shape",
        "varlen",
        {"block_tables": first(3)},
        "block_tables must have shape (B, M) with B = 4 as in cu_seqlens_q, got (3, 6)",
    ),
    Break(
        "context_lens.shape",
        "gather",
        {"context_lens": first(3)},
        "context_lens must have shape (B,) with B = 4 as in block_tables, got (3,)",
    ),
    Break(
        "kv_scales.shape",
        "decode, int8",
        {"kv_scales": torch.ones(2, 3)},
        "kv_scales must have shape (2, KH) with KH = 2 as in kv_cache, got (2, 3)",
    ),
    Break(
        "kv_scales.shape",
        "decode, int8",
        {"kv_scales": torch.ones(1, 2)},
        "kv_scales must have shape (2, KH), got (1, 2)",
    ),
    Break(
        "kv_scales.shape",
        "gather, int8",
        {"kv_scales": torch.ones(2, 2, 2)},
        "kv_scales must have shape (2,), (2, KH) or (2, N, KH, S), got (2, 2, 2)",
    ),
    Break(
        "kv_scales.shape",
        "write, int8",
        {"kv_scales": torch.ones(2, 5, 2, 16)},
        "kv_scales must have shape (2,) or (2, KH), got (2, 5, 2, 16)",
    ),
    Break(
        "kv_scales.shape", "quantize", {"kv_scales": torch.ones(2)}, "kv_scales must have shape (2, N, KH, S), got (2,)"
    ),
    Break(
        "kv_scales.shape",
        "quantize",
        {"kv_scales": torch.ones(2, 4, 2, 16)},
        "kv_scales must have shape (2, N, KH, S) with N = 5 as in kv_cache, got (2, 4, 2, 16)",
    ),
    Break("sinks.shape", "decode", {"sinks": first(7)}, "sinks must have shape (H,) with H = 8 as in query, got (7,)"),
    Break(
        "attn_mask.shape",
        "decode",
        {"attn_mask": first(3)},
        "attn_mask must have shape (B, C), (KH, B, C) or (H, B, C) with B = 4, KH = 2 and H = 8, got (3, 65)",
    ),
    Break(
        "attn_mask.shape",
        "varlen",
        {"attn_mask": lambda t: torch.cat([t, t[:1]])},
        "attn_mask must have shape (T, C), (KH, T, C) or (H, T, C) with T = 9, KH = 2 and H = 8, got (3, 9, 70)",
    ),
    Break(
        "query_positions.shape",
        "varlen",
        {"query_positions": first(8)},
        "query_positions must have shape (T,) with T = 9 as in query, got (8,)",
    ),
    Break(
        "key.shape",
        "varlen",
        {"key": first(63, 2)},
        "key must have shape (Tk, KH, D) with D = 64 as in query, got (9, 2, 63)",
    ),
    Break(
        "value.shape",
        "varlen",
        {"value": first(8)},
        "value must have shape (Tk, KH, DV) with Tk = 9 as in key, got (8, 2, 64)",
    ),
    Break(
        "cu_seqlens_q.shape",
        "varlen, cache",
        {"cu_seqlens_q": first(0)},
        "cu_seqlens_q must have shape (B + 1,) with B >= 0, got (0,)",
    ),
    Break(
        "cu_seqlens_k.shape",
        "varlen",
        {"cu_seqlens_k": first(4)},
        "cu_seqlens_k must have shape (B + 1,) with B = 4 as in cu_seqlens_q, got (4,)",
    ),
    Break(
        "slot_mapping.shape",
        "write",
        {"slot_mapping": first(16)},
        "slot_mapping must have shape (T,) with T = 17 as in key, got (16,)",
    ),
    Break(
        "outs.shape", "merge", {"outs": first(0)}, "outs must have shape (P, T, H, D) with P >= 1, got (0, 17, 8, 64)"
    ),
    Break(
        "lses.shape",
        "merge",
        {"lses": first(2)},
        "lses must have shape (P, T, H) with P = 3 as in outs, got (2, 17, 8)",
    ),
    Break(
        "dst_blocks.shape",
        "copy",
        {"dst_blocks": first(1)},
        "dst_blocks must have shape (P,) with P = 2 as in src_blocks, got (1,)",
    ),
    Break(
        "starts.shape",
        "gather",
        {"starts": first(3)},
        "starts must have shape (B,) with B = 4 as in block_tables, got (3,)",
    ),
]
TOGETHER = [
    *(
        Break("tensors.given", base, {name: None}, f"{name} must be given, got None")
        for base, names in (
            ("decode", ("query", "kv_cache", "block_tables", "context_lens")),
            ("varlen", ("query", "cu_seqlens_q")),
            ("write", ("key", "kv_cache", "slot_mapping")),
            ("quantize", ("key", "kv_cache", "kv_scales", "slot_mapping")),
            ("copy", ("kv_cache", "src_blocks", "dst_blocks")),
            ("gather", ("kv_cache", "block_tables", "context_lens")),
            ("merge", ("outs", "lses")),
        )
        for name in names
    ),
    Break("tensors.given", "merge", dict.fromkeys(("outs", "lses", "sinks")), "outs must be given, got None"),
    Break("key.given", "varlen, cache", {"kv_cache": None}, "key must be given without kv_cache, got None"),
    Break(
        "value.only_with_key",
        "varlen",
        {"key": None},
        "value must be None without key, got a tensor of shape (9, 2, 64)",
    ),
    Break("cu_seqlens_k.given", "varlen", {"cu_seqlens_k": None}, "cu_seqlens_k must be given with key, got None"),
    Break(
        "cu_seqlens_k.given",
        "varlen, latent",
        {"key": None},
        "cu_seqlens_k must be None without key, got a tensor of shape (5,)",
    ),
    Break("block_tables.given", "varlen", {"block_tables": None}, "block_tables must be given with kv_cache, got None"),
    Break(
        "context_lens.given",
        "varlen",
        {"kv_cache": None, "block_tables": None},
        "context_lens must be None without kv_cache, got a tensor of shape (4,)",
    ),
    Break(
        "kv_scales.only_with_kv_cache",
        "varlen",
        {"kv_cache": None, "block_tables": None, "context_lens": None},
        "kv_scales must be None without kv_cache, got a tensor of shape (2,)",
    ),
    Break("value.given", "varlen", {"value": None}, "value must be given with key unless kv_cache is latent, got None"),
    Break(
        "value.given",
        "varlen, latent",
        {"value": lambda _: torch.ones(9, 2, 32)},
        "value must be None for a latent kv_cache, got a tensor of shape (9, 2, 32)",
    ),
    Break("value.given", "write", {"value": None}, "value must be given unless kv_cache is latent, got None"),
    Break(
        "value.given",
        "write, latent",
        {"value": torch.ones(17, 2, 64)},
        "value must be None for a latent kv_cache, got a tensor of shape (17, 2, 64)",
    ),
    Break("value.given", "quantize", {"value": None}, "value must be given unless kv_cache is latent, got None"),
    Break(
        "value_dim.given",
        "decode, latent",
        {"value_dim": None},
        "value_dim must be given when the values are lanes of the keys, got None",
    ),
    Break(
        "value_dim.given",
        "varlen, new",
        {"value": None},
        "value_dim must be given when the values are lanes of the keys, got None",
    ),
    *(
        Break("kv_scales.given", base, {"kv_scales": None}, "kv_scales must be given for a kv_cache of int8, got None")
        for base in ("decode, int8", "varlen", "write, int8", "copy, int8", "gather, int8")
    ),
    Break(
        "kv_scales.given",
        "decode",
        {"kv_scales": torch.ones(2)},
        "kv_scales must be None for a kv_cache of float32, got a tensor of shape (2,)",
    ),
]
CROSS = [
    Break(
        "query.heads", "decode, no options", {"query": first(7, 1)}, "query must have H a multiple of KH = 2, got H = 7"
    ),
    Break("query.heads", "varlen, new", {"query": first(7, 1)}, "query must have H a multiple of KH = 2, got H = 7"),
    *(
        Break("kv_cache.stored_dim", base, {"kv_cache": first(32, 4)}, "kv_cache must have DS >= D = 64, got DS = 32")
        for base in ("decode", "varlen", "write", "quantize")
    ),
    *(
        Break(
            "value.width",
            base,
            {"value": lambda t: torch.cat([t, t], -1)},
            "value must have DV <= D = 64, got DV = 128",
        )
        for base in ("varlen, new", "write", "quantize")
    ),
    Break(
        "kv_cache.unit_stride",
        "decode",
        {"kv_cache": every_other},
        "kv_cache must have a unit last stride, got strides (40960, 4096, 2048, 128, 2)",
    ),
    Break(
        "kv_cache.unit_stride",
        "varlen, cache",
        {"kv_cache": every_other},
        "kv_cache must have a unit last stride, got strides (40960, 4096, 2048, 128, 2)",
    ),
    Break(
        "kv_cache.unit_stride",
        "write",
        {"kv_cache": every_other},
        "kv_cache must have a unit last stride, got strides (20480, 4096, 2048, 128, 2)",
    ),
    Break(
        "kv_cache.unit_stride",
        "quantize",
        {"kv_cache": every_other},
        "kv_cache must have a unit last stride, got strides (20480, 4096, 2048, 128, 2)",
    ),
    Break(
        "kv_cache.unit_stride",
        "copy",
        {"kv_cache": every_other},
        "kv_cache must have a unit last stride, got strides (2880, 480, 240, 80, 2)",
    ),
    Break(
        "kv_cache.unit_stride",
        "gather",
        {"kv_cache": every_other},
        "kv_cache must have a unit last stride, got strides",
    ),
    Break(
        "kv_cache.not_expanded",
        "write",
        {"kv_cache": expanded},
        "kv_cache must not be an expanded view, it is written, got strides (10240, 0, 1024, 64, 1)",
    ),
    Break(
        "kv_cache.not_expanded",
        "quantize",
        {"kv_cache": expanded},
        "kv_cache must not be an expanded view, it is written, got strides (10240, 0, 1024, 64, 1)",
    ),
    Break(
        "kv_scales.not_expanded",
        "quantize",
        {"kv_scales": expanded},
        "kv_scales must not be an expanded view, it is written, got strides (160, 0, 16, 1)",
    ),
    Break(
        "kv_cache.not_expanded",
        "copy",
        {"kv_cache": expanded},
        "kv_cache must not be an expanded view, it is written, got strides (1440, 0, 120, 40, 1)",
    ),
    Break(
        "kv_scales.not_expanded",
        "copy, int8",
        {"kv_scales": expanded},
        "kv_scales must not be an expanded view, it is written, got strides (36, 0, 3, 1)",
    ),
]
SCALARS = [
    *(
        broken
        for base in ("decode", "varlen, cache")
        for broken in (
            Break("value_dim.range", base, {"value_dim": 0}, "value_dim must lie in [1, D = 64], got 0"),
            Break("value_dim.range", base, {"value_dim": 65}, "value_dim must lie in [1, D = 64], got 65"),
            Break(
                "softmax_scale.float32",
                base,
                {"softmax_scale": float("nan")},
                "softmax_scale must be finite in float32, got nan",
            ),
            Break(
                "softmax_scale.float32",
                base,
                {"softmax_scale": float("-inf")},
                "softmax_scale must be finite in float32, got -inf",
            ),
            Break(
                "softmax_scale.float32",
                base,
                {"softmax_scale": 1e39},
                "softmax_scale must be finite in float32, got 1e+39",
            ),
            Break(
                "softmax_scale.float32",
                base,
                {"softmax_scale": -1e39},
                "softmax_scale must be finite in float32, got -1e+39",
            ),
            Break(
                "logits_soft_cap.float32",
                base,
                {"logits_soft_cap": -0.5},
                "logits_soft_cap must be 0 or a positive normal float32, got -0.5",
            ),
            Break(
                "logits_soft_cap.float32",
                base,
                {"logits_soft_cap": float("inf")},
                "logits_soft_cap must be 0 or a positive normal float32, got inf",
            ),
            *(
                Break(
                    "logits_soft_cap.float32",
                    base,
                    {"logits_soft_cap": cap},
                    f"logits_soft_cap must be 0 or a positive normal float32, got {cap:g}",
                )
                for cap in (float("nan"), 1e39, 1e-46, 1e-40)
            ),
            Break("sliding_window.range", base, {"sliding_window": 0}, "sliding_window must be None or >= 1, got 0"),
            Break("sliding_window.range", base, {"sliding_window": -1}, "sliding_window must be None or >= 1, got -1"),
            Break("attention_chunk.range", base, {"attention_chunk": 0}, "attention_chunk must be None or >= 1, got 0"),
            Break(
                "attention_chunk.range", base, {"attention_chunk": -7}, "attention_chunk must be None or >= 1, got -7"
            ),
        )
    ),
    Break("value_dim.range", "varlen, narrow", {"value_dim": 41}, "value_dim must lie in [1, DV = 40], got 41"),
    Break("max_seqlen_q.range", "varlen", {"max_seqlen_q": -1}, "max_seqlen_q must be >= 0, got -1"),
    Break("max_seqlen_k.range", "varlen", {"max_seqlen_k": -2}, "max_seqlen_k must be >= 0, got -2"),
    Break("max_len.range", "gather", {"max_len": -1}, "max_len must be >= 0, got -1"),
]
VALUES = [
    *(
        Break(
            "context_lens.values",
            base,
            {"context_lens": put(value, 2)},
            f"context_lens must lie in [0, M * S = 96], got {value} at index 2",
        )
        for base, value in (("decode", -1), ("decode", 97), ("varlen", 97))
    ),
    Break(
        "context_lens.values",
        "gather",
        {"context_lens": put(-1, 3)},
        "context_lens must lie in [0, M * S = 80], got -1 at index 3",
    ),
    Break(
        "kv_scales.values",
        "decode, int8",
        {"kv_scales": put(0.0, 1, 0)},
        "kv_scales must be finite and > 0, got 0 at index (1, 0)",
    ),
    Break(
        "kv_scales.values",
        "varlen",
        {"kv_scales": put(float("inf"), 1)},
        "kv_scales must be finite and > 0, got inf at index 1",
    ),
    Break(
        "kv_scales.values",
        "write, int8",
        {"kv_scales": put(float("nan"), 0, 1)},
        "kv_scales must be finite and > 0, got nan at index (0, 1)",
    ),
    Break(
        "kv_scales.values",
        "gather, int8",
        {"kv_scales": put(-0.5, 0, 1)},
        "kv_scales must be finite and > 0, got -0.5 at index (0, 1)",
    ),
    Break(
        "cu_seqlens_q.start", "varlen", {"cu_seqlens_q": put(1, 0)}, "cu_seqlens_q must start with 0, got 1 at index 0"
    ),
    Break(
        "cu_seqlens_q.order",
        "varlen",
        {"cu_seqlens_q": put(2, 2)},
        "cu_seqlens_q must not decrease, got 2 after 3 at index 2",
    ),
    Break(
        "cu_seqlens_q.end",
        "varlen",
        {"cu_seqlens_q": put(10, 4)},
        "cu_seqlens_q must end at or before T = 9, got 10 at index 4",
    ),
    Break(
        "cu_seqlens_k.start",
        "varlen",
        {"cu_seqlens_k": put(-1, 0)},
        "cu_seqlens_k must start with 0, got -1 at index 0",
    ),
    Break(
        "cu_seqlens_k.order",
        "varlen, new",
        {"cu_seqlens_k": put(9, 2)},
        "cu_seqlens_k must not decrease, got 8 after 9 at index 3",
    ),
    Break(
        "cu_seqlens_k.end",
        "varlen, new",
        {"cu_seqlens_k": put(9, 3)},
        "cu_seqlens_k must end at or before Tk = 8, got 9 at index 3",
    ),
    Break(
        "max_seqlen_q.covers",
        "varlen",
        {"max_seqlen_q": 4},
        "max_seqlen_q must be >= every query length, got 4, less than 5 at index 2",
    ),
    Break(
        "max_seqlen_k.covers",
        "varlen",
        {"max_seqlen_k": 67},
        "max_seqlen_k must be >= every kv length, got 67, less than 68 at index 2",
    ),
    Break(  # the first sequence breaks the next rule too
        "max_seqlen_q.covers",
        "varlen",
        {"max_seqlen_q": 4, "max_seqlen_k": 3},
        "max_seqlen_q must be >= every query length, got 4, less than 5 at index 2",
    ),
    Break(
        "attn_mask.covers",
        "decode",
        {"attn_mask": first(62, 1)},
        "attn_mask must have C >= every kv length, got C = 62, less than 63 at index 2",
    ),
    Break(
        "attn_mask.covers",
        "decode",
        {"attn_mask": first(0, 1)},
        "attn_mask must have C >= every kv length, got C = 0, less than 17 at index 0",
    ),
    Break(
        "attn_mask.covers",
        "varlen",
        {"attn_mask": first(67, 2)},
        "attn_mask must have C >= every kv length, got C = 67, less than 68 at index 2",
    ),
    Break(
        "block_tables.values",
        "decode",
        {"block_tables": put(10, 0, 1)},
        "block_tables must lie in [0, N = 10) where used, got 10 at index (0, 1)",
    ),
    Break(
        "block_tables.values",
        "decode",
        {"block_tables": put(-1, 2, 3)},
        "block_tables must lie in [0, N = 10) where used, got -1 at index (2, 3)",
    ),
    Break(
        "block_tables.values",
        "decode, window",
        {"block_tables": put(10, 2, 2)},
        "block_tables must lie in [0, N = 10) where used, got 10 at index (2, 2)",
    ),
    Break(
        "block_tables.values",
        "varlen",
        {"block_tables": put(-2, 3, 0)},
        "block_tables must lie in [0, N = 10) where used, got -2 at index (3, 0)",
    ),
    Break(
        "block_tables.values",
        "varlen, chunk",
        {"block_tables": put(99, 2, 3)},
        "block_tables must lie in [0, N = 10) where used, got 99 at index (2, 3)",
    ),
    Break(
        "block_tables.values",
        "gather",
        {"block_tables": put(64, 2, 0), "kv_cache": first(9, 1)},
        "block_tables must be < N = 9 where used, got 64 at index (2, 0)",
    ),
    Break(
        "slot_mapping.values",
        "write",
        {"slot_mapping": put(80, 16)},
        "slot_mapping must lie in [-1, N * S = 80), got 80 at index 16",
    ),
    Break(
        "slot_mapping.values",
        "write, int8",
        {"slot_mapping": put(-2, 3)},
        "slot_mapping must lie in [-1, N * S = 80), got -2 at index 3",
    ),
    Break(
        "slot_mapping.values",
        "quantize",
        {"slot_mapping": put(2**40, 16)},
        "slot_mapping must lie in [-1, N * S = 80), got 1099511627776 at index 16",
    ),
    Break(
        "src_blocks.values", "copy", {"src_blocks": put(6, 1)}, "src_blocks must lie in [-1, N = 6), got 6 at index 1"
    ),
    Break(
        "dst_blocks.values",
        "copy, int8",
        {"dst_blocks": put(-2, 1)},
        "dst_blocks must lie in [-1, N = 6), got -2 at index 1",
    ),
    Break(
        "dst_blocks.repeated", "copy", {"dst_blocks": put(3, 1)}, "dst_blocks must not repeat a block, got 3 at index 1"
    ),
    Break("starts.values", "gather", {"starts": put(-1, 1)}, "starts must be >= 0, got -1 at index 1"),
    Break("starts.values", "gather", {"starts": put(-1, 3), "max_len": 0}, "starts must be >= 0, got -1 at index 3"),
    Break(
        "max_len.covers",
        "gather",
        {"starts": None, "max_len": 62},
        "max_len must be >= every start plus context length, got 62, less than 63 at index 2",
    ),
]
FULL_BASES = (
    "decode",
    "decode, int8",
    "varlen",
    "write",
    "write, int8",
    "quantize",
    "copy, int8",
    "gather",
    "gather, int8",
    "merge",
)


def generic() -> Iterator[Break]:
    """Break device, dtype and rank of every tensor of every op."""
    for base in FULL_BASES:
        op, arguments = BASE_OPS[base], build(BASES[base], 0)
        leader = next(iter(name for name in arguments if isinstance(arguments[name], Tensor)))
        for name, value in arguments.items():
            if not isinstance(value, Tensor):
                continue
            for wrong in (torch.float64, torch.float8_e4m3fnuz) if value.is_floating_point() else (torch.int16,):
                yield Break(f"{name}.dtype", base, {name: value.to(wrong)}, f"{name} must be ")
            yield Break(f"{name}.shape", base, {name: value[None]}, f"{name} must have shape (")
            if f"{name}.device" in {rule.name for rule in RULES[op]}:
                says = f"{name} must be on cpu as {leader} is, got meta"
                yield Break(f"{name}.device", base, {name: value.to("meta")}, says)


STATIC = [*SHAPES, *TOGETHER, *CROSS, *SCALARS, *generic()]
"""Rules that shapes, dtypes, devices and scalars tell."""
