"""What every benchmark hands over: one case, the ways to do it, and how to see that each does it right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from benchmarks.limits import peak_flops
from benchmarks.machine import PeakMemory
from benchmarks.timing import Call, race
from torch_paged.testing import AttentionCase, assert_close, oracle, plain_attention, take_sequences

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
OURS = "torch_paged"
PEAK = "register peak"
"""Not a way to do the work: it does its own, which grows with the threads."""


@dataclass(frozen=True)
class Settings:
    """What the command line chooses."""

    size: str = "full"
    """"full", "quick" (fewer cases and samples) or "tiny" (seconds; for the tests)."""
    threads: tuple[int, ...] = (1,)
    seed: int = 0
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Sizes of ``decode`` to measure instead of the default ones."""

    @property
    def seconds(self) -> float:
        """For each call, on each number of threads."""
        return {"full": 0.4, "quick": 0.15, "tiny": 0.001}[self.size]

    @property
    def most_samples(self) -> int:
        return {"full": 25, "quick": 11, "tiny": 5}[self.size]


@dataclass(frozen=True)
class Row:
    """One line of the CSV file: one way to do one case."""

    benchmark: str
    group: str
    """Which question of the benchmark the case belongs to."""
    variant: str
    """What sets the case apart from the plain one of its group; empty for that."""
    case: str
    dtype: str
    batch: int
    context: int
    """The longest context, in tokens."""
    block_size: int
    heads: int
    kv_heads: int
    head_dim: int
    threads: int
    contender: str
    median_us: float
    minimum_us: float
    samples: int
    bytes: int
    """Keys and values that have to be read or written."""
    flops: int
    peak_bytes: int | None
    """Memory of the call beyond its inputs; None where the system does not tell."""

    @classmethod
    def read(cls, texts: dict[str, str]) -> "Row":
        """Make a row from the texts of a CSV line."""
        kinds: dict[Any, Callable[[str], Any]] = {str: str, int: int, float: float}
        values = {
            f.name: kinds.get(f.type, lambda text: int(text) if text else None)(texts[f.name]) for f in fields(cls)
        }
        return cls(**values)


@dataclass(frozen=True)
class Work:
    """One case, ready to be timed."""

    benchmark: str
    group: str
    case: str
    columns: dict[str, Any]
    contenders: dict[str, Call]
    """Name -> call; names with ``" @"`` are variants of one way."""
    pools: int
    check: Callable[[str, Any], None]
    """Raises AssertionError when what a contender returned for pool 0 is wrong."""
    bytes: int = 0
    flops: int = 0
    repeats: int = 1
    """How often a call does the work."""
    threads: tuple[int, ...] | None = None
    """None: those of the settings."""
    variant: str = ""

    def measure(self, settings: Settings) -> Iterator[Row]:
        """Check every contender, then time them on each number of threads."""
        peaks: dict[str, int | None] = {}
        for name, call in self.contenders.items():
            with PeakMemory() as memory:
                result = call(0)
            peaks.setdefault(name.partition(" @")[0], memory.num_bytes)
            try:
                self.check(name, result)
            except AssertionError as error:
                raise AssertionError(f"{self.benchmark}, {self.case}: {name} is wrong: {error}") from error
            del result
        for threads in self.threads or settings.threads:
            torch.set_num_threads(threads)
            times = race(self.contenders, self.pools, seconds=settings.seconds, most_samples=settings.most_samples)
            for name, taken in times.items():
                yield Row(
                    benchmark=self.benchmark,
                    group=self.group,
                    variant=self.variant,
                    case=self.case,
                    threads=threads,
                    contender=name,
                    median_us=round(taken.median / self.repeats * 1e6, 3),
                    minimum_us=round(taken.minimum / self.repeats * 1e6, 3),
                    samples=len(taken.samples),
                    bytes=self.bytes,
                    flops=self.flops if name != PEAK else threads * peak_flops(DTYPES[self.columns["dtype"]]),
                    peak_bytes=peaks[name],
                    **self.columns,
                )
        torch.set_num_threads(settings.threads[0])


def attention_columns(case: AttentionCase) -> dict[str, Any]:
    """Return the columns that describe an attention case."""
    return {
        "dtype": str(case.cache_dtype or case.dtype).removeprefix("torch."),
        "batch": case.num_seqs,
        "context": max(case.kv_lens),
        "block_size": case.block_size,
        "heads": case.num_heads,
        "kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
    }


def kv_bytes(case: AttentionCase) -> int:
    """Return the bytes of the cached keys and values that a decode case has to read, scales aside."""
    keys = sum(min(length, case.sliding_window or length) for length in case.context_lens or ())
    return 2 * keys * case.num_kv_heads * case.head_dim * (case.cache_dtype or case.dtype).itemsize


def attention_check(op: str, arguments: dict[str, Any]) -> Callable[[str, Any], None]:
    """Return a check by the rule of the tests, on the first and last kv head of the first and last sequence.

    Limits return None and are not checked.
    """
    num_seqs = len(arguments["context_lens"] if op == "paged_attention" else arguments["cu_seqlens_q"][1:])
    taken, rows = take_sequences(arguments, sorted({0, num_seqs - 1}))
    taken, heads = _take_heads(taken)
    expected = oracle(op, taken)[0]
    plain = plain_attention(op, taken)

    def check(_: str, result: Any) -> None:
        if result is not None:
            out: Tensor = result[0] if isinstance(result, tuple) else result
            assert_close(out.reshape(arguments["query"].shape)[rows][:, heads], expected, plain)

    return check


def _take_heads(arguments: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Return an attention call for the first and the last kv head, and the query heads that are left."""
    cache, key, scales = (arguments.get(name) for name in ("kv_cache", "key", "kv_scales"))
    num_kv_heads = arguments["key"].size(1) if cache is None else cache.size(2)
    group = arguments["query"].size(1) // num_kv_heads
    kv_heads = torch.tensor(sorted({0, num_kv_heads - 1}))
    heads = (kv_heads[:, None] * group + torch.arange(group)).flatten()
    taken = arguments | {"query": arguments["query"][:, heads]}
    if cache is not None:
        taken["kv_cache"] = cache[:, :, kv_heads]
    if key is not None:
        taken |= {name: arguments[name][:, kv_heads] for name in ("key", "value")}
    if scales is not None:
        taken["kv_scales"] = scales.index_select(1 if scales.dim() == 2 else 2, kv_heads)
    if arguments["sinks"] is not None:
        taken["sinks"] = arguments["sinks"][heads]
    return taken, heads
