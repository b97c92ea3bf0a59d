"""One call of every op, and what it leaves behind: for tests of what does not depend on an op."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torch_paged.testing.cache_cases import CopyCase, GatherCase, MergeCase, WriteCase
from torch_paged.testing.cases import AttentionCase, build

Case = AttentionCase | WriteCase | CopyCase | GatherCase | MergeCase
Run = Callable[[str, dict[str, Any]], Any]

_BF16, _INT8 = torch.bfloat16, torch.int8

EVERY_OP: Mapping[str, tuple[str, Case]] = {
    "decode": ("paged_attention", AttentionCase("every_decode", (1100, 5, 600, 64), dtype=_BF16, sinks=True)),
    "decode_int8": (
        "paged_attention",
        AttentionCase("every_int8", (1100, 5, 600), dtype=_BF16, cache_dtype=_INT8, scales_rank=4),
    ),
    "prefill": ("flash_attn_varlen", AttentionCase("every_prefill", (2100, 0, 300, 9), (40, 3, 90, 9))),
    "beside": (
        "flash_attn_varlen",
        AttentionCase("every_beside", (100, 40, 9), (70, 3, 9), new_lens=(70, 3, 9), dtype=_BF16, alibi=True),
    ),
    "write": ("reshape_and_cache", WriteCase("every_write", num_tokens=700, skipped_tokens=9, num_blocks=50)),
    "quantise": (
        "quantize_and_cache",
        WriteCase("every_quantise", num_tokens=700, num_blocks=50, dtype=_BF16, cache_dtype=_INT8, scales_rank=4),
    ),
    "copy": (
        "copy_blocks",
        CopyCase(
            "every_copy",
            tuple((i, i - 1 if i % 2 else i + 1) for i in range(30)),  # pairs of blocks change places
            num_blocks=32,
            block_size=16,
            stored_dim=64,
            cache_dtype=_INT8,
            scales_rank=4,
        ),
    ),
    "gather": ("gather_cache", GatherCase("every_gather", (700, 3, 90), cache_dtype=_INT8, scales_rank=2)),
    "merge": ("merge_attention_states", MergeCase("every_merge", tokens=200, sinks=True, empty=True)),
}
"""A call of each op by name, with its schema name; each has work for several threads, and those of attention are split
among them."""


def outcome(run: Run, op: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the results of a call, then the tensors that it wrote.

    Args:
        run: calls an op by its schema name.
        op: the schema name.
        arguments: the arguments by schema name; the cache and its scales are written.
    """
    return (*tensors_of(run(op, arguments)), *written(op, arguments))


def tensors_of(results: Any) -> tuple[Tensor, ...]:
    """Return what an op returned, one tensor, several or none, as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(results or ())


def written(op: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the arguments of a call that the op writes."""
    both = ("kv_cache", "kv_scales")
    names = {"reshape_and_cache": both[:1], "quantize_and_cache": both, "copy_blocks": both}.get(op, ())
    return tuple(arguments[name] for name in names if arguments[name] is not None)


def digest(tensors: tuple[Tensor, ...]) -> str:
    """Return a hash of contiguous tensors' bits; computed without torch's threads, which a forked child has not."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def call(op: str, arguments: dict[str, Any]) -> Any:
    """Call ``torch.ops.paged`` by schema name; attention with its statistics."""
    packet = getattr(torch.ops.paged, op)
    attention = op in ("paged_attention", "flash_attn_varlen")
    return (packet.with_stats if attention else packet.default)(**arguments)


def build_every_op() -> dict[str, dict[str, Any]]:
    """Return the arguments of each call by its name."""
    return {name: build(case) for name, (_, case) in EVERY_OP.items()}


def digests(arguments: Mapping[str, dict[str, Any]] | None = None, run: Run = call) -> dict[str, str]:
    """Return the hash of what each call leaves behind; None builds the arguments."""
    given = build_every_op() if arguments is None else arguments
    return {name: digest(outcome(run, op, given[name])) for name, (op, _) in EVERY_OP.items()}
