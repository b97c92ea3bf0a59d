"""python -m torch_paged.testing: a table of what a backend does with every line of the contract, for every dtype."""

import argparse
from collections import Counter
from collections.abc import Iterable

import torch

from torch_paged import dispatch
from torch_paged.testing.semantics import DTYPES
from torch_paged.testing.suite import FAILED, NOT_RUN, PASSED, UNSUPPORTED, Outcome, check_backend

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import track
    from rich.table import Column, Table
except ImportError as error:
    raise SystemExit("python -m torch_paged.testing needs rich: pip install rich") from error

_SHORT = dict(zip(DTYPES, ("fp32", "bf16", "fp16", "int8", "e4m3fn", "e5m2"), strict=True))
_STYLES = {PASSED: "green", UNSUPPORTED: "yellow", NOT_RUN: "dim", FAILED: "bold red"}


def _cell(counts: Counter[str]) -> str:
    """Return one dtype's outcomes of a row: how many checks passed, alone, and how many did not, with how."""
    said = [
        f"[{style}]{counts[status]}{'' if status == PASSED else ' ' + status}[/]"
        for status, style in _STYLES.items()
        if counts[status]
    ]
    return "\n".join(said) or "[dim]-[/]"


def table(name: str, outcomes: Iterable[Outcome]) -> Table:
    """Return the table: a row for each line of the contract, a column for each dtype."""
    found: dict[str, dict[torch.dtype, Counter[str]]] = {}
    for outcome in outcomes:
        counts = found.setdefault(outcome.row, {dtype: Counter() for dtype in DTYPES})
        counts[outcome.dtype][outcome.status] += 1
    result = Table(Column("checks that passed", no_wrap=True), title=name, box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for dtype in DTYPES:
        result.add_column(_SHORT[dtype], justify="right", min_width=6)
    for row, columns in found.items():
        result.add_row(row, *(_cell(columns[dtype]) for dtype in DTYPES))
    return result


def main(arguments: list[str] | None = None) -> int:
    """Print the table, then a reason for what did not pass; return 1 where a check failed, 2 without a backend."""
    parser = argparse.ArgumentParser(prog="python -m torch_paged.testing", description=__doc__)
    parser.add_argument(
        "--backend", default="cpu", help="cpu, tpu, neuron, a backend's folder; reference: the bare functions"
    )
    parser.add_argument("--cases", action="store_true", help="run the named cases of all ops as well")
    given = parser.parse_args(arguments)
    console = Console()
    try:
        if reason := dispatch.failure():
            raise ValueError(reason)
        outcomes = check_backend(given.backend, cases=given.cases)
    except ValueError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        return 2
    done = list(track(outcomes, f"{given.backend}: checking", console=Console(stderr=True), transient=True))
    console.print(table(given.backend, done))
    for status in (UNSUPPORTED, NOT_RUN):
        for reason, count in Counter(outcome.reason for outcome in done if outcome.status == status).items():
            console.print(f"{status} ({count}): {reason}", markup=False, soft_wrap=True)
    failed = [outcome for outcome in done if outcome.status == FAILED]
    for outcome in failed:
        where = f"{outcome.row.strip()}, {outcome.check}, {outcome.dtype}"
        console.print(f"{FAILED}: {where}: {outcome.reason}", markup=False, soft_wrap=True)
    totals = Counter(outcome.status for outcome in done)
    console.print(", ".join(f"{totals[status]} {status}" for status in _STYLES))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
