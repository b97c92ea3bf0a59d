"""The errors of ``PagedCache`` and of the attention function that reads it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from error_table import Group
from tiny_models import PROMPT_COLUMNS, make_model, ragged_batch
from torch import Tensor, nn
from transformers_provocations import (
    GENERATE,
    PARTS,
    PROMPT,
    UNPAGED,
    each_shape_is_compiled,
    forward,
    new_cache,
    not_supported,
    patched,
    runtime_error,
    value_error,
)

from torch_paged.integrations.transformers import (
    BatchGenerator,
    PagedCache,
    attention,
    latent,
)

_EAGER = "Run the forward eagerly."


def _while_compiling() -> AbstractContextManager[Any]:
    return patch("torch.compiler.is_compiling", lambda: True)


def _with_another_mask() -> AbstractContextManager[Any]:
    return patch(f"{PARTS}.mask._is_causal", lambda function, options: False)


def _attend(mask: Tensor | None = None, **options: Any) -> None:
    """Give a handle to the attention function."""
    model = patched()
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    handle, _ = new_cache(model).update(key, key, 0)
    attention.attention_forward(model.model.layers[0].self_attn, query, handle, handle, mask, **options)


def _copied_handle() -> None:
    model, update = patched(), PagedCache.update
    with patch.object(
        PagedCache, "update", lambda *args, **options: tuple(x.clone() for x in update(*args, **options))
    ):
        forward(model, past_key_values=new_cache(model))


def _copied_latent() -> None:
    latent.keep_handle(nn.Linear(1, 1), torch.ones(1, 1, 1), torch.ones(1))


def _lost_handle() -> None:
    cache, key = new_cache(), torch.randn(1, 2, 3, 16)
    cache.update(key, key, 0)
    cache.update(key, key, 1)


def _half_a_forward() -> None:
    model = patched()
    cache = new_cache(model)
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    handle, _ = cache.update(key, key, 0)
    attention.attention_forward(model.model.layers[0].self_attn, query, handle, handle, None)
    cache.prepare(1, 1)


def _padding_comes_back() -> None:
    model, batch = patched(), ragged_batch()
    cache = new_cache(model)
    forward(model, batch["input_ids"], attention_mask=batch["attention_mask"], past_key_values=cache)
    mask = torch.ones(3, PROMPT_COLUMNS + 1, dtype=torch.long)
    forward(model, torch.tensor([[7], [8], [9]]), attention_mask=mask, past_key_values=cache)


def _forgotten_padding() -> None:
    model = patched()
    cache = new_cache(model)
    cache.prepare(1, 3, torch.tensor([[False, True, True]]))
    cache.prepare(1, 3)
    forward(model, attention_mask=torch.ones_like(PROMPT), past_key_values=cache)


def _another_batch() -> None:
    model = patched()
    cache = new_cache(model)
    forward(model, past_key_values=cache)
    forward(model, torch.tensor([[3], [4]]), past_key_values=cache)


def _unprepared() -> None:
    with _while_compiling():
        new_cache().prepare(1, 1)


def _first_forward_compiled() -> None:
    layer: Any = new_cache().layers[0]
    with _while_compiling():
        layer.lazy_initialization(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16))


def _wide_values() -> None:
    new_cache().update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 24), 0)


def _latent_unpatched() -> None:
    model = make_model("deepseek_v3")
    model.set_attn_implementation("torch_paged")
    forward(model, past_key_values=PagedCache(model.config))


def _image_mask(packed: bool = False, compiling: bool = False, static: bool = False) -> Callable[[], Any]:
    def provoke() -> None:
        model = patched()
        cache = new_cache(model)
        cache.prepare(1, 3)
        with ExitStack() as stack:
            stack.enter_context(_with_another_mask())
            if compiling:
                stack.enter_context(_while_compiling())
            if static:
                stack.enter_context(each_shape_is_compiled())
            if packed:
                batch = BatchGenerator(model)
                batch.add_request([5, 6, 7], max_new_tokens=2)
                batch.step()
            else:
                forward(model, past_key_values=cache)

    return provoke


def _forward_of_static_shapes(**options: Any) -> Callable[[], Any]:
    def provoke() -> None:
        with each_shape_is_compiled():
            model = patched()
            forward(model, past_key_values=new_cache(model), **options)

    return provoke


def _hidden_on_static_shapes() -> None:
    with each_shape_is_compiled():
        model = patched()
        cache = new_cache(model)
        forward(model, past_key_values=cache)
        forward(model, PROMPT[:, :1], attention_mask=torch.tensor([[0, 1, 1, 1]]), past_key_values=cache)


def _part_of_a_packed_row() -> None:
    lengths = torch.ones(2, dtype=torch.int32)
    attention._step_of_last(SimpleNamespace(max_seqlen_q=2, context_lens=lengths), 1, 1)  # type: ignore[arg-type]


def _row_that_is_not_there(method: str) -> Callable[[], Any]:
    def provoke() -> None:
        model = patched()
        cache = new_cache(model)
        forward(model, past_key_values=cache)
        getattr(cache, method)(torch.tensor([5]))

    return provoke


CACHE = Group(
    "transformers: PagedCache and attention",
    (
        value_error(
            "PagedCache: <argument> must be an int >= 1, got <value>",
            "A size is 0 or negative, a float or a string.",
            "Leave it out.",
            lambda: new_cache(block_size=0),
            lambda: new_cache(max_cache_length=1.5),
        ),
        value_error(
            "PagedCache: config must be that of a transformers model, got <type>",
            "It is the model, a dict or None.",
            "Pass `model.config`.",
            lambda: PagedCache(patched()),
        ),
        value_error(
            "PagedCache: layer_idx must be < <n>, the layers of the config that the cache was made of, got <n>",
            "The cache was made for a model with fewer layers.",
            "Make it of this model's config.",
            lambda: new_cache().update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 99),
        ),
        value_error(
            "PagedCache: rows must be in [0, <n>), got <n>",
            "`reorder_cache` or `batch_select_indices` names a row that the cache does not have.",
            "Name rows of the batch that was cached.",
            _row_that_is_not_there("reorder_cache"),
            _row_that_is_not_there("batch_select_indices"),
        ),
        value_error(
            "PagedCache: dtype must be None, int8, float8_e4m3fn or float8_e5m2, got <dtype>",
            "`dtype` asks for a quantised cache; otherwise the keys' own is taken.",
            "Pass None.",
            lambda: new_cache(dtype=torch.float16),
        ),
        value_error(
            "PagedCache: batch size must be <n> as cached, got <n>",
            "A forward has another number of rows than the cache.",
            "Make a new cache, or reorder this one.",
            _another_batch,
        ),
        value_error(
            "PagedCache: attention_mask must hide what was padding in earlier forwards, got 1 where it was 0",
            "Of padding no key was kept.",
            "Append to the mask; do not rewrite it.",
            _padding_comes_back,
        ),
        value_error(
            "PagedCache: tokens_to_remove must be in [<n>, 0], got <value>",
            "`crop` takes a negative number of tokens off the end.",
            "Pass a negative number, or a length below the present one.",
            lambda: new_cache().crop(-5),
        ),
        value_error(
            "PagedCache: the model's attention implementation must be 'torch_paged', got <name>; call "
            "patch_model(model), and make the cache of model.config",
            "Another implementation would take the handle for keys.",
            "Patch the model first.",
            lambda: forward(make_model("llama"), past_key_values=new_cache(make_model("llama"))),
        ),
        not_supported(
            "PagedCache: <model> caches compressed keys (multi-head latent attention); call patch_model(model), which "
            "makes its layers attend to them",
            "The attention implementation alone was set.",
            "Call `patch_model(model)`.",
            _latent_unpatched,
        ),
        not_supported(
            "PagedCache: layer <n> has values wider than its keys, <n> and <n>",
            "The cache has room for values up to the keys' width.",
            UNPAGED,
            _wide_values,
        ),
        runtime_error(
            "PagedCache: attention_mask must mark the padding that this forward was prepared with, got no padding; "
            "after a forward that failed call settle()",
            "`prepare` was told of padding, the forward was not; or an earlier forward failed.",
            "Pass the same mask to both, or call `cache.settle()`.",
            _forgotten_padding,
        ),
        runtime_error(
            "PagedCache: the keys that update() returned must reach the torch_paged attention function, got lost; the "
            "model copies them, or does not use the attention interface: call patch_model(model)",
            "The model attends by code of its own.",
            "`patch_model(model)` gathers dense keys for such a model.",
            _lost_handle,
        ),
        runtime_error(
            "PagedCache: the forward before wrote <n> of <n> layers; call reset() and start again",
            "A forward stopped half way, by an exception or an interrupt.",
            "Call `cache.reset()`.",
            _half_a_forward,
        ),
        runtime_error(
            "PagedCache: call prepare() before each compiled forward",
            "Blocks are handed out on the host, which a graph cannot.",
            "Call `cache.prepare(batch, tokens)` before the graph.",
            _unprepared,
        ),
        runtime_error(
            "PagedCache: the first forward must run eagerly, got a compiled one; run the prefill first",
            "The first keys tell shape and dtype of the cache.",
            "Run the prefill uncompiled.",
            _first_forward_compiled,
        ),
        runtime_error(
            "attention: key must be the handle that PagedCache.update() returned, got a copy or a view of it; "
            "<module> changes keys after the cache update: call patch_model(model, gather=True)",
            "The model works on keys after they were cached.",
            "Patch it with `gather=True`.",
            _copied_handle,
            _copied_latent,
        ),
        not_supported(
            "attention: torch_paged does not support output_attentions, the ops do not return weights",
            "Attention weights are never computed as a whole.",
            "Unpatch the model for this call.",
            lambda: _attend(output_attentions=True),
        ),
        not_supported(
            "attention: PagedCache does not support dropout (<value>); call model.eval()",
            "The model is in training mode.",
            "Call `model.eval()`.",
            lambda: _attend(dropout=0.1),
        ),
        not_supported(
            "attention: PagedCache does not support bidirectional attention (<module>)",
            "The module asks for keys after the query.",
            "Pass `is_causal=True`, or a mask.",
            lambda: _attend(is_causal=False),
        ),
        not_supported(
            "attention: PagedCache does not support a window of <n> (<module>) in a layer whose cache has <n>",
            "The module's window is not the one of its config.",
            "Set `sliding_window` and `layer_types` of the config, then make the cache.",
            lambda: _attend(sliding_window=5),
        ),
        not_supported(
            "attention: PagedCache does not support <argument> (<module>); leave it out",
            "The argument belongs to another way of packing.",
            "Leave it out.",
            lambda: _attend(cu_seq_lens_q=PROMPT),
        ),
        not_supported(
            "attention: PagedCache does not support a part of the queries of a packed forward",
            "Layers that share keys got some of the packed tokens only.",
            GENERATE,
            _part_of_a_packed_row,
        ),
        not_supported(
            "attention_mask: PagedCache does not support masks other than causal, window and chunk for packed tokens",
            "A model with image or prefix masks was given packed requests.",
            GENERATE,
            _image_mask(packed=True),
        ),
        not_supported(
            "attention_mask: PagedCache does not support masks other than causal, window and chunk in a compiled "
            "forward; run it eagerly",
            "Such a mask is built from lengths on the host.",
            _EAGER,
            _image_mask(compiling=True),
        ),
        not_supported(
            "attention_mask: PagedCache does not support masks other than causal, window and chunk on device "
            "<device>, where each shape is compiled; run it on the CPU",
            "Such a mask has a shape of its own in each forward.",
            "Run it on the CPU.",
            _image_mask(static=True),
        ),
        not_supported(
            "attention_mask: PagedCache supports masks of columns alone on device <device>, got <n> dimensions",
            "Forwards are padded to few shapes there, for which a mask of all pairs would have to be rebuilt.",
            "Pass (batch, columns).",
            _forward_of_static_shapes(attention_mask=torch.ones(1, 1, 3, 3)),
        ),
        not_supported(
            "attention_mask: PagedCache does not support masks that hide cached tokens on device <device>",
            "Cached tokens are hidden by a mask of a shape of its own.",
            "Crop the cache, or run on the CPU.",
            _hidden_on_static_shapes,
        ),
        not_supported(
            "<argument>: not supported with a PagedCache on device <device>",
            "The result would hold the padding of the forward.",
            "Ask for logits alone.",
            _forward_of_static_shapes(output_hidden_states=True),
            _forward_of_static_shapes(labels=PROMPT),
        ),
    ),
)
