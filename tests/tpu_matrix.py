"""Compile every op for every chip, dtype and shape, without a TPU, and look at the programs: ``make tpu-matrix``.

A cell is a call of an op on a chip. It is supported when the chip's compiler takes the program, attention is one kernel
with no dense attention around it, and no operation makes a copy of the cache. Cells whose programs are the same are
compiled once; ``--seconds`` stops early, and the next run goes on from what ``build/tpu_matrix`` remembers.
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torch_paged.backends.tpu import aot
from torch_paged.backends.tpu.calls import JaxCall, jax_call
from torch_paged.backends.tpu.support import refusal
from torch_paged.testing import AttentionCase, build
from torch_paged.testing.cache_cases import CopyCase, GatherCase, MergeCase, WriteCase

FIGURES = Path(__file__).with_suffix(".json")
MEMORY = Path(__file__).parents[1] / "build" / "tpu_matrix"
BF16, F32, INT8, E4M3, E5M2 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2

CHIPS = tuple(aot.TOPOLOGIES)
STORAGES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (F32, None),
    "bfloat16": (BF16, None),
    "int8": (BF16, INT8),
    "float8_e4m3fn": (BF16, E4M3),
    "float8_e5m2": (BF16, E5M2),
}
"""Name -> dtypes of the query and of a quantised cache."""
SHAPES: dict[str, tuple[Any, ...]] = {
    "chip": CHIPS,
    "storage": tuple(STORAGES),
    "head_dim": (64, 80, 96, 128, 192, 256),
    "block_size": (8, 16, 32, 64, 128),
    "group": (1, 4, 8),
}
OPTIONS: dict[str, tuple[Any, ...]] = {
    **SHAPES,
    "source": ("decode", "cache", "new", "both"),
    "query": (None, F32),
    "scales_rank": (2, 1, 4),
    "num_kv_heads": (2, 1, 8, 3),
    "stats": (False, True),
    "sinks": (False, True),
    "alibi": (False, True),
    "mask": (None, "shared", "kv_heads", "heads"),
    "positions": (None, "shuffled"),
    "logits_soft_cap": (0.0, 5.0),
    "causal": (True, False),
    "sliding_window": (None, 7),
    "attention_chunk": (None, 16),
    "value_dim": (None, 48),
}
"""What combines in pairs; the first value is the neutral one."""
CACHE_OPS = ("reshape_and_cache", "quantize_and_cache", "copy_blocks", "gather_cache", "merge_attention_states")
CACHE_BLOCKS = 2048
"""Blocks of the cache that is attended to: enough to tell it from every other array, and so few that the compiler could
think of moving it to VMEM."""
CACHE_BYTES = 2**28
"""Bytes of the cache of the other ops, which are XLA's: more than any VMEM."""


@dataclass(frozen=True)
class Cell:
    """A call of an op on a chip."""

    chip: str
    case: Any
    overload: str

    @property
    def name(self) -> str:
        return f"{self.chip} {self.overload} {self.case.name}"


def shape_cells() -> Iterator[Cell]:
    """Yield both attention ops for every combination of ``SHAPES``, without options."""
    for source in ("decode", "cache"):
        for values in itertools.product(*SHAPES.values()):
            yield attention_cell({**_neutral(), **dict(zip(SHAPES, values, strict=True)), "source": source})


def option_cells() -> Iterator[Cell]:
    """Yield attention cells for ``option_choices``."""
    for choice in option_choices():
        yield attention_cell(dict(zip(OPTIONS, choice, strict=True)))


def option_choices() -> Iterator[tuple[Any, ...]]:
    """Yield values of ``OPTIONS`` that together hold every pair of values of two of them."""
    rng = random.Random(0)
    names = sorted(OPTIONS)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in OPTIONS[a] for y in OPTIONS[b]}
    while missing:
        choice = dict(min(missing, key=repr))
        for name in rng.sample(names, len(names)):
            gains = {
                value: sum(tuple(sorted(((name, value), other), key=_first)) in missing for other in choice.items())
                for value in OPTIONS[name]
            }
            choice.setdefault(name, max(gains, key=gains.__getitem__))
        missing -= set(itertools.combinations(sorted(choice.items(), key=_first), 2))
        yield tuple(choice[name] for name in OPTIONS)


def cache_cells() -> Iterator[Cell]:
    """Yield the other ops for every chip, dtype, block size and two head dims."""
    for chip, storage, size, dim in itertools.product(CHIPS, STORAGES, SHAPES["block_size"], (80, 256)):
        dtype, quantised = STORAGES[storage]
        stored = -(-dim // 128) * 128
        name = f"{storage} D{dim} S{size}"
        rank = 2 if quantised else None
        write = WriteCase(name, head_dim=dim, stored_dim=stored, block_size=size, dtype=dtype, scales_rank=rank)
        yield Cell(chip, replace(write, cache_dtype=quantised), "reshape_and_cache")
        if quantised:
            yield Cell(chip, replace(write, cache_dtype=quantised, scales_rank=4), "quantize_and_cache")
        for rank_ in (rank, 4) if quantised else (None,):
            named = f"{name}{' per token' if rank_ == 4 else ''}"
            shape = {"stored_dim": stored, "block_size": size, "cache_dtype": quantised or dtype, "scales_rank": rank_}
            yield Cell(chip, CopyCase(named, **shape), "copy_blocks")
            yield Cell(chip, GatherCase(named, **shape), "gather_cache")
        if not quantised and size == 16:
            merge = MergeCase(f"{storage} D{dim}", head_dim=dim, dtype=dtype, sinks=True)
            yield Cell(chip, merge, "merge_attention_states")


def attention_cell(choice: Mapping[str, Any]) -> Cell:
    """Return the cell of a choice of ``OPTIONS``."""
    dtype, quantised = STORAGES[choice["storage"]]
    dim, source = choice["head_dim"], choice["source"]
    if quantised and choice["query"]:
        dtype = choice["query"]
    decode = source == "decode"
    lens = (300, 0, 40, 1)
    case = AttentionCase(
        " ".join(f"{name}={value}" for name, value in choice.items() if value != OPTIONS[name][0] or name in SHAPES),
        context_lens=None if source == "new" else lens,
        query_lens=None if decode else (40, 0, 17, 1),
        new_lens=(40, 0, 17, 1) if source in ("new", "both") else None,
        num_kv_heads=choice["num_kv_heads"],
        group=choice["group"],
        head_dim=dim,
        stored_dim=-(-dim // 128) * 128,
        block_size=choice["block_size"],
        dtype=dtype,
        cache_dtype=quantised,
        scales_rank=choice["scales_rank"] if quantised else None,
        softmax_scale=0.125,
        positions=None if decode else choice["positions"],
        causal=decode or choice["causal"],
        padding_rows=0 if decode else 6,
        **{
            name: choice[name]
            for name in ("sinks", "alibi", "mask", "logits_soft_cap", "sliding_window", "attention_chunk", "value_dim")
        },
    )
    if source == "new":
        case = replace(case, cache_dtype=None, scales_rank=None, stored_dim=None)
    return Cell(choice["chip"], case, case.op + (".with_stats" if choice["stats"] else ""))


def outcome(cell: Cell) -> str | None:
    """Return None where a cell is supported, else why it is not."""
    from torch_paged.backends.tpu.export import exported, program_of

    arguments = build(cell.case)
    cache = arguments.get("kv_cache")
    if cache is not None:
        arguments |= _roomy(arguments)
    op = cell.overload.partition(".")[0]
    refused = refusal(op, arguments)
    if refused is not None:
        return f"refused: {refused}"
    call = jax_call(cell.overload, arguments)
    try:
        with aot.lowering_for(cell.chip):
            module = exported(program_of(call, "tpu", cell.chip, donate=True)).mlir_module()
    except Exception as error:
        return f"not lowered: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    num_bytes = 0 if arguments.get("kv_cache") is None else arguments["kv_cache"].nbytes
    written = sum(x.nbytes for i, x in enumerate(call.arrays) if i in call.written and x is not None)
    return _remembered(cell.chip, module, num_bytes, written, kernels=_expected_kernels(call))


def _expected_kernels(call: JaxCall) -> int:
    """Return how many kernels a call is to be: packed queries with all keys in the cache need two."""
    if not call.attends:
        return 0
    if call.module == "decode":
        return 1
    _, key, *_, positions = call.arrays
    return 2 if key is None and positions is None and call.options["max_seqlen_q"] > 1 else 1


def _roomy(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cache and its per-token scales with more blocks, without memory."""
    cache, scales = arguments["kv_cache"], arguments.get("kv_scales")
    shape = list(cache.shape)
    shape[1] = CACHE_BLOCKS if "query" in arguments else CACHE_BYTES // cache[:, 0].nbytes
    found = {"kv_cache": torch.empty(shape, dtype=cache.dtype, device="meta")}
    if scales is not None and scales.dim() == 4:
        found["kv_scales"] = torch.empty(shape[:-1], device="meta")
    return found


def _remembered(chip: str, module: str, cache_bytes: int, written: int, *, kernels: int) -> str | None:
    plain = re.sub(r" ?loc\([^()]*(?:\([^()]*\)[^()]*)*\)|^#loc.*$", "", module, flags=re.MULTILINE)
    key = hashlib.sha256(f"{versions()} {chip} {cache_bytes} {written} {kernels} {plain}".encode()).hexdigest()
    path = MEMORY / key[:2] / key
    if path.exists():
        return path.read_text() or None
    found = _compiled(chip, module, cache_bytes, written, kernels=kernels)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found or "")
    return found


def _compiled(chip: str, module: str, cache_bytes: int, written: int, *, kernels: int) -> str | None:
    """Return what is wrong with a program that is to have so many kernels, or None."""
    try:
        program = aot.compile_for(chip, module)
    except aot.Refused as error:
        return f"not compiled: {error}"
    if program.text is None and not kernels:  # a copy of a cache that is larger than any VMEM needs memory
        return f"{program.temp_bytes} temporary bytes" if program.temp_bytes >= cache_bytes // 2 else None
    wrong = []
    if kernels and len(program.kernels) != kernels:
        wrong.append(f"{len(program.kernels)} kernels, expected {kernels}")
    if kernels and any(operation.opcode in ("dot", "convolution") for operation in program.operations()):
        wrong.append("matrix products outside the kernel")
    if program.alias_bytes < written:
        wrong.append(f"{program.alias_bytes} bytes updated in place, expected {written}")
    copies = [x for x in program.whole(max(cache_bytes // 2, 1)) if cache_bytes and _moves(x, in_place=bool(written))]
    if copies:
        wrong.append("of the cache's size: " + ", ".join(f"{x.opcode} {x.num_bytes}" for x in copies))
    return "; ".join(wrong) or None


def _moves(operation: aot.Operation, *, in_place: bool) -> bool:
    """Say whether something of the cache's size is one too many: where it is written, an update of it is not."""
    return not (in_place and operation.opcode in ("fusion", "scatter", "dynamic-update-slice", "broadcast"))


def versions() -> str:
    """Return what the results depend on beside our programs."""
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))


def _neutral() -> dict[str, Any]:
    return {name: values[0] for name, values in OPTIONS.items()}


def _first(pair: tuple[str, Any]) -> str:
    return pair[0]


def all_cells() -> list[Cell]:
    """Return every cell, those first that hold most."""
    known = set(aot.chips())
    cells = [*option_cells(), *cache_cells(), *shape_cells()]
    return [cell for cell in cells if cell.chip in known]


def quick_cells() -> list[Cell]:
    """Return a subset for every run of the tests."""
    known = set(aot.chips())
    cells = [*list(option_cells())[::2], *list(cache_cells())[::97], *list(shape_cells())[::509]]
    return [cell for cell in cells if cell.chip in known]


def run(cells: list[Cell], seconds: float) -> dict[str, str | None]:
    """Return the outcome of each cell, of as many as there is time for."""
    end = time.monotonic() + seconds
    found: dict[str, str | None] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for start in range(0, len(cells), 16):
            if time.monotonic() > end:
                break
            chunk = cells[start : start + 16]
            found |= dict(zip((cell.name for cell in chunk), pool.map(outcome, chunk), strict=True))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="make tpu-matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1e9, help="stop early; the next run goes on from there")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--update", action="store_true", help="commit to the cells that are supported now")
    parser.add_argument("--quick", action="store_true", help="the subset of the tests")
    args = parser.parse_args()
    cells = [cell for cell in (quick_cells() if args.quick else all_cells()) if args.only in cell.name]
    found = run(cells, args.seconds)
    console = Console(width=200)
    console.print(table(found))
    wrong = Counter(why for why in found.values() if why is not None)
    for why, count in wrong.most_common():
        example = next(name for name, text in found.items() if text == why)
        print(f"{count} cells, such as {example}\n    {why}")
    supported = sum(why is None for why in found.values())
    print(f"{supported} of {len(found)} cells are supported, of {len(cells)} asked for; {versions()}")
    name = f"quick, {versions()}" if args.quick else versions()
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if args.update:
        FIGURES.write_text(json.dumps({**figures, name: supported}, indent=2) + "\n")
        return 0
    before = figures.get(name, 0)
    if len(found) == len(cells) and not args.only and supported < before:
        print(f"tpu-matrix: {before} cells were supported before")
        return 1
    return 1 if wrong else 0


def table(found: Mapping[str, str | None]) -> Table:
    """Return supported and all cells by chip and op."""
    counts: Counter[tuple[str, str, bool]] = Counter()
    for name, why in found.items():
        chip, op, _ = name.split(" ", 2)
        counts[chip, op.partition(".")[0], why is None] += 1
    ops = sorted({op for _, op, _ in counts})
    result = Table("chip", *ops, title="supported / cells")
    for chip in CHIPS:
        cells = [(counts[chip, op, True], counts[chip, op, True] + counts[chip, op, False]) for op in ops]
        result.add_row(chip, *(f"{yes} / {total}" for yes, total in cells))
    return result


if __name__ == "__main__":
    sys.exit(main())
