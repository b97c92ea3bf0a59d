"""The errors of the ops' arguments: every rule of the contract, broken."""

import functools
from typing import Any

import torch
from error_table import Error, Group

from torch_paged.testing.bad_input import STATIC, VALUES, Break

_PAIR = "pass both or neither"
_RULES: tuple[tuple[tuple[str, ...], str, str, str], ...] = (
    # rules, text, cause, remedy
    (("tensors.given",), "<op>: <argument> must be given, got None", "A required tensor is None.", "Pass it."),
    (
        ("*.dtype",),
        "<op>: <argument> must be <dtypes>, got <dtype>",
        "The op has no kernel for this dtype, or two tensors differ that must agree.",
        "Convert the tensor with `.to(dtype)`: indices are int32 (slots and block ids also int64), scales, sinks and "
        "slopes float32.",
    ),
    (
        ("*.device",),
        "<op>: <argument> must be on <device> as <argument> is, got <device>",
        "All tensors of a call are on one device.",
        "Move it with `.to(query.device)`.",
    ),
    (
        ("*.shape",),
        "<op>: <argument> must have shape <shape>, got <shape>",
        "The rank is wrong, or a size differs from that of the tensor that is named. The letters are those of the "
        "contract: T tokens, B sequences, H and KH query and kv heads, D and DS head_dim and its stored width, N "
        "blocks of S tokens, M table columns.",
        "Compare the shapes with the op's docstring; the cache is `(2, N, KH, S, DS)`.",
    ),
    (
        ("key.given",),
        "flash_attn_varlen: key must be given without kv_cache, got None",
        "The call names no keys at all.",
        "Pass `key`, `value` and `cu_seqlens_k`, or `kv_cache`, `block_tables` and `context_lens`, or both.",
    ),
    (
        ("value.only_with_key",),
        "flash_attn_varlen: value must be None without key, got <tensor>",
        "New values come with new keys.",
        _PAIR.capitalize() + ".",
    ),
    (
        ("cu_seqlens_k.given", "block_tables.given", "context_lens.given"),
        "flash_attn_varlen: <argument> must be given with <argument>, got None",
        "Arguments that describe one source of keys belong together.",
        _PAIR.capitalize() + ".",
    ),
    (
        ("cu_seqlens_k.given", "context_lens.given", "kv_scales.only_with_kv_cache"),
        "flash_attn_varlen: <argument> must be None without <argument>, got <tensor>",
        "Arguments that describe one source of keys belong together.",
        _PAIR.capitalize() + ".",
    ),
    (
        ("value.given",),
        "<op>: value must be given with key unless kv_cache is latent, got None",
        "Only a latent cache has values in its keys.",
        "Pass `value`, or use a cache with `kv_cache.size(0) == 1`.",
    ),
    (
        ("value.given",),
        "<op>: value must be given unless kv_cache is latent, got None",
        "Only a latent cache has values in its keys.",
        "Pass `value`, or use a cache with `kv_cache.size(0) == 1`.",
    ),
    (
        ("value.given",),
        "<op>: value must be None for a latent kv_cache, got <tensor>",
        "The values of a latent cache are lanes of its keys.",
        "Pass None, or use a cache with `kv_cache.size(0) == 2`.",
    ),
    (
        ("value_dim.given",),
        "<op>: value_dim must be given when the values are lanes of the keys, got None",
        "Nothing else says how many lanes of a latent cache are the value.",
        "Pass `value_dim`, such as 512 of DeepSeek's 576.",
    ),
    (
        ("value_dim.range",),
        "<op>: value_dim must lie in [1, <letter> = <n>], got <value>",
        "The output cannot be wider than the values.",
        "Pass at most their width, or None.",
    ),
    (
        ("kv_scales.given",),
        "<op>: kv_scales must be given for a kv_cache of <dtype>, got None",
        "A quantised cache means nothing without its scales.",
        "Pass the scales that it was written with.",
    ),
    (
        ("kv_scales.given",),
        "<op>: kv_scales must be None for a kv_cache of <dtype>, got <tensor>",
        "A cache that is not quantised has no scales.",
        "Leave them out, or allocate the cache in int8 or float8.",
    ),
    (
        ("kv_scales.values",),
        "<op>: kv_scales must be finite and > 0, got <value> at index <index>",
        "A scale of 0, NaN or infinity makes every value meaningless: mostly a checkpoint without scales.",
        "Calibrate the scales, or use 1.",
    ),
    (
        ("query.heads",),
        "<op>: query must have H a multiple of KH = <n>, got H = <n>",
        "Query heads are shared out evenly to kv heads.",
        "Check that cache and query are of one model and, in parallel runs, cut alike.",
    ),
    (
        ("kv_cache.stored_dim",),
        "<op>: kv_cache must have DS >= D = <n>, got DS = <n>",
        "Rows do not fit into the cache.",
        "Allocate the cache for this head_dim.",
    ),
    (
        ("value.width",),
        "<op>: value must have DV <= D = <n>, got DV = <n>",
        "Values wider than keys have no room in the cache.",
        "Pad the keys with zeros.",
    ),
    (
        ("kv_cache.unit_stride",),
        "<op>: kv_cache must have a unit last stride, got strides <strides>",
        "The lanes of a row must be neighbours.",
        "Pass a view with head_dim last; `.contiguous()` would write to a copy.",
    ),
    (
        ("kv_cache.not_expanded", "kv_scales.not_expanded"),
        "<op>: <argument> must not be an expanded view, it is written, got strides <strides>",
        "Several elements are one place in memory.",
        "Pass a tensor with memory of its own.",
    ),
    (
        ("softmax_scale.float32",),
        "<op>: softmax_scale must be finite in float32, got <value>",
        "The scale is NaN, infinite or too large.",
        "Leave it out for `1 / sqrt(D)`.",
    ),
    (
        ("logits_soft_cap.float32",),
        "<op>: logits_soft_cap must be 0 or a positive normal float32, got <value>",
        "A negative, tiny or infinite cap is none.",
        "Pass 0.0 for no cap.",
    ),
    (
        ("sliding_window.range", "attention_chunk.range"),
        "<op>: <argument> must be None or >= 1, got <value>",
        "Elsewhere 0 or -1 switch the option off; here None does.",
        "Pass None.",
    ),
    (
        ("max_seqlen_q.range", "max_seqlen_k.range", "max_len.range"),
        "<op>: <argument> must be >= 0, got <value>",
        "A length cannot be negative.",
        "Pass the largest length, or more.",
    ),
    (
        ("context_lens.values",),
        "<op>: context_lens must lie in [0, M * S = <n>], got <value> at index <i>",
        "The sequence is longer than the blocks in its row of the table.",
        "Widen `block_tables`; lengths are tokens, not blocks.",
    ),
    (
        ("cu_seqlens_q.start", "cu_seqlens_k.start"),
        "<op>: <argument> must start with 0, got <value> at index 0",
        "These are prefix sums, not lengths.",
        "Pass `cumsum` of the lengths with a 0 before it.",
    ),
    (
        ("cu_seqlens_q.order", "cu_seqlens_k.order"),
        "<op>: <argument> must not decrease, got <value> after <value> at index <i>",
        "These are prefix sums, not lengths.",
        "Pass `cumsum` of the lengths with a 0 before it.",
    ),
    (
        ("cu_seqlens_q.end", "cu_seqlens_k.end"),
        "<op>: <argument> must end at or before <letter> = <n>, got <value> at index <i>",
        "The sequences have more tokens than the packed tensor has rows.",
        "Make both from the same lengths.",
    ),
    (
        ("max_seqlen_q.covers",),
        "flash_attn_varlen: max_seqlen_q must be >= every query length, got <value>, less than <length> at index <i>",
        "It is an upper bound.",
        "Pass the longest query length, or more: the result does not depend on it.",
    ),
    (
        ("max_seqlen_k.covers",),
        "flash_attn_varlen: max_seqlen_k must be >= every kv length, got <value>, less than <length> at index <i>",
        "It bounds cached and new keys together.",
        "Pass the longest kv length, or more: the result does not depend on it.",
    ),
    (
        ("attn_mask.covers",),
        "<op>: attn_mask must have C >= every kv length, got C = <n>, less than <length> at index <i>",
        "The mask has fewer columns than a sequence has keys.",
        "Make the mask for the longest kv length.",
    ),
    (
        ("block_tables.values",),
        "<op>: block_tables must lie in [0, N = <n>) where used, got <block> at index <index>",
        "An entry that a query needs is no block of this cache: freed too early, or of another cache.",
        "Only entries behind a window or beyond the length may hold anything.",
    ),
    (
        ("block_tables.values",),
        "gather_cache: block_tables must be < N = <n> where used, got <block> at index <index>",
        "An entry is no block of this cache.",
        "Pass -1 for what shall be zeros.",
    ),
    (
        ("slot_mapping.values",),
        "<op>: slot_mapping must lie in [-1, N * S = <n>), got <slot> at index <i>",
        "The slot is outside the cache; `slot = block_id * S + offset`.",
        "Pass -1 to skip a token.",
    ),
    (
        ("src_blocks.values", "dst_blocks.values"),
        "copy_blocks: <argument> must lie in [-1, N = <n>), got <block> at index <i>",
        "The block is outside the cache.",
        "Pass -1 to skip a pair.",
    ),
    (
        ("dst_blocks.repeated",),
        "copy_blocks: dst_blocks must not repeat a block, got <block> at index <i>",
        "Two copies would go to one block.",
        "Keep one pair for each destination.",
    ),
    (
        ("starts.values",),
        "gather_cache: starts must be >= 0, got <value> at index <i>",
        "A column is negative.",
        "Pass `max_len - context_lens` for left padding.",
    ),
    (
        ("max_len.covers",),
        "gather_cache: max_len must be >= every start plus context length, got <value>, less than <n> at index <i>",
        "The result would cut a sequence off.",
        "Pass the largest sum, or more.",
    ),
)


def call(op: str, arguments: dict[str, Any]) -> Any:
    """Call the op itself."""
    return getattr(torch.ops.paged, op).default(**arguments)


def break_rule(broken: Break) -> Any:
    """Break a rule of the contract."""
    return call(broken.op, broken.arguments())


def _of_rule(rules: tuple[str, ...], text: str, cause: str, remedy: str) -> Error:
    """Return the error with every call that breaks one of the rules and says so."""
    error = Error("ValueError", text, cause, remedy, ())
    breaks = [broken for broken in (*STATIC, *VALUES) if _is_one_of(broken.rule, rules)]
    provoke = [functools.partial(break_rule, broken) for broken in breaks if error.matches(_sentence(broken))]
    return Error(error.kind, text, cause, remedy, tuple(provoke))


def _is_one_of(rule: str, rules: tuple[str, ...]) -> bool:
    return rule in rules or f"*.{rule.partition('.')[2]}" in rules


def _sentence(broken: Break) -> str:
    try:
        break_rule(broken)
    except ValueError as error:
        return str(error)
    return ""


RULES = Group("Arguments of the ops", tuple(_of_rule(*rule) for rule in _RULES))
