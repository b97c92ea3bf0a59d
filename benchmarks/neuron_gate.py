"""Compare what a few small calls run on the Neuron kernels with committed figures, which may only get better.

``python -m benchmarks.neuron_gate --update`` writes them. They are counts of the simulator, the same everywhere, and
what the model makes of them.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.neuron_counts import Counted
from torch_paged.backends.neuron import cache as cache_ops
from torch_paged.backends.neuron import decode, merge, varlen
from torch_paged.backends.neuron.cost import CHIPS, Counts, cost
from torch_paged.testing import AttentionCase, build
from torch_paged.testing.cache_cases import CopyCase, GatherCase, MergeCase, WriteCase

FIGURES = Path(__file__).parents[1] / "tests" / "neuron_counts.json"
BF16 = torch.bfloat16
DECODE = AttentionCase("decode", (70, 300), head_dim=64, dtype=BF16)
PREFILL = AttentionCase("prefill", (64,), (40,), head_dim=64, dtype=BF16)
Op = Callable[..., Any]
CASES: dict[str, tuple[Op, Any, int]] = {
    "decode": (decode.paged_attention, DECODE, 1),
    "decode, two cores": (decode.paged_attention, DECODE, 2),
    "decode, int8 per token": (
        decode.paged_attention,
        AttentionCase("decode", (70,), head_dim=64, dtype=BF16, cache_dtype=torch.int8, scales_rank=4),
        1,
    ),
    "decode, options": (
        decode.paged_attention,
        AttentionCase("decode", (300,), head_dim=64, sinks=True, logits_soft_cap=5.0, alibi=True, sliding_window=200),
        1,
    ),
    "prefill, cache": (varlen.flash_attn_varlen, PREFILL, 1),
    "prefill, cache and new keys": (
        varlen.flash_attn_varlen,
        AttentionCase("prefill", (64,), (40,), (40,), head_dim=64, dtype=BF16),
        1,
    ),
    "write": (cache_ops.reshape_and_cache, WriteCase("write", dtype=BF16), 1),
    "copy": (cache_ops.copy_blocks, CopyCase("copy", block_size=16, cache_dtype=BF16), 1),
    "gather": (cache_ops.gather_cache, GatherCase("gather", cache_dtype=BF16), 1),
    "merge": (merge.merge_attention_states, MergeCase("merge", dtype=BF16), 1),
}
"""Name -> op, case, cores."""
MEASURES = ("instructions", "turns", "descriptors", "bytes", *(f"us on {chip}" for chip in CHIPS))

Figures = dict[str, dict[str, float]]


def measured() -> Figures:
    """Return the figures of every case."""
    return {name: figures(name) for name in CASES}


@cache
def figures(name: str) -> dict[str, float]:
    """Return the figures of a case."""
    op, case, cores = CASES[name]
    counted = Counted("trn2", cores, None)
    op(counted.launch, build(case))
    total = Counts()
    for _, counts in counted.kernels:
        total = total.plus(counts)
    moves = [(key, number) for key, number in total.instructions.items() if key.engine == "dma"]
    us = [round(sum(cost(counts, chip).us for _, counts in counted.kernels), 2) for chip in CHIPS.values()]
    values = (
        sum(total.instructions.values()),
        total.turns,
        sum(number * key.descriptors for key, number in moves),
        sum(number * key.bytes for key, number in moves),
        *us,
    )
    return dict(zip(MEASURES, values, strict=True))


def worse(now: Figures, before: Figures) -> list[str]:
    """Return a sentence for each figure that grew, and for each case without one."""
    found = [f"{name} has no committed figures" for name in now if name not in before]
    for name, known in before.items():
        for measure, value in known.items():
            if name not in now or measure not in now[name]:
                found.append(f"{name} has no {measure} any more")
            elif now[name][measure] > value:
                found.append(f"{name}: {measure} grew from {value} to {now[name][measure]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neuron_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the figures instead of comparing with them")
    args = parser.parse_args()
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    now = measured()
    if args.update:
        FIGURES.write_text(json.dumps(now, indent=2) + "\n")
        return 0
    table = Table("case", *MEASURES, title="committed -> now")
    for name, values in now.items():
        before = known.get(name, {})
        table.add_row(name, *(f"{before.get(measure, '')} -> {values[measure]}" for measure in MEASURES))
    Console(width=180).print(table)
    found = worse(now, known)
    for sentence in found:
        print(
            f"neuron_gate: {sentence}; where that is meant, run `python -m benchmarks.neuron_gate --update` and commit"
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
