"""Plant faults in a backend that is written in Python, one at a time, and see the tests catch them.

Each mutant is a copy of the tree with one replacement, which must match exactly once. A mutant that no test catches is
a hole in the tests.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mutants import ROOT, Mutant
from rich.console import Console
from rich.markup import escape
from rich.progress import track


@dataclass(frozen=True)
class Planting:
    """Where faults are planted, and how tests run then.

    Attributes:
        backend: the folder of the backend.
        settings: variables of the tests' processes.
        seconds: a test that lasts longer waits for what never comes.
    """

    backend: str
    settings: Mapping[str, str]
    seconds: int

    def catcher(self, folder: Path, tests: tuple[str, ...]) -> str | None:
        """Return the first test that fails, or what else happened; None where all pass."""
        environment = {**os.environ, "PYTHONPATH": str(folder), **self.settings}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
        try:
            result = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=self.seconds
            )
        except subprocess.TimeoutExpired:
            return f"a test did not end in {self.seconds} s"
        failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED tests/", "ERROR tests/"))]
        if result.returncode not in (0, 1) and not failed:
            return f"the run ended with status {result.returncode}"
        return failed[0].split(" - ")[0].removeprefix("FAILED tests/") if failed else None

    def caught_by(self, mutant: Mutant, folder: Path) -> str | None:
        """Return what catches a fault, in words; None where nothing does."""
        path = folder / "torch_paged" / "backends" / self.backend / mutant.file
        original = path.read_text()
        if original.count(mutant.old) != 1:
            raise SystemExit(f"'{mutant.name}' must match once in {mutant.file}, got {original.count(mutant.old)}")
        path.write_text(original.replace(mutant.old, mutant.new))
        try:
            return self.catcher(folder, mutant.tests)
        finally:
            path.write_text(original)

    def run(self, mutants: Sequence[Mutant], description: str) -> int:
        """Plant what the command line names; return the exit status, 1 where a fault was caught by nothing."""
        parser = argparse.ArgumentParser(prog=f"make mutants-{self.backend}", description=description)
        parser.add_argument("--only", default="", help="run the mutants whose name or file contains this")
        parser.add_argument("--trusting", action="store_true", help="do not run the tests without a fault first")
        parser.add_argument("--part", default="0/1", help="of the mutants, such as 1/4: the second quarter")
        args = parser.parse_args()
        part, parts = map(int, args.part.split("/"))
        chosen = [mutant for mutant in mutants if args.only in mutant.name or args.only in mutant.file][part::parts]
        console = Console(width=160)
        survivors = 0
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(folder)
            tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
            without_fault = None if args.trusting else self.catcher(folder, tests)
            if without_fault is not None:
                raise SystemExit(f"the tests fail without a fault: {without_fault}")
            for mutant in track(chosen, description="mutants", console=Console(stderr=True)):
                test = self.caught_by(mutant, folder)
                survivors += test is None
                caught = escape(test) if test else "[red]caught by nothing[/red]"
                console.print(f"{mutant.file}: {mutant.name}: {caught}")
        print(f"{len(chosen) - survivors} of {len(chosen)} faults caught")
        return 1 if survivors else 0


def prepare(folder: Path) -> None:
    """Copy what the tests need."""
    for name in ("torch_paged", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, folder / name)
