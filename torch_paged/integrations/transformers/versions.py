"""What differs between the versions of transformers; the rest of the package is written for the newest.

Differences are found by looking at names and signatures. Versions are compared once only, with the lowest one that is
supported, before anything else of transformers is imported.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

LOWEST_VERSION = "4.57"


def check_version(version: str = transformers.__version__) -> None:
    """Raise when transformers is older than what this package is tested with.

    Raises:
        ImportError: an older version.
    """
    if Version(version) < Version(LOWEST_VERSION):
        raise ImportError(f"torch_paged: transformers must be {LOWEST_VERSION} or newer, got {version}; upgrade it")


check_version()

CROP_IS_RELATIVE = "tokens_to_remove" in inspect.signature(transformers.cache_utils.DynamicLayer.crop).parameters
MASKS_TAKE_POSITIONS = "cache_position" in inspect.signature(transformers.masking_utils.sdpa_mask).parameters

PreTrainedConfig: Any = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig


def columns_after_crop(columns: int, argument: int) -> int:
    """Return how many of ``columns`` stay after ``Cache.crop(argument)``.

    Args:
        columns: columns in the cache.
        argument: minus the columns to remove. Where ``crop`` is not relative, 0 and above are the columns to keep.

    Raises:
        ValueError: more columns than there are, or a positive number where ``crop`` is relative.
    """
    if argument >= 0 and not CROP_IS_RELATIVE:
        return min(argument, columns)
    if argument > 0 or columns + argument < 0:
        raise ValueError(f"PagedCache: tokens_to_remove must be in [{-columns}, 0], got {argument}")
    return columns + argument


def new_columns(query_length: int | Tensor) -> int:
    """Return the number of new columns from what ``get_mask_sizes`` is given: it, or the positions ``(Q,)``."""
    return query_length.shape[0] if isinstance(query_length, Tensor) else query_length


def as_mask_function(mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Return ``mask``, which takes ``q_length`` and ``q_offset``, in the form that transformers calls."""
    if not MASKS_TAKE_POSITIONS:
        return mask

    def from_positions(batch_size: int, cache_position: Tensor, kv_length: int, **kwargs: Any) -> Tensor | None:
        q_length = cache_position.shape[0]
        return mask(batch_size, q_length, kv_length, q_offset=cache_position[0], **kwargs)

    return from_positions


def dense_mask(*, q_length: int, q_offset: Any, **kwargs: Any) -> Tensor | None:
    """Return the bool mask ``(B, 1, Q, C)`` that transformers draws for scaled dot product attention."""
    kwargs["allow_is_causal_skip"] = False
    if MASKS_TAKE_POSITIONS:
        return transformers.masking_utils.sdpa_mask(cache_position=torch.arange(q_length) + q_offset, **kwargs)
    return transformers.masking_utils.sdpa_mask(q_length=q_length, q_offset=q_offset, **kwargs)


def draws_its_own_mask(model: Any) -> bool:
    """Say whether a model draws 4-D masks itself, as some did before all used transformers' mask functions."""
    return any(hasattr(module, "_update_causal_mask") for module in model.modules())
