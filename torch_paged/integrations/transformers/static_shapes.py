"""Devices that compile a program for every shape: few shapes, and the bookkeeping of ``generate`` on the host.

The columns of a forward, the pool and the block tables get sizes that are powers of two. ``generate`` runs on host
tensors, whose shapes change with every token; only what the model computes is on the device.
"""

import inspect
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from torch_paged.integrations.transformers.bind import bind, call_bound, unbind
from torch_paged.integrations.transformers.layer_plan import PatchReport
from torch_paged.integrations.transformers.paged_cache import PagedCache

_AFTER_COLUMNS = {"input_ids": 0, "position_ids": 0, "cache_position": 0, "token_type_ids": 0, "inputs_embeds": 1}
"""What has a value for each column -> its dimensions after that of the columns."""
_HOOKS = "_torch_paged_static_hooks"


def why_unsupported(model: Any, report: PatchReport) -> str:
    """Return why a patched model would need a new program at each step, empty where it does not."""
    name = type(model).__name__
    if report.way != "paged":
        return f"the keys of {name} are {report.way}"
    if model.config.is_encoder_decoder or model.config.get_text_config(decoder=True) is not model.config:
        return f"{name} does not only take text"
    parameters = inspect.signature(type(model).forward).parameters
    missing = [key for key in ("position_ids", "logits_to_keep") if key not in parameters]
    if missing:
        return f"{name} takes no {missing[0]}"
    kept = [layer for layer in report.layers if isinstance(layer, str)]
    return f"{name} has a {kept[0]}" if kept else ""


def install(model: nn.Module) -> None:
    """Pad the forwards of a model on its device, and let its ``generate`` keep books on the host."""
    hooks = (
        model.register_forward_pre_hook(_pad, with_kwargs=True),
        model.register_forward_hook(_trim, with_kwargs=True),
    )
    setattr(model, _HOOKS, hooks)
    bind(_generate, model, "generate")


def uninstall(model: nn.Module) -> None:
    """Take back what ``install`` did."""
    for hook in vars(model).pop(_HOOKS, ()):
        hook.remove()
    unbind(_generate, model, "generate")


def is_installed(model: nn.Module) -> bool:
    """Say whether ``install`` was called for a model."""
    return _HOOKS in vars(model)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*on a device type different than your model's device")
        result = call_bound(
            model, "generate", *map(_on_host, args), **{key: _on_host(value) for key, value in kwargs.items()}
        )
    device = given[0].device if given else model.device
    if isinstance(result, Tensor):
        return result.to(device)
    result.sequences = result.sequences.to(device)
    return result


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _pad(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Prepare the cache for a forward, pad the forward to as many columns, and move it to the device."""
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given.update(given.pop("kwargs", {}))
    cache, device = given.get("past_key_values"), model.device
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given["inputs_embeds"]
    if isinstance(cache, PagedCache):
        batch, columns = tokens.shape[:2]
        mask = _on_host(given.pop("attention_mask", None))
        if mask is not None and mask.ndim != 2:
            raise NotImplementedError(
                f"attention_mask: PagedCache supports masks of columns alone on device '{device.type}', "
                f"got {mask.ndim} dimensions"
            )
        cache.prepare(batch, columns, mask)
        if cache.hides_tokens(mask):
            raise NotImplementedError(
                f"attention_mask: PagedCache does not support masks that hide cached tokens on device '{device.type}'"
            )
        hidden_states = given.get("output_hidden_states")
        refused = {
            "output_hidden_states": model.config.output_hidden_states if hidden_states is None else hidden_states,
            "labels": given.get("labels") is not None,
        }
        for name in (name for name, asked in refused.items() if asked):
            raise NotImplementedError(f"{name}: not supported with a PagedCache on device '{device.type}'")
        if given.get("position_ids") is None:
            begin = cache.get_seq_length()
            given["position_ids"] = torch.arange(begin, begin + columns)[None]
        keep = given.get("logits_to_keep", 0)
        padding = cache.forward_columns - columns
        if isinstance(keep, int) and keep and cache.forward_columns > 1:
            given["logits_to_keep"] = torch.arange(max(0, columns - keep), columns)
        for key, after in _AFTER_COLUMNS.items():
            if padding and isinstance(given.get(key), Tensor):  # on the host: on the device it would be a program
                given[key] = nn.functional.pad(given[key].cpu(), (*(0, 0) * after, 0, padding))
    return (), {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}


def _trim(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Run what a forward has recorded, and drop the logits of columns that were only padding."""
    if model.device.type == "xla":
        sys.modules["torch_xla"].sync()  # else the next forward would record this one again
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, PagedCache):
        return output
    if isinstance(output, ModelOutput):
        output["logits"] = _real_columns(output["logits"], cache)
        return output
    return _real_columns(output[0], cache), *output[1:]


def _real_columns(logits: Tensor, cache: PagedCache) -> Tensor:
    return logits[:, : cache.new_tokens] if logits.shape[1] == cache.forward_columns else logits
