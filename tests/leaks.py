"""Call every op a million times, and calls that are refused, and watch the memory of the process: ``make leaks``."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import torch_paged  # noqa: F401  (defines the ops)
from torch_paged.testing import AttentionCase, build
from torch_paged.testing.cache_cases import CopyCase, GatherCase, MergeCase, WriteCase
from torch_paged.testing.every_op import call

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
ALLOWED_BYTES = 2**20  # of growth: a leak of 8 bytes a call is eight times that
DECODE = AttentionCase("leaks_decode", (9, 3), num_kv_heads=1, head_dim=8)
WRITE = WriteCase("leaks_write", num_tokens=3, num_kv_heads=1, head_dim=8)
CASES = (
    DECODE,
    replace(DECODE, name="leaks_int8", cache_dtype=torch.int8, scales_rank=4, sinks=True, mask="heads"),
    replace(DECODE, name="leaks_threads", context_lens=(600, 600)),
    replace(DECODE, name="leaks_varlen", query_lens=(3, 1), new_lens=(3, 1), dtype=torch.bfloat16),
    WRITE,
    replace(WRITE, name="leaks_quantise", cache_dtype=torch.int8, scales_rank=4),
    CopyCase("leaks_copy", ((0, 1), (1, 0)), cache_dtype=torch.int8, scales_rank=4, stored_dim=8),
    GatherCase("leaks_gather", (9, 3), num_kv_heads=1, stored_dim=8),
    MergeCase("leaks_merge", tokens=2, num_heads=2, head_dim=8, sinks=True),
)
INDICES = {"block_tables", "src_blocks", "slot_mapping"}


def kinds() -> Mapping[str, Callable[[], Any]]:
    """Return ways to call each op: as it should be, with strides that need a copy, and with an index out of range."""
    found: dict[str, Callable[[], Any]] = {}
    for case in CASES:
        arguments = build(case)
        op = {CopyCase: "copy_blocks", GatherCase: "gather_cache", MergeCase: "merge_attention_states"}.get(type(case))
        op = op or str(getattr(case, "op", ""))
        name = case.name.removeprefix("leaks_")
        found[name] = partial(call, op, arguments)
        kept = ("kv_cache", "kv_scales")  # written, or taken with any strides
        strided = {key: value if key in kept else _strided(value) for key, value in arguments.items()}
        found[f"{name}, strided"] = partial(call, op, strided)
        wrong = {key: value + 10**6 for key, value in arguments.items() if key in INDICES}
        if wrong:
            found[f"{name}, refused"] = partial(_refused, op, arguments | wrong)
    return found


def _strided(value: Any) -> Any:
    return torch.stack((value, value), -1)[..., 0] if isinstance(value, Tensor) else value


def _refused(op: str, arguments: dict[str, Any]) -> None:
    try:
        call(op, arguments)
    except ValueError:
        return
    raise AssertionError(f"{op} took an index out of range")


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def growth(function: Callable[[], Any], calls: int) -> int:
    """Return by how many bytes the process grew during the calls, after as many hundredths of them to warm up."""
    for _ in range(max(calls // 100, 200)):
        function()
    before = resident_bytes()
    for _ in range(calls):
        function()
    return resident_bytes() - before


def main() -> int:
    """Print a table of growths; fail where one is more than the allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000, help="calls of each op and kind (default: %(default)s)")
    calls = parser.parse_args().calls
    torch.set_num_threads(2)  # calls as small as most of these take one
    table = Table("call", "times", "growth in KiB")
    grown = {}
    with torch.inference_mode():
        for name, function in kinds().items():
            grown[name] = growth(function, calls)
            table.add_row(name, str(calls), str(grown[name] // 1024))
    Console().print(table)
    return int(max(grown.values()) > ALLOWED_BYTES)


if __name__ == "__main__":
    sys.exit(main())
