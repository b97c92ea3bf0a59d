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
from torch_paged.testing import AttentionCase, assert_attention, assert_same, build
from torch_paged.testing.processes import SOURCE

DEVICES = 4
SHAPE: dict[str, Any] = {"context_lens": (70, 0, 33), "num_kv_heads": 4, "group": 2, "stored_dim": 128, "sinks": True}
PREFILL: dict[str, Any] = {**SHAPE, "query_lens": (20, 0, 5)}
CASES = {
    "heads decode": AttentionCase("heads", **SHAPE, cache_dtype=torch.int8, scales_rank=2, alibi=True, mask="kv_heads"),
    # Without slopes: XLA's CPU compiler rounds a slope's product or not, as the program around it lets it.
    "heads prefill": AttentionCase("heads", **PREFILL, new_lens=(20, 0, 5), mask="heads", dtype=torch.bfloat16),
    "keys decode": AttentionCase("keys", **SHAPE, mask="shared", dtype=torch.bfloat16),
    "keys prefill": AttentionCase(
        "keys", **PREFILL, cache_dtype=torch.int8, scales_rank=4, sliding_window=30, alibi=True, mask="shared"
    ),
}
FUNCTIONS: dict[str, Any] = {"paged_attention": paged_attention, "flash_attn_varlen": flash_attn_varlen}


def code_of(page_name: str) -> dict[str, Any]:
    """Return what the code of a page defines."""
    page = (SOURCE / "docs" / page_name).read_text()
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    return names


def names_of(op: str) -> list[str]:
    """Return the names of the arrays of a JAX function, in order."""
    count = len(jax_call(f"{op}.with_stats", build(next(c for c in CASES.values() if c.op == op))).arrays)
    return list(FUNCTIONS[op].__annotations__)[:count]


def arrays_of(call: Any, op: str) -> dict[str, Any]:
    """Return the arrays of a call of the JAX function by name."""
    named = zip(names_of(op), call.arrays, strict=True)
    return {name: None if x is None else to_jax(x) for name, x in named}


def check(name: str) -> None:
    """Check that a call that is split over the devices gives what it gives on one: of heads also a device's bits."""
    case = CASES[name]
    arguments = build(case)
    call = jax_call(f"{case.op}.with_stats", arguments)
    arrays = arrays_of(call, case.op)
    function = partial(FUNCTIONS[case.op], **call.options, chip=CHIPS["v5e"], interpret=True)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("chips",))
    page = code_of("tpu.md")
    if name.startswith("heads"):
        results = page["over_heads"](function, mesh, arrays)
        shards = results[0].sharding.shard_shape(results[0].shape)
        assert shards[1] == case.num_heads // DEVICES, "heads are not split"
        own_heads, on_one = code_of("parallel.md")["heads_of_rank"], jax.jit(function)
        for device in range(DEVICES):
            own = arrays_of(jax_call(f"{case.op}.with_stats", own_heads(arguments, device, DEVICES)), case.op)
            for what, sharded, one in zip(("out", "lse", "max_logits"), results, on_one(**own), strict=True):
                shard = to_torch(sharded).chunk(DEVICES, 1)[device]
                assert_same(shard, to_torch(one), f"{what} of device {device}")
    else:
        parts = joined_parts(arguments)
        sinks = arrays.pop("sinks")
        shared = {key: x for key, x in arrays.items() if key not in parts}
        results = page["over_keys"](function, mesh, shared, {key: to_jax(x) for key, x in parts.items()}, sinks)
    assert_attention(case.op, arguments, *map(to_torch, results))


def joined_parts(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return caches, tables, lengths and masks of a quarter of each sequence's blocks for each device."""
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
        piece["attn_mask"] = columns_from(arguments["attn_mask"], starts)
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


def columns_from(mask: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return a (T, C) mask whose rows begin at these columns; False behind the last one."""
    columns = starts[:, None] + torch.arange(mask.size(-1))
    return mask.gather(-1, columns.clamp(max=mask.size(-1) - 1)) & (columns < mask.size(-1))


if __name__ == "__main__":
    assert len(jax.devices()) == DEVICES
    for case_name in CASES:
        try:
            check(case_name)
            print(f"passed: {case_name}", flush=True)
        except Exception:
            traceback.print_exc()
