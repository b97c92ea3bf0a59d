"""The errors of ``generate_batch`` and ``BatchGenerator``."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import torch
from error_table import Group
from tiny_models import make_model
from transformers import (
    BartConfig,
    BartForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
)
from transformers_provocations import (
    GENERATE,
    PARTS,
    not_supported,
    own_masks,
    patched,
    runtime_error,
    under_static_shapes,
    value_error,
)

from torch_paged.integrations.transformers import (
    BatchGenerator,
    GenerationRequest,
    generate_batch,
)
from torch_paged.integrations.transformers.packed_cache import PackedCache


def _request(request: Any, *changes: AbstractContextManager[Any], **options: Any) -> Callable[[], Any]:
    """Return a request that fails; its error is in the output."""

    def provoke() -> Any:
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            return generate_batch(patched(), [request], **options)[0].error

    return provoke


def _configured(**options: Any) -> Callable[[], Any]:
    return _request(GenerationRequest([5], GenerationConfig(**options)))


def _any(value: Any) -> Any:
    return value


def _most_tokens(count: int) -> AbstractContextManager[Any]:
    return patch(f"{PARTS}.batch_generator.most_packed_tokens", lambda config: count)


def _bart() -> Any:
    sizes: dict[str, Any] = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    return BartForCausalLM(BartConfig(vocab_size=32, pad_token_id=0, eos_token_id=None, **sizes)).eval()


def _packed() -> PackedCache:
    return PackedCache(patched().config, num_blocks=4)


_REFUSED_BY_TRANSFORMERS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": -1},
    {"do_sample": True, "temperature": -1.0},
    {"do_sample": True, "top_k": -3},
    {"do_sample": True, "min_p": 7.0},
    {"do_sample": True, "typical_p": -1.0},
    {"repetition_penalty": -1.0},
    {"bad_words_ids": 5},
)

PACKED = Group(
    "transformers: generate_batch and BatchGenerator",
    (
        value_error(
            "BatchGenerator: <argument> must be an int >= 1, got <value>",
            "A size is 0 or negative, a float or a string.",
            "Leave it out.",
            lambda: BatchGenerator(patched(), max_batch_tokens=0),
        ),
        value_error(
            "PackedCache: num_blocks must be an int >= 1, got <value>",
            "A cache has at least one block.",
            "Pass None for a cache that grows.",
            lambda: BatchGenerator(patched(), num_blocks=0),
            lambda: BatchGenerator(patched(), num_blocks=_any("8")),
        ),
        value_error(
            "generate_batch: a prompt must have at least 1 token, got none",
            "A prompt is empty.",
            "Begin with the bos token.",
            _request([]),
        ),
        value_error(
            "generate_batch: a prompt must be a list of token ids, got <value>",
            "A prompt is None or a single number.",
            "Pass a list or a vector of ids for each prompt.",
            _request(None),
            _request(torch.tensor(5)),
        ),
        value_error(
            "generate_batch: <argument> must be a <type>, got <value>",
            "A setting of a request is of another kind: a dict for a GenerationConfig, a function for a list of such.",
            "Pass `GenerationConfig(...)`, `LogitsProcessorList([...])`, `StoppingCriteriaList([...])`.",
            _request([5], generation_config={"max_new_tokens": 3}),
            _request(GenerationRequest([5], generation_config=_any("greedy"))),
            _request(GenerationRequest([5], logits_processor=_any(5))),
            _request(GenerationRequest([5], stopping_criteria=_any(5))),
        ),
        value_error(
            "generate_batch: streamer must have put() and end(), got <value>",
            "The object cannot be told of tokens.",
            "Pass a streamer of transformers, or an object with both methods.",
            _request(GenerationRequest([5], streamer=_any(3))),
        ),
        value_error(
            "generate_batch: seed must be an int of 64 bits, got <value>",
            "The seed is a float, a string or too large.",
            "Pass an int from 0 to 2^64 - 1.",
            _request(GenerationRequest([5], seed=2**70)),
        ),
        value_error(
            "`<option>` <rule>",
            "Transformers' own check of an option of generation: max_new_tokens `must be greater than 0`, temperature "
            "`has to be a strictly positive float`, top_k `a strictly positive integer`, min_p `a float in the [0, 1] "
            "interval`, and more.",
            "Do what the text says: it names the option and what it may be.",
            *(_request([5], **options) for options in _REFUSED_BY_TRANSFORMERS),
        ),
        value_error(
            "There are one or more stop strings, <more> could not locate a tokenizer. <more>",
            "Transformers' own check: `stop_strings` are compared with what the tokens decode to.",
            "Pass `tokenizer=` to `generate_batch` or `BatchGenerator`.",
            _request([5], stop_strings=["end"]),
        ),
        value_error(
            "generate_batch: token ids must be ints in [0, <n>], got <value> at index <i>",
            "An id is outside the vocabulary: mostly another model's tokenizer.",
            "Pass ids of this model's tokenizer, as ints.",
            _request([5, 4096]),
        ),
        value_error(
            "generate_batch: a prompt must fit into the cache of <n> blocks of <n> tokens, got <n> tokens; make "
            "num_blocks larger",
            "The prompt alone is longer than the cache.",
            "Pass more blocks, or None.",
            _request([5] * 9, block_size=4, num_blocks=2),
        ),
        value_error(
            "generate_batch: the cache of <n> blocks of <n> tokens is full after <n> tokens of this request; make "
            "num_blocks larger",
            "One request alone needs more than the cache.",
            "Pass more blocks, or a smaller max_new_tokens.",
            _request(GenerationRequest([5] * 6, GenerationConfig(max_new_tokens=9)), block_size=4, num_blocks=2),
        ),
        value_error(
            "generate_batch: max_length must be > the prompt's <n> tokens, got <n>",
            "Nothing is left to generate.",
            "Pass max_new_tokens.",
            _request(GenerationRequest([5] * 9, GenerationConfig(max_length=9))),
        ),
        value_error(
            "generate_batch: options must be of a GenerationConfig, got <names>",
            "An option is misspelt, or is one of `generate` alone.",
            "Check the name.",
            _request([5], max_tokens=3),
        ),
        value_error(
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
        not_supported(
            "generate_batch: packed tokens need paged layers, got <report>; use generate()",
            "The model's own attention reads gathered keys.",
            GENERATE,
            lambda: BatchGenerator(patched("bloom")),
        ),
        not_supported(
            "generate_batch: device <device> compiles each shape, and packed steps have many; use generate()",
            "XLA devices compile every shape.",
            GENERATE,
            lambda: under_static_shapes(BatchGenerator),
        ),
        not_supported(
            "generate_batch: packed tokens need their positions, <model> takes no position_ids; use generate()",
            "The model counts columns by itself.",
            GENERATE,
            lambda: generate_batch(_bart(), [[3, 4]]),
        ),
        not_supported(
            "generate_batch: packed tokens need transformers' mask functions, <model> draws its own masks in this "
            "version; use generate()",
            "The model is not moved to the mask functions yet.",
            "Upgrade transformers, or use `model.generate()`.",
            own_masks("llama", lambda model: generate_batch(model, [[5, 6]])),
        ),
        not_supported(
            "generate_batch: layer <n> of <model> is a <layer>, which takes no packed tokens; use generate()",
            "The layer's state belongs to one sequence: linear attention, convolutions.",
            GENERATE,
            lambda: generate_batch(make_model("qwen3_next"), [[5, 6]]),
        ),
        not_supported(
            "generate_batch: beyond <n> tokens the model's rotary frequencies or attention temperatures depend on the "
            "other sequences, got <n>; use generate()",
            "Frequencies are chosen from the longest sequence of a batch.",
            GENERATE,
            _request([5, 6, 7], _most_tokens(2)),
            _request([5, 6], _most_tokens(2), max_new_tokens=3),
        ),
        not_supported(
            "generate_batch: <mode> is not supported; use generate()",
            "Requests are independent; beams and assistants are not.",
            GENERATE,
            _configured(num_beams=2),
            _configured(output_scores=True),
        ),
        not_supported(
            "generate_batch: num_return_sequences > 1 is not supported; make a request of each, prefixes are shared",
            "A request has one output.",
            "Repeat the request.",
            _configured(num_return_sequences=2, do_sample=True),
        ),
        not_supported(
            "generate_batch: guidance_scale is not supported; use generate()",
            "Guidance needs a second forward for each token.",
            GENERATE,
            _configured(guidance_scale=2.0),
        ),
        runtime_error(
            "PackedCache: the forward must be the packed row of <n> tokens, got (<n>, <n>)",
            "The model was called by something else than the generator, or changes its inputs' shape.",
            GENERATE,
            lambda: _packed().prepare(1, 5),
        ),
        runtime_error(
            "PackedCache: attention_mask must be None or hide nothing, got one with zeros",
            "The model makes a mask of its own.",
            GENERATE,
            lambda: _packed().prepare(1, 0, torch.zeros(1, 1)),
        ),
        runtime_error(
            "PackedCache: the forward must write every layer, layers <list> were not",
            "The model skipped layers.",
            GENERATE,
            lambda: _packed().finish(),
        ),
    ),
)
