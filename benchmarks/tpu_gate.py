"""Compare static estimates of a few TPU programs with committed figures, which may only get better.

``python -m benchmarks.tpu_gate --update`` writes them. They are libtpu's, to the bundle, and of one version of it.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.tpu import OURS, PREFILL_TOKENS, Point, Row, row, versions

FIGURES = Path(__file__).with_suffix(".json")
POINTS = {
    **{f"decode, {chip}": Point(OURS, chip, 8, 1024, 8, 16, known=True) for chip in ("v5e", "v6e", "tpu7x")},
    "decode's loop, v5e": Point(OURS, "v5e", 8, 8192, 8, 16, known=False),
    "decode, one kv head, v6e": Point(OURS, "v6e", 8, 1024, 1, 64, known=True),
    **{
        f"prefill's loop, {chip}": Point(OURS, chip, 1, PREFILL_TOKENS, 8, 16, known=False, queries=PREFILL_TOKENS)
        for chip in ("v5e", "v6e")
    },
}
MEASURES = ("cycles", "loop_bundles", "spills", "vmem_bytes", "accessed_bytes", "temp_bytes")

Figures = dict[str, dict[str, float]]


def measured() -> Figures:
    """Return the figures of every point, without those that its estimate does not have."""
    return {name: _figures(row(point)) for name, point in POINTS.items()}


def _figures(found: Row) -> dict[str, float]:
    if found.loop_bundles is None:
        raise SystemExit(f"tpu_gate: the compiler gave no estimate: {found.note}")
    return {name: getattr(found, name) for name in MEASURES if getattr(found, name) is not None}


def worse(now: Figures, before: Figures) -> list[str]:
    """Return a sentence for each cost that grew, and for each point without a figure."""
    found = [f"{point} has no committed figure" for point in now if point not in before]
    for point, costs in before.items():
        for name, cost in costs.items():
            if name not in now.get(point, {}):
                found.append(f"{point} has no {name} any more")
            elif now[point][name] > cost:
                found.append(f"{point}: {name} grew from {cost} to {now[point][name]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the figures instead of comparing with them")
    args = parser.parse_args()
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"taken with": None, "figures": {}}
    now = measured()
    if args.update:
        FIGURES.write_text(json.dumps({"taken with": versions(), "figures": now}, indent=2) + "\n")
        return 0
    if known["taken with"] != versions():
        print(f"tpu_gate: the figures were taken with {known['taken with']}, this is {versions()}; compare there")
        return 2
    table = Table("program", *MEASURES, title="committed -> now")
    for point, costs in now.items():
        before = known["figures"].get(point, {})
        table.add_row(point, *(f"{before.get(name, '')} -> {costs.get(name, '')}" for name in MEASURES))
    Console(width=180).print(table)
    found = worse(now, known["figures"])
    for sentence in found:
        print(f"tpu_gate: {sentence}; where that is meant, run `python -m benchmarks.tpu_gate --update` and commit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
