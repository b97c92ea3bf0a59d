"""Fuzz the C++ kernels through the binding's checks, without torch: ``make fuzz-kernels``.

Needs clang++ with libFuzzer. The targets of ``csrc_shims/tests/fuzz`` are built with the kernels under AddressSanitizer
and UndefinedBehaviorSanitizer, or, with ``--shipped``, linked to the library as it is built for users; there every
tensor ends where a page begins that nobody may touch. Each target runs on every instruction set of this machine. What
they learn is kept under ``build/fuzz``; ``--minimize`` writes as few inputs as reach the same to the committed seeds.
"""

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from test_cpu_isa import NEEDED_FLAGS, available

from torch_paged.backends.cpu.support import LIBRARY

ROOT = Path(__file__).parents[1]
SHIMS = ROOT / "csrc_shims"
SOURCES = SHIMS / "tests" / "fuzz"
BUILD = ROOT / "build" / "fuzz"
TORCH = Path(torch.__file__).parent
TARGETS = ("decode", "varlen", "write", "copy", "gather", "merge")
ISAS = tuple(isa for isa in NEEDED_FLAGS if available(isa))
JOBS = int(os.environ.get("MAX_JOBS", 0)) or max(1, min(2, os.cpu_count() or 1))
COVERAGE = "-fsanitize-coverage=inline-8bit-counters,pc-table"
COMMON_FLAGS = ("-std=c++17", "-g1", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas")
INCLUDES = (f"-I{SHIMS / 'tests' / 'stub'}", f"-I{SHIMS / 'cpu'}", "-isystem", str(TORCH / "include"))


@dataclass(frozen=True)
class Mode:
    """How the targets are built.

    Attributes:
        name: the folder of its objects.
        compiled: flags of every file but the kernels.
        linked: flags of every program.
        kernels: flags of the kernels; none where the library is linked.
    """

    name: str
    compiled: tuple[str, ...]
    linked: tuple[str, ...]
    kernels: tuple[str, ...] = ()


# Kernels in which every check is a call and no loop is unrolled compile in a minute or two each, others in many more.
SANITIZED = Mode(
    "sanitized",
    ("-O1", COVERAGE, "-fsanitize=address,undefined"),
    ("-fsanitize=fuzzer,address,undefined",),
    ("-O1", COVERAGE, "-fsanitize=address", "-DTP_UNROLL=", "-mllvm", "-asan-instrumentation-with-call-threshold=0",
     "-mllvm", "-asan-stack=0"),
)  # fmt: skip
# The library finds the program's functions in place of torch's.
SHIPPED = Mode(
    "shipped",
    ("-O2", COVERAGE),
    ("-fsanitize=fuzzer", "-rdynamic", str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}:{TORCH / 'lib'}",
     f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-lgomp"),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    target: str
    isa: str
    executions: int
    edges: int
    failure: str


def run_all(commands: Sequence[list[str]]) -> None:
    """Run commands, a few at a time; stop at the first that fails."""

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"fuzz: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(run, commands))


def build(mode: Mode, targets: Sequence[str]) -> None:
    """Build the programs, file by file, each unless it is newer than all that it is made of."""
    folder = BUILD / mode.name
    folder.mkdir(parents=True, exist_ok=True)
    sources = [SOURCES / "host.cpp"]
    if mode.kernels:
        sources += [SHIMS / "registration.cpp", *sorted((SHIMS / "cpu").glob("*.cpp"))]
    isa_flags: dict[str, list[str]] = runpy.run_path(str(ROOT / "setup.py"))["ISA_FLAGS"]
    if ISAS == ("generic",):
        sources = [source for source in sources if source.name not in isa_flags]
    macros = ["-DTORCH_PAGED_X86"] if len(ISAS) > 1 else []
    newest = max(path.stat().st_mtime for path in (*SHIMS.rglob("*.h"), Path(__file__)))
    commands = []
    for source in (*sources, *(SOURCES / f"{target}.cpp" for target in targets)):
        built = folder / f"{source.stem}.o"
        if built.exists() and built.stat().st_mtime > max(newest, source.stat().st_mtime):
            continue
        own = mode.kernels if source.name.startswith("kernels_") else mode.compiled
        flags = [
            *own,
            *COMMON_FLAGS,
            *INCLUDES,
            *macros,
            *isa_flags.get(source.name, []),
            "-Wno-unknown-warning-option",
        ]
        commands.append(["clang++", *flags, "-c", str(source), "-o", str(built)])
    commands.sort(key=lambda command: "kernels_" not in command[-1])  # the longest first
    run_all(commands)
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    run_all(
        [
            ["clang++", *objects, str(folder / f"{target}.o"), *mode.linked, "-o", str(folder / target)]
            for target in targets
        ]
    )


def seeds(target: str) -> Path:
    return SOURCES / "corpus" / f"{target}.zip"


def unpack(target: str) -> Path:
    """Return the folder of a target's inputs: the committed ones, and what was learned since."""
    folder = BUILD / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    if seeds(target).exists():
        with zipfile.ZipFile(seeds(target)) as packed:
            packed.extractall(folder)
    return folder


def environment(isa: str) -> dict[str, str]:
    """One thread runs what is cut for many: a target gives the kernels a number of its own choosing."""
    return {**os.environ, "TORCH_PAGED_CPU_ISA": isa, "OMP_THREAD_LIMIT": "1"}


def fuzz(mode: Mode, target: str, isa: str, seconds: int) -> Outcome:
    findings = BUILD / "findings"
    findings.mkdir(exist_ok=True)
    command = [str(BUILD / mode.name / target), str(unpack(target)), f"-max_total_time={seconds}", "-max_len=512"]
    command += ["-len_control=0", "-timeout=60", "-print_final_stats=1", f"-artifact_prefix={findings}/{target}-{isa}-"]
    done = subprocess.run(command, env=environment(isa), capture_output=True, text=True, errors="replace")
    executions = re.findall(r"number_of_executed_units:\s*(\d+)", done.stderr)
    edges = re.findall(r"cov: (\d+)", done.stderr)
    failure = ""
    if done.returncode:
        told = re.findall(r"^(found: .*|.*ERROR: .*|.*runtime error: .*|Test unit written to .*)$", done.stderr, re.M)
        written = re.findall(r"Test unit written to (\S+)", done.stderr)
        failure = "\n".join([*told, *written]) or done.stderr[-2000:]
    return Outcome(target, isa, int(executions[-1]) if executions else 0, int(edges[-1]) if edges else 0, failure)


def minimize(mode: Mode, target: str) -> None:
    """Write the committed seeds: inputs that together reach what all known inputs reach, on every instruction set."""
    known = unpack(target)
    chosen = BUILD / "minimized" / target
    shutil.rmtree(chosen, ignore_errors=True)
    chosen.mkdir(parents=True)
    for isa in ISAS:
        command = [str(BUILD / mode.name / target), "-merge=1", "-use_counters=0", str(chosen), str(known)]
        subprocess.run(command, env=environment(isa), check=True, capture_output=True)
    seeds(target).parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(seeds(target), "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(chosen.iterdir()):
            packed.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)
    print(f"{target}: {len(list(chosen.iterdir()))} seeds, {seeds(target).stat().st_size} bytes")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make fuzz-kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600, help="of all targets together")
    parser.add_argument("--only", choices=TARGETS, help="run this target")
    parser.add_argument("--shipped", action="store_true", help="the library as it is built for users")
    parser.add_argument("--minimize", action="store_true", help="write the committed seeds instead")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if shutil.which("clang++") is None:
        print("fuzz: nothing was run, clang++ with libFuzzer is missing (apt install clang)", file=sys.stderr)
        return 1
    mode = SHIPPED if args.shipped else SANITIZED
    targets = [args.only] if args.only else list(TARGETS)
    build(mode, targets)
    if args.minimize:
        for target in targets:
            minimize(mode, target)
        return 0
    runs = [(target, isa) for target in targets for isa in ISAS]
    seconds = max(1, args.seconds * min(JOBS, len(runs)) // len(runs))
    with ThreadPoolExecutor(JOBS) as pool:
        outcomes = list(pool.map(lambda run: fuzz(mode, run[0], run[1], seconds), runs))
    table = Table("target", "instructions", "executions", "edges", "finding")
    for outcome in outcomes:
        table.add_row(outcome.target, outcome.isa, f"{outcome.executions:,}", f"{outcome.edges:,}", outcome.failure)
    Console(width=140).print(table)
    print(f"{sum(outcome.executions for outcome in outcomes):,} executions of {mode.name} kernels")
    return 1 if any(outcome.failure for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
