"""What a measurement depends on: processors, caches, versions, memory."""

import math
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor

import torch_paged
from benchmarks.native import ROOT
from torch_paged.backends.cpu.support import isa
from torch_paged.cache import allocate_kv_cache

COLD_FACTOR = 4
"""Memory that is rotated over, in sizes of the last-level cache."""


@cache
def last_level_cache_bytes() -> int:
    """Return the size of the largest cache of the first processor; 32 MiB where it is unknown."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1024, "M": 1024**2}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * 1024**2)


def pools_for(num_bytes: int) -> int:
    """Return how many pools of that size to rotate over, so that none is still cached when its turn comes again."""
    return min(256, max(2, -(-COLD_FACTOR * last_level_cache_bytes() // max(num_bytes, 1))))


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory with the pages that a cache has, for the tensors of those that are compared with it."""
    num_bytes = math.prod(shape) * dtype.itemsize
    whole = allocate_kv_cache(1, 1, 1, -(-num_bytes // 8), dtype=torch.float32).kv_cache  # two sides of 4 bytes each
    return whole.flatten().view(torch.uint8)[:num_bytes].view(dtype).view(shape)


def huge_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in such memory."""
    return huge_empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def describe() -> dict[str, str]:
    """Return what the head of each CSV file says."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(re.findall(r"^(model name|flags|Features)\s*:\s*(.*)$", info, re.MULTILINE))
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "processor": fields.get("model name", platform.processor() or platform.machine()),
        "processors": str(processors()),
        "last-level cache bytes": str(last_level_cache_bytes()),
        "huge pages": huge.read_text().strip() if huge.is_file() else "unknown",
        "kernels": isa() or "none",
        "torch_paged": torch_paged.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "processor flags": fields.get("flags", fields.get("Features", "unknown")),
    }


class PeakMemory:
    """Counts the memory that a call takes beyond what the process held before: the peak, not what is left.

    Scratch that a thread keeps is counted once, by the call that makes it grow.
    """

    def __enter__(self) -> "PeakMemory":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not Linux, or not allowed
            self._before = None
        else:
            self._before = _status_bytes("VmRSS")
        self.num_bytes: int | None = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.num_bytes = max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match[1]) * 1024
