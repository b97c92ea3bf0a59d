"""Writing, copying and gathering the cache. Callers donate what is written, and XLA then updates it in place.

XLA programs without a kernel of our own. What matters is the shape in which XLA sees the cache: as ``(rows, DS)``,
which is the same memory where DS is a multiple of 128 and S one of 8, it scatters rows in place, without a copy and
without a temporary of the cache's size. The same scatter over five dimensions copies the whole cache twice for KH = 1.
Rows of more than one tile of an 8-bit cache are written and copied by kernels (``cache_tiles``). Many tokens are
scattered by parts: beyond some number of rows XLA lays out per-token scales anew, and takes long to compile.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from torch_paged.backends.tpu import cache_tiles
from torch_paged.backends.tpu.block_sizes import LANES

QMAX = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
"""Largest magnitude stored in a quantised cache, by dtype."""
_SCATTERED_ROWS = 1024
"""Most rows of the cache in one scatter."""
_SCATTERED_SCALES = 512
"""Most scales in one scatter."""


def reshape_and_cache(
    key: jax.Array,  # (T, KH, D)
    value: jax.Array,  # (T, KH, DV)
    kv_cache: jax.Array,  # (2, N, KH, S, DS)
    slot_mapping: jax.Array,  # (T,) int32
    kv_scales: jax.Array | None = None,  # (2,) or (2, KH) float32
    *,
    interpret: Any = False,
) -> jax.Array:
    """Write new keys and values to their slots; lanes up to DS become zero, slots outside [0, N * S) are dropped.

    Returns:
        The cache, updated.
    """
    sides = [key, value]
    if kv_scales is not None:
        scales = kv_scales.reshape(2, -1, 1)  # (2, 1 | KH, 1)
        sides = [quantize(side, scale, kv_cache.dtype) for side, scale in zip(sides, scales, strict=True)]
    return _write(sides, kv_cache, slot_mapping, interpret)


def quantize_and_cache(
    key: jax.Array,  # (T, KH, D)
    value: jax.Array,  # (T, KH, DV)
    kv_cache: jax.Array,  # (2, N, KH, S, DS), quantised
    kv_scales: jax.Array,  # (2, N, KH, S) float32
    slot_mapping: jax.Array,  # (T,) int32
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Write new keys and values with a scale ``amax / qmax`` for each token and head.

    Returns:
        The cache and the scales, updated.
    """
    rows, scales = [], []
    for side in (key, value):
        amax = jnp.nan_to_num(jnp.abs(side.astype(jnp.float32)), nan=0.0).max(-1)  # (T, KH), finite
        scale = divide(amax, jnp.float32(QMAX[kv_cache.dtype.name]))
        scales.append(jnp.where(scale == 0, 1.0, scale))
        rows.append(quantize(side, scales[-1][..., None], kv_cache.dtype))
    written = _write(rows, kv_cache, slot_mapping, interpret)

    def scatter(kv_scales: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
        return kv_scales.at[_slots(slots, kv_cache.shape)].set(new, mode="drop")

    return written, _by_parts(scatter, kv_scales, slot_mapping, jnp.stack(scales), _SCATTERED_SCALES)


def copy_blocks(
    kv_cache: jax.Array,  # (2, N, KH, S, DS)
    src_blocks: jax.Array,  # (P,) int32
    dst_blocks: jax.Array,  # (P,) int32
    kv_scales: jax.Array | None = None,  # (2, N, KH, S) float32
    *,
    interpret: Any = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Copy whole blocks, all sources as they were before; a pair with an id outside [0, N) is skipped.

    Returns:
        The cache, with scales also them, updated.
    """
    num_blocks = kv_cache.shape[1]
    live = (src_blocks >= 0) & (src_blocks < num_blocks) & (dst_blocks >= 0)
    src = jnp.where(live, src_blocks, 0)
    dst = jnp.where(live, dst_blocks, num_blocks)
    if src.size and _is_laid_out_anew(kv_cache):
        usable = jnp.where(dst < num_blocks, dst, -1)
        copied = cache_tiles.copy_blocks(kv_cache, src, usable, interpret)
    else:
        copied = kv_cache.at[:, dst].set(kv_cache[:, src], mode="drop")
    if kv_scales is None:
        return copied
    each = jnp.arange(kv_cache.shape[3], dtype=jnp.int32)
    old = kv_scales[_index(src[:, None, None], each, kv_cache.shape)]  # (2, P, KH, S)

    def scatter(kv_scales: jax.Array, dst: jax.Array, old: jax.Array) -> jax.Array:
        return kv_scales.at[_index(dst[:, None, None], each, kv_cache.shape)].set(old, mode="drop")

    return copied, _by_parts(scatter, kv_scales, dst, old, _SCATTERED_SCALES // each.size, nowhere=num_blocks)


def gather_cache(
    kv_cache: jax.Array,  # (2, N, KH, S, DS)
    block_tables: jax.Array,  # (B, M) int32
    context_lens: jax.Array,  # (B,) int32
    kv_scales: jax.Array | None = None,  # (2,), (2, KH) or (2, N, KH, S) float32
    starts: jax.Array | None = None,  # (B,) int32
    *,
    max_len: int,
    interpret: object = False,
) -> tuple[jax.Array, jax.Array]:
    """Gather dense keys and values; zeros where there is no token or the entry is outside [0, N).

    Returns:
        keys, values (B, KH, max_len, DS) in the cache's dtype, float32 where it is quantised.
    """
    del interpret
    _, num_blocks, _, block_size, _ = kv_cache.shape
    num_seqs, width = block_tables.shape
    column = jnp.arange(max_len, dtype=jnp.int32) - (0 if starts is None else starts[:, None])
    column = jnp.broadcast_to(column, (num_seqs, max_len))
    entry = jnp.clip(column // block_size, 0, max(width - 1, 0))
    block = jnp.take_along_axis(block_tables, entry, 1) if width else jnp.full_like(entry, -1)
    length = jnp.clip(context_lens, 0, width * block_size)[:, None]
    live = (column >= 0) & (column < length) & (block >= 0) & (block < num_blocks)  # (B, max_len)
    where = live[:, None]  # (B, 1, max_len)
    block, offset = jnp.where(where, block[:, None], 0), jnp.where(where, column[:, None] % block_size, 0)
    index = _index(block, offset, kv_cache.shape)
    dense = _as_rows(kv_cache)[_rows(index, kv_cache.shape)]  # (2, B, KH, max_len, DS)
    if kv_scales is not None:
        scales = kv_scales[index] if kv_scales.ndim == 4 else kv_scales.reshape(2, 1, -1, 1)
        dense = dense.astype(jnp.float32) * scales[..., None]
    dense = jnp.where(where[..., None], dense, 0)
    return dense[0], dense[1]


def quantize(x: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Quantise ``x`` to ``dtype`` with scales that broadcast against it, to nearest even; NaN stays NaN in fp8."""
    qmax = QMAX[dtype.name]
    scaled = jnp.clip(divide(x.astype(jnp.float32), scales), -qmax, qmax)
    if dtype == jnp.int8:
        return jnp.where(jnp.isnan(scaled), 0, jnp.round(scaled)).astype(dtype)
    return scaled.astype(dtype)


def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return x / y, y > 0, rounded to nearest even; exact zeros of x keep their sign.

    XLA is free to multiply by a rounded inverse, which moves values across the boundaries of codes. The remainder of
    its quotient, from products of halves that are exact, tells how far off it is. Below x = 2^-96 it is not exact.
    """
    exponent = jnp.minimum(jax.lax.bitcast_convert_type(y, jnp.int32) >> 23, 252)
    power = jax.lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)  # makes y about 1: nothing underflows
    x, y = x * power, y * power
    quotient = x / y
    quotient_high, y_high = _high_half(quotient), _high_half(y)
    quotient_low, y_low = quotient - quotient_high, y - y_high
    remainder = x - quotient_high * y_high - quotient_high * y_low - quotient_low * y_high - quotient_low * y_low
    corrected = quotient + remainder / y
    return jnp.where((remainder == 0) | ~jnp.isfinite(corrected), quotient, corrected)


def _high_half(x: jax.Array) -> jax.Array:
    """Return ``x`` with the lower 12 bits of its fraction cut off."""
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & -4096, jnp.float32)


def _write(sides: list[jax.Array], kv_cache: jax.Array, slot_mapping: jax.Array, interpret: Any) -> jax.Array:
    stored_dim = kv_cache.shape[-1]
    new = jnp.stack([jnp.pad(side, ((0, 0), (0, 0), (0, stored_dim - side.shape[-1]))) for side in sides])
    new = new.astype(kv_cache.dtype)  # (2, T, KH, DS)
    if new.size and _is_laid_out_anew(kv_cache):
        return cache_tiles.write_rows(kv_cache, new, slot_mapping, interpret)

    def scatter(rows: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
        return rows.at[_rows(_slots(slots, kv_cache.shape), kv_cache.shape)].set(new, mode="drop")

    return _by_parts(scatter, _as_rows(kv_cache), slot_mapping, new, _SCATTERED_ROWS).reshape(kv_cache.shape)


def _by_parts(
    scatter: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    target: jax.Array,
    slot_mapping: jax.Array,  # (T,)
    new: jax.Array,  # (2, T, KH, ...)
    most: int,
    nowhere: int = -1,
) -> jax.Array:
    """Scatter tokens in their order, so many at a time that no more than ``most`` of (side, token, head) are.

    A target of ``nowhere`` is dropped.
    """
    sides, num_tokens, kv_heads, *_ = new.shape
    step = max(1, most // (sides * kv_heads))
    if num_tokens <= step:
        return scatter(target, slot_mapping, new)
    padding = -num_tokens % step
    slots = jnp.pad(slot_mapping, (0, padding), constant_values=nowhere)
    new = jnp.pad(new, ((0, 0), (0, padding), *[(0, 0)] * (new.ndim - 2)))

    def part(i: jax.Array, target: jax.Array) -> jax.Array:
        pieces = [jax.lax.dynamic_slice_in_dim(x, i * step, step, axis) for x, axis in ((slots, 0), (new, 1))]
        return scatter(target, *pieces)

    return jax.lax.fori_loop(0, slots.shape[0] // step, part, target)


def _is_laid_out_anew(kv_cache: jax.Array) -> bool:
    """Return whether XLA would copy the whole cache around a scatter (see ``cache_tiles``)."""
    *_, block_size, stored_dim = kv_cache.shape
    return kv_cache.size > 0 and kv_cache.dtype.itemsize == 1 and block_size >= 32 and stored_dim > LANES


def _as_rows(kv_cache: jax.Array) -> jax.Array:
    return kv_cache.reshape(-1, kv_cache.shape[-1])


def _slots(slot_mapping: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Return the index (2, T, KH) of each token's rows; slots outside the cache point to block N, which is dropped."""
    _, num_blocks, _, block_size, _ = shape
    slot = slot_mapping[:, None]
    inside = (slot >= 0) & (slot < num_blocks * block_size)
    return _index(jnp.where(inside, slot // block_size, num_blocks), slot % block_size, shape)


def _index(block: jax.Array, offset: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Return (side, block, head, offset), which broadcast: blocks are (A, 1) or (A, 1, C), heads the axis of 1."""
    behind = (1,) * (block.ndim - 2)
    side = jnp.arange(2, dtype=jnp.int32).reshape(2, 1, 1, *behind)
    head = jnp.arange(shape[2], dtype=jnp.int32).reshape(-1, *behind)
    return side, block, head, offset


def _rows(index: tuple[jax.Array, ...], shape: tuple[int, ...]) -> jax.Array:
    """Return which row of ``(2 * N * KH * S, DS)`` an index is; one behind the last for block N."""
    _, num_blocks, kv_heads, block_size, _ = shape
    side, block, head, offset = index
    row = ((side * num_blocks + block) * kv_heads + head) * block_size + offset
    return jnp.where(block < num_blocks, row, 2 * num_blocks * kv_heads * block_size)
