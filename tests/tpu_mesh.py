"""The TPU's attention kernels under shard_map on four virtual devices, interpreted: the code of docs/tpu.md.

A process of its own, which ``XLA_FLAGS`` gives its devices: ``python tests/tpu_mesh.py`` prints each check that passed.
"""

import re
import traceback
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from jax_arrays import to_jax, to_torch
from parallel_ranks import part, rows_of

from torch_paged.backends.tpu.block_sizes import CHIPS
from torch_paged.backends.tpu.calls import jax_call
from torch_paged.backends.tpu.decode import paged_attention
from torch_paged.backends.tpu.varlen import flash_attn_varlen
from torch_paged.testing import AttentionCase, assert_attention, build
from torch_paged.testing.processes import SOURCE

DEVICES = 4
SHAPE: dict[str, Any] = {"context_lens": (70, 0, 33), "num_kv_heads": 4, "group": 2, "stored_dim": 128, "sinks": True}
PREFILL: dict[str, Any] = {**SHAPE, "query_lens": (20, 0, 5)}
CASES = {
    "heads decode": AttentionCase("heads", **SHAPE, cache_dtype=torch.int8, scales_rank=2, alibi=True),
    "heads prefill": AttentionCase("heads", **PREFILL, new_lens=(20, 0, 5), mask="heads", dtype=torch.bfloat16),
    "keys decode": AttentionCase("keys", **SHAPE, dtype=torch.bfloat16),
    "keys prefill": AttentionCase("keys", **PREFILL, cache_dtype=torch.int8, scales_rank=4, sliding_window=30),
}
FUNCTIONS: dict[str, Any] = {"paged_attention": paged_attention, "flash_attn_varlen": flash_attn_varlen}


def code_of_the_page() -> dict[str, Any]:
    """Return what the code of the page defines."""
    page = (SOURCE / "docs" / "tpu.md").read_text()
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    return names


def names_of(op: str) -> list[str]:
    """Return the names of the arrays of a JAX function, in order."""
    count = len(jax_call(f"{op}.with_stats", build(next(c for c in CASES.values() if c.op == op))).arrays)
    return list(FUNCTIONS[op].__annotations__)[:count]


def check(name: str) -> None:
    """Check that a call that is split over the devices gives what it gives on one."""
    case = CASES[name]
    arguments = build(case)
    call = jax_call(f"{case.op}.with_stats", arguments)
    tensors = dict(zip(names_of(case.op), call.arrays, strict=True))
    arrays = {key: None if x is None else to_jax(x) for key, x in tensors.items()}
    function = partial(FUNCTIONS[case.op], **call.options, chip=CHIPS["v5e"], interpret=True)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("chips",))
    page = code_of_the_page()
    if name.startswith("heads"):
        results = page["over_heads"](function, mesh, arrays)
        shards = results[0].sharding.shard_shape(results[0].shape)
        assert shards[1] == case.num_heads // DEVICES, "heads are not split"
    else:
        parts = joined_parts(arguments)
        sinks = arrays.pop("sinks")
        shared = {key: x for key, x in arrays.items() if key not in parts}
        results = page["over_keys"](function, mesh, shared, {key: to_jax(x) for key, x in parts.items()}, sinks)
    assert_attention(case.op, arguments, *map(to_torch, results))


def joined_parts(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return caches, tables and lengths that hold a quarter of each sequence's blocks for each device."""
    size = arguments["kv_cache"].size(3)
    cu_seqlens_q, positions = rows_of(arguments)
    pieces = []
    for device in range(DEVICES):
        blocks = [-(-length // size) for length in arguments["context_lens"].tolist()]
        bounds = [
            tuple(min(length, count * i // DEVICES * size) for i in (device, device + 1))
            for length, count in zip(arguments["context_lens"].tolist(), blocks, strict=True)
        ]
        piece = part(arguments, [(begin, end) for begin, end in bounds])
        starts = piece.pop("starts").repeat_interleave(cu_seqlens_q.diff())
        if "query_positions" in arguments:
            piece["query_positions"] = positions - starts
        pieces.append({name: x for name, x in piece.items() if x is not None})
    most_blocks = max(piece["kv_cache"].size(1) for piece in pieces)
    widest = max(piece["block_tables"].size(1) for piece in pieces)
    for piece in pieces:
        missing = most_blocks - piece["kv_cache"].size(1)
        for name in {"kv_cache", "kv_scales"} & piece.keys():
            piece[name] = torch.cat([piece[name], piece[name][:, :1].expand(-1, missing, *piece[name].shape[2:])], 1)
        missing = widest - piece["block_tables"].size(1)
        piece["block_tables"] = torch.nn.functional.pad(piece["block_tables"], (0, missing), value=-1)
    return {
        name: torch.cat([piece[name] for piece in pieces], 1 if name in ("kv_cache", "kv_scales") else 0)
        for name in pieces[0]
    }


if __name__ == "__main__":
    assert len(jax.devices()) == DEVICES
    for case_name in CASES:
        try:
            check(case_name)
            print(f"passed: {case_name}", flush=True)
        except Exception:
            traceback.print_exc()
