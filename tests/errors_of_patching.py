"""The errors of ``patch_model``."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from error_table import Error, Group
from tiny_models import COMMON, PROMPT_COLUMNS, make_model, ragged_batch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
)
from transformers_provocations import (
    PARTS,
    PROMPT,
    UNPAGED,
    each_shape_is_compiled,
    forward,
    new_cache,
    not_supported,
    own_masks,
    patched,
    runtime_error,
    under_static_shapes,
    value_error,
)

from torch_paged.integrations.transformers import (
    BatchGenerator,
    generate_batch,
    patch_model,
    versions,
)


def _patch_under(*changes: AbstractContextManager[Any], family: str = "llama", **options: Any) -> Callable[[], Any]:
    """Return a patching of a new model under changes of its surroundings."""

    def provoke() -> None:
        model = make_model(family)
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            patch_model(model, **options)

    return provoke


def _layers(*layers: Any) -> AbstractContextManager[Any]:
    return patch(f"{PARTS}.layer_plan.DynamicCache", lambda config: SimpleNamespace(layers=list(layers)))


def _on_meta(make: Callable[[], Any]) -> Callable[[], Any]:
    def provoke() -> None:
        with torch.device("meta"):
            model = make()
        patch_model(model)

    return provoke


def _without_dynamic_cache() -> None:
    model = make_model("llama")
    with patch.object(type(model), "_supports_default_dynamic_cache", lambda self: False):
        patch_model(model)


def _own_prepare() -> None:
    model = make_model("llama")
    model._prepare_cache_for_generation = lambda *args: None
    patch_model(model)


def _deaf() -> None:
    model = make_model("llama")
    model.set_attn_implementation = lambda implementation: None
    patch_model(model)


def _moved() -> None:
    model = patched()
    with each_shape_is_compiled():
        model.generate(PROMPT, max_new_tokens=1)


def _shown_again() -> None:
    model = patched("mistral", gather=True)
    cache, ids = new_cache(model), ragged_batch()["input_ids"]
    forward(model, ids[:, :-1], past_key_values=cache)
    forward(model, ids[:, -1:], attention_mask=torch.zeros(3, 1, 1, PROMPT_COLUMNS), past_key_values=cache)


PATCHING = Group(
    "transformers: patch_model",
    (
        Error(
            "ImportError",
            "torch_paged: transformers must be <version> or newer, got <version>; upgrade it",
            "The cache classes that the integration builds on are newer.",
            "`pip install -U transformers`.",
            (partial(versions.check_version, "4.56.2"),),
        ),
        value_error(
            "<function>: model must be a transformers PreTrainedModel, got <type>",
            "Only models of transformers can be patched; wrappers of peft are seen through.",
            "Pass the model itself.",
            lambda: patch_model(nn.Linear(1, 1)),
            lambda: BatchGenerator(None),
            lambda: generate_batch(None, [[5]]),
        ),
        value_error(
            "patch_model: block_size must be an int >= 1, got <value>",
            "A block holds at least one token.",
            "Pass 16, or leave it out.",
            lambda: patch_model(make_model("llama"), block_size=0),
            _patch_under(block_size="16"),
            _patch_under(block_size=None),
        ),
        not_supported(
            "patch_model: <model> cannot generate; load it with AutoModelForCausalLM",
            "The model has no head that predicts tokens.",
            "Load the class with a head.",
            _on_meta(lambda: LlamaModel(LlamaConfig(**COMMON))),
        ),
        not_supported(
            "patch_model: <model> makes a cache of its own kind; use it unpatched",
            "The model's state is no keys and values.",
            UNPAGED,
            _without_dynamic_cache,
        ),
        not_supported(
            "PagedCache: layer <n> of <model> keeps its keys in a <layer>, which is not supported; use the model "
            "unpatched",
            "The version of transformers has a kind of cache layer that the paged cache does not know.",
            UNPAGED,
            _patch_under(_layers(object())),
        ),
        not_supported(
            "PagedCache: no layer of <model> has keys to page; use the model unpatched",
            "All layers are linear attention or another recurrence.",
            UNPAGED,
            _patch_under(_layers()),
        ),
        not_supported(
            "patch_model: no backend serves device <device> (available backends: <names>); <what to do>",
            "The model is on a device without a backend.",
            "Move the model with `.to(...)`.",
            _on_meta(lambda: make_model("llama").to("meta")),
        ),
        not_supported(
            "patch_model: this <model> has a _prepare_cache_for_generation of its own; delete it or use it unpatched",
            "Another library patched this model's cache.",
            "Take that patch off first.",
            _own_prepare,
        ),
        not_supported(
            "patch_model: <model> draws masks that do not know of windows, and cannot be gathered (<reason>); use a "
            "newer transformers",
            "In this version the model's masks would show keys that the cache has forgotten.",
            "Upgrade transformers.",
            own_masks("mistral", lambda model: patch_model(model, gather=True)),
        ),
        not_supported(
            "patch_model: device <device> is not supported, where each shape is compiled: <reason>",
            "On XLA devices forwards are padded to few shapes, which this model does not allow.",
            "Run it on the CPU.",
            lambda: under_static_shapes(lambda model: patch_model(make_model("bloom"))),
        ),
        not_supported(
            "patch_model: prefix_reuse is not supported: <reason>",
            "Prompts can be reused only where they are computed packed.",
            "Leave the option out.",
            lambda: patch_model(make_model("bloom"), prefix_reuse=True),
        ),
        not_supported(
            "patch_model: <model> did not take the attention implementation <name>",
            "The model overrides `set_attn_implementation`.",
            UNPAGED,
            _deaf,
        ),
        not_supported(
            "patch_model: output_attentions is not supported, the ops do not return weights; call unpatch_model(model)",
            "Attention weights are never computed as a whole.",
            "Unpatch the model for this call.",
            lambda: forward(patched("gpt2"), output_attentions=True),
        ),
        value_error(
            "patch_model: attention_mask must hide the keys that gathered layers with <reach> have forgotten, got one "
            "that shows them",
            "A layer with a window keeps no older keys, and the mask asks for them.",
            "Pass a mask with the window in it.",
            _shown_again,
        ),
        runtime_error(
            "patch_model: the model was moved to <device> since; call patch_model(model) again",
            "How forwards are shaped depends on the device.",
            "Patch the model after it was moved.",
            _moved,
        ),
    ),
)
