"""Decode on a NeuronCore through TorchNeuron: device "neuron", or the same kernels on NKI's simulator.

On a trn2 or trn3 instance run ``python examples/10_neuron.py``; elsewhere it says so in one sentence, unless
``TORCH_PAGED_NKI_SIM=1`` asks for the simulator (``PYTHONPATH=tests/nki_sim`` has one where the vendor's nki is not
installed). The outputs are compared with the reference in plain PyTorch. It has never run on hardware.
"""

import argparse
import sys

import torch
from torch import Tensor
from tqdm import tqdm

import torch_paged
from torch_paged import dispatch, reference
from torch_paged.cache import allocate_kv_cache

BATCH, QUERY_HEADS, KV_HEADS, HEAD_DIM = 2, 8, 2, 128
NUM_BLOCKS, BLOCK_SIZE, TABLE_WIDTH = 8, 16, 4


def step(
    query: Tensor, key: Tensor, kv_cache: Tensor, slot_mapping: Tensor, block_tables: Tensor, context_lens: Tensor
) -> Tensor:
    """Write one token of each sequence and attend to all that are cached."""
    torch_paged.reshape_and_cache(key, key, kv_cache, slot_mapping)
    return torch_paged.paged_attention(query, kv_cache, block_tables, context_lens)


@torch.no_grad()
def decode(device: str, steps: int) -> float:
    """Write and attend, token by token, on a device; return the largest difference to the reference."""
    generator = torch.Generator().manual_seed(0)
    allocated = allocate_kv_cache(
        NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=torch.float32, device=device, backend="neuron"
    )
    block_tables = torch.randperm(NUM_BLOCKS, generator=generator).to(torch.int32).view(BATCH, TABLE_WIDTH)
    expected_cache = allocated.kv_cache.cpu().clone()
    largest = 0.0
    for position in tqdm(range(steps), desc=device):
        slots = block_tables[:, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
        query = torch.randn(BATCH, QUERY_HEADS, HEAD_DIM, generator=generator)
        key = torch.randn(BATCH, KV_HEADS, HEAD_DIM, generator=generator)
        lengths = torch.full((BATCH,), position + 1, dtype=torch.int32)
        queries, keys, *indices = (x.to(device) for x in (query, key, slots, block_tables, lengths))
        out = step(queries, keys, allocated.kv_cache, *indices)
        reference.reshape_and_cache(key, key, expected_cache, slots)
        expected = reference.paged_attention(query, expected_cache, block_tables, lengths)
        largest = max(largest, (out.cpu() - expected).abs().max().item())
    return largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help=f"at most {TABLE_WIDTH * BLOCK_SIZE}")
    steps = parser.parse_args().steps
    devices = [device for device, backend in dispatch.served().items() if backend == "neuron" and device != "xla"]
    if not devices:
        print(f"no NeuronCore is in reach: {dispatch.no_backend('reshape_and_cache', 'neuron')}", file=sys.stderr)
        return 1
    difference = decode(devices[0], steps)
    where = "on NKI's simulator" if devices[0] == "cpu" else "on this machine's NeuronCore"
    print(f"{steps} steps {where}; largest difference to the reference: {difference:.1e}")
    return 0 if difference < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
