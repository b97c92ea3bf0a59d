"""The inputs of a benchmark case: as ``torch_paged.testing`` builds them, on as many pools as keep the caches cold."""

import random
from typing import Any

import torch

from benchmarks.machine import huge_copy, pools_for
from torch_paged.testing import AttentionCase, build

_CLONED = ("query", "key", "value", "kv_cache")


def ragged(batch: int, longest: int, seed: object) -> tuple[int, ...]:
    """Return lengths between half of the longest and the longest, which comes first."""
    draw = random.Random(f"{seed}/{batch}/{longest}")
    return (longest, *(draw.randint((longest + 1) // 2, longest) for _ in range(batch - 1)))


def attention_pools(case: AttentionCase, seed: int) -> list[dict[str, Any]]:
    """Return the arguments of a case once for each pool: the same tables and contents, other memory.

    Slots that no sequence uses hold zeros: those that are compared read them.
    """
    first = build(case, seed)
    if case.context_lens is not None:
        _drop_unused_blocks(first)
    sizes = 0
    for name in _CLONED:
        tensor = first.get(name)
        if tensor is not None:
            copy = huge_copy(tensor)
            first[name] = copy.nan_to_num_(0.0) if copy.dtype.itemsize > 1 else copy
            sizes += copy.nbytes
    others = range(pools_for(sizes) - 1)
    return [first, *(first | {name: huge_copy(first[name]) for name in _CLONED if _given(first, name)} for _ in others)]


def _drop_unused_blocks(arguments: dict[str, Any]) -> None:
    """Leave out the blocks that no table entry names, such as those behind a window: the pool is what is read."""
    kv_cache, tables = arguments["kv_cache"], arguments["block_tables"]
    known = (tables >= 0) & (tables < kv_cache.size(1))
    used, numbers = tables[known].unique(return_inverse=True)
    arguments["kv_cache"] = kv_cache[:, used]
    arguments["block_tables"] = tables.masked_scatter(known, numbers.int())
    if arguments["kv_scales"] is not None and arguments["kv_scales"].dim() == 4:
        arguments["kv_scales"] = arguments["kv_scales"][:, used]


def _given(arguments: dict[str, Any], name: str) -> bool:
    return isinstance(arguments.get(name), torch.Tensor)
