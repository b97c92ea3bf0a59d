"""Paged attention for decode: one query token per sequence.

The grid runs over the sequences. Blocks of pages stream from HBM into a ring of VMEM buffers (``pages``); while a block
is in flight, the one before it is multiplied: per kv head, the group's rows by the keys, one step of the online softmax
(``logits``), the weights by the values. Sums and maxima stay in VMEM scratch until the sequence ends.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_paged.backends.tpu.block_sizes import Chip, decode_blocks
from torch_paged.backends.tpu.logits import LANES, NOTHING, dot, modify, statistics, weigh
from torch_paged.backends.tpu.pages import STATE_WORDS, PageStream, hide_rows

SUBLANES = 8


def paged_attention(
    query: jax.Array,  # (B, H, D)
    kv_cache: jax.Array,  # (2, N, KH, S, DS)
    block_tables: jax.Array,  # (B, M)
    context_lens: jax.Array,  # (B,)
    *,
    softmax_scale: float,
    stats: bool = False,
    chip: Chip,
    interpret: Any = False,
) -> Any:
    """Return out (B, H, D), with ``stats`` also lse and max_logits (B, H) float32."""
    num_seqs, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, stored_dim = kv_cache.shape
    width = block_tables.shape[1]
    group = num_heads // num_kv_heads
    rows = -(-group // SUBLANES) * SUBLANES
    blocks = decode_blocks(chip, num_kv_heads, block_size, stored_dim, kv_cache.dtype.itemsize, width)
    padded = jnp.pad(
        query.reshape(num_seqs, num_kv_heads, group, head_dim),
        ((0, 0), (0, 0), (0, rows - group), (0, stored_dim - head_dim)),
    )
    kernel = functools.partial(_kernel, num_columns=width, head_dim=head_dim, softmax_scale=softmax_scale, stats=stats)

    def per_seq(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda seq, *_: (seq,) + (0,) * len(shape))

    tile = (num_kv_heads, rows, stored_dim)
    stat = (num_kv_heads, rows, LANES)
    out_shape = [jax.ShapeDtypeStruct((num_seqs, *tile), query.dtype)]
    out_specs = [per_seq(*tile)]
    if stats:
        out_shape += [jax.ShapeDtypeStruct((num_seqs, *stat), jnp.float32)] * 2
        out_specs += [per_seq(*stat)] * 2
    page = (2, num_kv_heads, block_size, stored_dim)
    results = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(num_seqs,),
            in_specs=[per_seq(*tile), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((blocks.buffers, blocks.pages, *page), kv_cache.dtype),
                pltpu.SemaphoreType.DMA((blocks.buffers,)),
                pltpu.SMEM((STATE_WORDS,), jnp.int32),
                pltpu.SMEM((blocks.buffers,), jnp.int32),
                pltpu.VMEM(stat, jnp.float32),
                pltpu.VMEM(stat, jnp.float32),
                pltpu.VMEM(tile, jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=chip.vmem_bytes * 3 // 4
        ),
        name="paged_attention_decode",
        interpret=interpret,
    )(context_lens, block_tables.reshape(-1), padded, kv_cache)
    out, *statistics_ = results
    out = out[:, :, :group, :head_dim].reshape(query.shape)
    if not stats:
        return out
    return (out, *(x[:, :, :group, 0].reshape(num_seqs, num_heads) for x in statistics_))


def _kernel(
    context_lens: Any,
    table: Any,
    query: Any,
    cache: Any,
    out: Any,
    *refs: Any,
    num_columns: int,
    head_dim: int,
    softmax_scale: float,
    stats: bool,
) -> None:
    stat_refs, refs = (refs[:2], refs[2:]) if stats else ((), refs)
    buffer, semaphores, state, unusable, maxima, totals, sums = refs
    seq = pl.program_id(0)
    _, pages_per_block, _, num_kv_heads, block_size, stored_dim = buffer.shape
    keys_per_block = pages_per_block * block_size

    def keys(item: Any) -> tuple[Any, Any]:
        """Return the span of the keys that a sequence sees."""
        end = jnp.clip(context_lens[item], 0, num_columns * block_size)
        return jnp.zeros_like(end), end

    def span(item: Any) -> tuple[Any, Any, Any]:
        begin, end = keys(item)
        return item, lax.div(begin, block_size), pl.cdiv(end, block_size)

    stream = PageStream((cache,), (buffer,), semaphores, table, state, unusable, span, num_columns, pl.num_programs(0))

    @pl.when(seq == 0)
    def open_stream() -> None:
        stream.open(0)

    maxima[...] = jnp.full(maxima.shape, NOTHING, jnp.float32)
    totals[...] = jnp.zeros(totals.shape, jnp.float32)
    sums[...] = jnp.zeros(sums.shape, jnp.float32)
    begin, end = keys(seq)
    _, first_page, end_page = span(seq)
    lane = lax.broadcasted_iota(jnp.int32, (1, stored_dim), 1)

    def block(i: Any, carry: Any) -> Any:
        stream.fetch()
        page = first_page + i * pages_per_block
        slot = stream.wait(jnp.minimum(end_page - page, pages_per_block))
        first_key = page * block_size

        @pl.when((first_key < begin) | (first_key + keys_per_block > end))
        def hide() -> None:
            hide_rows(buffer, slot, first_key, begin, end)

        position = first_key + lax.broadcasted_iota(jnp.int32, (1, keys_per_block), 1)
        seen = (position >= begin) & (position < end)
        for head in range(num_kv_heads):
            key = buffer[slot, :, 0, head].reshape(keys_per_block, stored_dim)
            value = buffer[slot, :, 1, head].reshape(keys_per_block, stored_dim)
            if head_dim < stored_dim:
                key = jnp.where(lane < head_dim, key, jnp.zeros_like(key))
            logits = modify(dot(query[0, head], key, (1, 1)), softmax_scale, 0.0)
            weights, total, factor, maxima[head] = weigh(logits, seen, maxima[head])
            totals[head] = totals[head] * factor + total
            sums[head] = sums[head] * factor + dot(weights.astype(value.dtype), value, (1, 0))
        return carry

    lax.fori_loop(0, pl.cdiv(end_page - first_page, pages_per_block), block, 0)
    for head in range(num_kv_heads):
        factor, lse, max_logits = statistics(totals[head][:, :1], maxima[head][:, :1])
        out[0, head] = (sums[head] * factor).astype(out.dtype)
        for ref, value in zip(stat_refs, (lse, max_logits), strict=False):
            ref[0, head] = jnp.broadcast_to(value, ref.shape[2:])
