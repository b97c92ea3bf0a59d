"""Multi-head latent attention: a model that caches compressed keys and expands them for each forward.

A patched model does not expand them: its queries are compressed instead, and attend to the cache as it is.
"""

from typing import Any

from torch import Tensor

from torch_paged.integrations.transformers.bind import call_bound
from torch_paged.integrations.transformers.handle import HANDLE_ATTRIBUTE, LOST_HANDLE
from torch_paged.integrations.transformers.versions import PreTrainedConfig

LATENT_ATTENTION_NAME = "torch_paged_latent"


def is_compressed(config: PreTrainedConfig, key: Tensor, value: Tensor) -> bool:
    """Say whether a layer caches compressed keys, and beside them the rotated part that all heads share."""
    rank = getattr(config, "kv_lora_rank", None)
    return rank is not None and key.shape[1] == 1 and (key.shape[3], value.shape[3]) == (rank, config.qk_rope_head_dim)


def check_not_expanded(config: PreTrainedConfig) -> None:
    """Raise when the model would expand the handle of a latent cache.

    Raises:
        NotImplementedError: the model is not patched.
    """
    if config._attn_implementation != LATENT_ATTENTION_NAME:
        raise NotImplementedError(
            f"PagedCache: {config.model_type} caches compressed keys (multi-head latent attention); "
            "call patch_model(model), which makes its layers attend to them"
        )


def keep_handle(module: Any, compressed: Tensor, rotated: Tensor) -> Any:
    """Do as the module's own ``expand_kv``, but leave the handle of a latent cache as it is."""
    if hasattr(compressed, HANDLE_ATTRIBUTE):
        return compressed, rotated
    if compressed.ndim != 4:
        raise RuntimeError(LOST_HANDLE.format(type(module).__name__))
    return call_bound(module, "expand_kv", compressed, rotated)
