"""Other ways to decode over a paged cache in PyTorch, each in the form that its users call.

Each function takes the arguments of ``paged_attention`` for every pool, prepares what the way has ready before a step
(its own cache layout, masks, index tensors) and returns the call that is timed. Their caches get the pages ours has.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.experimental._paged_attention import PagedAttention
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.generation.continuous_batching.utils import build_attention_mask
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import torch_paged
from benchmarks.machine import huge_copy, huge_empty
from benchmarks.timing import Call

Pools = list[dict[str, Any]]


def contiguous_sdpa(pools: Pools) -> Call:
    """SDPA on keys that lie contiguous for each sequence, the group folded into the query: no paging at all."""
    lengths = pools[0]["context_lens"].tolist()
    heads = pools[0]["query"].size(1)
    dense = []
    for arguments in pools:
        kv_cache = arguments["kv_cache"]
        sides, _, kv_heads, _, head_dim = kv_cache.shape
        memory = huge_empty((sides * sum(lengths) * kv_heads * head_dim,), kv_cache.dtype)
        sequences, begin = [], 0
        for seq, length in enumerate(lengths):
            one = slice(seq, seq + 1)
            pair = []
            for rows in torch_paged.gather_cache(
                kv_cache, arguments["block_tables"][one], arguments["context_lens"][one], length
            ):
                pair.append(memory[begin : begin + rows.numel()].view(rows.shape).copy_(rows))
                begin += rows.numel()
            sequences.append((arguments["query"][seq].view(1, kv_heads, heads // kv_heads, head_dim), *pair))
        dense.append(sequences)

    def call(pool: int) -> Tensor:
        return torch.cat([scaled_dot_product_attention(*sequence) for sequence in dense[pool]])

    return call


def gather_sdpa(pools: Pools) -> Call:
    """Gather the blocks of all sequences into one padded rectangle, then SDPA with a mask."""
    lengths, tables = pools[0]["context_lens"], pools[0]["block_tables"]
    _, num_blocks, kv_heads, block_size, head_dim = pools[0]["kv_cache"].shape
    columns = -(-int(lengths.max()) // block_size)
    used = tables[:, :columns].clamp(0, num_blocks - 1)
    mask = (torch.arange(columns * block_size) < lengths[:, None])[:, None, None]  # (B, 1, 1, C)

    def call(pool: int) -> Tensor:
        blocks = pools[pool]["kv_cache"][:, used]  # (2, B, M, KH, S, D)
        key, value = blocks.transpose(2, 3).reshape(2, len(lengths), kv_heads, columns * block_size, head_dim)
        query = pools[pool]["query"][:, :, None]  # (B, H, 1, D)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    return call


def transformers_paged(pools: Pools) -> Call:
    """What transformers' continuous batching does with SDPA: all tokens of all sequences gathered, one dense mask.

    Its index tensors and the mask are made outside of the call, and the new token is already in the cache.
    """
    query = pools[0]["query"]
    lengths = pools[0]["context_lens"].tolist()
    kv_heads = pools[0]["kv_cache"].size(2)
    read_index = _slots(pools[0])
    caches = [
        huge_copy(arguments["kv_cache"].transpose(2, 3)).flatten(1, 2) for arguments in pools
    ]  # (2, N * S, KH, D)
    mask = torch.full((1, 1, len(lengths), sum(lengths)), torch.finfo(query.dtype).min, dtype=query.dtype)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    build_attention_mask(mask, list(range(len(lengths) + 1)), starts)
    module: Any = SimpleNamespace(num_key_value_groups=query.size(1) // kv_heads, is_causal=False)

    def call(pool: int) -> Tensor:
        key, value = (
            torch.index_select(side, 0, read_index).transpose(0, 1).unsqueeze(0) for side in caches[pool]
        )  # (1, KH, all tokens, D)
        rows = pools[pool]["query"].transpose(0, 1).unsqueeze(0)  # (1, H, B, D)
        return sdpa_attention_forward(module, rows, key, value, mask)[0]

    return call


def flex_paged(pools: Pools) -> Call:
    """``flex_attention``, compiled for these sizes, with the page table of PyTorch's experimental PagedAttention."""
    lengths = pools[0]["context_lens"]
    tables = pools[0]["block_tables"]
    _, num_blocks, kv_heads, block_size, head_dim = pools[0]["kv_cache"].shape
    pages = PagedAttention(num_blocks, block_size, len(lengths), device="cpu")
    for seq, length in enumerate(lengths.tolist()):
        used = -(-length // block_size)
        pages.page_table[seq, :used] = tables[seq, :used].long()
        pages.physical_to_logical[seq, pages.page_table[seq, :used]] = torch.arange(used)

    def seen(batch: Tensor, _head: Tensor, _row: Tensor, column: Tensor) -> Tensor:
        return column < lengths[batch]

    columns = -(-int(lengths.max()) // block_size) * block_size
    logical = create_block_mask(seen, len(lengths), 1, 1, columns, device="cpu", BLOCK_SIZE=(1, block_size))
    mask = pages.convert_logical_block_mask(logical)
    caches = [
        huge_copy(arguments["kv_cache"].transpose(1, 2)).reshape(2, 1, kv_heads, num_blocks * block_size, head_dim)
        for arguments in pools
    ]
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(pool: int) -> Any:
        key, value = caches[pool]
        return compiled(pools[pool]["query"][:, :, None], key, value, block_mask=mask, enable_gqa=True)

    call(0)
    return call


PEERS: dict[str, Callable[[Pools], Call]] = {
    "contiguous SDPA": contiguous_sdpa,
    "gather + SDPA": gather_sdpa,
    "transformers paged": transformers_paged,
    "flex_attention": flex_paged,
}


def _slots(arguments: dict[str, Any]) -> Tensor:
    """Return the slot of every token of every sequence, in order."""
    size = arguments["kv_cache"].size(3)
    slots = []
    for table, length in zip(arguments["block_tables"].long(), arguments["context_lens"].tolist(), strict=True):
        tokens = torch.arange(length)
        slots.append(table[tokens // size] * size + tokens % size)
    return torch.cat(slots)
