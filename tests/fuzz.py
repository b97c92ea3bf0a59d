"""Hostile calls by the hundred thousand: ``make fuzz``. Exit status 1 when a call did what the contract does not say.

A process makes the calls, in the order of their seeds, and says which one comes next: a call that crashes it or never
ends is known by its seed, and a fresh process goes on behind it. One seed is one call, always the same:
``make fuzz ARGS="--seed 1234 --count 1"`` repeats it. The seeds are taken in shares of 500; the calls of every
twentieth share are those of a compiled graph.
"""

import argparse
import faulthandler
import json
import os
import random
import resource
import selectors
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
SHARE = 500  # seeds that one process or one compiled graph takes
MEMORY_BYTES = 12 << 30  # of address space: a result that does not fit must raise, not fill the machine


@dataclass
class Report:
    """What the calls did: how many ended in which way, and each that did what it should not."""

    ends: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def find(self, seed: int, what: str) -> None:
        """Note a call that did what it should not."""
        self.ends["FINDING"] += 1
        self.findings.append(f"seed {seed}: {what}")
        tqdm.write(self.findings[-1])


def main() -> int:
    """Make calls until all seeds were taken; print how they ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="calls to make (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed (default: %(default)s)")
    parser.add_argument("--compiled", type=int, default=20, help="every how many-th share is compiled (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=int,
        default=600,
        help="a call, compiling its graph included, that lasts longer hangs (%(default)s)",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(range(options.seed, options.seed + options.count), options.compiled)
        return 0
    report = Report()
    end = options.seed + options.count
    with tqdm(total=options.count, unit="call", dynamic_ncols=True) as bar:
        seed = options.seed
        while seed < end:
            command = [sys.executable, __file__, "--worker", f"--seed={seed}", f"--count={end - seed}"]
            command.append(f"--compiled={options.compiled}")
            for ended in supervise(command, seed, options.seconds, report):
                seed = ended + 1
                bar.update()
                bar.set_postfix(report.ends, refresh=False)
    print(", ".join(f"{count} {name}" for name, count in sorted(report.ends.items())), f"of {options.count} calls")
    print(*report.findings, sep="\n")
    return 1 if report.findings else 0


def supervise(command: list[str], seed: int, seconds: float, report: Report) -> Iterator[int]:
    """Yield every seed whose call has ended, from the first on, until the process that makes the calls has.

    Args:
        command: starts that process, which prints a line of JSON before and after each call.
        seed: of its first call.
        seconds: without a line after which it is ended.
        report: gets how the calls ended; a crash and a hang are findings of the call that had begun.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    current, rest = seed, b""
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT) as process,
        selectors.DefaultSelector() as waiting,
    ):
        assert process.stdout is not None
        waiting.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not waiting.select(seconds):
                process.kill()
                report.find(current, f"did not end within {seconds} seconds")
                yield current
                return
            read = os.read(process.stdout.fileno(), 1 << 16)
            if not read:
                break
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "begins" in said:
                    current = said["begins"]
                    continue
                if said["end"] == "FINDING":
                    report.find(current, said["what"])
                else:
                    report.ends[said["end"]] += 1
                yield current
    if process.returncode != 0:
        report.find(current, f"ended the process with {process.returncode}")
        yield current


def _work(seeds: range, compiled: int) -> None:
    """Make the calls of these seeds; say before each that it begins and after it how it ended."""
    faulthandler.enable()
    warnings.simplefilter("ignore")  # torch warns of the kinds of tensors that are made here
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from hostile import HostileCall, draw_call
    from hostile_compiled import CompiledShare
    from hostile_judge import judge, run, ways

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.use_deterministic_algorithms(True)  # torch.empty is poisoned then
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)  # whatever else prints, prints elsewhere
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    threads = 1
    share = CompiledShare()

    def with_threads(make: Callable[[HostileCall, str], Any]) -> Callable[[HostileCall, str], Any]:
        def invoke(call: HostileCall, way: str) -> Any:
            torch.set_num_threads(threads)
            try:
                return make(call, way)
            finally:
                torch.set_num_threads(1)

        return invoke

    for seed in seeds:
        print(json.dumps({"begins": seed}), file=said)
        rng = random.Random(seed)
        threads = rng.choice((1, 1, 1, 2))
        corruptions: list[str] = []
        result: dict[str, Any]
        try:
            if compiled and seed // SHARE % compiled == compiled - 1:
                call = share.draw(seed // SHARE, rng)
                corruptions, way = call.corruptions, share.way
                end = judge(call, way, with_threads(share.run))
            else:
                call = draw_call(rng)
                corruptions, way = call.corruptions, rng.choice(ways(call))
                end = judge(call, way, with_threads(run))
            result = {"end": f"{end} compiled" if way == share.way else end}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            result = {"end": "FINDING", "what": f"{corruptions}: {what}"}
        print(json.dumps(result), file=said)


if __name__ == "__main__":
    raise SystemExit(main())
