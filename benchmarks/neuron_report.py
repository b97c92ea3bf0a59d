"""Tables and plots of the model of the Neuron kernels' cost."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks import plots
from benchmarks.neuron import LAYERS, MODEL, Row
from benchmarks.report import Table
from torch_paged.backends.neuron.cost import CHIPS, ENGINES

GOAL_OVER_ROOF, GOAL_MFU = 1.10, 0.60
BASE = {"kv_heads": 8, "group": 4, "head_dim": 128, "block_size": 32, "cores": 1}
BASE_NAME = "KH 8, G 4, D 128, S 32"
SWEPT = (16, 8192)
"""Batch and context at which other shapes are shown."""
PARTS = (*ENGINES, "dma", "turns, starts")
PART_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", plots.GREY)
WAYS: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
    ("torch_paged", PART_COLORS[0], lambda x: x.attention_us),
    ("torch_paged, descriptors of gathers at 26.5 ns", "#9ecae9", lambda x: x.descriptors_us),
    ("token gather", PART_COLORS[1], lambda x: x.token_gather_us),
    ("old scheme", plots.GREY, lambda x: x.old_us),
)


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write the tables in Markdown, and the plots."""
    page = "[neuron-costs.md](../../../docs/neuron-costs.md)"
    head = f"# Neuron kernels: {MODEL}\n\nWritten by `python -m benchmarks neuron`; {page} explains it.\n"
    (folder / "README.md").write_text("\n".join([head, *(table.markdown() for table in tables(rows))]))
    for name, plot in (("neuron_decode", decode), ("neuron_engines", engines), ("neuron_prefill", prefill)):
        figure = plot(rows)
        if figure is not None:
            figure.suptitle(f"{figure.get_suptitle()}: {MODEL}")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the goals, decode, prefill and a whole step."""
    base = [x for x in rows if x.queries == 1 and _is_base(x)]
    found = [_goals(rows), _decode(f"decode ({MODEL})", base)]
    found.append(_decode(f"decode, other shapes ({MODEL})", [x for x in rows if _is_swept(x) and not _is_base(x)]))
    prefill_head = ("chip", "tokens", "context", "KH", "G", "D", "roof, us", *PARTS, "us", "bound", "MFU", "old scheme")
    lines = [
        (
            *(x.chip, str(x.queries), str(x.context), str(x.kv_heads), str(x.group), str(x.head_dim)),
            *(_us(x.roof_us), *map(_us, _parts(x)), _us(x.attention_us), x.bound, f"{x.mfu:.0%}", _us(x.old_us)),
        )
        for x in rows
        if x.queries > 1
    ]
    found.append(Table(f"prefill, causal ({MODEL})", prefill_head, tuple(lines)))
    step_head = ("chip", "B", "context", "plan", "write", "torch around", "attention", "step", "over the roof")
    steps = [
        (
            *(x.chip, str(x.batch), str(x.context), _us(x.plan_us), _us(x.write_us), _us(x.around_us)),
            *(_us(x.attention_us), _us(x.step_us), f"{x.step_us / (LAYERS * x.roof_us):.2f}"),
        )
        for x in base
    ]
    title = f"a step of {LAYERS} layers, us: one plan, in each layer write and attention ({MODEL})"
    found.append(Table(title, step_head, tuple(steps)))
    return [table for table in found if table.lines]


def goal_cells(rows: Sequence[Row], chip: str) -> tuple[list[Row], list[Row]]:
    """Return the rows that the goals of decode and of prefill are about."""
    mine = [x for x in rows if x.chip == chip]
    asked = [x for x in mine if x.queries == 1 and x.context >= 4096 and x.block_size >= 32 and x.group >= 4]
    return asked, [x for x in mine if x.queries > 1]


def _goals(rows: Sequence[Row]) -> Table:
    lines = []
    for chip in CHIPS:
        decode, prefill = goal_cells(rows, chip)
        over, shares = sorted(x.over_roof for x in decode), sorted((x.mfu for x in prefill), reverse=True)
        for name, goal, values, met in (
            ("decode", f"<= {GOAL_OVER_ROOF:.2f} x HBM roof", over, sum(x <= GOAL_OVER_ROOF for x in over)),
            ("prefill", f">= {GOAL_MFU:.2f} MFU", shares, sum(x >= GOAL_MFU for x in shares)),
        ):
            if values:
                shown = [f"{x:.2f}" for x in (values[0], values[len(values) // 2], values[-1])]
                lines.append((chip, name, goal, *shown, f"{met} of {len(values)}"))
    return Table(
        f"goals ({MODEL})", ("chip", "", "goal", "best", "median", "worst", "cells that meet it"), tuple(lines)
    )


def _decode(title: str, rows: Sequence[Row]) -> Table:
    head = ("chip", "B", "context", "KH", "G", "D", "S", "cores", "roof, us", *PARTS, "us", "over the roof", "bound")
    lines = [
        (
            *(x.chip, str(x.batch), str(x.context), str(x.kv_heads), str(x.group), str(x.head_dim), str(x.block_size)),
            *(str(x.cores), _us(x.roof_us), *map(_us, _parts(x)), _us(x.attention_us), f"{x.over_roof:.2f}", x.bound),
            *(f"{x.mbu:.0%}", _us(x.descriptors_us), _us(x.token_gather_us), _us(x.old_us)),
        )
        for x in rows
    ]
    return Table(title, (*head, "MBU", "with descriptors", "token gather", "old scheme"), tuple(lines))


def decode(rows: Sequence[Row]) -> Figure | None:
    """Draw times over the roof against the context, a line for each way, a panel for each chip and batch."""
    base = [x for x in rows if x.queries == 1 and _is_base(x)]
    batches = sorted({x.batch for x in base})
    if not base:
        return None
    figure = Figure(figsize=(1.5 + 2.6 * len(batches), 6), layout="constrained")
    axes = figure.subplots(len(CHIPS), len(batches), sharex=True, sharey=True, squeeze=False)
    for line, chip in zip(axes, CHIPS, strict=True):
        for axis, batch in zip(line, batches, strict=True):
            mine = sorted((x for x in base if (x.chip, x.batch) == (chip, batch)), key=lambda x: x.context)
            for name, color, value in WAYS:
                shown = [(x.context, us / x.roof_us) for x in mine if (us := value(x)) is not None]
                axis.plot(*zip(*shown, strict=True), "o-", color=color, markersize=3, label=name)
            axis.axhspan(1, GOAL_OVER_ROOF, color="#54a24b", alpha=0.4, linewidth=0)
            axis.set(title=f"{chip}, B {batch}", xscale="log", yscale="log")
            axis.minorticks_off()
            axis.set_xticks([x.context for x in mine], [f"{x.context // 1024}k" for x in mine])
        line[0].set_ylabel("time over the HBM roof")
        line[0].yaxis.set_major_formatter("{x:g}x")
    for axis in axes[-1]:
        axis.set_xlabel("context, tokens")
    goal = Patch(color="#54a24b", alpha=0.4, label="goal")
    figure.legend(handles=[*axes[0][0].get_legend_handles_labels()[0], goal], loc="outside lower center", ncols=3)
    figure.suptitle(f"Decode, {BASE_NAME}")
    return figure


def engines(rows: Sequence[Row]) -> Figure | None:
    """Draw what each engine takes beside the roof, a panel for each chip, for one batch of each shape."""
    chosen = [x for x in rows if _is_swept(x)]
    labels = list(dict.fromkeys(_label(x) for x in chosen))
    if not chosen:
        return None
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(labels)), layout="constrained")
    for axis, chip in zip(figure.subplots(1, len(CHIPS), sharey=True), CHIPS, strict=True):
        for x in (x for x in chosen if x.chip == chip):
            for number, (value, color) in enumerate(zip(_parts(x), PART_COLORS, strict=True)):
                axis.barh(labels.index(_label(x)) + (number - 2.5) * 0.14, value / x.roof_us, 0.13, color=color)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(title=chip, xlabel="time over the HBM roof")
        axis.set_yticks(range(len(labels)), labels)
        axis.grid(axis="y", visible=False)
    figure.axes[0].invert_yaxis()
    handles = [Patch(color=color, label=name) for name, color in zip(PARTS, PART_COLORS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(PARTS))
    figure.suptitle(f"Decode of {SWEPT[0]} x {SWEPT[1]} tokens")
    return figure


def prefill(rows: Sequence[Row]) -> Figure | None:
    """Draw the use of the tensor engine against the tokens, a line for each context."""
    base = [x for x in rows if x.queries > 1 and _is_base(x)]
    if not base:
        return None
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots(1, len(CHIPS), sharey=True)
    for axis, chip in zip(axes, CHIPS, strict=True):
        mine = sorted((x for x in base if x.chip == chip), key=lambda x: x.queries)
        for color, context in zip(PART_COLORS, sorted({x.context for x in mine}), strict=False):
            line = [x for x in mine if x.context == context]
            label = f"{context // 1024}k in the cache" if context else "nothing in the cache"
            axis.plot([x.queries for x in line], [100 * x.mfu for x in line], "o-", color=color, label=label)
            old = [(x.queries, 100 * x.mfu * x.attention_us / x.old_us) for x in line if x.old_us]
            axis.plot(*zip(*old, strict=True), "o:", color=color, alpha=0.5, label=f"{label}, old scheme")
        axis.axhline(100 * GOAL_MFU, color="black", linewidth=1)
        axis.set(title=chip, xlabel="new tokens", ylim=(0, 100))
        axis.set_xticks(sorted({x.queries for x in mine}))
    axes[0].set_ylabel("% of the tensor engine")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"Prefill, causal, {BASE_NAME}")
    return figure


def _is_base(row: Row) -> bool:
    return all(getattr(row, name) == value for name, value in BASE.items())


def _is_swept(row: Row) -> bool:
    """Whether one size, or kv heads and their group, differ from the base."""
    changed = [name for name, value in BASE.items() if getattr(row, name) != value]
    at = (row.batch, row.context) == SWEPT and row.queries == 1
    return at and (len(changed) < 2 or changed == ["kv_heads", "group"])


def _label(row: Row) -> str:
    names = {"kv_heads": "KH", "group": "G", "head_dim": "D", "block_size": "S", "cores": "cores"}
    changed = [f"{names[name]} {getattr(row, name)}" for name, value in BASE.items() if getattr(row, name) != value]
    return ", ".join(changed) or BASE_NAME


def _parts(row: Row) -> tuple[float, ...]:
    return row.tensor_us, row.vector_us, row.scalar_us, row.gpsimd_us, row.dma_us, row.fixed_us


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"
