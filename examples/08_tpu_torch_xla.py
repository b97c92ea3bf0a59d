"""Decode on a TPU through torch_xla: one compiled program for all steps, the cache written in place.

On a TPU VM run ``python examples/08_tpu_torch_xla.py``. Without a TPU, ``PJRT_DEVICE=CPU`` interprets the same kernels.
The outputs are compared with the C++ kernels on the CPU.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import torch_paged
from torch_paged.cache import allocate_kv_cache

BATCH, QUERY_HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 128
NUM_BLOCKS, BLOCK_SIZE, TABLE_WIDTH = 16, 16, 4


def step(
    query: Tensor, key: Tensor, kv_cache: Tensor, slot_mapping: Tensor, block_tables: Tensor, context_lens: Tensor
) -> Tensor:
    """Write one token of each sequence and attend to all that are cached."""
    torch_paged.reshape_and_cache(key, key, kv_cache, slot_mapping)
    return torch_paged.paged_attention(query, kv_cache, block_tables, context_lens)


@torch.no_grad()
def decode(run: Callable[..., Tensor], device: str, steps: int, finish: Callable[[], None]) -> Tensor:
    """Run the same steps on a fresh cache on a device and return the last output, (B, H, D), on the CPU."""
    generator = torch.Generator().manual_seed(0)
    allocated = allocate_kv_cache(
        NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=torch.float32, device=device, backend="tpu"
    )
    block_tables = torch.randperm(NUM_BLOCKS, generator=generator).to(torch.int32).view(BATCH, TABLE_WIDTH)
    out = torch.zeros(0)
    for position in tqdm(range(steps), desc=device):
        slots = block_tables[:, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
        query = torch.randn(BATCH, QUERY_HEADS, HEAD_DIM, generator=generator)
        key = torch.randn(BATCH, KV_HEADS, HEAD_DIM, generator=generator)
        lengths = torch.full((BATCH,), position + 1, dtype=torch.int32)
        inputs = [x.to(device) for x in (query, key, slots, block_tables, lengths)]
        out = run(*inputs[:2], allocated.kv_cache, *inputs[2:])
        finish()
    return out.cpu()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help=f"at most {TABLE_WIDTH * BLOCK_SIZE}")
    steps = parser.parse_args().steps
    if importlib.util.find_spec("torch_xla") is None:
        print("torch_xla is not installed: see docs/tpu.md for the install commands", file=sys.stderr)
        return 1
    import torch_xla
    from torch_xla.debug import metrics

    compiled = torch.compile(step, backend="openxla", fullgraph=True)
    expected = decode(step, "cpu", steps, lambda: None)
    out = decode(compiled, "xla", steps, torch_xla.sync)
    programs = metrics.counter_value("UncachedCompile") or 0
    difference = (out - expected).abs().max().item()
    kind = torch_xla._XLAC._xla_device_kind("xla:0")
    print(f"{steps} steps on {kind}: {programs} compilations, the empty cache's included")
    print(f"largest difference to the CPU's kernels: {difference:.1e}")
    return 0 if difference < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
