"""From products of queries and keys to weights: scale, soft cap, ALiBi, visibility, and the online softmax.

Functions of values, for a tile of ``R`` query rows and ``K`` keys, for decode. The kernel of packed queries takes the
products from here, and writes its own softmax into the steps of its pipeline.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from torch_paged.backends.tpu.block_sizes import LANES

NOTHING = float(jnp.finfo(jnp.float32).min)
"""The running maximum of a row that has seen no key: finite, so that a difference of two of them is no NaN."""
_CHAIN = 256
"""Lanes of float32 that are added up in one chain."""


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Return the product of two matrices in float32; float32 operands are not rounded.

    Long rows of float32 are multiplied in pieces: interpreted, XLA adds up all lanes of a product in one chain, whose
    error is then twice that of PyTorch's product.
    """
    if a.dtype == jnp.float32 and contract == (1, 1) and a.shape[1] > _CHAIN:
        pieces = [slice(i, i + LANES) for i in range(0, a.shape[1], LANES)]
        products = [dot(a[:, piece], b[:, piece], contract) for piece in pieces]
        return functools.reduce(jnp.add, products)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def heads_of_mask(attn_mask: jax.Array | None) -> int:
    """Return how many heads a mask tells apart: 0 where there is none."""
    return 0 if attn_mask is None else attn_mask.shape[0] if attn_mask.ndim == 3 else 1


def modify(products: jax.Array, scale: Any, soft_cap: float, slopes: Any = None, distances: Any = None) -> jax.Array:
    """Return logits.

    Args:
        products: (R, K) float32 of queries and keys.
        scale: factor, with the scale of the keys in it.
        soft_cap: 0.0: off.
        slopes: (R, 1) of ALiBi, or None.
        distances: (R, K) or (1, K) float32, the distances of the keys from the queries.
    """
    logits = products * scale
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if slopes is not None:
        logits = logits - slopes * distances
    return logits


def weigh(
    logits: jax.Array,  # (R, K)
    seen: jax.Array,  # (R, K) or (1, K) bool
    maximum: jax.Array,  # (R, LANES)
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Take one step of the online softmax.

    Returns:
        weights (R, K); their sums by lanes (R, LANES); the factor (R, LANES) for what was summed before; the new
        maximum (R, LANES). Factor and maximum are the same in all lanes, so that no lane waits for another.
    """
    logits = jnp.where(seen, logits, -jnp.inf)
    new = jnp.maximum(maximum, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp(logits - across(new, logits.shape[1]))
    return weights, _sum_by_lanes(weights), jnp.exp(maximum - new), new


def across(x: jax.Array, size: int) -> jax.Array:
    """Return (R, size) of (R, LANES), which is the same in all lanes."""
    if size <= LANES:
        return x[:, :size]
    return jnp.concatenate([x] * (size // LANES), axis=1)


def _sum_by_lanes(x: jax.Array) -> jax.Array:
    """Return (R, LANES) whose lanes add up to the rows of x (R, K)."""
    if x.shape[1] <= LANES:
        return jnp.pad(x, ((0, 0), (0, LANES - x.shape[1])))
    parts = [x[:, start : start + LANES] for start in range(0, x.shape[1], LANES)]
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def statistics(total: jax.Array, maximum: jax.Array, sinks: Any = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finish rows: return the factor of their sums of values, lse and max_logits.

    Args:
        total: (R, 1) sum of the weights; 0 in a row that saw no key.
        maximum: (R, 1).
        sinks: (R, 1), or None.
    """
    nothing = total == 0
    max_logits = jnp.where(nothing, -jnp.inf, maximum)
    if sinks is None:
        total = jnp.where(nothing, 1.0, total)
        return 1.0 / total, jnp.where(nothing, -jnp.inf, maximum + jnp.log(total)), max_logits
    top = jnp.maximum(maximum, sinks)
    kept = jnp.exp(maximum - top)
    with_sink = total * kept + jnp.exp(sinks - top)
    return kept / jnp.where(with_sink == 0, 1.0, with_sink), top + jnp.log(with_sink), max_logits


def weighted_sum(weights: jax.Array, seen: jax.Array, values: jax.Array) -> jax.Array:
    """Return the weighted sums (R, D) of values (K, D), of which rows may not see some that are not finite.

    A weight of 0 does not hide these: they are left out of the product, and added in the rows that see them.
    """
    wide = values.astype(jnp.float32)
    finite = jnp.abs(wide) < jnp.inf
    sums = dot(weights, jnp.where(finite, values, jnp.zeros_like(values)), (1, 0))
    rows = jnp.where(seen, jnp.ones(weights.shape, jnp.float32), 0.0).astype(jnp.bfloat16)
    for infinity, other in ((jnp.inf, wide > 0), (-jnp.inf, wide < 0)):  # NaN is both of them
        found = jnp.where(finite, 0.0, jnp.where(other | (wide != wide), 1.0, 0.0)).astype(jnp.bfloat16)
        sums = sums + jnp.where(dot(rows, found, (1, 0)) > 0, infinity, 0.0)
    return sums
