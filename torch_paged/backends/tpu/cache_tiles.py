"""Writing rows and blocks of a cache by whole tiles, in place.

XLA keeps 8-bit arrays of 32 rows and more in tiles of (32, 128), and scatters into tiles of (8, 128): for rows of more
than one tile it copies the whole cache there and back. This kernel, which any dtype may use, leaves the cache where it
is: it fetches the tile that a row belongs to, of all heads, puts the row into it, and stores it. Tokens go in groups,
in order: all fetches of a group, its updates, its stores. Tokens of the same tile share the first one's buffer. Another
kernel copies blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_TILE_ROWS = 32
"""Most rows of a tile: those of 8-bit elements."""
_GROUP = 8
"""Most tokens of a group."""
_BUFFER_BYTES = 4 * 2**20
"""VMEM for the tiles of a group."""
_MOST_TOKENS = 2**17
"""Slots that SMEM (1 MiB) has room for; more tokens take several kernels."""


def write_rows(
    kv_cache: jax.Array,  # (2, N, KH, S, DS)
    rows: jax.Array,  # (2, T, KH, DS), of the cache's dtype
    slot_mapping: jax.Array,  # (T,) int32
    interpret: Any,
) -> jax.Array:
    """Write rows to their slots, the last one where several have the same; slots outside [0, N * S) are dropped."""
    _, num_blocks, kv_heads, block_size, stored_dim = kv_cache.shape
    itemsize = kv_cache.dtype.itemsize
    if itemsize != 2:
        rows = lax.bitcast_convert_type(rows, jnp.int8 if itemsize == 1 else jnp.int32)
    new = rows.transpose(1, 0, 2, 3).reshape(-1, 2 * kv_heads, stored_dim)
    slots = jnp.where(slot_mapping < num_blocks * block_size, slot_mapping, -1)
    tile_bytes = 2 * kv_heads * min(block_size, _TILE_ROWS) * stored_dim * itemsize
    group = _GROUP
    while group > 1 and group * tile_bytes > _BUFFER_BYTES:
        group //= 2
    padding = -slots.shape[0] % group
    new = jnp.pad(new, ((0, padding), (0, 0), (0, 0)))
    slots = jnp.pad(slots, (0, padding), constant_values=-1)
    for first in range(0, slots.shape[0], _MOST_TOKENS):
        part = slice(first, first + _MOST_TOKENS)
        kv_cache = _call(kv_cache, slots[part].shape[0], group, interpret)(slots[part], new[part], kv_cache)
    return kv_cache


def copy_blocks(
    kv_cache: jax.Array,  # (2, N, KH, S, DS)
    src_blocks: jax.Array,  # (P,) int32
    dst_blocks: jax.Array,  # (P,) int32, -1: none
    interpret: Any,
) -> jax.Array:
    """Copy blocks, all sources as they were before; sources lie in [0, N)."""
    num_pairs = src_blocks.shape[0]

    def kernel(src: Any, dst: Any, _: Any, cache: Any, held: Any, semaphore: Any) -> None:
        def each(act: Any) -> None:
            def step(pair: Any, carry: Any) -> Any:
                pl.when(dst[pair] >= 0)(lambda: act(pair))
                return carry

            lax.fori_loop(0, num_pairs, step, 0)

        def hold(pair: Any) -> Any:
            return pltpu.make_async_copy(cache.at[:, src[pair]], held.at[:, pair], semaphore)

        def store(pair: Any) -> Any:
            return pltpu.make_async_copy(held.at[:, pair], cache.at[:, dst[pair]], semaphore)

        for copy in (hold, store):
            each(lambda pair, copy=copy: copy(pair).start())
            each(lambda pair, copy=copy: copy(pair).wait())

    sides, _, *block = kv_cache.shape
    copied, _ = pl.pallas_call(
        kernel,
        out_shape=[_in_hbm(x, kv_cache.dtype, interpret) for x in (kv_cache.shape, (sides, num_pairs, *block))],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="copy_blocks",
        interpret=interpret,
    )(src_blocks, dst_blocks, kv_cache)
    return copied


def _in_hbm(shape: tuple[int, ...], dtype: Any, interpret: Any) -> Any:
    """Return the shape of a result that XLA leaves in HBM; else it may move a cache that fits to VMEM and back.

    Only the result is said to lie there: the simulated memories of jax 0.7.1 would else hold a second array of NaN.
    """
    if interpret or jax.__version_info__ < (0, 8):
        return jax.ShapeDtypeStruct(shape, dtype)
    return pltpu.MemorySpace.HBM(shape, dtype)


def _call(kv_cache: jax.Array, num_tokens: int, group: int, interpret: Any) -> Any:
    sides, _, kv_heads, block_size, stored_dim = kv_cache.shape
    tile_rows = min(block_size, _TILE_ROWS)
    packing = 4 // kv_cache.dtype.itemsize
    """Rows that share 32-bit words."""

    def kernel(slots: Any, new: Any, _: Any, cache: Any, tiles: Any, owners: Any, semaphore: Any) -> None:
        first = pl.program_id(0) * group

        def copy(token: Any, *, store: bool) -> Any:
            slot = slots[first + token]
            row = pl.multiple_of(lax.div(lax.rem(slot, block_size), tile_rows) * tile_rows, tile_rows)
            there = cache.at[:, lax.div(slot, block_size), :, pl.ds(row, tile_rows)]
            here = tiles.at[token]
            return pltpu.make_async_copy(*((here, there) if store else (there, here)), semaphore)

        def own(token: Any, carry: Any) -> Any:
            """Find whose buffer holds the tile of a token: the first one's that has it."""
            slot = slots[first + token]

            def look(other: Any, owner: Any) -> Any:
                same = (slots[first + other] >= 0) & (
                    lax.div(slots[first + other], tile_rows) == lax.div(slot, tile_rows)
                )
                return jnp.where(same, jnp.minimum(owner, other), owner)

            owners[token] = jnp.where(slot < 0, -1, lax.fori_loop(0, token, look, token))
            return carry

        def each_tile(act: Any) -> None:
            def step(token: Any, carry: Any) -> Any:
                pl.when(owners[token] == token)(lambda: act(token))
                return carry

            lax.fori_loop(0, group, step, 0)

        def update(token: Any, carry: Any) -> Any:
            owner = owners[token]

            @pl.when(owner >= 0)
            def put() -> None:
                row = lax.rem(slots[first + token], tile_rows)
                words = (tile_rows // packing, stored_dim)
                mine = lax.broadcasted_iota(jnp.int32, words, 0) == lax.div(row, packing)
                shift = lax.rem(row, packing) * (32 // packing)
                others = ~(((1 << 32 // packing) - 1) << shift) if packing > 1 else 0
                codes = _codes(new[token], packing)
                for head in range(sides * kv_heads):
                    tile = tiles.at[owner, head // kv_heads, head % kv_heads]
                    old = pltpu.bitcast(tile[...], jnp.int32)
                    merged = (old & others) | (codes[head : head + 1] << shift)
                    tile[...] = pltpu.bitcast(jnp.where(mine, merged, old), kv_cache.dtype)

            return carry

        lax.fori_loop(0, group, own, 0)
        each_tile(lambda token: copy(token, store=False).start())
        each_tile(lambda token: copy(token, store=False).wait())
        lax.fori_loop(0, group, update, 0)
        each_tile(lambda token: copy(token, store=True).start())
        each_tile(lambda token: copy(token, store=True).wait())

    return pl.pallas_call(
        kernel,
        out_shape=_in_hbm(kv_cache.shape, kv_cache.dtype, interpret),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_tokens // group,),
            in_specs=[
                pl.BlockSpec((group, sides * kv_heads, stored_dim), lambda step, *_: (step, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((group, sides, kv_heads, tile_rows, stored_dim), kv_cache.dtype),
                pltpu.SMEM((group,), jnp.int32),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="write_rows",
        interpret=interpret,
    )


def _codes(rows: jax.Array, packing: int) -> jax.Array:
    """Return the bits of new rows as the low bits of int32."""
    if packing == 1:
        return rows
    if packing == 2:
        return lax.shift_right_logical(pltpu.bitcast(rows.astype(jnp.float32), jnp.int32), 16)
    return rows.astype(jnp.int32) & 0xFF
