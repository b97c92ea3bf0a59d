"""The time of a call on a device that works through a queue."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

CALLS, SAMPLES = 50, 5


def seconds(call: Callable[[], Any], wait: Callable[[], Any], calls: int = CALLS) -> float:
    """Return the median time of a call: of many in a row, one wait at the end, as in a model's layers.

    Args:
        call: starts the work; its first run may compile.
        wait: returns when the device has done all that was started.
        calls: of each sample.
    """
    with torch.no_grad():
        call()
        wait()
        samples = []
        for _ in range(SAMPLES):
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            wait()
            samples.append((time.perf_counter() - begin) / calls)
    return statistics.median(samples)
