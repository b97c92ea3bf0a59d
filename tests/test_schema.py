"""The signatures, pinned as text: a change here is a change of the contract, and may only add at the end."""

import pytest
import torch

from torch_paged.contract import reference
from torch_paged.contract.schema import NAMESPACE, SCHEMAS

ATTENTION = (
    "(Tensor query, Tensor kv_cache, Tensor block_tables, Tensor context_lens, Tensor? kv_scales=None, "
    "Tensor? sinks=None, Tensor? alibi_slopes=None, Tensor? attn_mask=None, float? softmax_scale=None, "
    "float logits_soft_cap=0., int? sliding_window=None, int? attention_chunk=None, int? value_dim=None)"
)
VARLEN = (
    "(Tensor query, Tensor? key, Tensor? value, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? kv_cache, "
    "Tensor? block_tables, Tensor? context_lens, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? kv_scales=None, "
    "Tensor? sinks=None, Tensor? alibi_slopes=None, Tensor? attn_mask=None, Tensor? query_positions=None, "
    "float? softmax_scale=None, float logits_soft_cap=0., bool causal=False, int? sliding_window=None, "
    "int? attention_chunk=None, int? value_dim=None)"
)
STATS = " -> (Tensor out, Tensor lse, Tensor max_logits)"
PINNED = [
    "paged::reshape_and_cache(Tensor key, Tensor? value, Tensor(a!) kv_cache, Tensor slot_mapping, "
    "Tensor? kv_scales=None) -> ()",
    "paged::quantize_and_cache(Tensor key, Tensor? value, Tensor(a!) kv_cache, Tensor(b!) kv_scales, "
    "Tensor slot_mapping) -> ()",
    f"paged::paged_attention{ATTENTION} -> Tensor",
    f"paged::paged_attention.with_stats{ATTENTION}{STATS}",
    f"paged::flash_attn_varlen{VARLEN} -> Tensor",
    f"paged::flash_attn_varlen.with_stats{VARLEN}{STATS}",
    "paged::merge_attention_states(Tensor outs, Tensor lses, Tensor? sinks=None) -> (Tensor out, Tensor lse)",
    "paged::copy_blocks(Tensor(a!) kv_cache, Tensor src_blocks, Tensor dst_blocks, Tensor(b!)? kv_scales=None) -> ()",
    "paged::gather_cache(Tensor kv_cache, Tensor block_tables, Tensor context_lens, SymInt max_len, "
    "Tensor? kv_scales=None, Tensor? starts=None) -> (Tensor key, Tensor value)",
]


def registered() -> list[str]:
    """Return the names in the namespace, as the dispatcher has them."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name for name in names if name.startswith(f"{NAMESPACE}::"))


def overload(name: str) -> torch._ops.OpOverload:
    op, _, overload = name.removeprefix("paged::").partition(".")
    return getattr(getattr(torch.ops.paged, op), overload or "default")


@pytest.mark.parametrize("text", PINNED, ids=lambda text: text.partition("(")[0])
def test_the_signature_is_this_one(text: str) -> None:
    assert str(overload(text.partition("(")[0])._schema) == text


def test_the_namespace_holds_just_these_overloads() -> None:
    assert NAMESPACE == "paged"
    assert registered() == sorted(text.partition("(")[0] for text in PINNED)
    assert registered() == sorted(f"paged::{name}" for name in SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_tags_are_these(name: str) -> None:
    tags = {torch.Tag.pt2_compliant_tag}
    if hasattr(torch.Tag, "needs_exact_strides"):
        tags.add(torch.Tag.needs_exact_strides)
    assert set(overload(name).tags) == tags


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_argument_needs_a_newer_torch(name: str) -> None:
    allowed = {"Tensor", "Optional[Tensor]", "int", "Optional[int]", "float", "Optional[float]", "bool"}
    assert {str(argument.type) for argument in overload(name)._schema.arguments} <= allowed


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_reference_has_the_same_arguments(name: str) -> None:
    function = getattr(reference, name.replace(".", "_"))
    code = function.__code__
    schema = overload(name)._schema
    assert list(code.co_varnames[: code.co_argcount]) == [argument.name for argument in schema.arguments]
    defaults = [argument.default_value for argument in schema.arguments if argument.has_default_value()]
    assert list(function.__defaults__ or ()) == defaults
