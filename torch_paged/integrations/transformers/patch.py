"""Switch a model to the paged cache and back, without touching any class."""

import functools
import types
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from torch_paged.integrations.transformers.attention import ATTENTION_NAME
from torch_paged.integrations.transformers.paged_cache import PagedCache
from torch_paged.integrations.transformers.paged_layer import layer_windows

Model = TypeVar("Model", bound=nn.Module)

_PREPARE = "_prepare_cache_for_generation"
_ORIGINAL = "_torch_paged_original_attention"


def patch_model(model: Model, *, block_size: int = 16) -> Model:
    """Make a decoder-only transformers model generate through ``torch.ops.paged.*``.

    Its attention implementation becomes ``"torch_paged"``, and ``generate`` makes a ``PagedCache`` where it would make
    a ``DynamicCache``. Only this instance changes; patching it again changes only the block size, and
    ``unpatch_model`` takes all back.

    Args:
        model: a decoder-only model whose layers use transformers' attention interface: full or sliding-window
            attention, with or without soft caps and sinks.
        block_size: tokens in a block of the cache.

    Returns:
        The same model.

    Raises:
        ValueError: not a transformers model, or a block size below 1.
        NotImplementedError: a model that the paged cache cannot serve.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from torch_paged.integrations.transformers import patch_model
        >>> config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> model = patch_model(LlamaForCausalLM(config).eval())
        >>> prompt = torch.tensor([[5, 6, 7]])
        >>> model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0).shape
        torch.Size([1, 7])
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"patch_model: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if block_size < 1:
        raise ValueError(f"patch_model: block_size must be >= 1, got {block_size}")
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise NotImplementedError(f"patch_model: encoder-decoder models ({name}) are not supported; use it unpatched")
    if not model.can_generate():
        raise NotImplementedError(f"patch_model: {name} cannot generate; load it with AutoModelForCausalLM")
    if not model._supports_default_dynamic_cache():  # type: ignore[operator]  # nn.Module hides it
        raise NotImplementedError(f"patch_model: {name} makes a cache of its own kind; use it unpatched")
    layer_windows(model.config.get_text_config(decoder=True))
    if not model._can_set_attn_implementation():
        raise NotImplementedError(
            f"patch_model: {name} does not use transformers' attention interface and is not supported; use it unpatched"
        )
    if hasattr(model, _ORIGINAL):
        unpatch_model(model)
    original = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(original)
        raise NotImplementedError(f"patch_model: {name} did not take the attention implementation '{ATTENTION_NAME}'")
    setattr(model, _ORIGINAL, original)
    setattr(model, _PREPARE, types.MethodType(_paged_prepare(getattr(type(model), _PREPARE), block_size), model))
    return model


def unpatch_model(model: Model) -> Model:
    """Take back what ``patch_model`` did; an unpatched model stays as it is.

    Args:
        model: the model.

    Returns:
        The same model, with the attention implementation that it had.
    """
    if isinstance(model, PreTrainedModel) and hasattr(model, _ORIGINAL):
        model.set_attn_implementation(getattr(model, _ORIGINAL))
        delattr(model, _ORIGINAL)
        delattr(model, _PREPARE)
        if hasattr(model, "_compiled_call"):
            del model._compiled_call
    return model


def _paged_prepare(original: Any, block_size: int) -> Any:
    @functools.wraps(original)
    def prepare_cache(
        model: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get("past_key_values") is not None
        wants_cache = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if given or not wants_cache:
            return original(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        cache = PagedCache(model.config, max_cache_length=max_cache_length, block_size=block_size, device=model.device)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        return None

    return prepare_cache
