"""Paged attention for decode: one query token per sequence.

The grid runs over the sequences, on two cores over halves of them (or of the kv heads, if there is one sequence). The
page table and the lengths lie in scalar memory; where they do not fit, parts of the sequences take a kernel each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_paged.backends.tpu.block_sizes import LANES, SUBLANES, Chip, Page, decode_blocks
from torch_paged.backends.tpu.decode_kernel import Kernel, Plan
from torch_paged.backends.tpu.logits import heads_of_mask
from torch_paged.backends.tpu.pages import STATE_WORDS, flat_table

MASK_ROWS = 32
"""Rows of a tile of int8."""
TABLE_WORDS = 3 * 2**16
"""Block ids that SMEM (1 MiB) has room for; longer tables take several kernels."""


def paged_attention(
    query: jax.Array,  # (B, H, D)
    kv_cache: jax.Array,  # (2, N, KH, S, DS)
    block_tables: jax.Array,  # (B, M)
    context_lens: jax.Array,  # (B,)
    kv_scales: jax.Array | None = None,  # (2,), (2, KH) or (2, N, KH, S)
    sinks: jax.Array | None = None,  # (H,)
    alibi_slopes: jax.Array | None = None,  # (H,)
    attn_mask: jax.Array | None = None,  # (B, C), (KH, B, C) or (H, B, C)
    *,
    softmax_scale: float,
    logits_soft_cap: float = 0.0,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    stats: bool = False,
    chip: Chip,
    interpret: Any = False,
) -> Any:
    """Attend from one token of each sequence to its cache.

    Returns:
        out (B, H, value_dim or D) in the query dtype; with ``stats`` also lse and max_logits (B, H) float32.
    """
    num_seqs, num_blocks, width = query.shape[0], kv_cache.shape[1], block_tables.shape[1]
    value_dim = query.shape[2] if value_dim is None else value_dim
    if not (num_seqs and num_blocks and width and value_dim):
        return _no_keys(query, sinks, value_dim, stats)

    seqs_at_a_time = max(1, TABLE_WORDS // (width + 1))
    parts = []
    for first in range(0, num_seqs, seqs_at_a_time):
        part = slice(first, first + seqs_at_a_time)
        found = _attend(
            *(query[part], kv_cache, block_tables[part], context_lens[part], kv_scales, sinks, alibi_slopes),
            None if attn_mask is None else attn_mask[..., part, :],
            softmax_scale=softmax_scale,
            logits_soft_cap=logits_soft_cap,
            sliding_window=sliding_window,
            attention_chunk=attention_chunk,
            value_dim=value_dim,
            stats=stats,
            chip=chip,
            interpret=interpret,
        )
        parts.append(found)
    joined = parts[0] if len(parts) == 1 else tuple(jnp.concatenate(pieces) for pieces in zip(*parts, strict=True))
    return joined if stats else joined[0]


def _attend(
    query: jax.Array,
    kv_cache: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    kv_scales: jax.Array | None,
    sinks: jax.Array | None,
    alibi_slopes: jax.Array | None,
    attn_mask: jax.Array | None,
    *,
    softmax_scale: float,
    logits_soft_cap: float,
    sliding_window: int | None,
    attention_chunk: int | None,
    value_dim: int,
    stats: bool,
    chip: Chip,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Return what ``paged_attention`` does by one kernel: out alone, or with both statistics."""
    num_seqs, num_heads, head_dim = query.shape
    _, num_blocks, num_kv_heads, block_size, stored_dim = kv_cache.shape
    width = block_tables.shape[1]
    scales_rank = 0 if kv_scales is None else kv_scales.ndim
    mask_heads = heads_of_mask(attn_mask)
    split_heads = num_seqs < chip.cores and num_kv_heads % chip.cores == 0 and not mask_heads and scales_rank < 4
    cores = chip.cores if split_heads or num_seqs >= chip.cores else 1
    group_rows = -(-(num_heads // num_kv_heads) // SUBLANES) * SUBLANES
    core_seqs = num_seqs if split_heads else num_seqs // cores if num_seqs % cores == 0 else 1
    # of all heads, also where a core takes a part of them: else a sequence would sum in another order in a batch
    page = Page(num_kv_heads, block_size, stored_dim, kv_cache.dtype.itemsize)
    key_bytes = (8 * num_kv_heads if scales_rank == 4 else 0) + -(-mask_heads // MASK_ROWS) * MASK_ROWS
    plan = Plan(
        num_seqs,
        num_heads,
        head_dim,
        value_dim,
        num_kv_heads,
        block_size,
        stored_dim,
        width,
        decode_blocks(chip, page, width, num_kv_heads * group_rows, key_bytes, core_seqs),
        cores,
        split_heads,
        scales_rank,
        sinks is not None,
        alibi_slopes is not None,
        mask_heads,
        softmax_scale,
        logits_soft_cap,
        sliding_window,
        attention_chunk,
        stats,
        query.dtype,
        kv_cache.dtype,
        bool(interpret),
    )
    scalars = [context_lens, flat_table(block_tables, num_blocks)]
    scalars += [kv_scales] if kv_scales is not None and scales_rank < 4 else []
    scalars += [x for x in (sinks, alibi_slopes) if x is not None]
    arrays = [query, kv_cache]
    if kv_scales is not None and scales_rank == 4:
        arrays.append(_scale_blocks(kv_scales, block_tables, plan))
    if attn_mask is not None:
        arrays.append(_mask_blocks(attn_mask, plan))
    if not interpret:  # else XLA may copy a whole cache to VMEM first
        arrays[1:] = [pltpu.with_memory_space_constraint(x, pltpu.MemorySpace.HBM) for x in arrays[1:]]
    out, *rest = _call(plan, chip, interpret)(*scalars, *arrays)
    return (out, *(x.reshape(num_seqs, num_heads) for x in rest))


def _no_keys(query: jax.Array, sinks: jax.Array | None, value_dim: int, stats: bool) -> Any:
    out = jnp.zeros((*query.shape[:2], value_dim), query.dtype)
    nothing = jnp.full(query.shape[:2], -jnp.inf, jnp.float32)
    lse = nothing if sinks is None else jnp.broadcast_to(sinks.astype(jnp.float32), nothing.shape)
    return (out, lse, nothing) if stats else out


def _scale_blocks(kv_scales: jax.Array, block_tables: jax.Array, plan: Plan) -> jax.Array:
    """Return the scales of all columns as (B, blocks, rows, keys of a block): keys of all heads, then values."""
    ids = jnp.clip(block_tables, 0, kv_scales.shape[1] - 1)
    scales = kv_scales[:, ids]  # (2, B, M, KH, S)
    rows = scales.transpose(1, 0, 3, 2, 4).reshape(plan.num_seqs, 2 * plan.num_kv_heads, -1)
    return _key_blocks(rows.astype(jnp.float32), SUBLANES, plan)


def _mask_blocks(attn_mask: jax.Array, plan: Plan) -> jax.Array:
    """Return a mask as (B, blocks, rows, keys of a block)."""
    mask = attn_mask if attn_mask.ndim == 3 else attn_mask[None]
    return _key_blocks(mask.astype(jnp.int8).transpose(1, 0, 2), MASK_ROWS, plan)


def _key_blocks(rows: jax.Array, multiple: int, plan: Plan) -> jax.Array:
    """Return (B, R, keys) as (B, blocks, R up to a multiple, keys of a block)."""
    num_blocks = -(-plan.width // plan.blocks.pages)
    keys = num_blocks * plan.block_keys
    rows = rows[..., :keys]
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % multiple), (0, keys - rows.shape[2])))
    return rows.reshape(*rows.shape[:2], num_blocks, plan.block_keys).transpose(0, 2, 1, 3)


def _call(plan: Plan, chip: Chip, interpret: Any) -> Any:
    """Return the compiled kernel."""

    def block_index(core: Any, step: Any, *_: Any) -> tuple[Any, ...]:
        if plan.split_heads:
            return step, core, 0
        steps = plan.steps // plan.members
        return jnp.minimum(core * steps + step, -(-plan.num_seqs // plan.members) - 1), 0, 0

    def stat_index(*indices: Any) -> tuple[Any, ...]:
        seq, part, _ = block_index(*indices)
        return seq, part, 0, 0

    parts = plan.cores if plan.split_heads else 1
    query_block = pl.BlockSpec((plan.members, plan.core_heads, plan.head_dim), block_index)
    out_shape = [jax.ShapeDtypeStruct((plan.num_seqs, plan.num_heads, plan.value_dim), plan.query_dtype)]
    out_specs = [pl.BlockSpec((plan.members, plan.core_heads, plan.value_dim), block_index)]
    if plan.stats:
        stat = jax.ShapeDtypeStruct((plan.num_seqs, parts, 1, plan.core_heads), jnp.float32)
        out_shape += [stat, stat]
        out_specs += [pl.BlockSpec((plan.members, 1, 1, plan.core_heads), stat_index)] * 2

    buffers, pages, tiles = plan.blocks.buffers, plan.blocks.pages, plan.blocks.pages // plan.blocks.tile_pages
    kv_heads, rows, size, members = plan.core_kv_heads, plan.rows, plan.block_size, plan.members
    scratch = {
        "buffer": pltpu.VMEM((buffers, pages, 2, kv_heads, size, plan.stored_dim), plan.cache_dtype),
        "semaphores": pltpu.SemaphoreType.DMA((buffers,)),
        "state": pltpu.SMEM((STATE_WORDS,), jnp.int32),
        "unusable": pltpu.SMEM((buffers,), jnp.int32),
        "slots": pltpu.SMEM((members,), jnp.int32),
        "live": pltpu.VMEM((members, tiles, SUBLANES, plan.tile_keys), jnp.float32),
        "heads": pltpu.VMEM((members, plan.core_heads + rows - plan.group, plan.stored_dim), jnp.float32),
        "queries": pltpu.VMEM((members, kv_heads, rows, plan.head_dim), plan.query_dtype),
        "maxima": pltpu.VMEM((members, kv_heads, rows, LANES), jnp.float32),
        "totals": pltpu.VMEM((members, kv_heads, rows, LANES), jnp.float32),
        "sums": pltpu.VMEM((members, kv_heads, rows, plan.stored_dim), jnp.float32),
    }
    if plan.scales_rank == 4:
        height = -(-2 * kv_heads // SUBLANES) * SUBLANES
        scratch["scale_buffer"] = pltpu.VMEM((buffers, height, plan.block_keys), jnp.float32)
    if plan.mask_heads:
        height = -(-plan.mask_heads // MASK_ROWS) * MASK_ROWS
        scratch["mask_buffer"] = pltpu.VMEM((buffers, height, plan.block_keys), jnp.int8)
    for name in ("sinks", "alibi"):
        if getattr(plan, name):
            scratch[f"{name}_rows"] = pltpu.VMEM((kv_heads, rows, LANES), jnp.float32)

    scalars = ["context_lens", "table"]
    scalars += ["scales"] if 0 < plan.scales_rank < 4 else []
    scalars += [name for name in ("sinks", "alibi") if getattr(plan, name)]
    in_hbm = ["cache", *plan.block_sources]
    outputs = ["out", "lse", "max_logits"] if plan.stats else ["out"]
    names = [*scalars, "query", *in_hbm, *outputs, *scratch]

    def kernel(*refs: Any) -> None:
        Kernel(plan, dict(zip(names, refs, strict=True))).run()

    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.cores, plan.steps // plan.members),
            in_specs=[query_block, *[pl.BlockSpec(memory_space=pl.ANY)] * len(in_hbm)],
            out_specs=out_specs,
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=chip.kernel_bytes,
            disable_bounds_checks=True,
        ),
        name="paged_attention",
        interpret=interpret,
    )
