"""Attention of packed ragged queries to keys in the cache, beside it, or both.

A sequence with one query and its keys in the cache is left to ``decode``; a batch of such sequences needs no more. The
queries of any other are cut into tiles of tokens (``tiles``). The queries of a tile, all heads, are copied to
VMEM and laid out per kv head as (G * tokens, D); blocks of keys stream past them (``pages``), cached ones first, then
the new ones, which a first step lays out as pages of their own. Each row sees an interval of keys. Only pages with a
key in some row's interval are read. A block is taken in chunks: those that no row sees are left out, those that lie in
the intervals of all rows need no mask. A tile writes its own rows and nothing else.

The page table and the fields of all tiles lie in scalar memory; where they do not fit, parts of the sequences take a
kernel each. Where a tile of all kv heads does not fit into VMEM, the kernel goes through the tiles once for each part
of the heads.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_paged.backends.tpu import tiles as t
from torch_paged.backends.tpu.block_sizes import LANES, SUBLANES, Chip, Page, VarlenBlocks, power_of_two, varlen_blocks
from torch_paged.backends.tpu.decode import paged_attention
from torch_paged.backends.tpu.logits import heads_of_mask
from torch_paged.backends.tpu.pages import STATE_WORDS, flat_table
from torch_paged.backends.tpu.varlen_kernel import Static, run_tiles

NEW_PAGE = 128
"""Tokens of a page of new keys."""
SMEM_WORDS = 15 * 2**14
"""What of SMEM (1 MiB) the page table and the fields of the tiles may take; more sequences take several kernels."""


def flash_attn_varlen(
    query: jax.Array,  # (T, H, D)
    key: Any,  # (Tk, KH, D) or None
    value: Any,  # (Tk, KH, DV) or None
    cu_seqlens_q: jax.Array,  # (B + 1,)
    cu_seqlens_k: Any,  # (B + 1,) or None
    kv_cache: Any,  # (2, N, KH, S, DS) or None
    block_tables: Any,  # (B, M) or None
    context_lens: Any,  # (B,) or None
    kv_scales: Any = None,  # (2,), (2, KH) or (2, N, KH, S)
    sinks: jax.Array | None = None,  # (H,)
    alibi_slopes: jax.Array | None = None,  # (H,)
    attn_mask: jax.Array | None = None,  # (T, C), (KH, T, C) or (H, T, C)
    query_positions: jax.Array | None = None,  # (T,)
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    stats: bool = False,
    chip: Chip,
    interpret: Any = False,
) -> Any:
    """Return out (T, H, value_dim or DV or D), with ``stats`` also lse and max_logits (T, H) float32."""
    num_tokens, num_heads, head_dim = query.shape
    if value_dim is None:
        value_dim = head_dim if value is None else value.shape[-1]
    begins = t.bounds(cu_seqlens_q, num_tokens)
    if key is not None and not key.shape[0]:
        key = value = cu_seqlens_k = None
    if kv_cache is not None and not (kv_cache.shape[1] and block_tables.shape[1]):
        kv_cache = kv_scales = block_tables = context_lens = None
    if attn_mask is not None and not attn_mask.shape[-1]:
        attn_mask = jnp.zeros((*attn_mask.shape[:-1], 1), jnp.bool_)
    nothing = jnp.full((num_tokens, num_heads), -jnp.inf, jnp.float32)
    results = [jnp.zeros((num_tokens, num_heads, value_dim), query.dtype), nothing, nothing]
    if not num_tokens or begins.shape[0] == 1 or (key is None and kv_cache is None):
        if sinks is not None:
            real = jnp.arange(num_tokens, dtype=jnp.int32)[:, None] < begins[-1]
            results[1] = jnp.where(real, sinks.astype(jnp.float32), -jnp.inf)
        return tuple(results) if stats else results[0]

    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "logits_soft_cap": logits_soft_cap,
        "sliding_window": sliding_window,
        "attention_chunk": attention_chunk,
        "value_dim": value_dim,
        "stats": stats,
        "chip": chip,
        "interpret": interpret,
    }
    single = None
    if key is None and query_positions is None:
        single = jnp.diff(begins) == 1
    if single is None or max_seqlen_q > 1:
        found = _attend_tiles(
            *(query, key, value, begins, cu_seqlens_k, kv_cache, block_tables, context_lens, kv_scales),
            *(sinks, alibi_slopes, attn_mask, query_positions, single),
            max_seqlen_q=max_seqlen_q,
            causal=causal,
            **options,
        )
        results = list(found) if stats else [found]
    if single is not None:
        row = jnp.minimum(begins[:-1], num_tokens - 1)
        mask = None if attn_mask is None else jnp.take(attn_mask, row, axis=-2)
        lens = jnp.where(single, context_lens, 0)
        found = paged_attention(
            *(query[row], kv_cache, block_tables, lens, kv_scales, sinks, alibi_slopes, mask), **options
        )
        place = jnp.where(single, row, num_tokens)
        rows = found if stats else (found,)
        results = [old.at[place].set(new, mode="drop") for old, new in zip(results, rows, strict=False)]
    return tuple(results) if stats else results[0]


def _attend_tiles(
    query: jax.Array,
    key: Any,
    value: Any,
    begins: jax.Array,  # (B + 1,)
    cu_seqlens_k: Any,
    kv_cache: Any,
    block_tables: Any,
    context_lens: Any,
    kv_scales: Any,
    sinks: jax.Array | None,
    alibi_slopes: jax.Array | None,
    attn_mask: jax.Array | None,
    query_positions: jax.Array | None,
    skipped: jax.Array | None,  # (B,) bool
    *,
    max_seqlen_q: int,
    value_dim: int,
    chip: Chip,
    **options: Any,
) -> Any:
    """Return what ``flash_attn_varlen`` does, but anything in the rows of sequences that are skipped."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[2] if key is None else key.shape[1]
    width = -(-head_dim // LANES) * LANES
    columns = 0 if block_tables is None else block_tables.shape[1]
    pages = []
    if kv_cache is not None:
        pages.append(Page(num_kv_heads, kv_cache.shape[3], kv_cache.shape[4], kv_cache.dtype.itemsize))
    if key is not None:
        pages.append(Page(num_kv_heads, NEW_PAGE, width, key.dtype.itemsize))
    blocks = varlen_blocks(
        chip,
        pages,
        kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        lanes=max(width, -(-value_dim // LANES) * LANES),
        itemsize=query.dtype.itemsize,
        mask_heads=heads_of_mask(attn_mask),
        max_seqlen_q=max_seqlen_q,
    )
    tile_words = t.TILE_FIELDS + len(pages) * t.SOURCE_FIELDS
    num_tiles = max(num_tokens, blocks.tokens) // blocks.tokens + 1
    seqs_at_a_time = (SMEM_WORDS - num_tiles * tile_words) // (columns + tile_words)
    if seqs_at_a_time < 1:
        raise NotImplementedError(
            f"flash_attn_varlen: backend 'tpu' does not support {num_tokens} query tokens beside block tables of "
            f"{columns} columns ({SMEM_WORDS} words of scalar memory); pass fewer tokens at a time"
        )
    results: Any = None
    for first in range(0, begins.shape[0] - 1, seqs_at_a_time):
        part, bounds = slice(first, first + seqs_at_a_time), slice(first, first + seqs_at_a_time + 1)
        new_bounds = None if key is None else cu_seqlens_k[bounds]
        tables, contexts = (None, None) if kv_cache is None else (block_tables[part], context_lens[part])
        found = _attend_part(
            *(query, key, value, begins[bounds], new_bounds, kv_cache, tables, contexts, kv_scales),
            *(sinks, alibi_slopes, attn_mask, query_positions, None if skipped is None else skipped[part]),
            blocks=blocks,
            value_dim=value_dim,
            chip=chip,
            **options,
        )
        if results is None:
            results = found
        else:
            before = jnp.arange(num_tokens, dtype=jnp.int32) < begins[first]
            results = jax.tree.map(partial(_rows, before), results, found)
    return results


def _attend_part(
    query: jax.Array,
    key: Any,
    value: Any,
    begins: jax.Array,  # (B + 1,)
    cu_seqlens_k: Any,
    kv_cache: Any,
    block_tables: Any,
    context_lens: Any,
    kv_scales: Any,
    sinks: jax.Array | None,
    alibi_slopes: jax.Array | None,
    attn_mask: jax.Array | None,
    query_positions: jax.Array | None,
    skipped: jax.Array | None,  # (B,) bool
    *,
    blocks: VarlenBlocks,
    softmax_scale: float,
    logits_soft_cap: float,
    causal: bool,
    sliding_window: int | None,
    attention_chunk: int | None,
    value_dim: int,
    stats: bool,
    chip: Chip,
    interpret: Any,
) -> Any:
    """Return what ``flash_attn_varlen`` does by one kernel, but anything in rows of sequences that are not its own."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[2] if key is None else key.shape[1]
    num_seqs = begins.shape[0] - 1
    group = num_heads // num_kv_heads
    width, value_width = -(-head_dim // LANES) * LANES, -(-value_dim // LANES) * LANES
    mask_heads = heads_of_mask(attn_mask)
    table_columns = 0 if block_tables is None else block_tables.shape[1]
    tokens, parts = blocks.tokens, blocks.parts
    padded_tokens = max(num_tokens, tokens)
    heads, kv_heads = num_heads // parts, num_kv_heads // parts
    padded_heads = -(-heads // SUBLANES) * SUBLANES
    padding = ((0, padded_tokens - num_tokens), (0, 0), (0, padded_heads - heads), (0, width - head_dim))
    query = jnp.pad(query.reshape(num_tokens, parts, heads, head_dim), padding).swapaxes(0, 1)

    seqs = jnp.arange(num_seqs, dtype=jnp.int32)
    sources, streams = [], []
    contexts = jnp.zeros((num_seqs,), jnp.int32)
    operands: dict[str, Any] = {}
    if kv_cache is not None:
        contexts = jnp.clip(context_lens, 0, block_tables.shape[1] * kv_cache.shape[3])
        sources.append(t.KeySource(seqs, contexts, jnp.zeros_like(contexts)))
        streams.append("cache")
        operands["cache"] = kv_cache
    if key is not None:
        new_begins = t.bounds(cu_seqlens_k, key.shape[0])
        operands["new"], first_pages = _lay_out_new(key, value, new_begins, width)
        sources.append(t.KeySource(first_pages, jnp.diff(new_begins), contexts))
        streams.append("new")
    if query_positions is not None:
        query_positions = jnp.pad(query_positions, (0, padded_tokens - num_tokens))
    tiles = t.cut(
        begins,
        sources,
        query_positions,
        skipped,
        num_tokens=padded_tokens,
        size=tokens,
        causal=causal,
        window=sliding_window,
        chunk=attention_chunk,
    )
    listed = query_positions is not None or attention_chunk is not None
    static = Static(
        blocks=blocks,
        width=tiles.width,
        sources=tuple(streams),
        group=group,
        head_dim=head_dim,
        softmax_scale=softmax_scale,
        logits_soft_cap=logits_soft_cap,
        causal=causal,
        window=None if sliding_window is None else min(sliding_window, t.FAR),
        listed=listed,
        mask_heads=mask_heads,
        table_columns=table_columns,
        scales_rank=0 if kv_scales is None else kv_scales.ndim,
        stats=stats,
        interpreted=bool(interpret),
    )
    rows = group * tokens
    num_tiles = tiles.fields.shape[0] // tiles.width
    float32, anywhere = jnp.float32, pl.BlockSpec(memory_space=pl.ANY)
    operands["query"] = query
    if static.scales_rank == 4:
        operands["token_scales"] = _scale_blocks(kv_scales, block_tables, blocks.keys, parts)
    if attn_mask is not None:
        mask = attn_mask if attn_mask.ndim == 3 else attn_mask[None]
        for i, name in enumerate(streams):
            operands[f"{name}_mask"] = t.mask_words(mask, tiles, i, blocks.keys)
    if listed:
        operands["listed"] = jnp.broadcast_to(jnp.swapaxes(tiles.rows, 0, 1)[..., None], (num_tiles, 3, tokens, LANES))
    if not interpret:  # else XLA may copy a whole cache to VMEM first
        operands = {name: pltpu.with_memory_space_constraint(x, pltpu.MemorySpace.HBM) for name, x in operands.items()}
    specs = dict.fromkeys(operands, anywhere)
    scalars = {}
    for name, values in (("sinks", sinks), ("slopes", alibi_slopes)):
        if values is not None:
            scalars[name] = values.astype(float32)
    if 0 < static.scales_rank < 4:
        scalars["scales"] = jnp.broadcast_to(kv_scales.reshape(2, -1), (2, num_kv_heads)).reshape(-1)
    operands |= scalars
    specs |= dict.fromkeys(scalars, pl.BlockSpec(memory_space=pltpu.MemorySpace.SMEM))
    prefetched = {"ends": t.shares(tiles, len(streams), chip.cores), "fields": tiles.fields}
    if block_tables is not None:
        prefetched["table"] = flat_table(block_tables, kv_cache.shape[1])

    outputs = {"out": jax.ShapeDtypeStruct((parts, padded_tokens, padded_heads, value_width), query.dtype)}
    scratch: dict[str, Any] = {
        "query_buffer": pltpu.VMEM((2, tokens, padded_heads, width), query.dtype),
        "query_rows": pltpu.VMEM((kv_heads, rows, width), query.dtype),
        "interleaved": pltpu.VMEM((max(width, value_width) // LANES * tokens * padded_heads, LANES), float32),
        "out_buffer": pltpu.VMEM((2, tokens, padded_heads, value_width), query.dtype),
        "maxima": pltpu.VMEM((kv_heads, rows, LANES), float32),
        "totals": pltpu.VMEM((kv_heads, rows, LANES), float32),
        "sums": pltpu.VMEM((kv_heads, rows, value_width), float32),
        "logits": pltpu.VMEM((2, rows, blocks.chunk), float32),
        "weights": pltpu.VMEM((2, rows, blocks.chunk), query.dtype),
        "alive": pltpu.VMEM((SUBLANES, blocks.keys), jnp.int32),
        "infinite": pltpu.SMEM((1,), jnp.int32),
        "query_semaphores": pltpu.SemaphoreType.DMA((2,)),
        "out_semaphores": pltpu.SemaphoreType.DMA((2,)),
    }
    if listed:
        scratch["listed_buffer"] = pltpu.VMEM((2, 3, tokens, LANES), jnp.int32)
    if stats:
        padded_rows = -(-rows // LANES) * LANES
        padded_kv_heads = min(power_of_two(kv_heads), -(-kv_heads // SUBLANES) * SUBLANES)  # whole tiles, to be copied
        outputs["statistics"] = jax.ShapeDtypeStruct((parts, num_tiles, 2, padded_kv_heads, padded_rows), float32)
        scratch["statistics_buffer"] = pltpu.VMEM((2, 2, padded_kv_heads, padded_rows), float32)
    if static.scales_rank == 4:
        scratch["scale_buffer"] = pltpu.VMEM((2, 2 * kv_heads, 1, blocks.keys), float32)
    if attn_mask is not None:
        scratch["mask_buffer"] = pltpu.VMEM((-(-mask_heads // parts), tokens, LANES), jnp.int32)
        scratch["mask_semaphore"] = pltpu.SemaphoreType.DMA
    for name in streams:
        sides, _, _, size, stored_dim = operands[name].shape
        page = (sides, kv_heads, size, stored_dim)
        scratch[f"{name}_buffer"] = pltpu.VMEM((2, blocks.keys // size, *page), operands[name].dtype)
        scratch[f"{name}_semaphores"] = pltpu.SemaphoreType.DMA((2,))
        scratch[f"{name}_state"] = pltpu.SMEM((STATE_WORDS,), jnp.int32)
        scratch[f"{name}_unusable"] = pltpu.SMEM((2,), jnp.int32)

    names = (*prefetched, *operands, *outputs, *scratch)
    results = pl.pallas_call(
        lambda *refs: run_tiles(SimpleNamespace(**dict(zip(names, refs, strict=True))), static),
        out_shape=list(outputs.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(chip.cores, parts),
            in_specs=[specs[name] for name in operands],
            out_specs=[anywhere] * len(outputs),
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=chip.kernel_bytes
        ),
        name="flash_attn_varlen",
        interpret=interpret,
    )(*prefetched.values(), *operands.values())
    out = results[0][:, :num_tokens, :heads, :value_dim].swapaxes(0, 1).reshape(num_tokens, num_heads, value_dim)
    if not stats:
        return out
    places = t.tile_rows(tiles, begins, num_tokens)
    by_row = results[1][..., :kv_heads, :rows].reshape(parts, num_tiles, 2, kv_heads, group, tokens)
    by_row = by_row.transpose(1, 5, 2, 0, 3, 4).reshape(num_tiles * tokens, 2, num_heads)[places]
    behind = jnp.arange(num_tokens, dtype=jnp.int32) >= begins[-1]
    by_row = jnp.where(behind[:, None, None], -jnp.inf, by_row)
    return out, by_row[:, 0], by_row[:, 1]


def _rows(before: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Return the old rows where ``before`` (T,), else the new ones."""
    return jnp.where(before.reshape(-1, *[1] * (old.ndim - 1)), old, new)


def new_pages(num_tokens: int, num_seqs: int) -> int:
    """Return how many pages new keys take: each sequence may fill its last one in part."""
    return num_tokens // NEW_PAGE + num_seqs


def _lay_out_new(
    key: jax.Array,  # (Tk, KH, D)
    value: jax.Array,  # (Tk, KH, DV)
    begins: jax.Array,  # (B + 1,)
    width: int,
) -> tuple[jax.Array, jax.Array]:
    """Return new keys and values as pages (2, P, KH, NEW_PAGE, width), and the first page of each sequence (B,)."""
    num_tokens, num_seqs = key.shape[0], begins.shape[0] - 1
    num_pages = new_pages(num_tokens, num_seqs)
    lens = jnp.diff(begins)
    ends = jnp.cumsum(-(-lens // NEW_PAGE)).astype(jnp.int32)
    first_pages = ends + -lens // NEW_PAGE
    page = jnp.arange(num_pages, dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(page[:, None] >= ends, axis=1), num_seqs - 1)
    token = begins[seq] + (page - first_pages[seq]) * NEW_PAGE
    token = jnp.clip(token[:, None] + jnp.arange(NEW_PAGE, dtype=jnp.int32), 0, num_tokens - 1)
    sides = [jnp.pad(side, ((0, 0), (0, 0), (0, width - side.shape[2]))) for side in (key, value)]
    return jnp.stack([side[token].swapaxes(1, 2) for side in sides]), first_pages


def _scale_blocks(kv_scales: jax.Array, block_tables: jax.Array, keys: int, parts: int) -> jax.Array:
    """Return the scales of all columns as (B, blocks, parts, 2 * KH / parts, 1, keys of a block).

    In each part those of the keys of its heads, then those of the values.
    """
    scales = kv_scales[:, jnp.clip(block_tables, 0, kv_scales.shape[1] - 1)]  # (2, B, M, KH, S)
    rows = scales.astype(jnp.float32).transpose(1, 3, 0, 2, 4)  # (B, KH, 2, M, S)
    rows = rows.reshape(*rows.shape[:3], -1)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, -rows.shape[3] % keys)))
    rows = rows.reshape(rows.shape[0], parts, -1, 2, rows.shape[3] // keys, keys).transpose(0, 4, 1, 3, 2, 5)
    return rows.reshape(*rows.shape[:3], -1, 1, keys)
