"""Tables of a run, for the terminal and in Markdown, and the CSV files they are made of."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.goals import JUDGED_BYTES, Cell, cells, goals, limit_share
from benchmarks.work import OURS, PEAK, Row

READS = ("paged read", "sequential read")
ABSOLUTE: dict[str, tuple[str, Callable[[Row], str]]] = {
    "overhead": ("us", lambda row: f"{row.median_us:.1f}"),
    "generate": ("tokens/s", lambda row: f"{row.batch * row.context / row.median_us * 1e6:.0f}"),
}
"""Benchmarks whose ways are shown in a unit of their own, not as ratios."""


@dataclass(frozen=True)
class Table:
    """A title, a header and the cells below it."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    def print(self, console: Console) -> None:
        """Print it in the terminal."""
        table = RichTable(*self.header, title=self.title, title_justify="left")
        for line in self.lines:
            style = {"yes": "green", "mean only": "yellow", "no": "red"}.get(line[-1], "")
            table.add_row(*line, style=style)
        console.print(table)

    def markdown(self) -> str:
        """Return it in Markdown."""
        rows = [self.header, ("---",) * len(self.header), *self.lines]
        return f"## {self.title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def goal_table(rows: Iterable[Row], *, unmeasured: bool) -> Table:
    """Return what was asked for beside what was reached; goals that no row speaks of are left out if not wanted."""
    lines = []
    for goal in goals(rows):
        if not goal.values and not unmeasured:
            continue
        met = {True: "yes", False: "mean only" if goal.mean_met else "no", None: ""}[goal.met]
        if not goal.values:
            met = "not measured"
        worst = goal.show(goal.worst) if len(goal.values) > 1 else ""
        lines.append((goal.work, goal.quantity, goal.asked, goal.show(goal.reached), worst, str(len(goal.values)), met))
    header = ("work", "quantity", "goal", "reached", "worst cell", "cells", "met")
    return Table("goals", header, tuple(lines))


def subject_tables(rows: Iterable[Row]) -> list[Table]:
    """Return a table for each benchmark and group, one line for each case and number of threads."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells(rows):
        found.setdefault((cell[OURS].benchmark, cell[OURS].group), []).append(cell)
    return [_table(benchmark, group, chosen) for (benchmark, group), chosen in found.items()]


def _table(benchmark: str, group: str, chosen: list[Cell]) -> Table:
    others = dict.fromkeys(name for cell in chosen for name in cell if name not in (OURS, PEAK, *READS))
    rated = any(cell[OURS].bytes or cell[OURS].flops for cell in chosen)
    limited = any(limit_share(cell) is not None for cell in chosen)
    unit, absolute = ABSOLUTE.get(benchmark, ("time over ours", None))
    if absolute:
        others = {OURS: None, **others}
    header = ["case", "threads", "us", "fastest us"]
    header += (["rate"] if rated else []) + (["of the limit"] if limited else [])
    header += [f"{name}, {unit}" for name in others]
    lines = []
    for cell in chosen:
        ours = cell[OURS]
        line = [ours.case, str(ours.threads), f"{ours.median_us:.1f}", f"{ours.minimum_us:.1f}"]
        if rated:
            line.append(rate(ours))
        if limited:
            share = limit_share(cell)
            small = benchmark == "decode" and ours.bytes < JUDGED_BYTES
            line.append("" if share is None else f"{100 * share:.0f} %{' (small)' if small else ''}")
        for name in others:
            row = cell.get(name)
            ratio = "" if row is None else f"{row.median_us / ours.median_us:.2f}"
            line.append(absolute(row) if absolute and row else ratio)
        lines.append(tuple(line))
    return Table(benchmark if group == benchmark else f"{benchmark}: {group}", tuple(header), tuple(lines))


def rate(row: Row) -> str:
    """Return GFLOP/s where operations were counted, else GB/s."""
    if row.flops:
        return f"{row.flops / row.median_us / 1e3:.0f} GFLOP/s"
    return f"{row.bytes / row.median_us / 1e3:.2f} GB/s"


def memory_table(rows: Iterable[Row]) -> Table:
    """Return the most memory that each way took beyond its inputs."""
    most: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.peak_bytes is not None and row.contender not in (PEAK, *READS):
            key = (row.benchmark, row.contender)
            most[key] = max(most.get(key, 0), row.peak_bytes)
    lines = tuple((*key, f"{num_bytes / 2**20:.1f}") for key, num_bytes in most.items())
    return Table("peak memory beyond the inputs", ("benchmark", "way", "MiB"), lines)


def write_csv(path: Path, head: dict[str, str], rows: Iterable[Row]) -> None:
    """Write rows below ``# name: value`` lines that describe the machine and the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in head.items())
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_csv(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Read what ``write_csv`` wrote."""
    lines = path.read_text().splitlines()
    head = dict(line.removeprefix("# ").split(": ", 1) for line in lines if line.startswith("# "))
    return head, [Row.read(line) for line in csv.DictReader(line for line in lines if not line.startswith("# "))]
