"""The named cases: each shape, layout and option that has broken a kernel somewhere, by name."""

from dataclasses import replace

import torch

from torch_paged.testing.cache_cases import CopyCase, GatherCase, MergeCase, WriteCase
from torch_paged.testing.cases import AttentionCase

HALF_DTYPES = (torch.bfloat16, torch.float16)
QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_ODD_LENS = (0, 1, 15, 16, 17, 63, 100)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_dtype(case: AttentionCase) -> list[AttentionCase]:
    return [replace(case, name=f"{case.name}_{_short(dtype)}", dtype=dtype) for dtype in (torch.float32, *HALF_DTYPES)]


def _sources(name: str, **options: object) -> list[AttentionCase]:
    """Return the same options in decode and with the three key sources."""
    decode = AttentionCase(f"{name}_decode", **options)  # type: ignore[arg-type]
    queries = (5, 0, 17, 3)
    return [
        decode,
        replace(decode, name=f"{name}_cache", query_lens=queries),
        replace(decode, name=f"{name}_new", query_lens=queries, new_lens=(17, 4, 63, 3), context_lens=None),
        replace(decode, name=f"{name}_both", query_lens=queries, new_lens=queries),
    ]


ATTENTION_CASES: tuple[AttentionCase, ...] = (
    *(case for source in _sources("plain") for case in _by_dtype(source)),
    AttentionCase("odd_lengths_decode", context_lens=_ODD_LENS),
    AttentionCase("odd_lengths_cache", context_lens=_ODD_LENS, query_lens=(100, 63, 17, 16, 15, 1, 0)),
    AttentionCase("odd_lengths_both", context_lens=_ODD_LENS, query_lens=(1, 16, 0, 3, 17, 33, 64), new_lens=_ODD_LENS),
    *(
        case
        for name, scale in (("zero", 0.0), ("negative", -0.3))
        for case in (
            AttentionCase(f"scale_{name}_decode", softmax_scale=scale, sinks=True),
            AttentionCase(f"scale_{name}_prefill", query_lens=(17, 0, 40, 1), softmax_scale=scale, sinks=True),
            AttentionCase(f"scale_{name}_mask", query_lens=(17, 0, 40, 1), softmax_scale=scale, mask="heads"),
        )
    ),
    *(
        AttentionCase(f"rows_{rows}_{name}", group=rows, num_kv_heads=3, dtype=dtype, context_lens=(80, 33, 100, 1))
        for rows in (8, 11, 15)
        for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16))
    ),
    AttentionCase(
        "scales_of_hidden_blocks",
        context_lens=(16,),
        query_lens=(3,),
        new_lens=(30,),
        cache_dtype=torch.int8,
        scales_rank=4,
        sliding_window=4,
    ),
    AttentionCase("long_decode", context_lens=(1030, 5), dtype=torch.bfloat16),
    AttentionCase("long_decode_float32", context_lens=(1030, 5), num_kv_heads=1),
    AttentionCase("long_prefill", context_lens=(200,), query_lens=(300,), new_lens=(300,), num_kv_heads=1),
    *(
        case
        for head_dim in (1, 3, 17, 40, 64, 80, 96, 128, 256, 576)
        for case in (
            AttentionCase(f"head_dim_{head_dim}_decode", head_dim=head_dim),
            AttentionCase(
                f"head_dim_{head_dim}_both", head_dim=head_dim, query_lens=(3, 1, 17, 0), new_lens=(3, 1, 17, 0)
            ),
            AttentionCase(f"head_dim_{head_dim}_bfloat16", head_dim=head_dim, dtype=torch.bfloat16),
            AttentionCase(
                f"head_dim_{head_dim}_varlen_bfloat16",
                head_dim=head_dim,
                dtype=torch.bfloat16,
                query_lens=(3, 1, 17, 0),
            ),
        )
    ),
    *(
        case
        for group in (1, 3, 4, 8)
        for case in (
            AttentionCase(f"group_{group}_decode", group=group),
            AttentionCase(f"group_{group}_cache", group=group, query_lens=(3, 1, 17, 0)),
        )
    ),
    *(
        case
        for group in (17, 71, 300)  # 71 is falcon-7b's; a tile holds 256 rows
        for case in (
            *_sources(f"group_{group}", group=group, num_kv_heads=1),
            AttentionCase(f"group_{group}_bfloat16_decode", group=group, num_kv_heads=1, dtype=torch.bfloat16),
            AttentionCase(f"group_{group}_mask_decode", group=group, mask="heads", context_lens=(100, 0, 63)),
            *_sources(f"group_{group}_mask", group=group, num_kv_heads=1, mask="heads", positions="anywhere")[1:],
            AttentionCase(
                f"group_{group}_positions",
                group=group,
                query_lens=(3, 1, 17, 0),
                mask="kv_heads",
                positions="shuffled",
                dtype=torch.bfloat16,
                sliding_window=16,
            ),
            AttentionCase(f"group_{group}_split_decode", group=group, num_kv_heads=1, context_lens=(2100, 513)),
        )
    ),
    *(
        case
        for block_size in (1, 3, 16, 32, 128)
        for case in (
            AttentionCase(f"block_size_{block_size}_decode", block_size=block_size),
            AttentionCase(f"block_size_{block_size}_cache", block_size=block_size, query_lens=(3, 1, 17, 0)),
        )
    ),
    *(
        case
        for layout in ("nhd", "strided")
        for case in _sources(f"layout_{layout}", layout=layout, fused_rows=True, shared_blocks=True)
        if case.context_lens is not None
    ),
    *_sources("padded_dim", head_dim=80, stored_dim=128),
    *_sources("value_dim", head_dim=80, value_dim=40),
    AttentionCase(
        "new_value_dim", head_dim=80, new_value_dim=48, context_lens=None, query_lens=(5, 9), new_lens=(9, 9)
    ),
    AttentionCase(
        "new_value_dim_both", head_dim=80, new_value_dim=48, context_lens=(20, 3), query_lens=(5, 9), new_lens=(5, 9)
    ),
    *(case for case in _sources("latent", latent=True, head_dim=96, value_dim=64, num_kv_heads=1) if case.context_lens),
    *(
        case
        for group in (16, 128)
        for source in _sources(
            f"deepseek_{group}_heads", latent=True, head_dim=576, value_dim=512, num_kv_heads=1, group=group
        )
        if source.context_lens
        for case in _by_dtype(source)
    ),
    *_sources("softmax_scale", softmax_scale=0.7),
    *_sources("soft_cap", logits_soft_cap=2.0, softmax_scale=1.0),
    *_sources("sinks", sinks=True),
    *_sources("alibi", alibi=True),
    *(case for mask in ("shared", "kv_heads", "heads") for case in _sources(f"mask_{mask}", mask=mask)),
    *(case for positions in ("shuffled", "anywhere") for case in _sources(positions, positions=positions)[1:]),
    *_sources("not_causal", causal=False)[1:],
    *(
        case
        for window in (1, 7, 16, 17, 1000)
        for case in (
            *_sources(f"window_{window}", sliding_window=window, block_size=3),
            *_sources(f"window_{window}_not_causal", sliding_window=window, block_size=3, causal=False)[1:],
        )
    ),
    *(case for chunk in (1, 5, 16, 1000) for case in _sources(f"chunk_{chunk}", attention_chunk=chunk, block_size=3)),
    *(
        AttentionCase(
            f"long_{option}_{size}_{name}",
            context_lens=(1100, 5, 70, 720),
            query_lens=queries,
            num_kv_heads=1,
            dtype=dtype,
            sliding_window=size if option == "window" else None,
            attention_chunk=size if option == "chunk" else None,
        )
        for option in ("window", "chunk")
        for size, dtype in ((100, torch.float32), (700, torch.bfloat16))
        for name, queries in (("decode", None), ("cache", (5, 0, 17, 3)))
    ),
    AttentionCase(
        "long_window_not_causal",
        context_lens=(1100,),
        query_lens=(40,),
        positions="anywhere",
        sliding_window=700,
        causal=False,
    ),
    *(
        case
        for power in (33, 62)
        for case in (
            *_sources(f"window_2_to_the_{power}", sliding_window=2**power),
            *_sources(f"window_2_to_the_{power}_not_causal", sliding_window=2**power, causal=False)[1:],
            *_sources(f"chunk_2_to_the_{power}", attention_chunk=2**power),
            AttentionCase(
                f"wide_2_to_the_{power}_anywhere",
                query_lens=(5, 0, 17, 3),
                positions="anywhere",
                sliding_window=2**power,
                attention_chunk=2**power,
            ),
        )
    ),
    *_sources("window_and_chunk", sliding_window=7, attention_chunk=16, block_size=1),
    *(
        case
        for dtype in QUANTIZED_DTYPES
        for rank in (1, 2, 4)
        for case in _sources(f"{_short(dtype)}_scales_{rank}", cache_dtype=dtype, scales_rank=rank)
        if case.context_lens is not None
    ),
    *(
        AttentionCase(
            f"{_short(dtype)}_bfloat16_decode", cache_dtype=dtype, scales_rank=4, dtype=torch.bfloat16, head_dim=128
        )
        for dtype in QUANTIZED_DTYPES
    ),
    *(
        case
        for dtype in QUANTIZED_DTYPES
        for head_dim in (17, 40, 64, 80, 96, 256)
        for case in _sources(
            f"{_short(dtype)}_head_dim_{head_dim}_bfloat16",
            cache_dtype=dtype,
            scales_rank=2,
            dtype=torch.bfloat16,
            head_dim=head_dim,
            group=1,
            context_lens=(130, 0, 63, 1),
        )
        if case.context_lens is not None
    ),
    *(
        case
        for dtype in QUANTIZED_DTYPES
        for group in (2, 3, 8, 15)
        for case in _sources(
            f"{_short(dtype)}_group_{group}_bfloat16",
            cache_dtype=dtype,
            scales_rank=1,
            dtype=torch.bfloat16,
            group=group,
            value_dim=40,
            context_lens=(130, 0, 63, 1),
        )
        if case.context_lens is not None
    ),
    *(
        AttentionCase(
            f"{_short(dtype)}_latent",
            cache_dtype=dtype,
            scales_rank=4,
            latent=True,
            head_dim=96,
            value_dim=64,
            num_kv_heads=1,
        )
        for dtype in QUANTIZED_DTYPES
    ),
    *(
        AttentionCase(
            f"{_short(dtype)}_deepseek_decode",
            cache_dtype=dtype,
            scales_rank=4,
            dtype=torch.bfloat16,
            latent=True,
            head_dim=576,
            value_dim=512,
            num_kv_heads=1,
            group=128,
        )
        for dtype in QUANTIZED_DTYPES
    ),
    AttentionCase("more_queries_than_keys", context_lens=(5, 0), query_lens=(17, 4)),
    AttentionCase("padding_rows", query_lens=(3, 1, 17, 0), padding_rows=9, mask="heads", sinks=True),
    AttentionCase(
        "padding_rows_both", query_lens=(3, 1, 17, 0), new_lens=(3, 1, 17, 0), padding_rows=9, positions="shuffled"
    ),
    AttentionCase("no_tokens_decode", context_lens=()),
    AttentionCase("no_tokens_cache", context_lens=(), query_lens=()),
    AttentionCase("no_queries", query_lens=(0, 0, 0, 0)),
    AttentionCase("only_padding", query_lens=(0, 0, 0, 0), padding_rows=4),
    AttentionCase("no_keys", context_lens=(0, 0)),
    AttentionCase("no_keys_with_sinks", context_lens=(0, 0), query_lens=(3, 1), sinks=True),
)

WRITE_CASES: tuple[WriteCase, ...] = (
    *(
        WriteCase(f"write_{_short(dtype)}_{tokens}", num_tokens=tokens, dtype=dtype)
        for dtype in (torch.float32, *HALF_DTYPES)
        for tokens in (0, 1, 17, 80)
    ),
    WriteCase("write_skipped", num_tokens=15, skipped_tokens=6, slot_dtype=torch.int32),
    WriteCase("write_only_skipped", num_tokens=0, skipped_tokens=3),
    WriteCase("write_padded_dim", head_dim=80, stored_dim=128, value_dim=40),
    WriteCase("write_latent", latent=True, head_dim=96, stored_dim=112, num_kv_heads=1),
    WriteCase("write_odd", head_dim=17, stored_dim=19, block_size=3, num_blocks=9, num_kv_heads=3),
    WriteCase("write_one_lane", head_dim=1, block_size=1, num_blocks=40),
    *(
        WriteCase(
            f"write_{layout}_{_short(dtype)}", layout=layout, fused_rows=True, head_dim=40, stored_dim=48, dtype=dtype
        )
        for layout in ("nhd", "strided")
        for dtype in (torch.float32, *HALF_DTYPES)
    ),
    *(
        WriteCase(
            f"write_{_short(cache_dtype)}_scales_{rank}_{_short(dtype)}",
            cache_dtype=cache_dtype,
            scales_rank=rank,
            dtype=dtype,
            head_dim=80,
            stored_dim=96,
            value_dim=64,
            skipped_tokens=2,
            magnitude=3.0,
        )
        for cache_dtype in QUANTIZED_DTYPES
        for rank in (1, 2, 4)
        for dtype in (torch.float32, *HALF_DTYPES)
    ),
    *(
        WriteCase(
            f"write_{_short(cache_dtype)}_scales_{rank}_{layout}",
            cache_dtype=cache_dtype,
            scales_rank=rank,
            layout=layout,
            fused_rows=True,
            latent=latent,
            head_dim=17,
            stored_dim=32,
        )
        for cache_dtype in QUANTIZED_DTYPES
        for rank in (2, 4)
        for layout, latent in (("nhd", False), ("strided", True))
    ),
)

_FORMATS: tuple[tuple[torch.dtype, int | None], ...] = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    *((dtype, rank) for dtype in QUANTIZED_DTYPES for rank in (1, 2, 4)),
)

COPY_CASES: tuple[CopyCase, ...] = (
    *(CopyCase(f"copy_{_short(dtype)}_{rank}", cache_dtype=dtype, scales_rank=rank) for dtype, rank in _FORMATS),
    CopyCase("copy_nothing", pairs=()),
    CopyCase("copy_skipped", pairs=((-1, 2), (3, -1), (-1, -1), (5, 0)), id_dtype=torch.int32),
    CopyCase("copy_chain", pairs=((0, 1), (1, 2), (2, 3))),
    CopyCase("copy_swap", pairs=((0, 1), (1, 0)), cache_dtype=torch.int8, scales_rank=4),
    CopyCase("copy_fork", pairs=((2, 0), (2, 1), (2, 5)), layout="nhd"),
    CopyCase("copy_self", pairs=((2, 2),)),
    CopyCase("copy_strided_latent", latent=True, layout="strided"),
    CopyCase("copy_strided", pairs=((0, 5), (5, 0)), layout="strided", cache_dtype=torch.float8_e4m3fn, scales_rank=4),
)

GATHER_CASES: tuple[GatherCase, ...] = (
    *(GatherCase(f"gather_{_short(dtype)}_{rank}", cache_dtype=dtype, scales_rank=rank) for dtype, rank in _FORMATS),
    *(
        GatherCase(f"gather_left_{_short(dtype)}_{rank}", cache_dtype=dtype, scales_rank=rank, left_padded=True)
        for dtype, rank in _FORMATS
    ),
    GatherCase("gather_missing", missing_entries=True, block_size=3, left_padded=True),
    GatherCase("gather_missing_int8", missing_entries=True, block_size=3, cache_dtype=torch.int8, scales_rank=4),
    GatherCase("gather_tight", extra_columns=0),
    GatherCase("gather_nothing", context_lens=(0, 0)),
    GatherCase("gather_no_sequences", context_lens=()),
    GatherCase("gather_latent", latent=True, stored_dim=40, block_size=1),
    GatherCase("gather_latent_int8", latent=True, cache_dtype=torch.int8, scales_rank=2),
    GatherCase("gather_nhd", layout="nhd", cache_dtype=torch.bfloat16),
    GatherCase("gather_strided", layout="strided", cache_dtype=torch.float8_e5m2, scales_rank=4),
)

MERGE_CASES: tuple[MergeCase, ...] = (
    *(
        MergeCase(f"merge_{_short(dtype)}_{parts}_{sinks}", dtype=dtype, parts=parts, sinks=sinks, empty=empty)
        for dtype in (torch.float32, *HALF_DTYPES)
        for parts, sinks, empty in ((1, False, False), (2, True, False), (3, False, True), (7, True, True))
    ),
    MergeCase("merge_odd", num_heads=3, head_dim=17, tokens=1),
    MergeCase("merge_one_lane", num_heads=1, head_dim=1, tokens=5),
    MergeCase("merge_no_tokens", tokens=0),
)
