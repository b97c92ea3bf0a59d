"""The prefill of ``generate`` without padding, and on blocks that hold the beginning of a prompt already."""

import contextlib
import copy
import hashlib
import inspect
import itertools
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin

from torch_paged.integrations.transformers.bind import bind, call_bound, unbind
from torch_paged.integrations.transformers.layer_plan import PatchReport
from torch_paged.integrations.transformers.paged_cache import PagedCache
from torch_paged.integrations.transformers.rope import most_packed_tokens, most_tokens_in_row

_POOL = "_torch_paged_prefix_pool"
_INPUTS = "prepare_inputs_for_generation"
_SAMPLES = 16  # values of a weight that are looked at: changes through .data leave its version as it was
_TEXT_ONLY = frozenset(
    {"attention_mask", "position_ids", "cache_position", "past_key_values", "use_cache", "logits_to_keep"}
)


class PrefixPool:
    """The blocks that a patched model keeps from call to call.

    Each call of ``generate`` gets a cache of its own on the same blocks; what the call's rows held is released when it
    ends, unless the cache is returned, and stays findable until the memory is wanted. A model that is moved, or has
    another dtype, begins anew.

    Args:
        options: of the caches.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._kind: tuple[Any, ...] | None = None  # of the keys in the blocks
        self._made: list[PagedCache] | None = None  # in the call that runs; a cache that is made outside dies by itself

    def __reduce__(self) -> Any:
        return PrefixPool, (self._options,)  # a copy of the model has no keys yet

    def new_cache(self, model: Any, max_cache_length: int) -> PagedCache:
        """Return an empty cache on these blocks."""
        kind = (model.device, model.dtype, _autocast_dtype(model))
        if kind != self._kind:
            self._kind = kind
            self._empty = PagedCache(model.config, device=model.device, prefix_reuse=True, **self._options)
        cache = copy.deepcopy(self._empty)
        cache.max_cache_length = max_cache_length
        if self._made is not None:
            self._made.append(cache)
        return cache

    @contextlib.contextmanager
    def call(self) -> Any:
        """Release what was made within, but for a cache that is put into the list that this yields."""
        outer, made, returned = self._made, list[PagedCache](), list[Any]()
        self._made = made
        try:
            yield returned
        finally:
            self._made = outer
            for cache in made:
                if not any(cache is kept for kept in returned):
                    cache.reset()


def why_padded(model: Any, report: PatchReport) -> str:
    """Return why the prefill of a patched model stays padded, empty where it does not."""
    name = type(model).__name__
    if not hasattr(type(model), "_prefill"):
        return f"the prefill of transformers {transformers.__version__} is a part of its loops"
    if type(model)._prefill is not GenerationMixin._prefill or "_prefill" in vars(model):
        return f"{name} has a _prefill of its own"
    if _INPUTS in vars(model):
        return f"{name} has a {_INPUTS} of its own"
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if model.config.get_text_config(decoder=True) is not model.config:
        return f"{name} does not only take text"
    if report.way == "gathered":
        return f"the keys of {name} are gathered"
    if not takes_positions(model):
        return f"{name} takes no position_ids"
    kept = [layer for layer in report.layers if isinstance(layer, str) and layer != "DummyLayer"]
    return f"{name} has a {kept[0]}" if kept else ""


def takes_positions(model: Any) -> bool:
    """Say whether a model can be told where the tokens of a packed row stand in their sequences."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def install(model: Any, pool: PrefixPool | None) -> None:
    """Wrap ``_prefill`` of a model, and ``generate`` where prefixes are kept; of this instance only."""
    bind(_prefill, model, "_prefill")
    if pool is not None:
        setattr(model, _POOL, pool)
        bind(_generate, model, "generate")


def prefix_pool(model: Any) -> PrefixPool | None:
    """Return where a model keeps prefixes, None where it does not."""
    return getattr(model, _POOL, None)


def uninstall(model: Any) -> None:
    """Take back what ``install`` did."""
    unbind(_prefill, model, "_prefill")
    unbind(_generate, model, "generate")
    vars(model).pop(_POOL, None)


def cache_salt(model: Any) -> bytes:
    """Return what besides the ids decides a token's keys: the weights as they are now, and the adapters in use."""
    state: list[Any] = [_autocast_dtype(model)]
    samples: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        state.append((tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version))
        if tensor.numel() and type(tensor.data) is Tensor and tensor.is_contiguous() and not tensor.is_meta:
            flat = tensor.detach().view(-1)
            samples.setdefault((tensor.dtype, tensor.device), []).append(flat[:: -(-len(flat) // _SAMPLES)])
    for module in model.modules():
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters"):
            state.append((list(module.active_adapters), list(module.merged_adapters), module.disable_adapters))
    digest = hashlib.sha256(repr(state).encode())
    for alike in samples.values():
        digest.update(torch.cat(alike).view(torch.uint8).cpu().numpy().tobytes())
    return digest.digest()


def _autocast_dtype(model: Any) -> torch.dtype | None:
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    with getattr(model, _POOL).call() as returned:
        result = call_bound(model, "generate", *args, **kwargs)
        returned.append(getattr(result, "past_key_values", None))
    return result


def _prefill(
    model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    mask = None if _INPUTS in vars(model) else _mask_to_pack(input_ids, generation_config, model_kwargs)
    if mask is None:
        return call_bound(model, "_prefill", input_ids, generation_config, model_kwargs, *args, **kwargs)
    return _run_packed(model, input_ids, mask, model_kwargs)


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
    positions = model_kwargs.get("position_ids")
    shapes = {mask.shape, input_ids.shape, input_ids.shape if positions is None else positions.shape}
    if len(shapes) > 1 or not input_ids.numel():
        return None
    mask = mask.bool()
    limit = most_tokens_in_row(cache.config)
    if limit is not None and int(mask.sum()) > limit:
        return None
    worthwhile = cache.prefix_reuse or not bool(mask.all())
    return mask if worthwhile and bool(mask[:, -1].all()) else None


def _run_packed(model: Any, input_ids: Tensor, mask: Tensor, model_kwargs: dict[str, Any]) -> Any:
    cache: PagedCache = model_kwargs["past_key_values"]
    counted = (mask.long().cumsum(1) - 1).clamp(min=0)
    positions = model_kwargs.get("position_ids")
    positions = counted if positions is None else positions
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
