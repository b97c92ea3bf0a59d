"""The speed that is asked for, and what the rows of a run say about it.

A goal over several cells is met when their geometric mean meets it and no cell is worse than 0.8 of that mean.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.generate import CONTINUOUS, PADDED, RAGGED
from benchmarks.prefill import APART
from benchmarks.work import OURS, PEAK, Row

JUDGED_BYTES = 8_000_000
"""Decode cells with less to read are reported, not judged."""
SPREAD = 0.8

Cell = dict[str, Row]
"""Contender -> its row, for one case on one number of threads."""
Value = Callable[[Cell], float | None]


@dataclass(frozen=True)
class Goal:
    """One line of the table of goals."""

    work: str
    quantity: str
    bound: float | None
    """None: reported beside the goals, not judged."""
    values: tuple[float, ...]
    """One for each cell."""
    at_least: bool = True
    unit: str = "x"

    @property
    def reached(self) -> float | None:
        """The geometric mean over the cells, or the only value; None where nothing was measured."""
        if len(self.values) < 2:
            return self.values[0] if self.values else None
        return math.exp(sum(map(math.log, self.values)) / len(self.values))

    @property
    def worst(self) -> float | None:
        """The cell that is furthest on the wrong side."""
        if not self.values:
            return None
        return min(self.values) if self.at_least else max(self.values)

    @property
    def mean_met(self) -> bool | None:
        """Whether the mean will do; None where nothing was measured or is asked."""
        if self.reached is None or self.bound is None:
            return None
        return self.reached >= self.bound if self.at_least else self.reached <= self.bound

    @property
    def met(self) -> bool | None:
        """Whether mean and worst cell will do; None where nothing was measured or is asked."""
        if not self.mean_met or self.reached is None or self.worst is None or len(self.values) == 1:
            return self.mean_met
        return self.worst >= SPREAD * self.reached if self.at_least else SPREAD * self.worst <= self.reached

    def show(self, value: float | None) -> str:
        """Write a value in the goal's unit."""
        if value is None:
            return "-"
        return {"%": f"{100 * value:.0f} %", "x": f"{value:.2f}x", "us": f"{value:.1f} us"}[self.unit]

    @property
    def asked(self) -> str:
        """The bound in words."""
        if self.bound is None:
            return ""
        return f"{'>=' if self.at_least else '<='} {self.show(self.bound)}"


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Group rows by case and threads."""
    found: dict[tuple[object, ...], Cell] = {}
    for row in rows:
        found.setdefault((row.benchmark, row.group, row.case, row.threads), {})[row.contender] = row
    return list(found.values())


def goals(rows: Iterable[Row]) -> list[Goal]:
    """Judge the rows of a run by every goal."""
    everything = cells(rows)

    def select(benchmark: str, group: str, **columns: object) -> list[Cell]:
        chosen = []
        for cell in everything:
            row = next(iter(cell.values()))
            if (row.benchmark, row.group) == (benchmark, group) and all(
                getattr(row, name) == value for name, value in columns.items()
            ):
                chosen.append(cell)
        return chosen

    def judged(group: str, **columns: object) -> list[Cell]:
        return [cell for cell in select("decode", group, **columns) if cell[OURS].bytes >= JUDGED_BYTES]

    return [
        *_decode_goals(judged),
        *_published_goals(judged),
        *_variant_goals(judged),
        *_isa_goals(select),
        *_prefill_goals(select),
        *_call_goals(select),
        *_generate_goals(select),
        *_thread_goals(select),
    ]


def limit_share(cell: Cell) -> float | None:
    """Return the part of the paged-read limit, or of the register peak, that our row reaches."""
    ours = cell[OURS]
    if PEAK in cell:
        peak = cell[PEAK]
        return (ours.flops / ours.median_us) / (peak.flops / peak.median_us)
    return cell["paged read"].median_us / ours.median_us if "paged read" in cell else None


def faster_than(contender: str) -> Value:
    """Return the value "how many times faster than that contender"."""
    return lambda cell: cell[contender].median_us / cell[OURS].median_us if contender in cell else None


def _each(value: Value, chosen: Iterable[Cell]) -> tuple[float, ...]:
    return tuple(found for cell in chosen if (found := value(cell)) is not None)


DECODE_BOUNDS = {"bfloat16": (0.7, 3.0), "float32": (0.7, 2.2), "float16": (0.6, 7.0)}
"""dtype -> share of the limit on one thread, times contiguous SDPA."""


def _decode_goals(judged: Callable[..., list[Cell]]) -> Iterable[Goal]:
    for dtype, (share, times) in DECODE_BOUNDS.items():
        work = f"decode, {dtype}"
        for threads, bound in ((1, share), (2, 0.8)):
            found = _each(limit_share, judged("grid", dtype=dtype, threads=threads))
            yield Goal(work, f"of the paged-read limit, {_threads(threads)}", bound, found, unit="%")
        found = _each(faster_than("contiguous SDPA"), judged("grid", dtype=dtype))
        yield Goal(work, "against contiguous SDPA", times, found)
        found = _each(faster_than("transformers paged"), judged("grid", dtype=dtype))
        yield Goal(work, "against transformers' gather and mask", 30, found)
    for threads in (1, 2):
        relative = []
        for cell in judged("random", threads=threads):
            bound = DECODE_BOUNDS[cell[OURS].dtype][0] if threads == 1 else 0.8
            relative.append((limit_share(cell) or 0) / bound)
        yield Goal("decode, drawn shapes", f"of the dtype's goal, {_threads(threads)}", 1, tuple(relative), unit="%")


@dataclass(frozen=True)
class Published:
    """The highest GB/s that was measured of a CPU kernel elsewhere, and the highest paged-read limit there."""

    kernel: str
    dtype: str
    rate: float
    limit: float
    times: float
    """That many times faster is asked."""


PUBLISHED = (
    Published("vLLM 0.33", "bfloat16", 8, 33, 2.5),
    Published("SGLang", "bfloat16", 6, 33, 2.5),
    Published("vLLM 0.33", "float32", 10, 29, 1.8),
)
"""The upper ends of what was seen on another Zen 4 machine: one thread, cold caches, 32 query heads and 8 kv heads."""


def _published_goals(judged: Callable[..., list[Cell]]) -> Iterable[Goal]:
    for known in PUBLISHED:
        chosen = judged("grid", dtype=known.dtype, threads=1)
        work = f"decode, {known.dtype}, {known.kernel} elsewhere"
        share = known.rate / known.limit
        found = tuple(value / share for value in _each(limit_share, chosen))
        yield Goal(work, f"share of the limit over its {100 * share:.0f} %", known.times, found)
        rates = tuple(cell[OURS].bytes / cell[OURS].median_us / 1e3 / known.rate for cell in chosen)
        yield Goal(work, f"GB/s over its {known.rate:g}", None, rates)


def _isa_goals(select: Callable[..., list[Cell]]) -> Iterable[Goal]:
    for dtype, bound in (("bfloat16", 0.6), ("float32", 1 / 1.1), ("float16", None)):
        chosen = select("isa", "isa", dtype=dtype)
        found = _each(
            lambda cell: cell["avx512"].median_us / cell["avx2"].median_us if {"avx512", "avx2"} <= set(cell) else None,
            chosen,
        )
        yield Goal(f"AVX2 kernels, {dtype}", "speed over AVX-512", bound, found)
        found = _each(
            lambda cell: cell["contiguous SDPA"].median_us / cell["generic"].median_us if "generic" in cell else None,
            chosen,
        )
        yield Goal(f"generic kernels, {dtype}", "against contiguous SDPA", 1, found)


def _variant_goals(judged: Callable[..., list[Cell]]) -> Iterable[Goal]:
    def times(cell: Cell) -> float:
        return cell[OURS].median_us

    for dtype in ("int8", "float8_e4m3fn", "float8_e5m2"):
        slower = _over_plain(judged("quantised"), times, dtype=dtype)
        faster = tuple(1 / ratio for ratio in slower)
        yield Goal(f"decode, {dtype} cache", "against a bfloat16 cache", 1.5, faster)
    for option in ("window", "cap", "sinks", "stats"):
        found = _over_plain(judged("options"), times, variant=option)
        yield Goal(f"decode with {option}", "time of the plain case", 1.1, found, at_least=False)
    found = _over_plain(judged("window"), times, variant="window")
    yield Goal("decode, window of 512 in 16384", "time of a context of 512", 1.1, found, at_least=False)
    for shape in ("G = 1", "G = 8", "D = 80", "D = 96", "D = 256"):
        found = _over_plain(judged("shapes"), lambda cell: limit_share(cell) or 0, variant=shape)
        yield Goal(f"decode, {shape}", "limit share over that of D = 128, G = 4", 0.85, found, unit="%")


def _over_plain(chosen: list[Cell], value: Callable[[Cell], float], **columns: str) -> tuple[float, ...]:
    """Return value / value of the plain case on as many threads, for each cell of a variant."""
    ratios = []
    for cell in chosen:
        row = cell[OURS]
        if row.variant and all(getattr(row, name) == wanted for name, wanted in columns.items()):
            plain = next(
                other
                for other in chosen
                if (found := other[OURS]).variant == ""
                and found.threads == row.threads
                and (found.dtype == row.dtype or row.group == "quantised")
            )
            ratios.append(value(cell) / value(plain))
    return tuple(ratios)


PREFILL_BOUNDS = {"bfloat16": (0.75, 2.0), "float32": (0.8, None), "float16": (None, 4.0)}
"""dtype -> share of the register peak, times SDPA."""
SHORT = "8x64"
SHORT_SHARE = 0.6


def _prefill_goals(select: Callable[..., list[Cell]]) -> Iterable[Goal]:
    for dtype, (share, times) in PREFILL_BOUNDS.items():
        chosen = select("prefill", "prefill", dtype=dtype)
        short = [cell for cell in chosen if cell[OURS].variant == SHORT]
        long = [cell for cell in chosen if cell[OURS].variant != SHORT]
        if share is not None:
            yield Goal(f"prefill, {dtype}", "of the register peak", share, _each(limit_share, long), unit="%")
        if dtype == "bfloat16":
            found = _each(limit_share, short)
            yield Goal(f"prefill, {dtype}, {SHORT}", "of the register peak", SHORT_SHARE, found, unit="%")
        if times is not None:
            yield Goal(f"prefill, {dtype}", "against SDPA", times, _each(faster_than("SDPA"), chosen))
    found = _each(
        lambda cell: cell[OURS].median_us / sum(cell[name].median_us for name in APART), select("prefill", "mixed")
    )
    yield Goal("mixed batch", "time of its parts apart", 1.1, found, at_least=False)


def _call_goals(select: Callable[..., list[Cell]]) -> Iterable[Goal]:
    many, one = (select("cache-write", "cache-write", batch=tokens, variant="") for tokens in (512, 1))
    index_put = faster_than("index_put_")
    yield Goal("cache write, 512 tokens", "against index_put_", 2, _each(index_put, many))
    yield Goal("cache write, 1 token", "against index_put_", 2.5, _each(index_put, one))
    dense = _each(lambda cell: cell[OURS].median_us / cell["dense copy_"].median_us, many)
    yield Goal("cache write, 512 tokens", "time of a dense copy", 1.8, dense, at_least=False)
    for name, contender, bound in (
        ("eager call, inference_mode", OURS, 3),
        ("eager call, no_grad", f"{OURS}, no_grad", 7),
        ("eager call of the op, inference_mode", "op", 3),
        ("eager call of the op, no_grad", "op, no_grad", 7),
        ("call in a compiled graph", f"{OURS} in a compiled graph", 5),
        ("call of the op in a compiled graph", "op in a compiled graph", 5),
    ):
        found = tuple(
            cell[contender].median_us - cell["kernel alone"].median_us
            for cell in select("overhead", "overhead")
            if contender in cell and "kernel alone" in cell
        )
        yield Goal(name, "beyond the kernel", bound, found, at_least=False, unit="us")


def _thread_goals(select: Callable[..., list[Cell]]) -> Iterable[Goal]:
    decodes = [cell for cell in select("decode", "grid") if cell[OURS].context >= 4096]
    prefills = select("prefill", "prefill")
    for work, chosen, contender, bound in (
        ("decode, context >= 4096", decodes, OURS, 1.7),
        ("the paged read itself, there", decodes, "paged read", None),
        ("prefill", prefills, OURS, 1.7),
    ):
        found = tuple(
            one[contender].median_us / two[contender].median_us
            for one in chosen
            for two in chosen
            if (one[OURS].case, one[OURS].threads, two[OURS].threads) == (two[OURS].case, 1, 2)
            and (one[OURS].bytes >= JUDGED_BYTES or one[OURS].flops)
            and contender in one
            and contender in two
        )
        yield Goal(work, "2 threads against 1", bound, found)


def _generate_goals(select: Callable[..., list[Cell]]) -> Iterable[Goal]:
    chosen = select("generate", RAGGED)
    yield Goal("ragged prompts", "against generate, padded", 2.5, _each(faster_than(PADDED), chosen))
    yield Goal("ragged prompts", f"against {CONTINUOUS}", 1, _each(faster_than(CONTINUOUS), chosen))

    def memory(cell: Cell) -> float | None:
        ours, theirs = cell[OURS].peak_bytes, cell[PADDED].peak_bytes if PADDED in cell else None
        return ours / theirs if ours is not None and theirs else None

    yield Goal("ragged prompts", "peak memory over generate's", 1, _each(memory, chosen), at_least=False)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
