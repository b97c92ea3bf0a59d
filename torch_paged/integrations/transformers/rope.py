"""Rotary frequencies that depend on the longest sequence of a forward: packed, one sequence would get another's."""

from typing import Any


def most_packed_tokens(config: Any) -> int | None:
    """Return up to how many tokens a sequence keeps the frequencies that it has alone; None for any number.

    Args:
        config: the decoder's config.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [part for part in parameters.values() if isinstance(part, dict)] or [parameters]
    limits: list[int] = []
    for kind in kinds:
        name = kind.get("rope_type", kind.get("type"))
        if name == "dynamic":
            limits.append(config.max_position_embeddings)
        elif name == "longrope":
            original = kind.get("original_max_position_embeddings")
            limits.append(
                original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
            )
    return min(limits, default=None)


def needs_other_frequencies(num_tokens: int, limit: int) -> NotImplementedError:
    """Return the error for a sequence beyond the limit."""
    return NotImplementedError(
        f"generate_batch: beyond {limit} tokens the model's rotary frequencies depend on the longest sequence, "
        f"got {num_tokens}; use generate()"
    )
