"""Merging attention over disjoint keys: a few elementwise operations, which XLA fuses into one program."""

import jax
import jax.numpy as jnp


def merge_attention_states(
    outs: jax.Array,  # (P, T, H, D)
    lses: jax.Array,  # (P, T, H) float32
    sinks: jax.Array | None = None,  # (H,) float32
    *,
    interpret: object = False,
) -> tuple[jax.Array, jax.Array]:
    """Merge attention over ``P`` disjoint parts of the keys into attention over their union.

    Parts are added up one after another in float32, so that a row has the same bits in every batch.

    Args:
        interpret: Taken for the sake of one signature; there is no kernel to interpret.

    Returns:
        out (T, H, D) in the dtype of ``outs``, lse (T, H) float32.
    """
    del interpret
    parts, *_ = outs.shape
    if parts == 1 and sinks is None:
        return jnp.where(jnp.isneginf(lses[0])[..., None], 0, outs[0]), lses[0]
    top = lses.max(0)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    base = jnp.where(jnp.isneginf(top), 0.0, top)
    total = jnp.zeros_like(base) if sinks is None else jnp.exp(sinks - base)
    weights = jnp.exp(lses - base)  # 0 where a part saw no key
    acc = jnp.zeros(outs.shape[1:], jnp.float32)
    for part in range(parts):
        total += weights[part]
        seen = weights[part][..., None] != 0
        acc += jnp.where(seen, weights[part][..., None] * outs[part].astype(jnp.float32), 0.0)
    out = jnp.where(total[..., None] == 0, 0.0, acc / total[..., None])
    return out.astype(outs.dtype), base + jnp.log(total)
