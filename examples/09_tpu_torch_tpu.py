"""Decode on a TPU through torch_tpu: device "tpu", one compiled program for all steps.

On a TPU VM run ``python examples/09_tpu_torch_tpu.py``; without a TPU it says so. The outputs are compared with the C++
kernels on the CPU. It has never run on hardware.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import torch_paged
from torch_paged import dispatch
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
def decode(run: Callable[..., Tensor], device: str, steps: int) -> Tensor:
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
    return out.cpu()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help=f"at most {TABLE_WIDTH * BLOCK_SIZE}")
    steps = parser.parse_args().steps
    if "tpu" not in dispatch.served():
        print(f"no TPU is in reach of torch_tpu: {dispatch.no_backend('reshape_and_cache', 'tpu')}", file=sys.stderr)
        return 1
    expected = decode(step, "cpu", steps)
    out = decode(torch.compile(step, backend="tpu", fullgraph=True), "tpu", steps)
    difference = (out - expected).abs().max().item()
    print(f"{steps} steps; largest difference to the CPU's kernels: {difference:.1e}")
    return 0 if difference < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
