"""What the paged attention kernels for Neuron that this project grew from compute, and what they asked of their caller.

Restated in numpy from what they do, not from how: one flat list of context blocks, new tokens beside the cache, and one
mask over both. Source: vllm-project/vllm, vllm/attention/ops/nki_flash_attn.py (05eaa6ee), and aws-neuron/nki-samples,
contributed/neuron-team-kernels/flash_paged_attn_varlen (3b5a71f9), whose plan changes the order of work only.

Dimensions: H query heads, KH key heads, D head dim, T new tokens of all sequences, N blocks of S tokens in the cache,
M blocks of context in the flat table, C = M * S.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MASKED = -9984.0
"""The logit of what a row does not attend to: large, but no infinity."""
PARTITIONS = 128


@dataclass(frozen=True)
class Case:
    """A batch of prefills, then decodes; `group` query heads share a key head, `tile_tokens` of context are a tile."""

    prefills: int
    decodes: int
    block_size: int
    tile_tokens: int
    heads: int
    group: int
    head_dim: int


PUBLISHED = (
    Case(1, 199, 1, 512, 4, 2, 8),
    Case(4, 12, 32, 2048, 32, 8, 64),
    Case(4, 12, 32, 2048, 16, 4, 32),
    Case(4, 12, 256, 8192, 8, 1, 128),
    Case(4, 12, 256, 8192, 64, 8, 64),
    Case(2, 24, 64, 4096, 12, 4, 96),
    Case(8, 8, 128, 2048, 24, 2, 48),
    Case(1, 128, 16, 1024, 4, 2, 16),
    Case(16, 4, 8, 1024, 4, 2, 128),
    Case(4, 12, 32, 2048, 16, 1, 32),
    Case(4, 12, 32, 2048, 16, 16, 32),
)
"""The cases of the old kernel's own test (vllm, tests/neuron/1_core/test_prefix_prefill.py)."""


@dataclass(frozen=True)
class Batch:
    """Sequences: lengths and tables, new tokens (T, H | KH, D), and the cache (2, N, KH, S, D) with their context."""

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: Array
    query: Array
    key: Array
    value: Array
    kv_cache: Array


def draw(case: Case, seed: int = 0, most_context: int = 1024, most_queries: int = 512) -> Batch:
    """Draw a batch: contexts of 32 tokens on, prefills of 16 on, blocks in no order, block 0 being nobody's."""
    rng = np.random.default_rng(seed)
    sequences, key_heads = case.prefills + case.decodes, case.heads // case.group
    queries = (*rng.integers(16, most_queries + 1, case.prefills).tolist(), *[1] * case.decodes)
    contexts = tuple(rng.integers(32, most_context + 1, sequences).tolist())
    blocks = [-(-length // case.block_size) for length in contexts]
    ids = iter((rng.permutation(sum(blocks)) + 1).tolist())
    tables = np.full((sequences, max(blocks)), -1, np.int32)
    for row, count in zip(tables, blocks, strict=True):
        row[:count] = [next(ids) for _ in range(count)]
    tokens = [(sum(queries), heads, case.head_dim) for heads in (case.heads, key_heads, key_heads)]
    query, key, value = (rng.standard_normal(shape).astype(np.float32) for shape in tokens)
    cache = rng.standard_normal((2, sum(blocks) + 1, key_heads, case.block_size, case.head_dim)).astype(np.float32)
    return Batch(queries, contexts, tables, query, key, value, cache)


def padded(batch: Batch, tokens: int) -> tuple[Array, Array, Array]:
    """Return query (1, H, D, T), key (1, KH, D, T) and value (1, KH, T, D), padded with zeros to T tokens."""
    more = ((0, tokens - len(batch.query)), (0, 0), (0, 0))
    query, key, value = (np.pad(x, more) for x in (batch.query, batch.key, batch.value))
    return query.transpose(1, 2, 0)[None], key.transpose(1, 2, 0)[None], value.transpose(1, 0, 2)[None]


@dataclass(frozen=True)
class Call:
    """The arguments that a caller makes of lengths and tables.

    block_table: (M,) int32, the context blocks of all sequences, padded with block 0 to whole tiles, one tile at least.
    mask: (T, C + T) bool, what each new token attends to: context first, then new tokens.
    """

    block_table: Array
    mask: Array


def plan(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Array,  # (B, blocks) int32
    block_size: int,
    tile_tokens: int = 2048,
    num_tokens: int | None = None,
) -> Call:
    """Return the flat table and the mask of a batch: every token sees its sequence's context and is causal beyond it.

    Args:
        context_lens: tokens of each sequence in the cache, the new ones not counted.
        tile_tokens: tokens of a tile of context; the table is filled up to whole tiles.
        num_tokens: T with padding rows, which attend to nothing.
    """
    blocks_of = [-(-length // block_size) for length in context_lens]
    flat = [int(block) for row, count in zip(block_tables, blocks_of, strict=True) for block in row[:count]]
    tile_blocks = tile_tokens // block_size
    flat += [0] * (max(-(-len(flat) // tile_blocks), 1) * tile_blocks - len(flat))
    total = num_tokens if num_tokens is not None else sum(query_lens)
    context = len(flat) * block_size
    mask = np.zeros((total, context + total), bool)
    row = column = 0
    for query_len, context_len, blocks in zip(query_lens, context_lens, blocks_of, strict=True):
        mask[row : row + query_len, column : column + context_len] = True
        causal = np.tri(query_len, dtype=bool)
        mask[row : row + query_len, context + row : context + row + query_len] = causal
        row += query_len
        column += blocks * block_size
    return Call(np.array(flat, np.int32), mask)


def reorder(mask: Array, tile_tokens: int, block_size: int) -> Array:
    """Return a mask with the columns of the context in the order in which a kernel's tile has its tokens.

    A tile of context is loaded as (load, partition, slot) and consumed as (load, slot, partition). The result of
    attention does not depend on it: the kernel's keys and values are in the same order.
    """
    context = mask.shape[1] - len(mask)
    slots = tile_tokens // max(PARTITIONS, tile_tokens // block_size)
    tiles = mask[:, :context].reshape(len(mask), context // tile_tokens, -1, PARTITIONS, slots)
    return np.concatenate([tiles.swapaxes(3, 4).reshape(len(mask), context), mask[:, context:]], 1)


def attention(
    query: Array,  # (1, H, D, T)
    key: Array,  # (1, KH, D, T), new tokens
    value: Array,  # (1, KH, T, D), new tokens
    kv_cache: Array,  # (2, N, KH, S, D)
    call: Call,
    scale: float | None = None,
) -> tuple[Array, Array]:
    """Attend from new tokens to their context in the cache and to each other.

    Returns: (1, H, T, D) and the logarithm of the sum of exponentials, (1, H, T), both float64. A row that attends to
        nothing gets the mean of all values and MASKED + log(C + T).
    """
    heads, head_dim = query.shape[1:3]
    key_heads = kv_cache.shape[2]
    caches = kv_cache.astype(np.float64)[:, call.block_table]  # (2, M, KH, S, D)
    context = caches.transpose(0, 2, 1, 3, 4).reshape(2, key_heads, -1, head_dim)
    keys = np.concatenate([context[0], key[0].astype(np.float64).transpose(0, 2, 1)], 1)  # (KH, C + T, D)
    values = np.concatenate([context[1], value[0].astype(np.float64)], 1)
    of_head = np.arange(heads) // (heads // key_heads)
    scaled = query[0].astype(np.float64) * (head_dim**-0.5 if scale is None else scale)
    logits = np.where(call.mask, np.einsum("hdt,hcd->htc", scaled, keys[of_head]), MASKED)
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("htc,hcd->htd", weights / total, values[of_head])
    return out[None], (top + np.log(total))[None, :, :, 0]


def write_new_tokens(key: Array, value: Array, kv_cache: Array, slots: Array) -> None:
    """Put keys and values (T, KH, D) into a cache (2, N, KH, S, D) at slots (T,) that are not negative."""
    block_size = kv_cache.shape[3]
    for index, tokens in enumerate((key, value)):
        kv_cache[index, slots // block_size, :, slots % block_size] = tokens
