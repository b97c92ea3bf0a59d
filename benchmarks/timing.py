"""Time several ways to do the same work, in turns."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MINIMUM_SAMPLES = 5
SLOW_SAMPLES = 3
"""For calls that take their seconds several times over."""
SAMPLE_SECONDS = 200e-6
"""Shorter calls are repeated within one sample."""

Call = Callable[[int], Any]
"""Does the work on the pool of that number."""


@dataclass(frozen=True)
class Times:
    """The times of one call, in seconds."""

    samples: tuple[float, ...]
    variant: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)


def race(calls: Mapping[str, Call], pools: int, *, seconds: float, most_samples: int) -> dict[str, Times]:
    """Time calls in turns, so that what else the machine does weighs on all of them.

    The order of a turn is drawn anew each time: what a call leaves to be written back would always burden the next one.

    Each call, whoever's it is, takes the next pool. A call leaves the race when it has had its seconds, so slow ones
    get fewer samples.

    Args:
        calls: name -> call. Names ``"name @variant"`` are variants of one way; the fastest of them is kept.
        pools: how many pools there are.
        seconds: for each call.
        most_samples: for each call.

    Returns:
        name -> its times.
    """
    turn = 0
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        call(0)
        if time.perf_counter() - begin < 0.1:  # else nothing is left to warm up
            begin = time.perf_counter()
            call(pools - 1)
        repeats[name] = max(1, int(SAMPLE_SECONDS / (time.perf_counter() - begin)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    racing = list(calls)
    order = random.Random(0)
    while racing:
        order.shuffle(racing)
        for name in racing:
            call, count = calls[name], repeats[name]
            turns = [(turn + i) % pools for i in range(count)]
            turn += count
            begin = time.perf_counter()
            for pool in turns:
                call(pool)
            taken[name].append((time.perf_counter() - begin) / count)
        racing = [name for name in racing if not _done(taken[name], repeats[name], seconds, most_samples)]
    best: dict[str, Times] = {}
    for full_name, samples in taken.items():
        name, _, variant = full_name.partition(" @")
        times = Times(tuple(samples), variant)
        if name not in best or times.median < best[name].median:
            best[name] = times
    return best


def _done(samples: list[float], repeats: int, seconds: float, most_samples: int) -> bool:
    spent = sum(samples) * repeats
    enough = MINIMUM_SAMPLES if spent < 3 * seconds else SLOW_SAMPLES
    return len(samples) >= most_samples or (len(samples) >= enough and spent >= seconds)
