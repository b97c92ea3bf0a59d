"""The prefill of ``generate`` without padding, and on blocks that hold the beginning of a prompt already."""

import contextlib
import copy
import functools
import hashlib
import types
from typing import Any

import torch
import transformers
from torch import Tensor

from torch_paged.integrations.transformers.layer_plan import PatchReport
from torch_paged.integrations.transformers.paged_cache import PagedCache
from torch_paged.integrations.transformers.rope import most_packed_tokens

_METHODS = ("_prefill", "generate")
_TEXT_ONLY = frozenset(
    {"attention_mask", "position_ids", "cache_position", "past_key_values", "use_cache", "logits_to_keep"}
)


class PrefixPool:
    """The blocks that a patched model keeps from call to call.

    Each call of ``generate`` gets a cache of its own on the same blocks; what the call's rows held is released when it
    ends, unless the cache is returned, and stays findable until the memory is wanted.
    """

    def __init__(self, empty: PagedCache) -> None:
        self._empty = empty
        self._made: list[PagedCache] = []

    def new_cache(self, max_cache_length: int) -> PagedCache:
        """Return an empty cache on these blocks."""
        cache = copy.deepcopy(self._empty)
        cache.max_cache_length = max_cache_length
        self._made.append(cache)
        return cache

    @contextlib.contextmanager
    def call(self) -> Any:
        """Release what was made within, but for a cache that is put into the list that this yields."""
        before, returned = len(self._made), list[Any]()
        try:
            yield returned
        finally:
            for cache in self._made[before:]:
                if not any(cache is kept for kept in returned):
                    cache.reset()
            del self._made[before:]


def why_padded(model: Any, report: PatchReport) -> str:
    """Return why the prefill of a patched model stays padded, empty where it does not."""
    name = type(model).__name__
    if not hasattr(type(model), "_prefill"):
        return f"the prefill of transformers {transformers.__version__} is a part of its loops"
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if model.config.get_text_config(decoder=True) is not model.config:
        return f"{name} does not only take text"
    if report.way == "gathered":
        return f"the keys of {name} are gathered"
    kept = [layer for layer in report.layers if isinstance(layer, str) and layer != "DummyLayer"]
    return f"{name} has a {kept[0]}" if kept else ""


def install(model: Any, prefix_pool: PrefixPool | None) -> None:
    """Wrap ``_prefill`` of a model, and ``generate`` where prefixes are kept; of this instance only."""
    model._prefill = types.MethodType(_packed_prefill(type(model)._prefill), model)
    if prefix_pool is not None:
        model.generate = types.MethodType(_releasing(type(model).generate, prefix_pool), model)


def uninstall(model: Any) -> None:
    """Take back what ``install`` did."""
    for name in _METHODS:
        vars(model).pop(name, None)


def cache_salt(model: Any) -> bytes:
    """Return what besides the ids decides a token's keys: the weights as they are now, and the adapters in use."""
    state: list[Any] = [torch.is_autocast_enabled(model.device.type)]
    for parameter in model.parameters():
        state.append((parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version))
    for module in model.modules():
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters"):
            state.append((list(module.active_adapters), list(module.merged_adapters), module.disable_adapters))
    return hashlib.sha256(repr(state).encode()).digest()


def _releasing(generate: Any, prefix_pool: PrefixPool) -> Any:
    @functools.wraps(generate)
    def wrapped(model: Any, *args: Any, **kwargs: Any) -> Any:
        with prefix_pool.call() as returned:
            result = generate(model, *args, **kwargs)
            returned.append(getattr(result, "past_key_values", None))
        return result

    return wrapped


def _packed_prefill(prefill: Any) -> Any:
    @functools.wraps(prefill)
    def wrapped(
        model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        mask = _mask_to_pack(input_ids, generation_config, model_kwargs)
        if mask is None:
            return prefill(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
        return _run_packed(model, input_ids, mask, model_kwargs)

    return wrapped


def _mask_to_pack(input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> Tensor | None:
    """Return which columns hold tokens, (B, Q) bool, where packing them saves something and is safe; else None."""
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, PagedCache) or cache.lengths or input_ids.ndim != 2:
        return None
    given = {name for name, value in model_kwargs.items() if value is not None}
    if not given <= _TEXT_ONLY or model_kwargs.get("logits_to_keep") != 1:
        return None
    if generation_config.prefill_chunk_size is not None or generation_config.is_assistant:
        return None
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)
    if mask.shape != input_ids.shape or not input_ids.numel():
        return None
    mask = mask.bool()
    worthwhile = cache.prefix_reuse or not bool(mask.all())
    return mask if worthwhile and bool(mask[:, -1].all()) else None


def _run_packed(model: Any, input_ids: Tensor, mask: Tensor, model_kwargs: dict[str, Any]) -> Any:
    cache: PagedCache = model_kwargs["past_key_values"]
    counted = (mask.long().cumsum(1) - 1).clamp(min=0)
    positions = model_kwargs.get("position_ids")
    positions = counted if positions is None or positions.shape != mask.shape else positions
    prompts, limit = None, most_packed_tokens(cache.config)
    long = limit is not None and mask.shape[1] > limit
    if cache.prefix_reuse and not long and torch.equal(positions[mask], counted[mask]):
        prompts = [row[real].tolist() for row, real in zip(input_ids, mask, strict=True)]
    reused = cache.prepare_packed(mask, prompts, salt=cache_salt(model))
    todo = mask & (mask.long().cumsum(1) > torch.tensor(reused, device=mask.device)[:, None])
    output = model(
        input_ids=input_ids[todo][None],
        position_ids=positions[todo][None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=todo.sum(1).cumsum(0) - 1,
        return_dict=True,
    )
    output.logits = output.logits[0][:, None]
    return output
