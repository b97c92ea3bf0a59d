"""The signatures of every op, written once: Python registers them, the Python-free library is generated from them.

Required tensors come first, then required sizes, then optional tensors, then scalars with defaults. Schemas only ever
grow at the end. There are no ``str`` and no ``int[]`` arguments, so that one stable-ABI binary loads from torch 2.9 on.
"""

import torch

NAMESPACE = "paged"

_ATTENTION_OPTIONS = (
    "float? softmax_scale=None, float logits_soft_cap=0.0{causal}, "
    "int? sliding_window=None, int? attention_chunk=None, int? value_dim=None"
)
_PAGED_ATTENTION = (
    "(Tensor query, Tensor kv_cache, Tensor block_tables, Tensor context_lens, "
    "Tensor? kv_scales=None, Tensor? sinks=None, Tensor? alibi_slopes=None, Tensor? attn_mask=None, "
    + _ATTENTION_OPTIONS.format(causal="")
    + ")"
)
_FLASH_ATTN_VARLEN = (
    "(Tensor query, Tensor? key, Tensor? value, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? kv_cache, Tensor? block_tables, Tensor? context_lens, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? kv_scales=None, Tensor? sinks=None, Tensor? alibi_slopes=None, Tensor? attn_mask=None, "
    "Tensor? query_positions=None, " + _ATTENTION_OPTIONS.format(causal=", bool causal=False") + ")"
)
_STATS = " -> (Tensor out, Tensor lse, Tensor max_logits)"

SCHEMAS: dict[str, str] = {
    "reshape_and_cache": (
        "(Tensor key, Tensor? value, Tensor(a!) kv_cache, Tensor slot_mapping, Tensor? kv_scales=None) -> ()"
    ),
    "quantize_and_cache": (
        "(Tensor key, Tensor? value, Tensor(a!) kv_cache, Tensor(b!) kv_scales, Tensor slot_mapping) -> ()"
    ),
    "paged_attention": _PAGED_ATTENTION + " -> Tensor",
    "paged_attention.with_stats": _PAGED_ATTENTION + _STATS,
    "flash_attn_varlen": _FLASH_ATTN_VARLEN + " -> Tensor",
    "flash_attn_varlen.with_stats": _FLASH_ATTN_VARLEN + _STATS,
    "merge_attention_states": "(Tensor outs, Tensor lses, Tensor? sinks=None) -> (Tensor out, Tensor lse)",
    "copy_blocks": "(Tensor(a!) kv_cache, Tensor src_blocks, Tensor dst_blocks, Tensor(b!)? kv_scales=None) -> ()",
    "gather_cache": (
        "(Tensor kv_cache, Tensor block_tables, Tensor context_lens, SymInt max_len, "
        "Tensor? kv_scales=None, Tensor? starts=None) -> (Tensor key, Tensor value)"
    ),
}
"""Op name (with overload) -> argument list and returns. The nine overloads are the whole public namespace."""


def tags() -> tuple[torch.Tag, ...]:
    """Return the tags of every op: ``pt2_compliant_tag``, and ``needs_exact_strides`` where this torch has it."""
    exact_strides = getattr(torch.Tag, "needs_exact_strides", None)
    return (torch.Tag.pt2_compliant_tag,) + ((exact_strides,) if exact_strides is not None else ())


def define_ops() -> torch.library.Library:
    """Define all ops in the dispatcher.

    Returns:
        The library, whose lifetime is the lifetime of the definitions.
    """
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, signature in SCHEMAS.items():
        library.define(name + signature, tags=tags())
    return library
