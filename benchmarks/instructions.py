"""Count the instructions of small fixed calls and compare them with committed figures: ``make instructions``.

Counts do not depend on what else the machine does, so that a change of a few per cent shows where times would not tell.
They say nothing of memory: a kernel may take fewer instructions and more time. Every instruction of a call is executed
in single steps (``steps.cpp``, x86-64 only). The count of a case is that of the call less that of the same call with
nothing to do; ``empty call`` is what remains, interpreter and dispatcher included.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.native import ISA_VARIABLE, ISAS, compiled
from torch_paged.backends.cpu.support import LIBRARY, isa
from torch_paged.testing import AttentionCase, build
from torch_paged.testing.cache_cases import CopyCase, GatherCase, MergeCase, WriteCase

HERE = Path(__file__).parent
FIGURES = HERE / "instructions.json"
TOLERANCE = 0.03
ADDR_NO_RANDOMIZE = 0x0040000  # of <sys/personality.h>
WARM_UP = 20  # the interpreter specialises its bytecode, torch and the kernels keep memory

Case = AttentionCase | WriteCase | CopyCase | GatherCase | MergeCase

DECODE = AttentionCase("decode", (100,), num_kv_heads=1)
PREFILL = AttentionCase("prefill", (64,), (32,), num_kv_heads=1, group=1, head_dim=32)
WRITE = WriteCase("write", num_tokens=16)
BF16, FP16, INT8, E4M3 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
CASES: tuple[Case, ...] = (
    replace(DECODE, name="decode, bfloat16", dtype=BF16),
    replace(DECODE, name="decode, float32"),
    replace(DECODE, name="decode, float16", dtype=FP16),
    replace(DECODE, name="decode, int8 per token", dtype=BF16, cache_dtype=INT8, scales_rank=4),
    replace(DECODE, name="decode, float8_e4m3fn per head", dtype=BF16, cache_dtype=E4M3, scales_rank=2),
    replace(DECODE, name="decode, bfloat16, head_dim 80", dtype=BF16, head_dim=80),
    replace(DECODE, name="decode, bfloat16, group 1", dtype=BF16, group=1),
    replace(DECODE, name="decode, bfloat16, options", dtype=BF16, sinks=True, logits_soft_cap=5.0, sliding_window=40),
    replace(DECODE, name="decode, bfloat16, 8 sequences", dtype=BF16, context_lens=(16,) * 8, head_dim=32),
    replace(PREFILL, name="prefill, bfloat16", dtype=BF16),
    replace(PREFILL, name="prefill, float32"),
    replace(PREFILL, name="prefill, float16", dtype=FP16),
    replace(WRITE, name="write, bfloat16", dtype=BF16),
    replace(WRITE, name="write, int8 per tensor", dtype=BF16, cache_dtype=INT8, scales_rank=1),
    replace(WRITE, name="write, float8_e4m3fn per token", dtype=BF16, cache_dtype=E4M3, scales_rank=4),
    CopyCase("copy, bfloat16", num_kv_heads=8, block_size=16, cache_dtype=BF16),
    GatherCase("gather, int8 per token", (20,), cache_dtype=INT8, scales_rank=4),
    MergeCase("merge, bfloat16", parts=2, tokens=2, dtype=BF16),
)
OPS = {CopyCase: "copy_blocks", GatherCase: "gather_cache", MergeCase: "merge_attention_states"}
EMPTY: dict[type, dict[str, Any]] = {
    AttentionCase: {"context_lens": ()},
    WriteCase: {"num_tokens": 0},
    CopyCase: {"pairs": ()},
    GatherCase: {"context_lens": ()},
    MergeCase: {"tokens": 0},
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the figures instead of comparing with them")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        print(json.dumps(count_all()))
        return 0
    if platform.machine() != "x86_64":
        print(
            f"instructions: single steps are implemented for x86_64, this is {platform.machine()}; nothing to compare"
        )
        return 0
    counts = {name: found for name in ISAS if (found := counts_of(name)) is not None}
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"taken with": None, "instructions": {}}
    if args.update:
        text = {"taken with": taken_with(), "instructions": known["instructions"] | counts}
        FIGURES.write_text(json.dumps(text, indent=2) + "\n")
        return 0
    if known["taken with"] != taken_with():
        print(
            f"instructions: the figures were taken with {known['taken with']}, this is {taken_with()}; "
            "compare there, or write figures of your own with `make instructions ARGS=--update` before your change"
        )
        return 2
    return compare(counts, known["instructions"])


def taken_with() -> str:
    """Return the versions that counts depend on."""
    compiler = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", LIBRARY.read_bytes())
    name = "an unknown compiler" if compiler is None else compiler[0].decode()
    return f"{name}, Python {platform.python_version()}, torch {torch.__version__}"


def compare(counts: dict[str, dict[str, int]], figures: dict[str, dict[str, int]]) -> int:
    """Print the cases that left the tolerance, and return how the program ends."""
    table = Table("kernels", "case", "committed", "now", "change")
    failed = False
    for name, found in counts.items():
        for case, now in found.items():
            before = figures.get(name, {}).get(case)
            wrong = before is None or abs(now - before) > TOLERANCE * before
            failed |= wrong
            shown = "no figure" if before is None else f"{now / before - 1:+.1%}"
            table.add_row(name, case, str(before), str(now), f"[red]{shown}[/red]" if wrong else shown)
    Console(width=100).print(table)
    if failed:
        print(
            f"instructions: some count changed by more than {TOLERANCE:.0%}; where that is meant, "
            "run `make instructions ARGS=--update` and commit the figures"
        )
    return 1 if failed else 0


def counts_of(name: str) -> dict[str, int] | None:
    """Return the counts of one instruction set, taken in a process of its own, or None where it does not run here."""
    environment = dict(os.environ, **{ISA_VARIABLE: name}, OMP_NUM_THREADS="1", PYTHONHASHSEED="0")
    # One step of a string instruction is one byte or one line, as the processor likes: copy without them.
    environment["GLIBC_TUNABLES"] = "glibc.cpu.hwcaps=-ERMS,-FSRM"
    command = [sys.executable, "-m", "benchmarks.instructions", "--count"]
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env=environment,
        preexec_fn=fix_addresses,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    counts: dict[str, int] | None = json.loads(done.stdout)
    if counts is None:
        print(f"instructions: this machine has no {name}; its figures are not compared")
    return counts


def fix_addresses() -> None:
    """Give the process the same addresses in every run: the work of malloc depends on them."""
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)


def count_all() -> dict[str, int] | None:
    """Return the instructions of every case with the kernels of this process."""
    if isa() is None:
        return None
    torch.set_num_threads(1)
    gc.disable()
    with torch.inference_mode():
        count = partial(steps, stepper())
        before = [count(lambda: None) for _ in range(WARM_UP)][-1]
        if before == 0:
            raise SystemExit("instructions: this machine does not trap single steps, so that nothing can be counted")
        counts = {case.name: count(call(case)) - count(call(nothing(case))) for case in CASES}
        counts["empty call, inference_mode"] = count(call(nothing(DECODE))) - before
        with torch.inference_mode(False), torch.no_grad():
            counts["empty call, no_grad"] = count(call(nothing(DECODE))) - before
    return counts


def nothing(case: Any) -> Any:
    """Return the case with no tokens, pairs or sequences."""
    empty = EMPTY[type(case)]
    return replace(case, **empty, query_lens=()) if getattr(case, "query_lens", None) else replace(case, **empty)


def call(case: Any) -> Callable[[], object]:
    """Return a call of the op on the case's tensors."""
    overload = getattr(torch.ops.paged, OPS.get(type(case)) or case.op).default
    arguments = build(case)
    values = tuple(arguments.get(argument.name, argument.default_value) for argument in overload._schema.arguments)
    return lambda: overload(*values)


def steps(library: ctypes.CDLL, function: Callable[[], object]) -> int:
    """Return how many instructions a call takes once it is warm."""
    for _ in range(WARM_UP):
        function()
    library.begin_steps()
    function()
    return int(library.end_steps())


def stepper() -> ctypes.CDLL:
    """Return the counter, compiled when that is out of date."""
    loaded = compiled("steps")
    loaded.end_steps.restype = ctypes.c_int64
    return loaded


if __name__ == "__main__":
    sys.exit(main())
