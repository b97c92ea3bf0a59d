"""The rules that only values tell: slots, block ids of used entries, lengths. ``VALUE_RULES[op]``, in checking order.

They read every index tensor on the host, so that accelerators run them for debugging only. The CPU kernels implement
the same table in ``csrc_shims/checks_attention.h``. Arguments have passed ``validate``.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from torch_paged.contract.rules import Broken, Call, Rule, check


def check_values(op: str, arguments: Mapping[str, Any]) -> None:
    """Check everything that depends on tensor data.

    Args:
        op: Schema name without overload.
        arguments: All arguments by schema name, defaults filled in. Index tensors are copied to the host.

    Raises:
        ValueError: ``<op>: <argument> must <rule>, got <value> at index <i>``, for the first rule that is broken.
    """
    check(VALUE_RULES[op], Call(op, arguments))


def _values(call: Call, name: str) -> list[Any]:
    return call[name].tolist()


def _in_range(name: str, high: Callable[[Call], int], text: str, low: int = 0) -> Rule:
    """Return the rule that every value lies in ``[low, high]``; ``text`` spells the interval, ``{}`` its end."""

    def broken(call: Call) -> Broken:
        limit = high(call)
        for i, value in enumerate(_values(call, name) if call.has(name) else []):
            if not low <= value <= limit:
                end = limit if text.endswith("]") else limit + 1
                return name, f"lie in {text.format(end)}", f"{value} at index {i}"
        return None

    return Rule(f"{name}.values", broken)


def _capacity(call: Call) -> int:
    return call["block_tables"].size(1) * call["kv_cache"].size(3) if call.has("kv_cache") else 0


def _last_block(call: Call) -> int:
    return call["kv_cache"].size(1) - 1


def _last_slot(call: Call) -> int:
    return call["kv_cache"].size(1) * call["kv_cache"].size(3) - 1


def _cu_seqlens(name: str, rows: str, letter: str) -> tuple[Rule, Rule, Rule]:
    def start(call: Call) -> Broken:
        if not call.has(name) or (first := _values(call, name)[0]) == 0:
            return None
        return name, "start with 0", f"{first} at index 0"

    def order(call: Call) -> Broken:
        for i, (before, value) in enumerate(pairwise(_values(call, name) if call.has(name) else [])):
            if value < before:
                return name, "not decrease", f"{value} after {before} at index {i + 1}"
        return None

    def end(call: Call) -> Broken:
        if not call.has(name):
            return None
        values, limit = _values(call, name), call[rows].size(0)
        if values[-1] <= limit:
            return None
        return name, f"end at or before {letter} = {limit}", f"{values[-1]} at index {len(values) - 1}"

    return Rule(f"{name}.start", start), Rule(f"{name}.order", order), Rule(f"{name}.end", end)


def _scale_values(call: Call) -> Broken:
    scales = call["kv_scales"]
    if scales is None or scales.dim() > 2:
        return None
    for i, row in enumerate(scales.tolist()):
        for j, value in enumerate(row if isinstance(row, list) else [row]):
            if not 0 < value < math.inf:
                index = (i, j) if isinstance(row, list) else i
                return "kv_scales", "be finite and > 0", f"{value:g} at index {index}"
    return None


def _differences(cu_seqlens: Tensor) -> list[int]:
    return cu_seqlens.diff().tolist()


def _query_lens(call: Call) -> list[int]:
    if call.op == "paged_attention":
        return [1] * call["query"].size(0)
    return _differences(call["cu_seqlens_q"])


def _kv_lens(call: Call) -> list[int]:
    cached = _values(call, "context_lens") if call.has("context_lens") else None
    new = _differences(call["cu_seqlens_k"]) if call.has("cu_seqlens_k") else None
    if cached is None or new is None:
        return cached if new is None else new  # type: ignore[return-value]
    return [a + b for a, b in zip(cached, new, strict=True)]


def _covers(name: str, what: str, lengths: Callable[[Call], list[int]], bound: Callable[[Call], int], got: str) -> Rule:
    """Return the rule that a bound is no less than every length."""

    def broken(call: Call) -> Broken:
        if not call.has(name):
            return None
        limit = bound(call)
        for i, length in enumerate(lengths(call)):
            if length > limit:
                return name, f"{what}", f"{got.format(limit)}, less than {length} at index {i}"
        return None

    return Rule(f"{name}.covers", broken)


def used_entries(call: Call, seq: int, query_begin: int, query_len: int, kv_len: int) -> list[bool]:
    """Return which table entries of a sequence hold a key that length, window and chunk together let some query see.

    Args:
        call: An attention call with a cache.
        seq: Sequence, the row of ``block_tables``.
        query_begin: Row of its first query.
        query_len: Its queries, tokens.
        kv_len: Its keys, cached and new, tokens.

    Returns:
        One bool per entry up to its context length.
    """
    context, size = int(call["context_lens"][seq]), call["kv_cache"].size(3)
    window, chunk = call["sliding_window"], call["attention_chunk"]
    used = [False] * -(-context // size)
    if window is None and chunk is None:
        return [query_len > 0] * len(used)
    positions = range(kv_len - query_len, kv_len)
    if call.has("query_positions"):
        positions = call["query_positions"][query_begin : query_begin + query_len].tolist()
    for p in positions:
        first = max(0, 0 if window is None else p - window + 1, 0 if chunk is None else p // chunk * chunk)
        last = p if call["causal"] or chunk is not None or window is None else p + window - 1
        last = min(last, context - 1)
        if first <= last:
            blocks = last // size - first // size + 1
            used[first // size : last // size + 1] = [True] * blocks
    return used


def _block_ids(call: Call) -> Broken:
    if not call.has("kv_cache"):
        return None
    num_blocks, begin = call["kv_cache"].size(1), 0
    table = _values(call, "block_tables")
    for seq, (query_len, kv_len) in enumerate(zip(_query_lens(call), _kv_lens(call), strict=True)):
        for m, used in enumerate(used_entries(call, seq, begin, query_len, kv_len)):
            if used and not 0 <= table[seq][m] < num_blocks:
                return (
                    "block_tables",
                    f"lie in [0, N = {num_blocks}) where used",
                    f"{table[seq][m]} at index {(seq, m)}",
                )
        begin += query_len
    return None


def _starts(call: Call) -> Broken:
    for i, start in enumerate(_values(call, "starts") if call.has("starts") else []):
        if start < 0:
            return "starts", "be >= 0", f"{start} at index {i}"
    return None


def _ends(call: Call) -> list[int]:
    starts = _values(call, "starts") if call.has("starts") else [0] * call["context_lens"].numel()
    return [a + b for a, b in zip(starts, _values(call, "context_lens"), strict=True)]


def _gathered_ids(call: Call) -> Broken:
    num_blocks, size = call["kv_cache"].size(1), call["kv_cache"].size(3)
    for seq, (row, length) in enumerate(zip(_values(call, "block_tables"), _values(call, "context_lens"), strict=True)):
        for m, block_id in enumerate(row[: -(-length // size)]):
            if block_id >= num_blocks:
                return "block_tables", f"be < N = {num_blocks} where used", f"{block_id} at index {(seq, m)}"
    return None


def _destinations(call: Call) -> Broken:
    seen = set()
    for i, (src, dst) in enumerate(zip(_values(call, "src_blocks"), _values(call, "dst_blocks"), strict=True)):
        if src < 0 or dst < 0:
            continue
        if dst in seen:
            return "dst_blocks", "not repeat a block", f"{dst} at index {i}"
        seen.add(dst)
    return None


_CONTEXT_LENS = _in_range("context_lens", _capacity, "[0, M * S = {}]")
_SCALE_VALUES = Rule("kv_scales.values", _scale_values)
_SLOTS = _in_range("slot_mapping", _last_slot, "[-1, N * S = {})", low=-1)


def _attention(*, varlen: bool) -> Iterator[Rule]:
    if varlen:
        yield from _cu_seqlens("cu_seqlens_q", "query", "T")
        yield from _cu_seqlens("cu_seqlens_k", "key", "Tk")
    yield _CONTEXT_LENS
    yield _SCALE_VALUES
    if varlen:
        yield _covers("max_seqlen_q", "be >= every query length", _query_lens, lambda call: call["max_seqlen_q"], "{}")
        yield _covers("max_seqlen_k", "be >= every kv length", _kv_lens, lambda call: call["max_seqlen_k"], "{}")
    yield _covers("attn_mask", "have C >= every kv length", _kv_lens, lambda call: call["attn_mask"].size(-1), "C = {}")
    yield Rule("block_tables.values", _block_ids)


VALUE_RULES: dict[str, tuple[Rule, ...]] = {
    "reshape_and_cache": (_SLOTS, _SCALE_VALUES),
    "quantize_and_cache": (_SLOTS,),
    "paged_attention": tuple(_attention(varlen=False)),
    "flash_attn_varlen": tuple(_attention(varlen=True)),
    "merge_attention_states": (),
    "copy_blocks": (
        _in_range("src_blocks", _last_block, "[-1, N = {})", low=-1),
        _in_range("dst_blocks", _last_block, "[-1, N = {})", low=-1),
        Rule("dst_blocks.repeated", _destinations),
    ),
    "gather_cache": (
        _CONTEXT_LENS,
        _SCALE_VALUES,
        Rule("starts.values", _starts),
        _covers("max_len", "be >= every start plus context length", _ends, lambda call: call["max_len"], "{}"),
        Rule("block_tables.values", _gathered_ids),
    ),
}
"""Op name without overload -> its value rules."""
