"""What a model does to a token by the whole forward: packed, a sequence would get what another one is due.

Rotary frequencies may depend on the longest sequence, and Llama 4 scales queries by their place in the row.
"""

from typing import Any


def most_packed_tokens(config: Any) -> int | None:
    """Return up to how many tokens a packed sequence is treated as it is alone; None for any number.

    Args:
        config: the decoder's config.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [part for part in parameters.values() if isinstance(part, dict)] or [parameters]
    limits = [limit for limit in (most_tokens_in_row(config),) if limit is not None]
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


def most_tokens_in_row(config: Any) -> int | None:
    """Return up to how many tokens the place in a packed row changes no query; None for any number."""
    return config.floor_scale - 1 if getattr(config, "attn_temperature_tuning", None) else None


def depends_on_others(num_tokens: int, limit: int) -> NotImplementedError:
    """Return the error for a sequence beyond the limit."""
    return NotImplementedError(
        f"generate_batch: beyond {limit} tokens the model's rotary frequencies or attention temperatures depend on the "
        f"other sequences, got {num_tokens}; use generate()"
    )
