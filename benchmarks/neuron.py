"""The model of the Neuron kernels' cost: ``make bench-neuron`` or ``python -m benchmarks neuron``.

What the kernels run is counted on the simulator and never guessed; what that takes is by the documented rates of the
engines (torch_paged/backends/neuron/cost.py). Nothing of it was ever run on hardware.
"""

import argparse
import csv
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from torch_paged.backends.neuron.cost import CHIPS, ENGINES, cost, torch_us

if TYPE_CHECKING:
    from benchmarks.neuron_points import Point

ROOT = Path(__file__).parents[1]
MEMORY = ROOT / "build" / "neuron_points"
KERNELS = ROOT / "torch_paged" / "backends" / "neuron"
RESULTS = Path(__file__).parent / "results" / "neuron"
MODEL = "model, never run on hardware"
LAYERS = 32
"""Of the step that the table shows: one plan serves them all."""


@dataclass(frozen=True)
class Row:
    """What the model says of a point on a chip; microseconds, of all kernels of one call of the op."""

    chip: str
    batch: int
    context: int
    queries: int
    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    cores: int
    roof_us: float
    """The larger of the bytes at the HBM rate and the products at the tensor engine's."""
    tensor_us: float
    vector_us: float
    scalar_us: float
    gpsimd_us: float
    dma_us: float
    fixed_us: float
    """Turns of loops, barriers and starts, which overlap with nothing."""
    attention_us: float
    bound: str
    mbu: float
    mfu: float
    descriptors_us: float
    """``attention_us`` where GpSimd makes descriptors at the one measured rate."""
    token_gather_us: float
    old_us: float | None
    write_us: float
    around_us: float
    """Operations of torch in every layer."""
    plan_us: float
    """Operations of torch once a step."""
    instructions: int

    @property
    def over_roof(self) -> float:
        """Times the roof."""
        return self.attention_us / self.roof_us

    @property
    def layer_us(self) -> float:
        """Of a layer: write and attend, what torch does around them included."""
        return self.write_us + self.attention_us + self.around_us

    @property
    def step_us(self) -> float:
        """Of all layers and the plan."""
        return self.plan_us + LAYERS * self.layer_us


def rows_of(point: "Point", known: Any, known_old: Any) -> list[Row]:
    """Return the rows of a point, a chip each."""
    from benchmarks import neuron_points

    found = []
    before = neuron_points.old(point, known_old)
    work, write = neuron_points.attention(point, known), neuron_points.write(point)
    for name, chip in CHIPS.items():
        costs = [cost(counts, chip) for _, counts in work.kernels]
        gathers = [cost(neuron_points.token_gather(counts, point), chip) for _, counts in work.kernels]
        attention_us = sum(one.us for one in costs)
        memory_us = point.bytes / (chip.hbm_bytes * point.cores) * 1e6
        product_us = point.flops / (chip.flops * point.cores) * 1e6
        engines: dict[str, Any] = {
            f"{engine}_us": sum(one.engines[engine] for one in costs) for engine in (*ENGINES, "dma")
        }
        found.append(
            Row(
                chip=name,
                **asdict(point),
                roof_us=max(memory_us, product_us),
                **engines,
                fixed_us=sum(one.fixed_us for one in costs),
                attention_us=attention_us,
                bound=max(costs, key=lambda one: one.us).bound,
                mbu=memory_us / attention_us,
                mfu=product_us / attention_us,
                descriptors_us=sum(one.us_with_descriptors for one in costs),
                token_gather_us=sum(one.us for one in gathers),
                old_us=None if before is None else cost(before, chip).us / point.cores,
                write_us=sum(cost(counts, chip).us for _, counts in write.kernels) + torch_us(write.around, chip),
                around_us=torch_us(work.around, chip),
                plan_us=torch_us(work.plan, chip),
                instructions=round(sum(sum(counts.instructions.values()) for _, counts in work.kernels)),
            )
        )
    return found


def sources() -> bytes:
    """Return what rows depend on beside their points: kernels, plans, simulator and model."""
    simulator = sorted((ROOT / "tests" / "nki_sim").rglob("*.py"))
    mine = sorted(Path(__file__).parent.glob("neuron*.py"))
    return b"".join(path.read_bytes() for path in (*sorted(KERNELS.glob("*.py")), *simulator, *mine))


def measure(args: argparse.Namespace) -> None:
    """Model every point that was asked for, write the CSV file, the tables and the plots."""
    if args.device:
        from benchmarks import neuron_device

        neuron_device.measure(args.out)
        return
    from benchmarks import neuron_points, neuron_report

    began = time.monotonic()
    chosen = [point for point in neuron_points.points() if _asked(point, args)]
    memory = MEMORY / hashlib.sha256(sources()).hexdigest()[:16]
    memory.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    known: Any = {}
    known_old: Any = {}
    for point in track(chosen, "model", console=Console(stderr=True)):
        place = memory / f"{'-'.join(str(value) for value in asdict(point).values())}.json"
        if not place.exists():
            found = [asdict(row) for row in rows_of(point, known, known_old)]
            place.write_text(json.dumps(found))
        rows += [Row(**row) for row in json.loads(place.read_text())]
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "neuron.csv", rows)
    rows = read_csv(args.out / "neuron.csv")
    neuron_report.write(rows, args.out)
    console = Console(width=200)
    for table in neuron_report.tables(rows):
        table.print(console)
    print(f"{len(rows)} rows in {time.monotonic() - began:.0f} s; {MODEL}; tables and plots are in {args.out}")


def _asked(point: "Point", args: argparse.Namespace) -> bool:
    wanted = {"batch": args.batch, "context": args.context, "head_dim": args.head_dim, "block_size": args.block_size}
    kind = {"decode": point.is_decode, "prefill": not point.is_decode}.get(args.op, True)
    return kind and all(values is None or getattr(point, name) in values for name, values in wanted.items())


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows under a line that says what they are."""
    with path.open("w", newline="") as file:
        file.write(f"# {MODEL}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in values.items()})


def read_csv(path: Path) -> list[Row]:
    """Read what ``write_csv`` wrote."""
    kinds: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}
    with path.open() as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    types = {field.name: str(getattr(field.type, "__name__", field.type)).split(" ")[0] for field in fields(Row)}
    found: list[dict[str, Any]] = [{k: kinds[types[k]](x) if x else None for k, x in line.items()} for line in lines]
    return [Row(**values) for values in found]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``python -m benchmarks neuron`` takes."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file, the tables and the plots")
    parser.add_argument("--op", choices=("decode", "prefill"), help="only this one")
    for name in ("batch", "context", "head-dim", "block-size"):
        parser.add_argument(f"--{name}", type=int, nargs="+", help="only points of these")
    help_device = "time the kernels on the NeuronCores of this machine, beside the figures that --out has of them"
    parser.add_argument("--device", action="store_true", help=help_device)
    parser.set_defaults(do=measure)
