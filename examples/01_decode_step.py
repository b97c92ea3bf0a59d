"""One decode step with the bare ops: allocate a cache, write keys and values into it, attend, compare with SDPA.

Run ``python examples/01_decode_step.py``.
"""

import torch
from torch import Tensor

import torch_paged
from torch_paged.cache import allocate_kv_cache

NUM_BLOCKS, BLOCK_SIZE = 32, 16
QUERY_HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
LENGTHS = [5, 33, 100]  # tokens of each sequence, the new one included
UNUSED_ENTRY = -1


def hand_out_blocks() -> Tensor:
    """Give each sequence blocks from anywhere in the pool, as an int32 ``(B, M)`` table."""
    free = torch.randperm(NUM_BLOCKS).tolist()
    width = -(-max(LENGTHS) // BLOCK_SIZE)
    rows = []
    for length in LENGTHS:
        used = -(-length // BLOCK_SIZE)
        rows.append([free.pop() for _ in range(used)] + [UNUSED_ENTRY] * (width - used))
    return torch.tensor(rows, dtype=torch.int32)


def slots_of(block_table: Tensor, length: int) -> Tensor:
    """Return where the tokens of one sequence go: ``block_id * BLOCK_SIZE + offset``."""
    positions = torch.arange(length)
    return block_table[positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE


def main() -> int:
    torch.manual_seed(0)
    kv_cache = allocate_kv_cache(NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=torch.float32).kv_cache
    block_tables = hand_out_blocks()
    context_lens = torch.tensor(LENGTHS, dtype=torch.int32)
    keys = [torch.randn(length, KV_HEADS, HEAD_DIM) for length in LENGTHS]
    values = [torch.randn(length, KV_HEADS, HEAD_DIM) for length in LENGTHS]
    query = torch.randn(len(LENGTHS), QUERY_HEADS, HEAD_DIM)

    slot_mapping = torch.cat([slots_of(table, length) for table, length in zip(block_tables, LENGTHS, strict=True)])
    torch.ops.paged.reshape_and_cache(torch.cat(keys), torch.cat(values), kv_cache, slot_mapping)
    out = torch.ops.paged.paged_attention(query, kv_cache, block_tables, context_lens)

    print(f"cache {tuple(kv_cache.shape)}, block tables:\n{block_tables}")
    worst = 0.0
    for seq, (key, value) in enumerate(zip(keys, values, strict=True)):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[seq, :, None], key.transpose(0, 1), value.transpose(0, 1), enable_gqa=True
        )
        worst = max(worst, float((out[seq] - expected[:, 0]).abs().max()))
    print(f"largest difference to scaled_dot_product_attention: {worst:.1e}")
    print(
        torch_paged.explain(
            "paged_attention", query=query, kv_cache=kv_cache, block_tables=block_tables, context_lens=context_lens
        )
    )
    return 0 if worst < 1e-5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
