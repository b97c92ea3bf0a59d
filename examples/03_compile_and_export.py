"""Compile, export and package a decode step that writes into the cache and attends; compare all of them with eager.

Run ``python examples/03_compile_and_export.py``; with ``--out step.pt2`` the AOTInductor package is kept.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import torch_paged
from torch_paged.cache import allocate_kv_cache

BATCH, QUERY_HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 32
NUM_BLOCKS, BLOCK_SIZE, TABLE_WIDTH = 64, 16, 8
STEPS = 40


class DecodeStep(nn.Module):
    """One attention layer's decode step: project, write the new key and value to their slots, attend, project back."""

    def __init__(self) -> None:
        super().__init__()
        width = QUERY_HEADS * HEAD_DIM
        self.qkv = nn.Linear(width, (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(width, width)

    def forward(
        self, hidden: Tensor, kv_cache: Tensor, slot_mapping: Tensor, block_tables: Tensor, context_lens: Tensor
    ) -> Tensor:
        heads = self.qkv(hidden).view(-1, QUERY_HEADS + 2 * KV_HEADS, HEAD_DIM)
        query, key, value = heads.split([QUERY_HEADS, KV_HEADS, KV_HEADS], dim=1)
        torch_paged.reshape_and_cache(key, value, kv_cache, slot_mapping)
        attended = torch_paged.paged_attention(query, kv_cache, block_tables, context_lens)
        return self.out(attended.flatten(1))


def decode(step: Callable[..., Tensor], name: str) -> Tensor:
    """Run the same STEPS steps on a fresh cache and return the last output, ``(B, width)``."""
    kv_cache = allocate_kv_cache(NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=torch.float32).kv_cache
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randperm(NUM_BLOCKS, generator=generator)[: BATCH * TABLE_WIDTH]
    block_tables = blocks.view(BATCH, TABLE_WIDTH).to(torch.int32)
    hidden = torch.randn(BATCH, QUERY_HEADS * HEAD_DIM, generator=generator)
    for position in tqdm(range(STEPS), desc=name):
        slots = block_tables[:, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
        context_lens = torch.full((BATCH,), position + 1, dtype=torch.int32)
        hidden = step(hidden, kv_cache, slots, block_tables, context_lens)
    return hidden


def example_inputs() -> tuple[Tensor, ...]:
    """Return inputs of the right shapes, for the exporter."""
    kv_cache = torch.zeros(2, NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    block_tables = torch.arange(BATCH * TABLE_WIDTH, dtype=torch.int32).view(BATCH, TABLE_WIDTH)
    return (
        torch.randn(BATCH, QUERY_HEADS * HEAD_DIM),
        kv_cache,
        block_tables[:, 0].long() * BLOCK_SIZE,
        block_tables,
        torch.ones(BATCH, dtype=torch.int32),
    )


@torch.no_grad()
def compare_all(package: Path) -> bool:
    """Run the step eagerly, compiled, exported and packaged, and print how far each is from eager."""
    torch.manual_seed(0)
    step = DecodeStep()
    expected = decode(step, "eager")
    exported = torch.export.export(step, example_inputs())
    torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    ways: dict[str, Callable[..., Tensor]] = {
        "compiled": torch.compile(step, fullgraph=True),
        "exported": exported.module(),
        "packaged": torch._inductor.aoti_load_package(str(package)),
    }
    good = True
    for name, way in ways.items():
        actual = decode(way, name)
        difference = float((actual - expected).abs().max())
        good &= torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)
        print(f"{name}: largest difference to eager after {STEPS} steps {difference:.1e}")
    print(f"{package}: {package.stat().st_size:,} bytes")
    return good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to keep the package, a .pt2 file")
    args = parser.parse_args(argv)
    torch._dynamo.config.error_on_recompile = True
    with tempfile.TemporaryDirectory() as folder:
        return 0 if compare_all(args.out or Path(folder) / "decode_step.pt2") else 1


if __name__ == "__main__":
    raise SystemExit(main())
