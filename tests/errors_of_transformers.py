"""The errors of the integration with transformers: patching, the paged cache, packed generation."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from error_table import Error, Group
from tiny_models import COMMON, PROMPT_COLUMNS, make_model, ragged_batch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaModel,
    LogitsProcessorList,
)

from torch_paged.integrations.transformers import (
    BatchGenerator,
    GenerationRequest,
    PagedCache,
    attention,
    generate_batch,
    latent,
    patch_model,
    static_sizes,
    versions,
)
from torch_paged.integrations.transformers.packed_cache import PackedCache

_PARTS = "torch_paged.integrations.transformers"
_PROMPT = torch.tensor([[5, 6, 7]])
_UNPAGED = "Use the model unpatched."
_GENERATE = "Use `model.generate()`."
_EAGER = "Run the forward eagerly."


def _patched(family: str = "llama", **options: Any) -> Any:
    return patch_model(make_model(family), block_size=4, **options)


def _cache(model: Any = None, **options: Any) -> PagedCache:
    return PagedCache((model or _patched()).config, **{"block_size": 4, **options})


def _each_shape_is_compiled() -> AbstractContextManager[Any]:
    return patch.object(static_sizes, "_DEVICES", ("cpu",))


def _while_compiling() -> AbstractContextManager[Any]:
    return patch("torch.compiler.is_compiling", lambda: True)


def _with_another_mask() -> AbstractContextManager[Any]:
    return patch(f"{_PARTS}.mask._is_causal", lambda function, options: False)


def _forward(model: Any, ids: Tensor = _PROMPT, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, **options)


def _attend(mask: Tensor | None = None, **options: Any) -> None:
    """Give a handle to the attention function."""
    model = _patched()
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    handle, _ = _cache(model).update(key, key, 0)
    attention.attention_forward(model.model.layers[0].self_attn, query, handle, handle, mask, **options)


def _copied_handle() -> None:
    model, update = _patched(), PagedCache.update
    with patch.object(
        PagedCache, "update", lambda *args, **options: tuple(x.clone() for x in update(*args, **options))
    ):
        _forward(model, past_key_values=_cache(model))


def _copied_latent() -> None:
    latent.keep_handle(nn.Linear(1, 1), torch.ones(1, 1, 1), torch.ones(1))


def _lost_handle() -> None:
    cache, key = _cache(), torch.randn(1, 2, 3, 16)
    cache.update(key, key, 0)
    cache.update(key, key, 1)


def _half_a_forward() -> None:
    model = _patched()
    cache = _cache(model)
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    handle, _ = cache.update(key, key, 0)
    attention.attention_forward(model.model.layers[0].self_attn, query, handle, handle, None)
    cache.prepare(1, 1)


def _padding_comes_back() -> None:
    model, batch = _patched(), ragged_batch()
    cache = _cache(model)
    _forward(model, batch["input_ids"], attention_mask=batch["attention_mask"], past_key_values=cache)
    mask = torch.ones(3, PROMPT_COLUMNS + 1, dtype=torch.long)
    _forward(model, torch.tensor([[7], [8], [9]]), attention_mask=mask, past_key_values=cache)


def _forgotten_padding() -> None:
    model = _patched()
    cache = _cache(model)
    cache.prepare(1, 3, torch.tensor([[False, True, True]]))
    cache.prepare(1, 3)
    _forward(model, attention_mask=torch.ones_like(_PROMPT), past_key_values=cache)


def _another_batch() -> None:
    model = _patched()
    cache = _cache(model)
    _forward(model, past_key_values=cache)
    _forward(model, torch.tensor([[3], [4]]), past_key_values=cache)


def _unprepared() -> None:
    with _while_compiling():
        _cache().prepare(1, 1)


def _first_forward_compiled() -> None:
    layer: Any = _cache().layers[0]
    with _while_compiling():
        layer.lazy_initialization(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16))


def _wide_values() -> None:
    _cache().update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 24), 0)


def _latent_unpatched() -> None:
    model = make_model("deepseek_v3")
    model.set_attn_implementation("torch_paged")
    _forward(model, past_key_values=PagedCache(model.config))


def _image_mask(packed: bool = False, compiling: bool = False, static: bool = False) -> Callable[[], Any]:
    def provoke() -> None:
        model = _patched()
        cache = _cache(model)
        cache.prepare(1, 3)
        with ExitStack() as stack:
            stack.enter_context(_with_another_mask())
            if compiling:
                stack.enter_context(_while_compiling())
            if static:
                stack.enter_context(_each_shape_is_compiled())
            if packed:
                batch = BatchGenerator(model)
                batch.add_request([5, 6, 7], max_new_tokens=2)
                batch.step()
            else:
                _forward(model, past_key_values=cache)

    return provoke


def _forward_of_static_shapes(**options: Any) -> Callable[[], Any]:
    def provoke() -> None:
        with _each_shape_is_compiled():
            model = _patched()
            _forward(model, past_key_values=_cache(model), **options)

    return provoke


def _hidden_on_static_shapes() -> None:
    with _each_shape_is_compiled():
        model = _patched()
        cache = _cache(model)
        _forward(model, past_key_values=cache)
        _forward(model, _PROMPT[:, :1], attention_mask=torch.tensor([[0, 1, 1, 1]]), past_key_values=cache)


def _part_of_a_packed_row() -> None:
    lengths = torch.ones(2, dtype=torch.int32)
    attention._step_of_last(SimpleNamespace(max_seqlen_q=2, context_lens=lengths), 1, 1)  # type: ignore[arg-type]


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
    return patch(f"{_PARTS}.layer_plan.DynamicCache", lambda config: SimpleNamespace(layers=list(layers)))


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


def _own_masks(family: str, use: Callable[[Any], Any]) -> Callable[[], Any]:
    def provoke() -> Any:
        model = make_model(family)
        with patch.object(type(model.model), "_update_causal_mask", None, create=True):
            return use(model)

    return provoke


def _deaf() -> None:
    model = make_model("llama")
    model.set_attn_implementation = lambda implementation: None
    patch_model(model)


def _moved() -> None:
    model = _patched()
    with _each_shape_is_compiled():
        model.generate(_PROMPT, max_new_tokens=1)


def _shown_again() -> None:
    model = _patched("mistral", gather=True)
    cache, ids = _cache(model), ragged_batch()["input_ids"]
    _forward(model, ids[:, :-1], past_key_values=cache)
    _forward(model, ids[:, -1:], attention_mask=torch.zeros(3, 1, 1, PROMPT_COLUMNS), past_key_values=cache)


def _request(request: Any, *changes: AbstractContextManager[Any], **options: Any) -> Callable[[], Any]:
    """Return a request that fails; its error is in the output."""

    def provoke() -> Any:
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            return generate_batch(_patched(), [request], **options)[0].error

    return provoke


def _configured(**options: Any) -> Callable[[], Any]:
    return _request(GenerationRequest([5], GenerationConfig(**options)))


def _most_tokens(count: int) -> AbstractContextManager[Any]:
    return patch(f"{_PARTS}.batch_generator.most_packed_tokens", lambda config: count)


def _bart() -> Any:
    sizes: dict[str, Any] = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    return BartForCausalLM(BartConfig(vocab_size=32, pad_token_id=0, eos_token_id=None, **sizes)).eval()


def _under_static_shapes(call: Callable[[Any], Any]) -> None:
    model = _patched()
    with _each_shape_is_compiled():
        call(model)


def _packed() -> PackedCache:
    return PackedCache(_patched().config, num_blocks=4)


def _value(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("ValueError", text, cause, remedy, provoke)


def _cannot(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("NotImplementedError", text, cause, remedy, provoke)


def _state(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("RuntimeError", text, cause, remedy, provoke)


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
        _value(
            "patch_model: model must be a transformers PreTrainedModel, got <type>",
            "Only models of transformers can be patched; wrappers of peft are seen through.",
            "Pass the model itself.",
            lambda: patch_model(nn.Linear(1, 1)),
        ),
        _value(
            "patch_model: block_size must be >= 1, got <value>",
            "A block holds at least one token.",
            "Pass 16, or leave it out.",
            lambda: patch_model(make_model("llama"), block_size=0),
        ),
        _cannot(
            "patch_model: <model> cannot generate; load it with AutoModelForCausalLM",
            "The model has no head that predicts tokens.",
            "Load the class with a head.",
            _on_meta(lambda: LlamaModel(LlamaConfig(**COMMON))),
        ),
        _cannot(
            "patch_model: <model> makes a cache of its own kind; use it unpatched",
            "The model's state is no keys and values.",
            _UNPAGED,
            _without_dynamic_cache,
        ),
        _cannot(
            "PagedCache: layer <n> of <model> keeps its keys in a <layer>, which is not supported; use the "
            "model unpatched",
            "The version of transformers has a kind of cache layer that the paged cache does not know.",
            _UNPAGED,
            _patch_under(_layers(object())),
        ),
        _cannot(
            "PagedCache: no layer of <model> has keys to page; use the model unpatched",
            "All layers are linear attention or another recurrence.",
            _UNPAGED,
            _patch_under(_layers()),
        ),
        _cannot(
            "patch_model: no backend serves device <device> (available backends: <names>); <what to do>",
            "The model is on a device without a backend.",
            "Move the model with `.to(...)`.",
            _on_meta(lambda: make_model("llama").to("meta")),
        ),
        _cannot(
            "patch_model: this <model> has a _prepare_cache_for_generation of its own; delete it or use it unpatched",
            "Another library patched this model's cache.",
            "Take that patch off first.",
            _own_prepare,
        ),
        _cannot(
            "patch_model: <model> draws masks that do not know of windows, and cannot be gathered (<reason>); "
            "use a newer "
            "transformers",
            "In this version the model's masks would show keys that the cache has forgotten.",
            "Upgrade transformers.",
            _own_masks("mistral", lambda model: patch_model(model, gather=True)),
        ),
        _cannot(
            "patch_model: device <device> is not supported, where each shape is compiled: <reason>",
            "On XLA devices forwards are padded to few shapes, which this model does not allow.",
            "Run it on the CPU.",
            lambda: _under_static_shapes(lambda model: patch_model(make_model("bloom"))),
        ),
        _cannot(
            "patch_model: prefix_reuse is not supported: <reason>",
            "Prompts can be reused only where they are computed packed.",
            "Leave the option out.",
            lambda: patch_model(make_model("bloom"), prefix_reuse=True),
        ),
        _cannot(
            "patch_model: <model> did not take the attention implementation <name>",
            "The model overrides `set_attn_implementation`.",
            _UNPAGED,
            _deaf,
        ),
        _cannot(
            "patch_model: output_attentions is not supported, the ops do not return weights; call unpatch_model(model)",
            "Attention weights are never computed as a whole.",
            "Unpatch the model for this call.",
            lambda: _forward(_patched("gpt2"), output_attentions=True),
        ),
        _value(
            "patch_model: attention_mask must hide the keys that gathered layers with <reach> have forgotten, "
            "got one that "
            "shows them",
            "A layer with a window keeps no older keys, and the mask asks for them.",
            "Pass a mask with the window in it.",
            _shown_again,
        ),
        _state(
            "patch_model: the model was moved to <device> since; call patch_model(model) again",
            "How forwards are shaped depends on the device.",
            "Patch the model after it was moved.",
            _moved,
        ),
    ),
)
CACHE = Group(
    "transformers: PagedCache and attention",
    (
        _value(
            "PagedCache: <argument> must be >= 1, got <value>",
            "A size is 0 or negative.",
            "Pass None or leave it out.",
            lambda: _cache(block_size=0),
        ),
        _value(
            "PagedCache: dtype must be None, int8, float8_e4m3fn or float8_e5m2, got <dtype>",
            "`dtype` asks for a quantised cache; otherwise the keys' own is taken.",
            "Pass None.",
            lambda: _cache(dtype=torch.float16),
        ),
        _value(
            "PagedCache: batch size must be <n> as cached, got <n>",
            "A forward has another number of rows than the cache.",
            "Make a new cache, or reorder this one.",
            _another_batch,
        ),
        _value(
            "PagedCache: attention_mask must hide what was padding in earlier forwards, got 1 where it was 0",
            "Of padding no key was kept.",
            "Append to the mask; do not rewrite it.",
            _padding_comes_back,
        ),
        _value(
            "PagedCache: tokens_to_remove must be in [<n>, 0], got <value>",
            "`crop` takes a negative number of tokens off the end.",
            "Pass a negative number, or a length below the present one.",
            lambda: _cache().crop(-5),
        ),
        _value(
            "PagedCache: the model's attention implementation must be 'torch_paged', got <name>; call "
            "patch_model(model), and "
            "make the cache of model.config",
            "Another implementation would take the handle for keys.",
            "Patch the model first.",
            lambda: _forward(make_model("llama"), past_key_values=_cache(make_model("llama"))),
        ),
        _cannot(
            "PagedCache: <model> caches compressed keys (multi-head latent attention); call patch_model(model), "
            "which makes "
            "its layers attend to them",
            "The attention implementation alone was set.",
            "Call `patch_model(model)`.",
            _latent_unpatched,
        ),
        _cannot(
            "PagedCache: layer <n> has values wider than its keys, <n> and <n>",
            "The cache has room for values up to the keys' width.",
            _UNPAGED,
            _wide_values,
        ),
        _state(
            "PagedCache: attention_mask must mark the padding that this forward was prepared with, got no "
            "padding; after a "
            "forward that failed call settle()",
            "`prepare` was told of padding, the forward was not; or an earlier forward failed.",
            "Pass the same mask to both, or call `cache.settle()`.",
            _forgotten_padding,
        ),
        _state(
            "PagedCache: the keys that update() returned must reach the torch_paged attention function, got "
            "lost; the model "
            "copies them, or does not use the attention interface: call patch_model(model)",
            "The model attends by code of its own.",
            "`patch_model(model)` gathers dense keys for such a model.",
            _lost_handle,
        ),
        _state(
            "PagedCache: the forward before wrote <n> of <n> layers; call reset() and start again",
            "A forward stopped half way, by an exception or an interrupt.",
            "Call `cache.reset()`.",
            _half_a_forward,
        ),
        _state(
            "PagedCache: call prepare() before each compiled forward",
            "Blocks are handed out on the host, which a graph cannot.",
            "Call `cache.prepare(batch, tokens)` before the graph.",
            _unprepared,
        ),
        _state(
            "PagedCache: the first forward must run eagerly, got a compiled one; run the prefill first",
            "The first keys tell shape and dtype of the cache.",
            "Run the prefill uncompiled.",
            _first_forward_compiled,
        ),
        _state(
            "attention: key must be the handle that PagedCache.update() returned, got a copy or a view of it; "
            "<module> changes "
            "keys after the cache update: call patch_model(model, gather=True)",
            "The model works on keys after they were cached.",
            "Patch it with `gather=True`.",
            _copied_handle,
            _copied_latent,
        ),
        _cannot(
            "attention: torch_paged does not support output_attentions, the ops do not return weights",
            "Attention weights are never computed as a whole.",
            "Unpatch the model for this call.",
            lambda: _attend(output_attentions=True),
        ),
        _cannot(
            "attention: PagedCache does not support dropout (<value>); call model.eval()",
            "The model is in training mode.",
            "Call `model.eval()`.",
            lambda: _attend(dropout=0.1),
        ),
        _cannot(
            "attention: PagedCache does not support bidirectional attention (<module>)",
            "The module asks for keys after the query.",
            "Pass `is_causal=True`, or a mask.",
            lambda: _attend(is_causal=False),
        ),
        _cannot(
            "attention: PagedCache does not support a window of <n> (<module>) in a layer whose cache has <n>",
            "The module's window is not the one of its config.",
            "Set `sliding_window` and `layer_types` of the config, then make the cache.",
            lambda: _attend(sliding_window=5),
        ),
        _cannot(
            "attention: PagedCache does not support <argument> (<module>); leave it out",
            "The argument belongs to another way of packing.",
            "Leave it out.",
            lambda: _attend(cu_seq_lens_q=_PROMPT),
        ),
        _cannot(
            "attention: PagedCache does not support a part of the queries of a packed forward",
            "Layers that share keys got some of the packed tokens only.",
            _GENERATE,
            _part_of_a_packed_row,
        ),
        _cannot(
            "attention_mask: PagedCache does not support masks other than causal, window and chunk for packed tokens",
            "A model with image or prefix masks was given packed requests.",
            _GENERATE,
            _image_mask(packed=True),
        ),
        _cannot(
            "attention_mask: PagedCache does not support masks other than causal, window and chunk in a "
            "compiled forward; run "
            "it eagerly",
            "Such a mask is built from lengths on the host.",
            _EAGER,
            _image_mask(compiling=True),
        ),
        _cannot(
            "attention_mask: PagedCache does not support masks other than causal, window and chunk on device "
            "<device>, where "
            "each shape is compiled; run it on the CPU",
            "Such a mask has a shape of its own in each forward.",
            "Run it on the CPU.",
            _image_mask(static=True),
        ),
        _cannot(
            "attention_mask: PagedCache supports masks of columns alone on device <device>, got <n> dimensions",
            "Forwards are padded to few shapes there, for which a mask of all pairs would have to be rebuilt.",
            "Pass (batch, columns).",
            _forward_of_static_shapes(attention_mask=torch.ones(1, 1, 3, 3)),
        ),
        _cannot(
            "attention_mask: PagedCache does not support masks that hide cached tokens on device <device>",
            "Cached tokens are hidden by a mask of a shape of its own.",
            "Crop the cache, or run on the CPU.",
            _hidden_on_static_shapes,
        ),
        _cannot(
            "<argument>: not supported with a PagedCache on device <device>",
            "The result would hold the padding of the forward.",
            "Ask for logits alone.",
            _forward_of_static_shapes(output_hidden_states=True),
            _forward_of_static_shapes(labels=_PROMPT),
        ),
    ),
)
PACKED = Group(
    "transformers: generate_batch and BatchGenerator",
    (
        _value(
            "BatchGenerator: <argument> must be >= 1, got <value>",
            "A size is 0 or negative.",
            "Leave it out.",
            lambda: BatchGenerator(_patched(), max_batch_tokens=0),
        ),
        _value(
            "PackedCache: num_blocks must be >= 1, got <value>",
            "A cache has at least one block.",
            "Pass None for a cache that grows.",
            lambda: BatchGenerator(_patched(), num_blocks=0),
        ),
        _value(
            "generate_batch: a prompt must have at least 1 token, got none",
            "A prompt is empty.",
            "Begin with the bos token.",
            _request([]),
        ),
        _value(
            "generate_batch: token ids must be ints in [0, <n>], got <value> at index <i>",
            "An id is outside the vocabulary: mostly another model's tokenizer.",
            "Pass ids of this model's tokenizer, as ints.",
            _request([5, 4096]),
        ),
        _value(
            "generate_batch: a prompt must fit into the cache of <n> blocks of <n> tokens, got <n> tokens; make "
            "num_blocks "
            "larger",
            "The prompt alone is longer than the cache.",
            "Pass more blocks, or None.",
            _request([5] * 9, block_size=4, num_blocks=2),
        ),
        _value(
            "generate_batch: the cache of <n> blocks of <n> tokens is full after <n> tokens of this request; "
            "make num_blocks "
            "larger",
            "One request alone needs more than the cache.",
            "Pass more blocks, or a smaller max_new_tokens.",
            _request(GenerationRequest([5] * 6, GenerationConfig(max_new_tokens=9)), block_size=4, num_blocks=2),
        ),
        _value(
            "generate_batch: max_length must be > the prompt's <n> tokens, got <n>",
            "Nothing is left to generate.",
            "Pass max_new_tokens.",
            _request(GenerationRequest([5] * 9, GenerationConfig(max_length=9))),
        ),
        _value(
            "generate_batch: options must be of a GenerationConfig, got <names>",
            "An option is misspelt, or is one of `generate` alone.",
            "Check the name.",
            _request([5], max_tokens=3),
        ),
        _value(
            "generate_batch: a chosen token must be an id in [0, <n>], got <value>",
            "A logits processor returned scores of another width.",
            "Let it keep the shape.",
            _request(
                GenerationRequest(
                    [5],
                    logits_processor=LogitsProcessorList([lambda ids, scores: torch.cat([scores, scores + 1], 1)]),
                )
            ),
        ),
        _cannot(
            "generate_batch: packed tokens need paged layers, got <report>; use generate()",
            "The model's own attention reads gathered keys.",
            _GENERATE,
            lambda: BatchGenerator(_patched("bloom")),
        ),
        _cannot(
            "generate_batch: device <device> compiles each shape, and packed steps have many; use generate()",
            "XLA devices compile every shape.",
            _GENERATE,
            lambda: _under_static_shapes(BatchGenerator),
        ),
        _cannot(
            "generate_batch: packed tokens need their positions, <model> takes no position_ids; use generate()",
            "The model counts columns by itself.",
            _GENERATE,
            lambda: generate_batch(_bart(), [[3, 4]]),
        ),
        _cannot(
            "generate_batch: packed tokens need transformers' mask functions, <model> draws its own masks in "
            "this version; "
            "use generate()",
            "The model is not moved to the mask functions yet.",
            "Upgrade transformers, or use `model.generate()`.",
            _own_masks("llama", lambda model: generate_batch(model, [[5, 6]])),
        ),
        _cannot(
            "generate_batch: layer <n> of <model> is a <layer>, which takes no packed tokens; use generate()",
            "The layer's state belongs to one sequence: linear attention, convolutions.",
            _GENERATE,
            lambda: generate_batch(make_model("qwen3_next"), [[5, 6]]),
        ),
        _cannot(
            "generate_batch: beyond <n> tokens the model's rotary frequencies or attention temperatures depend "
            "on the other "
            "sequences, got <n>; use generate()",
            "Frequencies are chosen from the longest sequence of a batch.",
            _GENERATE,
            _request([5, 6, 7], _most_tokens(2)),
            _request([5, 6], _most_tokens(2), max_new_tokens=3),
        ),
        _cannot(
            "generate_batch: <mode> is not supported; use generate()",
            "Requests are independent; beams and assistants are not.",
            _GENERATE,
            _configured(num_beams=2),
            _configured(output_scores=True),
        ),
        _cannot(
            "generate_batch: num_return_sequences > 1 is not supported; make a request of each, prefixes are shared",
            "A request has one output.",
            "Repeat the request.",
            _configured(num_return_sequences=2, do_sample=True),
        ),
        _cannot(
            "generate_batch: guidance_scale is not supported; use generate()",
            "Guidance needs a second forward for each token.",
            _GENERATE,
            _configured(guidance_scale=2.0),
        ),
        _state(
            "PackedCache: the forward must be the packed row of <n> tokens, got (<n>, <n>)",
            "The model was called by something else than the generator, or changes its inputs' shape.",
            _GENERATE,
            lambda: _packed().prepare(1, 5),
        ),
        _state(
            "PackedCache: attention_mask must be None or hide nothing, got one with zeros",
            "The model makes a mask of its own.",
            _GENERATE,
            lambda: _packed().prepare(1, 0, torch.zeros(1, 1)),
        ),
        _state(
            "PackedCache: the forward must write every layer, layers <list> were not",
            "The model skipped layers.",
            _GENERATE,
            lambda: _packed().finish(),
        ),
    ),
)
