"""Encoder-decoders and vision-language models write the tokens that they write unpatched."""

from typing import Any

import pytest
import torch
from tiny_models import as_reference
from tiny_multimodal import (
    ENCODER_DECODERS,
    VISION_LANGUAGE,
    encoder_inputs,
    image_inputs,
    make_encoder_decoder,
    make_vision_language,
    row_alone,
)
from transformers import CompileConfig, DynamicCache, EncoderDecoderCache

from torch_paged.integrations.transformers import PagedCache, attention, patch_model, patch_report, unpatch_model
from torch_paged.integrations.transformers.block_group import BlockGroup
from torch_paged.integrations.transformers.versions import draws_its_own_mask
from torch_paged.testing.compare import assert_close

BLOCK_SIZE = 4
NEW_TOKENS = 20
LEAST_DISTINCT_TOKENS = 8


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    settings = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        **options,
    }
    return model.generate(**inputs, **settings)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoder_writes_the_same_tokens(family: str, options: dict[str, Any]) -> None:
    model, inputs = make_encoder_decoder(family), encoder_inputs(family)
    expected = generate(model, inputs, **options)
    assert max(len(set(row.tolist())) for row in expected.sequences) >= LEAST_DISTINCT_TOKENS
    actual = generate(patch_model(model, block_size=BLOCK_SIZE), inputs, **options)
    cache = actual.past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    if family != "whisper":  # which returns a cache of its own making
        assert isinstance(cache.self_attention_cache, PagedCache)
        assert type(cache.cross_attention_cache) is DynamicCache
    assert torch.equal(actual.sequences, expected.sequences)
    assert type(generate(unpatch_model(model), inputs).past_key_values.self_attention_cache) is DynamicCache


@pytest.mark.parametrize(("family", "text"), [("t5", "2 gathered"), ("bart", "2 paged"), ("whisper", "2 paged")])
def test_an_encoder_decoder_says_how_it_attends(family: str, text: str) -> None:
    assert text in str(patch_report(patch_model(make_encoder_decoder(family))))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_trains_without_a_cache(family: str) -> None:
    model, inputs = make_encoder_decoder(family), encoder_inputs(family)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradient()
    patch_model(model)
    actual = gradient()
    as_reference(unpatch_model(model))
    assert_close(actual, gradient(), plain)


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_a_vision_language_model_writes_the_same_tokens(family: str) -> None:
    model, inputs = make_vision_language(family), image_inputs(family)
    plain = generate(model, inputs)
    columns = inputs["input_ids"].shape[1]
    assert min(len(set(row.tolist())) for row in plain.sequences[:, columns:]) >= LEAST_DISTINCT_TOKENS
    vision = model.config.vision_config._attn_implementation
    actual = generate(patch_model(model, block_size=BLOCK_SIZE), inputs)
    assert isinstance(actual.past_key_values, PagedCache)
    assert model.config.vision_config._attn_implementation == vision
    plain_logits = torch.stack(plain.logits)
    if pads_windows_wrongly(model):
        rows = [generate(unpatch_model(model), row_alone(inputs, row)) for row in (0, 1)]
        assert torch.equal(actual.sequences[:, columns:], torch.cat([row.sequences[:, -NEW_TOKENS:] for row in rows]))
        plain_logits = torch.cat([torch.stack(row.logits) for row in rows], 1)
    else:
        assert torch.equal(actual.sequences, plain.sequences)
    as_reference(unpatch_model(model))
    expected = [generate(model, row_alone(inputs, row)) for row in (0, 1)]
    logits = torch.cat([torch.stack(row.logits) for row in expected], 1)
    assert_close(torch.stack(actual.logits), logits, plain_logits)


def pads_windows_wrongly(model: Any) -> bool:
    """Say whether the unpatched model hides keys in a window by the padding that lies before the window."""
    windows = getattr(model.config.get_text_config(), "sliding_window", None) is not None
    return windows and draws_its_own_mask(model)


def test_a_new_token_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = patch_model(make_vision_language("gemma3_conditional")), image_inputs("gemma3_conditional")
    masks = []
    attend = attention._cached

    def look(layer: Any, query: torch.Tensor, mask: torch.Tensor | None, options: Any) -> torch.Tensor:
        masks.append((query.shape[2], mask is not None))
        return attend(layer, query, mask, options)

    monkeypatch.setattr(attention, "_cached", look)
    for compile_too in (None, CompileConfig()):  # with it, generate draws the masks
        generate(model, inputs, compile_config=compile_too)
    assert {had_mask for new_tokens, had_mask in masks if new_tokens > 1} == {True}
    assert {had_mask for new_tokens, had_mask in masks if new_tokens == 1} == {False}


@pytest.mark.parametrize("family", ["gemma3_conditional", "paligemma"])
def test_what_an_image_sees_of_itself_matters(family: str) -> None:
    model, inputs = patch_model(make_vision_language(family)), image_inputs(family)
    if draws_its_own_mask(model):
        pytest.skip("in this version of transformers a prompt sees itself whatever its token types are")
    expected = generate(model, inputs).logits[0]
    causal = (
        torch.zeros_like(inputs["token_type_ids"])
        if family == "gemma3_conditional"
        else torch.ones_like(inputs["input_ids"])
    )
    actual = generate(model, {**inputs, "token_type_ids": causal}).logits[0]
    assert not torch.allclose(actual, expected, atol=0.1)


@pytest.mark.parametrize("family", [*VISION_LANGUAGE, *ENCODER_DECODERS])
def test_a_corrupt_block_id_is_caught(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, inputs_of = make_vision_language, image_inputs
    if family in ENCODER_DECODERS:
        make, inputs_of = make_encoder_decoder, encoder_inputs
    model, inputs = make(family), inputs_of(family)
    expected = generate(model, inputs).sequences
    write_tables = BlockGroup.write_tables

    def corrupt(group: BlockGroup) -> None:
        write_tables(group)
        last = len(group._tables[1]) - 1
        if group.window is None:
            group.block_tables[1, last] = (group.block_tables[1, last] + 1) % group.num_blocks

    monkeypatch.setattr(BlockGroup, "write_tables", corrupt)
    actual = generate(patch_model(model, block_size=BLOCK_SIZE), inputs).sequences
    if not pads_windows_wrongly(model):
        assert torch.equal(actual[0], expected[0])
    assert not torch.equal(actual[1], expected[1])
