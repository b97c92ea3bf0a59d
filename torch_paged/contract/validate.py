"""The rules that shapes, dtypes, devices and scalars tell, as one table: ``RULES[op]``, in the order of checking.

Every rule has a name and, when broken, finds the rest of the sentence ``<op>: <argument> must <rule>, got <value>``.
The CPU kernels implement the same table in ``csrc_shims/checks.h`` and ``checks_attention.h``; fakes and the Python
backends run this one. Rules about values are in ``bounds``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torch_paged.contract.rules import (
    Broken,
    Call,
    Rule,
    at_least,
    check,
    dtype_name,
    given,
    holds,
    not_expanded,
    only_with,
    plain,
    required,
    shape_text,
    tensor,
    together,
)

FLOATS = ("float32", "bfloat16", "float16")
QUANTIZED = ("int8", "float8_e4m3fn", "float8_e5m2")
_CACHE = "2 N KH S DS"
_FLOAT32 = torch.finfo(torch.float32)


def validate(op: str, arguments: Mapping[str, Any]) -> None:
    """Check everything that can be told without reading tensor data.

    Args:
        op: Schema name without overload, such as ``"paged_attention"``.
        arguments: All arguments by schema name, defaults filled in. Meta and fake tensors are fine.

    Raises:
        ValueError: ``<op>: <argument> must <rule>, got <value>``, for the first rule that is broken.
    """
    check(RULES[op], Call(op, arguments))


def _some_keys(call: Call) -> Broken:
    return None if call.has("key") or call.has("kv_cache") else ("key", "be given without kv_cache", "None")


def _mask(rows: str) -> tuple[Rule, ...]:
    def shape(call: Call) -> Broken:
        mask = call["attn_mask"]
        if mask is None:
            return None
        heads = [call.sizes["H"], call.sizes["KH"]]
        fits = mask.dim() == 2 or (mask.dim() == 3 and any(holds(mask.size(0) == size) for size in heads))
        if fits and holds(mask.size(-2) == call.sizes[rows]):
            return None
        shapes = f"({rows}, C), (KH, {rows}, C) or (H, {rows}, C)"
        where = f"{rows} = {plain(call.sizes[rows])}, KH = {plain(call.sizes['KH'])} and H = {plain(call.sizes['H'])}"
        return "attn_mask", f"have shape {shapes} with {where}", shape_text(mask)

    return (*tensor("attn_mask", ("bool",), "")[:2], Rule("attn_mask.shape", shape))


def _heads(call: Call) -> Broken:
    num_heads, num_kv_heads = call.sizes["H"], call.sizes["KH"]
    if holds(num_heads % num_kv_heads == 0):
        return None
    return "query", f"have H a multiple of KH = {plain(num_kv_heads)}", f"H = {plain(num_heads)}"


def _stored_dim(call: Call) -> Broken:
    if not call.has("kv_cache") or holds(call.sizes["DS"] >= call.sizes["D"]):
        return None
    return "kv_cache", f"have DS >= D = {plain(call.sizes['D'])}", f"DS = {plain(call.sizes['DS'])}"


def _unit_stride(call: Call) -> Broken:
    cache = call["kv_cache"]
    if cache is None or holds(cache.stride(-1) == 1) or holds(cache.size(-1) <= 1):
        return None
    return "kv_cache", "have a unit last stride", f"strides {tuple(map(plain, cache.stride()))}"


def _scales_given(call: Call) -> Broken:
    if not call.has("kv_cache"):
        return None
    dtype = dtype_name(call["kv_cache"])
    if (dtype in QUANTIZED) == call.has("kv_scales"):
        return None
    return (
        "kv_scales",
        f"be {'given' if dtype in QUANTIZED else 'None'} for a kv_cache of {dtype}",
        given(call["kv_scales"]),
    )


def _value_given(without_key: str) -> Rule:
    def broken(call: Call) -> Broken:
        if not call.has("key") or not call.has("kv_cache") or call.latent != call.has("value"):
            return None
        must = "be None for a latent kv_cache" if call.latent else f"be given{without_key} unless kv_cache is latent"
        return "value", must, given(call["value"])

    return Rule("value.given", broken)


def _value_width(call: Call) -> Broken:
    if not call.has("value") or holds(call.sizes["DV"] <= call.sizes["D"]):
        return None
    return "value", f"have DV <= D = {plain(call.sizes['D'])}", f"DV = {plain(call.sizes['DV'])}"


def _value_dim_given(call: Call) -> Broken:
    if call.has("value_dim") or not call.latent:
        return None
    return "value_dim", "be given when the values are lanes of the keys", "None"


def _value_dim_range(call: Call) -> Broken:
    if not call.has("value_dim"):
        return None
    letter = "DV" if call.has("value") else "D"
    if holds(call["value_dim"] >= 1) and holds(call["value_dim"] <= call.sizes[letter]):
        return None
    return "value_dim", f"lie in [1, {letter} = {plain(call.sizes[letter])}]", plain(call["value_dim"])


def _softmax_scale(call: Call) -> Broken:
    value = call["softmax_scale"]
    if value is None or holds(abs(value) <= _FLOAT32.max):
        return None
    return "softmax_scale", "be finite in float32", f"{plain(value):g}"


def _soft_cap(call: Call) -> Broken:
    # Kernels compute in float32, where a smaller cap would round to 0, which means "off", or have no finite inverse.
    value = call["logits_soft_cap"]
    if holds((value == 0) | (value >= _FLOAT32.tiny)) and holds(value <= _FLOAT32.max):
        return None
    return "logits_soft_cap", "be 0 or a positive normal float32", f"{plain(value):g}"


_SCALES = tensor("kv_scales", ("float32",), "2", "2 KH", "2 N KH S")
_CACHE_RULES = (Rule("kv_cache.unit_stride", _unit_stride), Rule("kv_scales.given", _scales_given))


def _attention(rows: str, *, varlen: bool) -> Iterator[Rule]:
    yield required("query", *(("cu_seqlens_q",) if varlen else ("kv_cache", "block_tables", "context_lens")))
    if varlen:
        yield Rule("key.given", _some_keys)
        yield only_with("value", "key")
        yield together("cu_seqlens_k", "key")
        yield together("block_tables", "kv_cache")
        yield together("context_lens", "kv_cache")
        yield only_with("kv_scales", "kv_cache")
    yield from tensor("query", FLOATS, f"{rows} H D")[1:]
    if varlen:
        yield from tensor("key", (), "Tk KH D", like="query")
        yield from tensor("value", (), "Tk KH DV", like="query")
        yield from tensor("cu_seqlens_q", ("int32",), "B+1")
        yield from tensor("cu_seqlens_k", ("int32",), "B+1")
    yield from tensor("kv_cache", QUANTIZED, _CACHE, like="query")
    yield from tensor("block_tables", ("int32",), "B M")
    yield from tensor("context_lens", ("int32",), "B")
    yield from _SCALES
    yield from tensor("sinks", ("float32",), "H")
    yield from tensor("alibi_slopes", ("float32",), "H")
    yield from _mask(rows)
    if varlen:
        yield from tensor("query_positions", ("int32",), "T")
    yield Rule("query.heads", _heads)
    yield Rule("kv_cache.stored_dim", _stored_dim)
    yield from _CACHE_RULES
    if varlen:
        yield _value_given(" with key")
        yield Rule("value.width", _value_width)
    yield Rule("value_dim.given", _value_dim_given)
    yield Rule("value_dim.range", _value_dim_range)
    if varlen:
        yield at_least("max_seqlen_q", 0)
        yield at_least("max_seqlen_k", 0)
    yield Rule("softmax_scale.float32", _softmax_scale)
    yield Rule("logits_soft_cap.float32", _soft_cap)
    yield at_least("sliding_window", 1)
    yield at_least("attention_chunk", 1)


def _write(*, compute_scales: bool) -> Iterator[Rule]:
    yield required("key", "kv_cache", *(("kv_scales",) if compute_scales else ()), "slot_mapping")
    yield from tensor("key", FLOATS, "T KH D")[1:]
    yield from tensor("value", (), "T KH DV", like="key")
    yield from tensor("kv_cache", QUANTIZED, _CACHE, like=None if compute_scales else "key")
    yield from tensor("slot_mapping", ("int64", "int32"), "T")
    yield from tensor("kv_scales", ("float32",), *(("2 N KH S",) if compute_scales else ("2", "2 KH")))
    yield _value_given("")
    yield Rule("kv_cache.stored_dim", _stored_dim)
    yield Rule("value.width", _value_width)
    yield Rule("kv_cache.unit_stride", _unit_stride)
    yield not_expanded("kv_cache")
    if compute_scales:
        yield not_expanded("kv_scales")
    else:
        yield Rule("kv_scales.given", _scales_given)


RULES: dict[str, tuple[Rule, ...]] = {
    "reshape_and_cache": tuple(_write(compute_scales=False)),
    "quantize_and_cache": tuple(_write(compute_scales=True)),
    "paged_attention": tuple(_attention("B", varlen=False)),
    "flash_attn_varlen": tuple(_attention("T", varlen=True)),
    "merge_attention_states": (
        required("outs", "lses"),
        *tensor("outs", FLOATS, "P T H D")[1:],
        *tensor("lses", ("float32",), "P T H"),
        *tensor("sinks", ("float32",), "H"),
    ),
    "copy_blocks": (
        required("kv_cache", "src_blocks", "dst_blocks"),
        *tensor("kv_cache", FLOATS + QUANTIZED, _CACHE)[1:],
        *tensor("src_blocks", ("int64", "int32"), "P*"),
        *tensor("dst_blocks", ("int64", "int32"), "P*"),
        *_SCALES,
        Rule("kv_cache.unit_stride", _unit_stride),
        not_expanded("kv_cache"),
        Rule("kv_scales.given", _scales_given),
        not_expanded("kv_scales", per_token_only=True),
    ),
    "gather_cache": (
        required("kv_cache", "block_tables", "context_lens"),
        *tensor("kv_cache", FLOATS + QUANTIZED, _CACHE)[1:],
        *tensor("block_tables", ("int32",), "B M"),
        *tensor("context_lens", ("int32",), "B"),
        *_SCALES,
        *tensor("starts", ("int32",), "B"),
        *_CACHE_RULES,
        at_least("max_len", 0),
    ),
}
"""Op name without overload -> its rules. ``P*`` is a number of pairs, which may be 0."""
