"""From products of queries and keys to weights: scale, soft cap, ALiBi, visibility, and the online softmax.

Functions of values, for a tile of ``R`` query rows and ``K`` keys; both attention kernels use them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128

NOTHING = float(jnp.finfo(jnp.float32).min)
"""The running maximum of a row that has seen no key: finite, so that a difference of two of them is no NaN."""


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Return the product of two matrices in float32; float32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


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
        weights (R, K); their sums (R, 1); the factor (R, 1) for what was summed before; the new maximum (R, LANES).
    """
    logits = jnp.where(seen, logits, -jnp.inf)
    new = jnp.maximum(maximum, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp(logits - new[:, :1])
    return weights, jnp.sum(weights, axis=1, keepdims=True), jnp.exp(maximum - new)[:, :1], new


def statistics(total: jax.Array, maximum: jax.Array, sinks: Any = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finish rows: return the factor of their sums of values, lse and max_logits.

    Args:
        total: (R, 1) sum of the weights.
        maximum: (R, 1).
        sinks: (R, 1), or None.
    """
    seen = maximum > NOTHING
    max_logits = jnp.where(seen, maximum, -jnp.inf)
    if sinks is None:
        lse = jnp.where(seen, maximum + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
        return jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0), lse, max_logits
    top = jnp.maximum(maximum, sinks)
    kept = jnp.exp(maximum - top)
    with_sink = total * kept + jnp.exp(sinks - top)
    return kept / with_sink, top + jnp.log(with_sink), max_logits
