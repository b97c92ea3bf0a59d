"""Static estimates of the TPU kernels beside those that jax ships: ``make bench-tpu`` or ``python -m benchmarks tpu``.

The compiler's own estimate of each program, padding, reshapes and scales around the kernel included. It never ran on
hardware, and the model behind it knows no contention for HBM: what the bytes take is shown beside it.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.report import Table

ROOT = Path(__file__).parents[1]
MEMORY = ROOT / "build" / "tpu_points"
KERNELS = ROOT / "torch_paged" / "backends" / "tpu"
RESULTS = Path(__file__).parent / "results" / "tpu"
STATIC = "static estimate, never run on hardware"
OURS, PAGED, RAGGED = "torch_paged", "jax paged_attention", "jax ragged_paged_attention"

CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9, "tpu7x": 2.2e9}
"""Hz: the published peak rate over what the matrix units do in a cycle."""
HBM_BYTES = {"v5e": 819e9, "v6e": 1640e9, "tpu7x": 3690e9}
"""Published bytes per second, for one core."""
MXU_FLOPS = {"v5e": 131072, "v6e": 524288, "tpu7x": 524288}
"""bfloat16 operations per cycle of one core."""
BATCHES, CONTEXTS, KV_HEADS, BLOCK_SIZES = (8, 64), (1024, 8192), (8, 1), (16, 64)
GROUP, HEAD_DIM = 4, 128
TOKENS = 512
"""Bundles and cycles of the steady state are given for so many tokens."""
PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Point:
    """One program.

    Attributes:
        way: whose kernel.
        known: the kernel knows lengths and tables, which the estimate of cycles needs; without, its loop is the real
            one, and its bundles are counted.
        queries: query tokens of each sequence.
        tokens_per_block: keys that a kernel of jax computes at a time; ours chooses itself.
        queries_per_block: query tokens that a kernel of jax computes at a time.
    """

    way: str
    chip: str
    batch: int
    context: int
    kv_heads: int
    block_size: int
    known: bool
    queries: int = 1
    group: int = GROUP
    head_dim: int = HEAD_DIM
    tokens_per_block: int = 0
    queries_per_block: int = 0


@dataclass(frozen=True)
class Row(Point):
    """What the compiler says of a program; None where its estimate fails, for the reason in ``note``."""

    cycles: int | None = None
    """Of the whole program."""
    kernel_cycles: int | None = None
    loop_bundles: int | None = None
    """Instructions of the loop with the matrix products."""
    spills: int | None = None
    vmem_bytes: int | None = None
    accessed_bytes: float | None = None
    """By operations around the kernel."""
    temp_bytes: int | None = None
    note: str = ""

    @property
    def cache_bytes(self) -> int:
        """What has to be read of the cache."""
        return self.batch * self.context * 2 * self.kv_heads * self.head_dim * 2

    @property
    def floor_cycles(self) -> float:
        """What reading the cache takes at the published rate."""
        return self.cache_bytes / HBM_BYTES[self.chip] * CLOCKS[self.chip]

    @property
    def steady_bundles(self) -> float | None:
        """Bundles of the loop for ``TOKENS`` tokens of all kv heads."""
        if self.loop_bundles is None or not self.tokens_per_block:
            return None
        turns = self.kv_heads if self.way == PAGED else 1
        return self.loop_bundles * turns * TOKENS / self.tokens_per_block


_CANDIDATES = {(8, 1024): (1024, 512), (8, 8192): (2048, 4096, 8192), (64, 1024): (1024,)}
"""Batch and context -> tokens of a block that jax's ``paged_attention`` is tried with; smaller ones are slower."""


def points() -> Iterator[Point]:
    """Yield every program, the peers' candidates included; the best of these are chosen afterwards."""
    for chip, kv_heads, size in itertools.product(("v6e", "tpu7x", "v5e"), KV_HEADS, BLOCK_SIZES):
        for batch, context in ((8, 1024), (8, 8192), (64, 1024)):
            ours = Point(OURS, chip, batch, context, kv_heads, size, known=True)
            yield ours
            if chip == "tpu7x" and size == 16 and batch == 64:  # of which the estimate fails
                yield replace(ours, batch=12)
            if chip != "v5e":  # where the estimate of this kernel ends the compiler
                for tokens in _CANDIDATES[batch, context]:
                    yield replace(ours, way=PAGED, tokens_per_block=tokens)
        plain = Point(OURS, chip, 8, 8192, kv_heads, size, known=False)
        yield plain
        yield replace(plain, way=PAGED, tokens_per_block=1024)
        yield replace(plain, way=RAGGED, tokens_per_block=512, queries_per_block=8)
    for chip in ("v6e", "tpu7x", "v5e"):
        prefill = Point(OURS, chip, 1, PREFILL_TOKENS, 8, 16, known=True, queries=PREFILL_TOKENS)
        yield prefill
        yield replace(prefill, way=RAGGED, tokens_per_block=512, queries_per_block=128)


def row(point: Point) -> Row:
    """Return what the compiler says of a program, from memory where neither versions nor kernels changed."""
    path = _place(point)
    if path.exists():
        return Row(**json.loads(path.read_text()))
    command = [sys.executable, "-m", "benchmarks.tpu_worker", json.dumps(asdict(point))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode > 0:
        raise SystemExit(f"benchmarks tpu: {command[-1]} failed\n{done.stderr[-2000:]}")
    found = {"note": _reason(done.stderr)} if done.returncode else json.loads(done.stdout.splitlines()[-1])
    result = Row(**{**asdict(point), **found})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result)))
    return result


def _place(point: Point) -> Path:
    """Return the file that remembers a point."""
    names = ["pages", "logits", "block_sizes", "decode", "decode_kernel"]
    if point.queries > 1:  # a program of packed queries holds decode's kernel too
        names += ["varlen", "varlen_kernel", "tiles"]
    mine = [KERNELS / f"{name}.py" for name in names] if point.way == OURS else []
    readers = [Path(__file__).with_name(f"{name}.py") for name in ("tpu_calls", "tpu_known", "tpu_worker")]
    readers.append(KERNELS / "aot.py")
    text = json.dumps([asdict(point), versions()])
    sources = b"".join(path.read_bytes() for path in (*mine, *readers))
    return MEMORY / hashlib.sha256(text.encode() + sources).hexdigest()


def versions() -> str:
    """Return what the estimates depend on beside the programs."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))


def _reason(output: str) -> str:
    """Return the sentence with which the compiler ended the process."""
    found = re.search(r"^F\d{4} [^\]]*\] (.*)", output, re.MULTILINE)
    return found[1][:300] if found else output[-300:]


def measure(args: argparse.Namespace) -> None:
    """Estimate every point as far as there is time, write the CSV file, and the tables and plots of what there is."""
    if args.device:
        from benchmarks import tpu_device

        tpu_device.measure(args.out)
        return
    end = time.monotonic() + args.seconds
    chosen = [point for point in points() if args.way in point.way and args.chip in point.chip]
    rows = []
    for point in track(chosen, "static estimates", console=Console(stderr=True)):
        if time.monotonic() < end or _place(point).exists():
            rows.append(row(point))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "tpu.csv").open("w", newline="") as file:
        file.write(f"# {STATIC}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(found) for found in rows)
    console = Console(width=200)
    for table in tables(rows):
        table.print(console)
    page = "[tpu.md](../../../docs/tpu.md)"
    head = f"# TPU kernels: {STATIC}\n\nWritten by `python -m benchmarks tpu`; {page} explains it.\n"
    (args.out / "README.md").write_text("\n".join([head, *(table.markdown() for table in tables(rows))]))
    draw(rows, args.out)
    print(f"{len(rows)} of {len(chosen)} programs; {STATIC}; tables and plots are in {args.out}")


def best(rows: Sequence[Row], way: str, **at: object) -> Row | None:
    """Return the row of a way with the fewest cycles, or None where there is none."""
    found = [x for x in rows if x.way == way and x.cycles and all(getattr(x, k) == v for k, v in at.items())]
    return min(found, key=lambda x: x.cycles or 0, default=None)


def extrapolated(rows: Sequence[Row], way: str, context: int, **at: object) -> Row | None:
    """Return 64 sequences from fewer: the estimate is linear in the sequences, takes long, and fails for some sizes."""
    few, long = (best(rows, way, **at, batch=8, context=length) for length in (1024, context))
    many = next(filter(None, (best(rows, way, **at, batch=batch, context=1024) for batch in (64, 12))), None)
    if few is None or long is None or many is None or not (few.cycles and long.cycles and many.cycles):
        return None
    fixed = few.cycles - 8 * (many.cycles - few.cycles) / (many.batch - 8)
    note = "from 8 sequences" if many.batch == 64 else f"from 8 and {many.batch} sequences"
    return replace(long, batch=64, cycles=round(fixed + 8 * (long.cycles - fixed)), note=note)


def decode_cells(rows: Sequence[Row]) -> Iterator[tuple[Row, Row | None]]:
    """Yield our estimate and the best of jax's ``paged_attention``, None where that has none."""
    for chip, kv_heads, size in itertools.product(CLOCKS, KV_HEADS, BLOCK_SIZES):
        at = {"chip": chip, "kv_heads": kv_heads, "block_size": size, "queries": 1}
        for batch, context in itertools.product(BATCHES, CONTEXTS):
            ours, peer = (
                best(rows, way, **at, batch=batch, context=context)
                or (extrapolated(rows, way, context, **at) if batch == 64 else None)
                for way in (OURS, PAGED)
            )
            if ours is not None:
                yield ours, peer


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return decode, its steady state, and prefill."""
    decode = [
        (
            *(x.chip, str(x.batch), str(x.context), str(x.kv_heads), str(x.block_size)),
            *(f"{x.cycles}", "" if peer is None else f"{peer.cycles} ({peer.tokens_per_block})"),
            "" if peer is None else f"{(x.cycles or 0) / (peer.cycles or 1):.2f}",
            "" if peer is None else f"{_at_least(x) / _at_least(peer):.2f}",
            *(f"{x.floor_cycles:.0f}", f"{x.cycles - (x.kernel_cycles or 0)}" if x.cycles and not x.note else ""),
            *(str(x.spills), f"{(x.vmem_bytes or 0) / 2**20:.1f}", x.note),
        )
        for x, peer in decode_cells(rows)
    ]
    head = ("chip", "B", "context", "KH", "S", "cycles", "jax paged_attention (tokens per block)", "ours / jax")
    decode_head = (*head, "none below the floor", "HBM floor", "of them around the kernel", "spills", "VMEM MiB", "")
    plain = [x for x in rows if not x.known]
    steady = []
    for x in (x for x in plain if x.way == OURS):
        peers = {
            y.way: y
            for y in plain
            if (y.chip, y.kv_heads, y.block_size) == (x.chip, x.kv_heads, x.block_size) and y.way != OURS
        }
        shown = [_bundles(y) for y in (x, peers.get(PAGED), peers.get(RAGGED))]
        floor = x.floor_cycles * TOKENS / (x.batch * x.context)
        steady.append((x.chip, str(x.kv_heads), str(x.block_size), *shown, f"{floor:.0f}"))
    steady_head = ("chip", "KH", "S", OURS, PAGED, RAGGED, "HBM floor, cycles")
    prefill = []
    for x in (x for x in rows if x.queries > 1):
        flops = 4 * x.head_dim * x.kv_heads * x.group * x.context * (x.context + 1) // 2
        floor = flops / MXU_FLOPS[x.chip]
        over = "" if x.cycles is None else f"{x.cycles / floor:.2f}"
        prefill.append((x.chip, x.way, f"{x.cycles or ''}", f"{floor:.0f}", over, str(x.spills or ""), x.note))
    prefill_head = ("chip", "way", "cycles", "MXU floor", "over the floor", "spills", "")
    found = (
        Table(f"decode, cycles of the whole program ({STATIC})", decode_head, tuple(decode)),
        Table(f"decode, bundles in the steady state for {TOKENS} tokens ({STATIC})", steady_head, tuple(steady)),
        Table(f"prefill of {PREFILL_TOKENS} tokens, causal ({STATIC})", prefill_head, tuple(prefill)),
    )
    return [table for table in found if table.lines]


def _at_least(found: Row) -> float:
    """Return cycles that are no fewer than the bytes of the cache take: the estimate knows no contention for HBM."""
    return max(found.cycles or 0, found.floor_cycles)


def _bundles(found: Row | None) -> str:
    if found is None or found.steady_bundles is None:
        return found.note if found else ""
    return f"{found.steady_bundles:.0f}"


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Draw cycles per ``TOKENS`` tokens of ours and jax's beside the floor, a panel for each chip."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from benchmarks import plots

    cells = list(decode_cells(rows))
    chips = [chip for chip in CLOCKS if any(x.chip == chip for x, _ in cells)]
    if not chips:
        return
    labels = list(dict.fromkeys(_sizes(x) for x, _ in cells))
    figure = Figure(figsize=(1.6 + 3.6 * len(chips), 1.4 + 0.3 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(chips), squeeze=False, sharey=True)[0]
    for axis, chip in zip(axes, chips, strict=True):
        for x, peer in cells:
            if x.chip != chip:
                continue
            share, at = TOKENS / (x.batch * x.context), labels.index(_sizes(x))
            axis.barh(at - 0.2, (x.cycles or 0) * share, 0.38, color=plots.COLORS[1])
            if peer is not None:
                axis.barh(at + 0.2, (peer.cycles or 0) * share, 0.38, color=plots.COLORS[2])
            axis.plot([x.floor_cycles * share] * 2, [at - 0.42, at + 0.42], color="black")
        axis.set_title(chip)
        axis.set_xlabel(f"cycles per {TOKENS} tokens")
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    shown = [Patch(color=plots.COLORS[1], label=OURS), Patch(color=plots.COLORS[2], label=f"{PAGED}, best block size")]
    floor = Line2D([], [], color="black", label="HBM floor")
    figure.legend(handles=[*shown, floor], loc="outside lower center", ncols=3)
    figure.suptitle(f"Decode: {STATIC}")
    figure.savefig(folder / "tpu_decode.svg", metadata={"Date": None})


def _sizes(x: Row) -> str:
    return f"B {x.batch}, {x.context}, KH {x.kv_heads}, S {x.block_size}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``python -m benchmarks tpu`` takes."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file, the tables and the plot")
    parser.add_argument("--way", default="", help="only kernels whose name contains this")
    parser.add_argument("--chip", default="", help="only this chip")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop early; the next run goes on from there")
    help_device = "time our kernels on the TPU of this machine, beside the estimates that --out has of them"
    parser.add_argument("--device", action="store_true", help=help_device)
    parser.set_defaults(do=measure)
