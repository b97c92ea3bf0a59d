"""Switch a model to the paged cache and back, without touching any class."""

import inspect
import logging
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from torch_paged import dispatch
from torch_paged.integrations.transformers import packed_prefill, static_shapes
from torch_paged.integrations.transformers.attention import ATTENTION_NAME
from torch_paged.integrations.transformers.bind import bind, unbind
from torch_paged.integrations.transformers.checks import check_model, check_sizes, inside
from torch_paged.integrations.transformers.latent import LATENT_ATTENTION_NAME, keep_handle
from torch_paged.integrations.transformers.layer_plan import PatchReport, Reach, Way, plan_layers
from torch_paged.integrations.transformers.own_config import take_own_config
from torch_paged.integrations.transformers.paged_cache import PagedCache
from torch_paged.integrations.transformers.static_sizes import compiles_each_shape
from torch_paged.integrations.transformers.versions import PreTrainedConfig, draws_its_own_mask

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger("torch_paged.transformers")

_PREPARE = "_prepare_cache_for_generation"
_PATCH = "_torch_paged_patch"


class _Patch:
    """What ``unpatch_model`` needs: the report, the implementations before, and the hook of a gathered model."""

    def __init__(self, report: PatchReport, options: dict[str, Any]) -> None:
        self.report = report
        self.options = options
        self.implementations: Any = None
        self.hook: Any = None
        self.expanding: list[nn.Module] = []


def patch_model(
    model: Model,
    *,
    block_size: int = 16,
    dtype: torch.dtype | None = None,
    gather: bool = False,
    prefix_reuse: bool = False,
) -> Model:
    """Make a transformers model generate through ``torch.ops.paged.*``.

    Its attention implementation becomes ``"torch_paged"``, and ``generate`` makes a ``PagedCache`` where it would make
    a ``DynamicCache``. A model whose attention does not go through transformers' interface keeps its own attention, on
    dense copies gathered from the blocks. Only this instance changes; patching it again changes only the options, and
    ``unpatch_model`` takes all back. ``patch_report`` says what became of each layer, and so does a log line.

    Args:
        model: a model that can generate: decoder-only, encoder-decoder (its self-attention) or vision-language; or the
            adapter of peft around one, or what ``torch.compile`` made of it.
        block_size: tokens in a block of the cache.
        dtype: of a quantised cache, as in ``PagedCache``. None: the dtype of the keys.
        gather: True to gather in any case, for a model that changes keys after it cached them.
        prefix_reuse: True to keep the blocks of prompts from call to call of ``generate``, so that what a prompt has in
            common with earlier ones is not computed again. They are forgotten where weights or adapters change.

    Returns:
        The same model.

    Raises:
        ValueError: not a transformers model, a block size below 1, or a dtype that no quantised cache has.
        NotImplementedError: a model that the paged cache cannot serve, or a device that no backend serves.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from torch_paged.integrations.transformers import patch_model, patch_report
        >>> config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> model = patch_model(LlamaForCausalLM(config).eval())
        >>> print(patch_report(model))
        LlamaForCausalLM: layers: 2 paged (full attention)
        >>> prompt = torch.tensor([[5, 6, 7]])
        >>> model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0).shape
        torch.Size([1, 7])
    """
    _patch(inside(model), model, {"block_size": block_size, "dtype": dtype}, gather, prefix_reuse)
    return model


def _patch(model: Any, holder: nn.Module, options: dict[str, Any], gather: bool, prefix_reuse: bool) -> None:
    check_model("patch_model", model)
    check_sizes("patch_model", block_size=options["block_size"])
    name = type(model).__name__
    if not model.can_generate():
        raise NotImplementedError(f"patch_model: {name} cannot generate; load it with AutoModelForCausalLM")
    if not model._supports_default_dynamic_cache():  # type: ignore[operator]  # nn.Module hides it
        raise NotImplementedError(f"patch_model: {name} makes a cache of its own kind; use it unpatched")
    config = model.config.get_text_config(decoder=True)
    planned = plan_layers(config)
    if model.device.type not in dispatch.served():
        raise NotImplementedError(dispatch.no_backend("patch_model", model.device.type))
    PagedCache(config, **options)  # raises where an option is wrong
    before: _Patch | None = getattr(model, _PATCH, None)
    _unpatch(model)
    if _PREPARE in vars(model):
        raise NotImplementedError(
            f"patch_model: this {name} has a {_PREPARE} of its own; delete it or use it unpatched"
        )
    reason = "gather=True asks for it" if gather else _why_gathered(model, config)
    windows = any(isinstance(layer, Reach) and layer.window is not None for layer in planned)
    if reason and windows and draws_its_own_mask(model):
        raise NotImplementedError(
            f"patch_model: {name} draws masks that do not know of windows, and cannot be gathered ({reason}); "
            "use a newer transformers"
        )
    expanding = [module for module in model.modules() if hasattr(module, "expand_kv")]
    layers = tuple(layer if isinstance(layer, Reach) else type(layer).__name__ for layer in planned)
    way: Way = "gathered" if reason else "latent" if expanding else "paged"
    patch = _Patch(PatchReport(name, way, layers, reason), options)
    static = compiles_each_shape(model.device)
    why_not = static_shapes.why_unsupported(model, patch.report) if static else ""
    if why_not:
        raise NotImplementedError(
            f"patch_model: device '{model.device.type}' is not supported, where each shape is compiled: {why_not}"
        )
    why_padded = packed_prefill.why_padded(model, patch.report)
    if static:
        why_padded = f"device '{model.device.type}' compiles each shape"
    if prefix_reuse and why_padded:
        raise NotImplementedError(f"patch_model: prefix_reuse is not supported: {why_padded}")
    if not reason:
        if before is None or before.implementations is None:
            take_own_config(model, holder)
        patch.implementations = _set_implementation(model, LATENT_ATTENTION_NAME if expanding else ATTENTION_NAME)
        patch.expanding = expanding
        for module in expanding:
            bind(keep_handle, module, "expand_kv")
    before_forward = _prepare_gathered if reason else _refuse_attentions
    patch.hook = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    setattr(model, _PATCH, patch)
    bind(_prepare_cache, model, _PREPARE)
    if not why_padded:
        packed_prefill.install(model, packed_prefill.PrefixPool(options) if prefix_reuse else None)
    if static:
        static_shapes.install(model)
    logger.info("patch_model: %s", patch.report)


def unpatch_model(model: Model) -> Model:
    """Take back what ``patch_model`` did; an unpatched model stays as it is.

    Args:
        model: the model.

    Returns:
        The same model, with the attention implementation that it had.
    """
    _unpatch(inside(model))
    return model


def _unpatch(model: Any) -> None:
    patch: _Patch | None = getattr(model, _PATCH, None)
    if patch is None:
        return
    patch.hook.remove()
    if patch.implementations is not None:
        model.set_attn_implementation(patch.implementations)  # type: ignore[operator]
    for module in patch.expanding:
        unbind(keep_handle, module, "expand_kv")
    delattr(model, _PATCH)
    unbind(_prepare_cache, model, _PREPARE)
    packed_prefill.uninstall(model)
    static_shapes.uninstall(model)
    if hasattr(model, "_compiled_call"):
        del model._compiled_call


def patch_report(model: nn.Module) -> PatchReport | None:
    """Return what ``patch_model`` did to a model, None where it did nothing."""
    patch: _Patch | None = getattr(inside(model), _PATCH, None)
    return None if patch is None else patch.report


def _why_gathered(model: Any, config: PreTrainedConfig) -> str:
    """Return why the model's own attention has to read dense keys, empty where it has not."""
    name = type(model).__name__
    if not model._can_set_attn_implementation():
        return f"{name} does not use transformers' attention interface"
    if any(hasattr(module, "relative_attention_bias") for module in model.modules()):
        return f"{name} adds a bias for relative positions to its logits"
    for module in model.modules():
        up = getattr(module, "kv_b_proj", None)
        if hasattr(module, "expand_kv") and not (type(up) is nn.Linear and type(up.weight.data) is Tensor):
            return f"{type(module).__name__} computes its keys by something else than a plain Linear"
    return ""


def _set_implementation(model: Any, name: str) -> Any:
    """Set the attention implementation of the decoder alone; return what to set to have the old one back."""
    config = model.config.get_text_config(decoder=True)
    part = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is config), None)
    before = config._attn_implementation
    model.set_attn_implementation(name if part is None else {part: name})
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != name:
        model.set_attn_implementation(before if part is None else {part: before})
        raise NotImplementedError(
            f"patch_model: {type(model).__name__} did not take the attention implementation '{name}'"
        )
    return before if part is None else {part: before}


def _refuse_attentions(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "patch_model: output_attentions is not supported, the ops do not return weights; call unpatch_model(model)"
        )


def _prepare_gathered(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell a paged cache, before each forward, that dense keys are read and which columns are padding."""
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given.update(given.pop("kwargs", {}))
    cache = given.get("past_key_values")
    mask = given.get("attention_mask")
    inputs, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
        mask = given.get("decoder_attention_mask")
        inputs, embeddings = given.get("decoder_input_ids"), given.get("decoder_inputs_embeds")
    if isinstance(cache, PagedCache):
        cache.gathered = True
        tokens = inputs if inputs is not None else embeddings
        padding_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if tokens is not None:
            cache.prepare(tokens.shape[0], tokens.shape[1], padding_mask)
            cache.hides_tokens(padding_mask)  # raises where padding comes back
            for reach in cache.groups:
                _check_forgotten(cache, reach, mask)


def _check_forgotten(cache: PagedCache, reach: Reach, mask: Any) -> None:
    if isinstance(mask, dict):
        mask = mask.get("sliding_attention" if reach.window is not None else "chunked_attention")
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return
    forgotten = cache.forgotten(reach)
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if forgotten is not None and bool((shown & forgotten[:, None, None]).any()):
        raise ValueError(
            f"patch_model: attention_mask must hide the keys that gathered layers with {reach} have forgotten, "
            "got one that shows them"
        )


def _prepare_cache(
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    given = model_kwargs.get("past_key_values")
    may_compile = not generation_config.disable_compile
    may_compile &= model.device.type != "cpu" or generation_config.compile_config is not None
    may_compile &= not draws_its_own_mask(model)
    if isinstance(given, PagedCache):
        given.may_compile = may_compile
    wants_cache = generation_config.use_cache is not False and generation_config.cache_implementation is None
    if given is not None or not wants_cache:
        original = getattr(type(model), _PREPARE)
        return original(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    patch: _Patch = getattr(model, _PATCH)
    if compiles_each_shape(model.device) != static_shapes.is_installed(model):
        raise RuntimeError(
            f"patch_model: the model was moved to '{model.device.type}' since; call patch_model(model) again"
        )
    cache: Any
    if (pool := packed_prefill.prefix_pool(model)) is not None:
        cache = pool.new_cache(model, max_cache_length)
    else:
        cache = PagedCache(model.config, max_cache_length=max_cache_length, device=model.device, **patch.options)
    cache.gathered = patch.report.way == "gathered"
    cache.may_compile = may_compile
    if model.config.is_encoder_decoder:
        cross = DynamicCache(config=model.config.get_text_config(decoder=True))
        cache = EncoderDecoderCache(cache, cross)
    if generation_config.is_assistant:
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache
    return None
