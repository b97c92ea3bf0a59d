"""Plots of a run, as SVG."""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.generate import RAGGED
from benchmarks.goals import Cell, cells, limit_share
from benchmarks.report import READS
from benchmarks.work import DTYPES, OURS, PEAK, Row

mpl.rcParams.update(
    {
        "svg.hashsalt": "torch_paged",  # equal rows give equal files
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)
COLORS = {1: "#4c78a8", 2: "#f58518"}
GREY = "#8a8a8a"


def draw(rows: list[Row], folder: Path, suffix: str = "svg") -> None:
    """Draw what the rows allow, one file for each plot."""
    everything = cells(rows)
    for name, plot in (
        ("decode_limit", decode_limit),
        ("decode_peers", decode_peers),
        ("prefill", prefill),
        ("scaling", scaling),
        ("generate", generate),
    ):
        figure = plot(everything)
        if figure is not None:
            figure.savefig(folder / f"{name}.{suffix}", metadata={"Date": None} if suffix == "svg" else None, dpi=110)


def decode_limit(everything: list[Cell]) -> Figure | None:
    """Draw the share of the paged-read limit of each cell of the grid, a panel for each dtype."""
    chosen = [cell for cell in _of(everything, "decode", "grid") if limit_share(cell) is not None]
    dtypes = [name for name in DTYPES if any(cell[OURS].dtype == name for cell in chosen)]
    if not chosen:
        return None
    height = 1.2 + 0.33 * max(len({c[OURS].case for c in chosen if c[OURS].dtype == name}) for name in dtypes)
    figure = Figure(figsize=(4.2 + 2.6 * len(dtypes), height), layout="constrained")
    axes = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        mine = [cell for cell in chosen if cell[OURS].dtype == dtype]
        labels = list(dict.fromkeys(_sizes(cell[OURS]) for cell in mine))
        for threads in sorted({cell[OURS].threads for cell in mine}):
            shares = {_sizes(c[OURS]): 100 * (limit_share(c) or 0) for c in mine if c[OURS].threads == threads}
            offset = 0.2 * (1 if threads > 1 else -1)
            axis.barh(
                [labels.index(label) + offset for label in shares],
                list(shares.values()),
                0.38,
                color=COLORS.get(threads, GREY),
                label=_threads(threads),
            )
        axis.axvline(100, color="black", linewidth=1)
        axis.set(title=dtype, xlabel="% of the paged-read limit", xlim=(0, 110))
        axis.set_yticks(range(len(labels)), labels)
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    axes[0].set_ylabel("batch x context, block size, head_dim")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def decode_peers(everything: list[Cell]) -> Figure | None:
    """Draw how many times longer each peer takes: the geometric mean over the grid, and each cell as a dot."""
    chosen = [cell for cell in _of(everything, "decode", "grid") if cell[OURS].threads == 1]
    dtypes = [name for name in DTYPES if any(cell[OURS].dtype == name for cell in chosen)]
    peers = list(dict.fromkeys(name for cell in chosen for name in cell if name not in (OURS, *READS)))
    if not peers:
        return None
    figure = Figure(figsize=(8, 1.2 + 0.8 * len(peers)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(dtypes)
    for number, (dtype, color) in enumerate(zip(dtypes, ("#4c78a8", "#54a24b", "#e45756"), strict=False)):
        for line, peer in enumerate(peers):
            ratios = [c[peer].median_us / c[OURS].median_us for c in chosen if c[OURS].dtype == dtype and peer in c]
            if not ratios:
                continue
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            y = line + (number - (len(dtypes) - 1) / 2) * height
            axis.barh(y, mean, 0.9 * height, color=color, label=dtype if line == 0 else None)
            axis.plot(ratios, [y] * len(ratios), "o", color="black", markersize=2.5, alpha=0.6)
            axis.text(max([mean, *ratios]) * 1.12, y, f"{mean:.1f}x", va="center", fontsize=9)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.set_xlim(right=axis.get_xlim()[1] * 1.6)
    axis.set_yticks(range(len(peers)), peers)
    axis.invert_yaxis()
    axis.set_xlabel("time over the time of paged_attention, 1 thread (mean and cells of the grid)")
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower right")
    return figure


def prefill(everything: list[Cell]) -> Figure | None:
    """Draw GFLOP/s beside SDPA and the register peak, a panel for each dtype."""
    chosen = [cell for cell in _of(everything, "prefill", "prefill") if cell[OURS].threads == 1]
    dtypes = [name for name in DTYPES if any(cell[OURS].dtype == name for cell in chosen)]
    if not chosen:
        return None
    figure = Figure(figsize=(3.4 * len(dtypes) + 1, 3.6), layout="constrained")
    axes = figure.subplots(1, len(dtypes), squeeze=False)[0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        mine = [cell for cell in chosen if cell[OURS].dtype == dtype]
        for number, (way, color) in enumerate(((OURS, COLORS[1]), ("SDPA", GREY))):
            rates = [cell[way].flops / cell[way].median_us / 1e3 for cell in mine]
            axis.bar([i + 0.38 * (number - 0.5) for i in range(len(mine))], rates, 0.36, color=color, label=way)
        peak = max(cell[PEAK].flops / cell[PEAK].median_us / 1e3 for cell in mine)
        axis.axhline(peak, color="black", linewidth=1)
        axis.text(len(mine) - 0.5, peak, "register peak", ha="right", va="bottom", fontsize=9)
        axis.set(title=dtype, ylim=(0, 1.15 * peak))
        axis.set_xticks(
            range(len(mine)), [cell[OURS].variant.replace("_", " ") for cell in mine], rotation=30, ha="right"
        )
        axis.grid(axis="x", visible=False)
    axes[0].set_ylabel("GFLOP/s on visible pairs, 1 thread")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def generate(everything: list[Cell]) -> Figure | None:
    """Draw tokens per second and peak memory of each way to generate for ragged prompts."""
    chosen = _of(everything, "generate", RAGGED)
    if not chosen:
        return None
    ways = list(dict.fromkeys(name for cell in chosen for name in cell))
    figure = Figure(figsize=(9.5, 1.2 + 0.6 * len(ways)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(chosen)
    for number, cell in enumerate(chosen):
        lines = [line + (number - (len(chosen) - 1) / 2) * height for line in range(len(ways))]
        rows = [cell[name] for name in ways]
        rates = [row.batch * row.context / row.median_us * 1e6 for row in rows]
        peaks = [(row.peak_bytes or 0) / 2**20 for row in rows]
        label = f"{cell[OURS].variant}, {_threads(cell[OURS].threads)}"
        for axis, values in ((speed, rates), (memory, peaks)):
            bars = axis.barh(lines, values, height, color=list(COLORS.values())[number % 2], label=label)
            axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
    speed.set(xlabel="new tokens/s")
    memory.set(xlabel="peak memory beyond the model, MiB")
    speed.set_yticks(range(len(ways)), ways)
    speed.invert_yaxis()
    for axis in (speed, memory):
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.15)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


SWEEPS: dict[str, tuple[str, str]] = {
    "batch": ("batch", "batch"),
    "context": ("context", "context, tokens"),
    "odd context": ("context", "context around 1050, tokens"),
    "block_size": ("block_size", "block size, tokens"),
    "head_dim": ("head_dim", "head_dim"),
    "prompt": ("context", "prompt, tokens"),
}


def scaling(everything: list[Cell]) -> Figure | None:
    """Draw time against each size; where time ought to stay the same for each byte, the rate."""
    chosen = {sweep: _of(everything, "scaling", sweep) for sweep in SWEEPS}
    if not any(chosen.values()):
        return None
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    for axis, (sweep, (column, label)) in zip(figure.subplots(2, 3).flat, SWEEPS.items(), strict=True):
        for threads in sorted({cell[OURS].threads for cell in chosen[sweep]}):
            mine = [cell for cell in chosen[sweep] if cell[OURS].threads == threads]
            if sweep == "odd context":
                mine = [cell for cell in mine if cell[OURS].context < 2000]
            _sweep(axis, sweep, mine, column, threads)
        axis.set(xlabel=label, ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 4, 5, 10]))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def _sweep(axis: Any, sweep: str, mine: list[Cell], column: str, threads: int) -> None:
    sizes = [getattr(cell[OURS], column) for cell in mine]
    color = COLORS.get(threads, GREY)
    if sweep in ("batch", "context", "odd context"):
        for way, style in ((OURS, "o-"), ("paged read", ":")):
            times = [cell[way].median_us / 1e3 for cell in mine]
            axis.plot(sizes, times, style, color=color, markersize=3, label=f"{way}, {_threads(threads)}")
        axis.set_ylabel("ms")
    elif sweep == "prompt":
        rates = [cell[OURS].flops / cell[OURS].median_us / 1e3 for cell in mine]
        axis.plot(sizes, rates, "o-", color=color, markersize=3)
        axis.set_ylabel("GFLOP/s")
    else:
        for way, style in ((OURS, "o-"), ("paged read", ":")):
            rates = [cell[way].bytes / cell[way].median_us / 1e3 for cell in mine]
            axis.plot(sizes, rates, style, color=color, markersize=3)
        axis.set_ylabel("GB/s")


def _of(everything: list[Cell], benchmark: str, group: str) -> list[Cell]:
    return [cell for cell in everything if (cell[OURS].benchmark, cell[OURS].group) == (benchmark, group)]


def _sizes(row: Row) -> str:
    small = " (small)" if row.bytes < 8_000_000 else ""
    return f"{row.batch} x {row.context}, S {row.block_size}, D {row.head_dim}{small}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
