"""Time the NKI kernels on the NeuronCores of this machine, beside the model (``benchmarks neuron --device``).

It has never run on hardware.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import torch_paged
from benchmarks.device_time import CALLS, seconds
from benchmarks.neuron import Row, read_csv
from benchmarks.report import Table
from torch_paged import dispatch
from torch_paged.backends.neuron.support import cores, generation
from torch_paged.testing.cases import cumulative

DEVICE = "neuron"


def call_of(row: Row, compiler: Any) -> Callable[[], Tensor]:
    """Return the compiled call of a row of the model's table, on random tensors of the device.

    Args:
        row: of which.
        compiler: backend of ``torch.compile``.
    """
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
    width = max(1, -(-row.context // row.block_size))
    num_blocks = row.batch * width
    query = torch.randn(row.batch * row.queries, row.kv_heads * row.group, row.head_dim, **options)
    kv_cache = torch.randn(2, num_blocks, row.kv_heads, row.block_size, row.head_dim, **options)
    tables = torch.arange(num_blocks, dtype=torch.int32).reshape(row.batch, width).to(DEVICE)
    lens = torch.full((row.batch,), row.context, dtype=torch.int32).to(DEVICE)
    key, value = (torch.randn(row.batch * row.queries, row.kv_heads, row.head_dim, **options) for _ in range(2))
    starts = cumulative((row.queries,) * row.batch).to(DEVICE)

    def decode() -> Tensor:
        return torch_paged.paged_attention(query, kv_cache, tables, lens)

    def prefill() -> Tensor:
        cached: dict[str, Any] = {"kv_cache": kv_cache, "block_tables": tables, "context_lens": lens}
        return torch_paged.flash_attn_varlen(
            query,
            key,
            value,
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=row.queries,
            max_seqlen_k=row.queries + row.context,
            causal=True,
            **(cached if row.context else {}),
        )

    return torch.compile(decode if row.queries == 1 else prefill, backend=compiler, fullgraph=True)


def table(rows: Iterable[Row], compiler: Any = DEVICE, calls: int = CALLS) -> Table:
    """Time all rows.

    Args:
        rows: of the model's table, for this generation and number of cores.
        compiler: backend of ``torch.compile``.
        calls: calls of a sample.
    """
    lines = []
    for row in rows:
        took = seconds(call_of(row, compiler), torch.accelerator.synchronize, calls)
        sizes = (row.batch, row.context, row.queries, row.kv_heads, row.group, row.head_dim, row.block_size)
        times = (took * 1e6, row.attention_us, row.descriptors_us, row.roof_us)
        lines.append((*map(str, sizes), *(f"{us:.1f}" for us in times)))
    head = ("B", "context", "queries", "KH", "G", "D", "S", "us", "model, us", "with descriptors", "roof, us")
    return Table("kernels on device 'neuron'", head, tuple(lines))


def measure(folder: Path) -> None:
    """Time what the model's table has, on the NeuronCores of this machine; one sentence where there are none."""
    if DEVICE not in dispatch.served():
        sentence = "no NeuronCore is in reach of TorchNeuron here; docs/neuron.md has the commands for a trn2 instance"
        raise SystemExit(f"benchmarks neuron: {sentence}")
    chip, here = generation(simulated=False), cores(simulated=False)
    rows = [row for row in read_csv(folder / "neuron.csv") if row.chip == chip and row.cores == here]
    table(rows).print(Console(width=160))
    print(f"measured on {chip}, {here} cores for a kernel")
