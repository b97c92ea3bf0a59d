"""Compile every op for every chip, dtype and shape, without a TPU, and look at the programs: ``make tpu-matrix``.

A cell is a call of an op on a chip. It is supported when the chip's compiler takes the program, attention is the
kernels that it is to be, with no dense attention around them, and no operation makes a copy of the cache. Every outcome
is kept in ``build/tpu_matrix`` until a file that it depends on changes; cells whose programs are the same are compiled
once. ``--seconds`` stops early, and the next run goes on. The order is such that what was done first says most: pairs
of options, then pairs of shapes, then the rest at random.
"""

import argparse
import hashlib
import importlib.metadata
import inspect
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
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from torch_paged.backends.tpu import aot
from torch_paged.backends.tpu.calls import JaxCall, jax_call
from torch_paged.backends.tpu.support import chip_refusal, refusal
from torch_paged.testing import AttentionCase, build
from torch_paged.testing.cache_cases import CopyCase, GatherCase, MergeCase, WriteCase

FIGURES = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[1]
MEMORY = ROOT / "build" / "tpu_matrix"
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


def corner_cells() -> Iterator[Cell]:
    """Yield of ``shape_cells`` so many that each op has every pair of values of two of ``SHAPES``."""
    for source, choice in itertools.product(("decode", "cache"), list(pairs(SHAPES))):
        yield attention_cell({**_neutral(), **dict(zip(SHAPES, choice, strict=True)), "source": source})


def option_cells() -> Iterator[Cell]:
    """Yield attention cells with every pair of values of two of ``OPTIONS``."""
    for choice in pairs(OPTIONS):
        yield attention_cell(dict(zip(OPTIONS, choice, strict=True)))


def pairs(values: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Yield choices of values that together hold every pair of values of two names."""
    rng = random.Random(0)
    names = sorted(values)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in values[a] for y in values[b]}
    while missing:
        choice = dict(min(missing, key=repr))
        for name in rng.sample(names, len(names)):
            gains = {
                x: sum(tuple(sorted(((name, x), other), key=_first)) in missing for other in choice.items())
                for x in values[name]
            }
            choice.setdefault(name, max(gains, key=gains.__getitem__))
        missing -= set(itertools.combinations(sorted(choice.items(), key=_first), 2))
        yield tuple(choice[name] for name in values)


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
    """Return None where a cell is supported, else why it is not; what is known of it, or else found out now."""
    path = _path(versions(), _sources(_module(cell)), cell.overload, repr(cell.case), cell.chip)
    return _read(path) if path.exists() else _write(path, _found(cell))


def known(cell: Cell) -> bool:
    """Say whether the outcome of a cell is kept."""
    return _path(versions(), _sources(_module(cell)), cell.overload, repr(cell.case), cell.chip).exists()


def _path(*parts: object) -> Path:
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    return MEMORY / key[:2] / key


def _read(path: Path) -> str | None:
    return path.read_text() or None


def _write(path: Path, why: str | None) -> str | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(why or "")
    return why


def _module(cell: Cell) -> str:
    return {"paged_attention": "decode", "flash_attn_varlen": "varlen", "merge_attention_states": "merge"}.get(
        cell.overload.partition(".")[0], "cache"
    )


@cache
def _sources(module: str) -> str:
    """Return a digest of what a module's outcomes depend on: it, what it imports of this backend, and the checks."""
    folder = ROOT / "torch_paged" / "backends" / "tpu"
    todo, texts = [module, "aot", "calls", "export"], {}
    while todo:
        name = todo.pop()
        if name not in texts:
            texts[name] = (folder / f"{name}.py").read_text()
            todo += re.findall(r"^from torch_paged\.backends\.tpu(?:\.| import )(\w+)", texts[name], re.MULTILINE)
    checks = [inspect.getsource(x) for x in (_found, _expected_kernels, _roomy, _compiled, _moves)]
    return hashlib.sha256(repr((sorted(texts.items()), checks, CACHE_BLOCKS, CACHE_BYTES)).encode()).hexdigest()


def _found(cell: Cell) -> str | None:
    from torch_paged.backends.tpu.block_sizes import LANES
    from torch_paged.backends.tpu.export import exported, program_of
    from torch_paged.backends.tpu.varlen import NEW_PAGE, new_pages

    arguments = build(cell.case)
    if arguments.get("kv_cache") is not None:
        arguments |= _roomy(arguments)
    op = cell.overload.partition(".")[0]
    refused = refusal(op, arguments) or chip_refusal(op, arguments.get("kv_cache"), cell.chip)
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
    tables = arguments.get("block_tables")
    gathered = 0 if tables is None else num_bytes * tables.numel() // arguments["kv_cache"].shape[1]
    if arguments.get("key") is not None and gathered:  # new keys are gathered into pages, which is not dense attention
        key = arguments["key"]
        pages = new_pages(key.shape[0], arguments["cu_seqlens_k"].shape[0] - 1)
        row = key.shape[1] * -(-key.shape[2] // LANES) * LANES * key.dtype.itemsize
        gathered = max(gathered, 4 * (pages * NEW_PAGE * row + 1))
    return _remembered(cell.chip, module, num_bytes, written, kernels=_expected_kernels(call), gathered=gathered)


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
    if arguments.get("attn_mask") is not None:
        shape[1] *= 8  # laid out in tiles, a mask of a few thousand columns is as large as a small cache
    found = {"kv_cache": torch.empty(shape, dtype=cache.dtype, device="meta")}
    if scales is not None and scales.dim() == 4:
        found["kv_scales"] = torch.empty(shape[:-1], device="meta")
    return found


def _remembered(chip: str, module: str, cache_bytes: int, written: int, *, kernels: int, gathered: int) -> str | None:
    plain = re.sub(r" ?loc\([^()]*(?:\([^()]*\)[^()]*)*\)|^#loc.*$", "", module, flags=re.MULTILINE)
    path = _path(versions(), chip, cache_bytes, written, kernels, gathered, plain, inspect.getsource(_compiled))
    if path.exists():
        return _read(path)
    return _write(path, _compiled(chip, module, cache_bytes, written, kernels=kernels, gathered=gathered))


def _compiled(chip: str, module: str, cache_bytes: int, written: int, *, kernels: int, gathered: int) -> str | None:
    """Return what is wrong with a program, or None.

    Args:
        chip: the chip.
        module: the program.
        cache_bytes: of the cache that it reads or writes.
        written: bytes that it updates.
        kernels: how many it is to have; 0: it is XLA's.
        gathered: bytes of the blocks that its tables name, which a kernel fetches and nothing else.
    """
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
    dense = [x for x in program.operations() if x.opcode == "gather" and x.num_bytes >= gathered // 4 > 0]
    if kernels and dense:
        wrong.append("blocks gathered outside the kernel: " + ", ".join(str(x.num_bytes) for x in dense))
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
    """Return every cell, those first that say most."""
    rest = [*cache_cells(), *shape_cells()]
    random.Random(0).shuffle(rest)
    cells = {(cell.chip, cell.overload, repr(cell.case)): cell for cell in (*option_cells(), *corner_cells(), *rest)}
    served = set(aot.chips())
    return [cell for cell in cells.values() if cell.chip in served]


def quick_cells() -> list[Cell]:
    """Return a subset for every run of the tests."""
    served = set(aot.chips())
    cells = [*list(option_cells())[::11], *list(cache_cells())[::97], *list(shape_cells())[::1109]]
    return [cell for cell in cells if cell.chip in served]


def run(cells: list[Cell], seconds: float, jobs: int) -> dict[Cell, str | None]:
    """Return the outcomes of the cells that are known, and of as many others as there is time for."""
    end = time.monotonic() + seconds
    found = {cell: outcome(cell) for cell in cells if known(cell)}
    todo = [cell for cell in cells if cell not in found]
    for start in range(0, len(todo), 16):
        if time.monotonic() > end:
            break
        if start % 128 == 0:
            while _pools:  # a cell leaves 10 MB behind in its process
                _pools.pop().shutdown()
        chunk = todo[start : start + 16]
        try:
            found |= zip(chunk, _outcomes(chunk, jobs), strict=True)
        except BrokenProcessPool:  # libtpu ends the process where it does not know how to go on
            for cell in chunk:
                try:
                    found[cell] = _outcomes([cell], 1)[0]
                except BrokenProcessPool:
                    found[cell] = "the compiler ended the process"
    return found


_pools: list[ProcessPoolExecutor] = []


def _outcomes(cells: list[Cell], jobs: int) -> list[str | None]:
    if not _pools:
        _pools.append(ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")))
    try:
        return list(_pools[0].map(outcome, cells))
    except BrokenProcessPool:
        _pools.clear()
        raise


def main() -> int:
    parser = argparse.ArgumentParser(prog="make tpu-matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1e9, help="stop early; the next run goes on from there")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--only", default="", help="cells whose name holds this regular expression")
    parser.add_argument("--update", action="store_true", help="commit to the cells that are supported now")
    parser.add_argument("--quick", action="store_true", help="the subset of the tests")
    parser.add_argument("--markdown", action="store_true", help="print the committed figures as a table, and end")
    args = parser.parse_args()
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if args.markdown:
        print(markdown(figures))
        return 0
    cells = [cell for cell in (quick_cells() if args.quick else all_cells()) if re.search(args.only, cell.name)]
    found = run(cells, args.seconds, args.jobs)
    wrong = Counter(why for why in found.values() if why is not None)
    for why, count in wrong.most_common():
        example = next(cell.name for cell, text in found.items() if text == why)
        print(f"{count} cells, such as {example}\n    {why}")
    supported = sum(why is None for why in found.values())
    print(f"{supported} of {len(found)} cells are supported, of {len(cells)} asked for; {versions()}")
    name = f"quick, {versions()}" if args.quick else versions()
    if args.update and not args.only:
        unsupported = sorted(cell.name for cell, why in found.items() if why is not None)
        figures[name] = unsupported if args.quick else counts(cells, found)
        text = json.dumps(figures, indent=1)
        FIGURES.write_text(re.sub(r"\[[\s\d,]+\]", lambda found: " ".join(found[0].split()), text) + "\n")
        return 0
    before = 0 if args.quick else floor(figures.get(name, {}))
    if len(found) == len(cells) and not args.only and supported < before:
        print(f"tpu-matrix: {before} cells were supported before")
        return 1
    return 1 if any(not why.startswith("refused: ") for why in wrong) else 0


Counts = dict[str, dict[str, list[int]]]
"""Chip -> op -> supported, refused, failed, not yet compiled."""


def counts(cells: list[Cell], found: Mapping[Cell, str | None]) -> Counts:
    """Return how many cells of each chip and op there are of each kind."""
    result: Counts = {}
    for cell in cells:
        each = result.setdefault(cell.chip, {}).setdefault(cell.overload.partition(".")[0], [0, 0, 0, 0])
        why = found.get(cell)
        each[3 if cell not in found else 0 if why is None else 1 if why.startswith("refused: ") else 2] += 1
    return {chip: dict(sorted(result[chip].items())) for chip in CHIPS if chip in result}


def floor(figures: Counts) -> int:
    """Return how many cells committed figures say are supported."""
    return sum(kinds[0] for ops in figures.values() for kinds in ops.values())


def markdown(figures: Mapping[str, Counts | list[str]]) -> str:
    """Return the committed figures as tables, one for each version of the compiler."""
    lines = []
    for name, chips in figures.items():
        if isinstance(chips, list):
            continue
        ops = sorted({op for each in chips.values() for op in each})
        lines += [
            f"{name}: supported / refused / failed / not yet compiled",
            "",
            f"| chip | {' | '.join(ops)} |",
            "| --- " * (len(ops) + 1) + "|",
        ]
        for chip, each in chips.items():
            texts = [" / ".join(map(str, each.get(op, [0, 0, 0, 0]))) for op in ops]
            lines.append(f"| {chip} | {' | '.join(texts)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.exit(main())
