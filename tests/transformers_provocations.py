"""Small models, caches and changed surroundings, to provoke the errors of the integration with transformers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from error_table import Error
from tiny_models import make_model
from torch import Tensor

from torch_paged.integrations.transformers import (
    PagedCache,
    patch_model,
    static_sizes,
)

PARTS = "torch_paged.integrations.transformers"
PROMPT = torch.tensor([[5, 6, 7]])
UNPAGED = "Use the model unpatched."
GENERATE = "Use `model.generate()`."


def patched(family: str = "llama", **options: Any) -> Any:
    return patch_model(make_model(family), block_size=4, **options)


def new_cache(model: Any = None, **options: Any) -> PagedCache:
    return PagedCache((model or patched()).config, **{"block_size": 4, **options})


def each_shape_is_compiled() -> AbstractContextManager[Any]:
    return patch.object(static_sizes, "_DEVICES", ("cpu",))


def forward(model: Any, ids: Tensor = PROMPT, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, **options)


def own_masks(family: str, use: Callable[[Any], Any]) -> Callable[[], Any]:
    def provoke() -> Any:
        model = make_model(family)
        with patch.object(type(model.model), "_update_causal_mask", None, create=True):
            return use(model)

    return provoke


def under_static_shapes(call: Callable[[Any], Any]) -> None:
    model = patched()
    with each_shape_is_compiled():
        call(model)


def value_error(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("ValueError", text, cause, remedy, provoke)


def not_supported(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("NotImplementedError", text, cause, remedy, provoke)


def runtime_error(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("RuntimeError", text, cause, remedy, provoke)
