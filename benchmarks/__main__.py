"""Command line of the benchmarks: ``make bench`` or ``python -m benchmarks --help``."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import (
    cache_write,
    decode,
    generate,
    isa,
    machine,
    neuron,
    overhead,
    plots,
    prefill,
    report,
    scaling,
    tpu,
)
from benchmarks.work import DTYPES, Row, Settings, Work

SUBJECTS: dict[str, tuple[Callable[[Settings], Iterable[Callable[[], Work]]], str]] = {
    "decode": (decode.works, "paged_attention beside peers and limits"),
    "isa": (isa.works, "the instruction sets beside each other and contiguous SDPA"),
    "prefill": (prefill.works, "flash_attn_varlen beside SDPA and the register peak"),
    "cache-write": (cache_write.works, "reshape_and_cache beside plain PyTorch"),
    "overhead": (overhead.works, "what a call costs beyond its kernel"),
    "generate": (generate.works, "tokens per second of the demo's model"),
    "scaling": (scaling.works, "cost against batch, context, block size, head_dim and prompt"),
}
RESULTS = Path(__file__).parent / "results" / "latest"
console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)


def run(subject: str, settings: Settings) -> list[Row]:
    """Measure one subject behind a progress bar."""
    works = list(SUBJECTS[subject][0](settings))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console, transient=True) as progress, torch.inference_mode():
        task = progress.add_task(subject, total=len(works))
        for build in works:
            work = build()
            progress.update(task, description=f"{subject}: {work.case}")
            rows += work.measure(settings)
            progress.advance(task)
    return rows


def measure(args: argparse.Namespace) -> None:
    """Run the subjects that were asked for; write CSV files and plots, print the tables."""
    began = time.monotonic()
    names = ("dtypes", "batch", "context", "block_size", "head_dim")
    grid = {name: tuple(given) for name in names if (given := getattr(args, name, None))}
    threads = tuple(count for count in args.threads if count <= machine.processors())
    settings = Settings("tiny" if args.tiny else "quick" if args.quick else "full", threads, args.seed, grid)
    head = machine.describe() | {"seed": str(args.seed), "size": settings.size}
    console.print(f"{head['processor']}, {head['processors']} processors, kernels {head['kernels']}, seed {args.seed}")
    torch.set_num_threads(threads[0])
    rows: list[Row] = []
    for subject in SUBJECTS if args.subject == "all" else (args.subject,):
        found = run(subject, settings)
        report.write_csv(args.out / f"{subject}.csv", head, found)
        rows += found
    for table in tables(rows, all_goals=args.subject == "all"):
        if table.lines:
            table.print(console)
    write_report(args)
    console.print(f"{time.monotonic() - began:.0f} s; tables, CSV files and plots are in {args.out}")


def tables(rows: list[Row], *, all_goals: bool) -> Iterator[report.Table]:
    """Yield every table of a run, the goals last."""
    yield from report.subject_tables(rows)
    yield report.memory_table(rows)
    yield report.goal_table(rows, unmeasured=all_goals)


def write_report(args: argparse.Namespace) -> None:
    """Write what the CSV files of a folder say: ``README.md`` with every table, and the plots."""
    runs = [report.read_csv(path) for path in sorted(args.out.glob("*.csv"))]
    if not runs:
        raise SystemExit(f"benchmarks: --out must be a folder with CSV files of a run, got {args.out}")
    rows = [row for _, found in runs for row in found]
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks`; [performance.md](../../../docs/performance.md) explains it.",
        "",
    ]
    for key in ("processor", "processors", "kernels", "torch", "transformers", "commit", "seed", "size"):
        lines.append(f"- {key}: {', '.join(dict.fromkeys(head[key] for head, _ in runs))}")
    lines += ["", *(table.markdown() for table in reversed(list(tables(rows, all_goals=True))))]
    (args.out / "README.md").write_text("\n".join(lines))
    plots.draw(rows, args.out)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure the kernels beside peers and limits."
    )
    subjects = top.add_subparsers(dest="subject", metavar="SUBJECT")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files and plots")
    measured = argparse.ArgumentParser(add_help=False)
    size = measured.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer cells and samples: minutes")
    size.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs: seconds")
    measured.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="as far as there are processors")
    measured.add_argument("--seed", type=int, default=0, help="of lengths, tables and drawn shapes")
    for name, (_, description) in SUBJECTS.items():
        sub = subjects.add_parser(name, parents=[common, measured], help=description, description=description)
        if name == "decode":
            sub.add_argument("--dtypes", nargs="+", choices=DTYPES)
            for size_name in ("batch", "context", "block-size", "head-dim"):
                sub.add_argument(f"--{size_name}", type=int, nargs="+", help="instead of the default grid")
        sub.set_defaults(do=measure)
    static = subjects.add_parser("tpu", help="static estimates of the TPU kernels beside those of jax")
    tpu.add_arguments(static)
    model = subjects.add_parser("neuron", help="model of the Neuron kernels' cost beside other schemes")
    neuron.add_arguments(model)
    everything = subjects.add_parser("all", parents=[common, measured], help="all of them, and the goals (default)")
    everything.set_defaults(do=measure)
    again = subjects.add_parser("report", parents=[common], help="write README.md and the plots of --out again")
    again.set_defaults(do=write_report)
    return top


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if argv is None else argv
    named = given and (not given[0].startswith("-") or given[0] in ("-h", "--help"))
    args = parser().parse_args(given if named else ["all", *given])
    args.do(args)


if __name__ == "__main__":
    main()
