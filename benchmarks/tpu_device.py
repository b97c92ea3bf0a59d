"""Time the TPU kernels on the TPU of this machine, beside the compiler's estimates (``benchmarks tpu --device``).

It has never run on hardware.
"""

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import torch_paged
from benchmarks.device_time import CALLS, seconds
from benchmarks.report import Table
from benchmarks.tpu import CLOCKS, OURS, points
from torch_paged.testing.backends import tpu_device_type


@dataclass(frozen=True)
class Size:
    """One call: ``batch`` sequences of ``context`` cached tokens with ``queries`` query tokens each."""

    batch: int
    context: int
    kv_heads: int
    block_size: int
    queries: int = 1
    group: int = 4
    head_dim: int = 128

    @property
    def cache_bytes(self) -> int:
        """What has to be read of a bfloat16 cache."""
        return self.batch * self.context * 2 * self.kv_heads * self.head_dim * 2


def call_of(size: Size, device: str) -> Callable[[], Tensor]:
    """Return the compiled call on random tensors of a device."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    width = -(-size.context // size.block_size)
    num_blocks = size.batch * width
    query = torch.randn(size.batch * size.queries, size.kv_heads * size.group, size.head_dim, **options)
    kv_cache = torch.randn(2, num_blocks, size.kv_heads, size.block_size, size.head_dim, **options)
    tables = torch.arange(num_blocks, dtype=torch.int32).reshape(size.batch, width).to(device)
    lens = torch.full((size.batch,), size.context, dtype=torch.int32).to(device)
    starts = (torch.arange(size.batch + 1, dtype=torch.int32) * size.queries).to(device)

    def decode(query: Tensor, kv_cache: Tensor) -> Tensor:
        return torch_paged.paged_attention(query, kv_cache, tables, lens)

    def prefill(query: Tensor, kv_cache: Tensor) -> Tensor:
        return torch_paged.flash_attn_varlen(
            query,
            cu_seqlens_q=starts,
            kv_cache=kv_cache,
            block_tables=tables,
            context_lens=lens,
            max_seqlen_q=size.queries,
            max_seqlen_k=size.context,
            causal=True,
        )

    function = decode if size.queries == 1 else prefill
    compiled = torch.compile(function, backend="openxla" if device == "xla" else "tpu", fullgraph=True)
    return lambda: compiled(query, kv_cache)


def _wait(device: str) -> Callable[[], Any]:
    if device == "xla":
        from torch_xla.core import xla_model

        return xla_model.wait_device_ops
    return torch.accelerator.synchronize


def table(sizes: Iterable[Size], device: str, estimates: Mapping[Size, float], calls: int = CALLS) -> Table:
    """Time all sizes.

    Args:
        sizes: what to time.
        device: "xla" or "tpu".
        estimates: the compiler's estimates for this chip, in seconds.
        calls: calls of a sample.
    """
    lines = []
    wait = _wait(device)
    for size in sizes:
        took, estimate = seconds(call_of(size, device), wait, calls), estimates.get(size)
        lines.append(
            (
                *(str(x) for x in (size.batch, size.context, size.kv_heads, size.block_size, size.queries)),
                f"{took * 1e6:.1f}",
                "" if estimate is None else f"{estimate * 1e6:.1f}",
                f"{size.cache_bytes / took / 1e9:.0f}",
            )
        )
    head = ("B", "context", "KH", "S", "queries", "us", "static estimate, us", "GB/s of keys and values")
    return Table(f"kernels on device '{device}'", head, tuple(lines))


def estimates(path: Path, chip: str) -> dict[Size, float]:
    """Return what the compiler estimates for our kernels on a chip, in seconds, from the CSV file of a static run."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    names = [field.name for field in fields(Size)]
    return {
        Size(**{name: int(row[name]) for name in names}): int(row["cycles"]) / CLOCKS[chip]
        for row in rows
        if row["way"] == OURS and row["chip"] == chip and row["cycles"]
    }


def measure(folder: Path) -> None:
    """Time the sizes of the static run on the TPU of this machine; one sentence where there is none."""
    device = tpu_device_type()
    if device is None:
        raise SystemExit("benchmarks tpu: no TPU is in reach here; docs/tpu.md has the commands for a TPU VM")
    chip = _chip(device)
    names = [field.name for field in fields(Size)]
    sizes = dict.fromkeys(Size(**{name: getattr(x, name) for name in names}) for x in points() if x.way == OURS)
    table(sizes, device, estimates(folder / "tpu.csv", chip)).print(Console(width=140))
    print(f"measured on {chip}")


def _chip(device: str) -> str:
    if device == "xla":
        from torch_paged.backends.tpu.bridge_torch_xla import target

        return target("xla:0")[1]
    from torch_paged.backends.tpu import bridge_torch_tpu

    return bridge_torch_tpu._chip()
