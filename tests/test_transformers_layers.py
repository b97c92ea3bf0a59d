"""What becomes of each kind of layer: paged, in chunks, latent, gathered, kept; and the masks that are not causal."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import (
    CHUNK_TOKENS,
    FAMILIES,
    GATHERED,
    PROMPT_COLUMNS,
    WINDOW_TOKENS,
    as_reference,
    make_model,
    ragged_batch,
)
from torch import Tensor

from torch_paged.integrations.transformers import PagedCache, patch_model, patch_report, unpatch_model
from torch_paged.integrations.transformers.layer_plan import Reach
from torch_paged.testing.compare import assert_close

BLOCK_SIZE = 4
FIRST = WINDOW_TOKENS - 1
"""Columns of the first of two forwards: no layer has forgotten one of them in the second."""

PAGED = [family for family in FAMILIES if family not in GATHERED]
REPORTS = {
    "llama": r"LlamaForCausalLM: layers: 4 paged \(full attention\)",
    "gemma2": r"2 paged \(window 8\), 2 paged \(full attention\)",
    "llama4": r"3 paged \(chunk 8\), 1 paged \(full attention\)",
    "gemma4": r"1 paged \(window 8\), 1 paged \(full attention\)(, 2 kept \(DummyLayer\))?$",
    "qwen3_next": r"2 kept \(LinearAttentionLayer\), 2 paged \(full attention\)",
    "deepseek_v3": r"4 latent \(full attention\)",
    "bloom": r"4 gathered \(full attention\); gathered because BloomForCausalLM does not use transformers' attention",
}


def needs(family: str) -> None:
    if family not in FAMILIES:
        pytest.skip(f"this version of transformers has no {family}")


def generated(model: Any, **options: Any) -> Any:
    settings = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**ragged_batch(), **settings)


@pytest.mark.parametrize("family", REPORTS)
def test_patching_says_what_it_did(family: str, caplog: pytest.LogCaptureFixture) -> None:
    needs(family)
    model = make_model(family)
    if family == "deepseek_v3" and not any(hasattr(part, "expand_kv") for part in model.modules()):
        pytest.skip("this version of transformers caches other keys")
    assert patch_report(model) is None
    with caplog.at_level(logging.INFO, "torch_paged"):
        patch_model(model)
    messages = [record.getMessage() for record in caplog.records if record.name == "torch_paged.transformers"]
    assert messages == [f"patch_model: {patch_report(model)}"]
    assert re.search(REPORTS[family], messages[0])


@pytest.mark.parametrize("change", [Tensor.clone, lambda handle: handle[:]], ids=["copy", "view"])
@pytest.mark.parametrize("family", PAGED)
def test_a_lost_handle_raises(family: str, change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(make_model(family))
    update = PagedCache.update

    def lose(self: PagedCache, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(change(handle) for handle in update(self, *args, **kwargs))

    monkeypatch.setattr(PagedCache, "update", lose)
    with pytest.raises(RuntimeError, match=r"key must be the handle that PagedCache.update\(\) returned"):
        model(ragged_batch()["input_ids"], past_key_values=PagedCache(model.config))


def test_blocks_behind_the_chunk_are_reused() -> None:
    model = patch_model(make_model("llama4"), block_size=BLOCK_SIZE)
    prompt = ragged_batch()["input_ids"][1:2]
    cache = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=60,
        do_sample=False,
        prefill_chunk_size=BLOCK_SIZE,
        return_dict_in_generate=True,
    ).past_key_values
    group = cache.groups[Reach(chunk=CHUNK_TOKENS)]
    assert group.peak_blocks <= CHUNK_TOKENS // BLOCK_SIZE + 2
    assert group.num_blocks <= CHUNK_TOKENS // BLOCK_SIZE + 2


def test_lengths_are_those_of_each_layer_in_the_middle_of_a_forward() -> None:
    model = patch_model(make_model("llama"))
    cache = PagedCache(model.config)
    seen: list[list[int]] = []

    def look(*_: Any) -> None:
        seen.append([cache.get_seq_length(layer) for layer in range(4)])

    model.model.layers[1].mlp.register_forward_hook(look)
    model(ragged_batch()["input_ids"], past_key_values=cache)
    model(torch.tensor([[3], [4], [5]]), past_key_values=cache)
    assert seen == [[17, 17, 0, 0], [18, 18, 17, 17]]


def test_latent_keys_are_stored_once() -> None:
    model = make_model("deepseek_v3")
    if not any(hasattr(part, "expand_kv") for part in model.modules()):
        pytest.skip("this version of transformers caches the keys of all heads")
    cache = generated(patch_model(model, block_size=BLOCK_SIZE)).past_key_values
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    assert {layer.kv_cache.shape[0] for layer in cache.layers} == {1}
    assert {layer.kv_cache.shape[2:] for layer in cache.layers} == {(1, BLOCK_SIZE, width)}


def test_latent_keys_need_a_patched_model() -> None:
    model = make_model("deepseek_v3")
    if not any(hasattr(part, "expand_kv") for part in model.modules()):
        pytest.skip("this version of transformers caches the keys of all heads")
    model.set_attn_implementation("torch_paged")
    with pytest.raises(NotImplementedError, match=r"multi-head latent attention\); call patch_model\(model\)"):
        model(ragged_batch()["input_ids"], past_key_values=PagedCache(model.config))


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "gpt_oss", "llama4", "qwen3_next"])
def test_any_model_can_be_gathered(family: str) -> None:
    needs(family)
    model = make_model(family)
    expected = generated(model).sequences
    implementation = model.config._attn_implementation
    patch_model(model, block_size=BLOCK_SIZE, gather=True)
    actual = generated(model)
    assert model.config._attn_implementation == implementation
    assert isinstance(actual.past_key_values, PagedCache)
    assert not actual.past_key_values.is_compileable
    assert torch.equal(actual.sequences, expected)


def test_masks_that_know_no_window_are_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mistral")
    monkeypatch.setattr(type(model.model), "_update_causal_mask", None, raising=False)
    with pytest.raises(NotImplementedError, match="draws masks that do not know of windows, and cannot be gathered"):
        patch_model(model, gather=True)
    assert patch_report(model) is None


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_padding_of_a_gathered_model_takes_no_blocks(family: str) -> None:
    cache = generated(patch_model(make_model(family), block_size=BLOCK_SIZE)).past_key_values
    lengths = (ragged_batch()["attention_mask"].sum(1) + 24 - 1).tolist()
    assert cache.blocks_in_use == sum(-(-length // BLOCK_SIZE) for length in lengths)


def test_an_unpatched_model_of_its_own_attention_is_refused() -> None:
    model = make_model("bloom")
    with pytest.raises(ValueError, match=r"must be 'torch_paged', got 'eager'; call patch_model\(model\)"):
        model(ragged_batch()["input_ids"], past_key_values=PagedCache(model.config))


def image_block_mask(ids: Tensor, real: Tensor, window: int | None) -> Tensor:
    """Return a causal mask of columns, (B, 1, C, C), in which five columns see each other."""
    columns = torch.arange(ids.shape[1])
    distance = columns[:, None] - columns
    block = (columns >= FIRST) & (columns < FIRST + 5)
    seen = (distance >= 0) | (block[:, None] & block)
    if window is not None:
        seen &= distance < window
    return (seen & real[:, None, None, :].bool()) | torch.eye(ids.shape[1], dtype=torch.bool)


@pytest.mark.parametrize("kind", ["bool", "additive", "bias"])
@pytest.mark.parametrize("layout", ["even", "padded", "holes"])
@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek_v3", "gpt_oss", "llama4"])
def test_a_mask_of_the_user_is_obeyed(family: str, layout: str, kind: str) -> None:
    model = make_model(family)
    ids, real = ragged_batch()["input_ids"], ragged_batch()["attention_mask"]
    if layout == "even":
        real = torch.ones_like(real)
    elif layout == "holes":
        real = real.clone()
        real[1, 1:5] = 0
    window = getattr(model.config, "sliding_window", None) if family == "mistral" else None
    mask = image_block_mask(ids, real, window)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    if kind == "bias":  # in the second forward
        bias = torch.randn(mask.shape, generator=torch.Generator().manual_seed(5))
        additive[:, :, FIRST:] += bias[:, :, FIRST:]

    def forward(seen: Tensor, first: int, **options: Any) -> Tensor:
        part = slice(first, PROMPT_COLUMNS)
        return model(ids[:, part], attention_mask=seen[:, :, part], position_ids=positions[:, part], **options).logits

    def split(cache: PagedCache) -> Tensor:
        begin = slice(FIRST)
        model(ids[:, begin], attention_mask=real[:, begin], position_ids=positions[:, begin], past_key_values=cache)
        cache.prepare(3, PROMPT_COLUMNS - FIRST, real)
        return forward(mask if kind == "bool" else additive, FIRST, past_key_values=cache)

    with torch.no_grad():
        plain = forward(additive, 0, use_cache=False)[:, FIRST:]
        patch_model(model, block_size=BLOCK_SIZE)
        actual = split(PagedCache(model.config, block_size=BLOCK_SIZE))
        as_reference(unpatch_model(model))
        expected = forward(additive.double(), 0, use_cache=False)[:, FIRST:]
    kept = real[:, FIRST:].bool()
    assert_close(actual[kept], expected[kept], plain[kept])


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("columns", [PROMPT_COLUMNS, PROMPT_COLUMNS - 3])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "llama4"])
def test_a_mask_shows_no_key_behind_the_window(family: str, columns: int, kind: str) -> None:
    needs(family)
    model = make_model(family)
    real = ragged_batch()["attention_mask"][:, :columns]
    inputs = {"input_ids": ragged_batch()["input_ids"][:, :columns], "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
    first, last = ({name: rows[:, part] for name, rows in inputs.items()} for part in (slice(-1), slice(-1, None)))
    seen = real[:, None, None].bool()
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    def alone(model: Any) -> Tensor:
        rows = [ids[kept][None] for ids, kept in zip(inputs["input_ids"], real.bool(), strict=True)]
        return torch.cat([model(row, use_cache=False).logits[:, -1:] for row in rows])

    with torch.no_grad():
        plain = alone(model)
        cache = PagedCache(patch_model(model).config, block_size=BLOCK_SIZE)
        model(**first, attention_mask=real[:, :-1], past_key_values=cache)
        actual = model(**last, attention_mask=mask, past_key_values=cache).logits
        expected = alone(as_reference(unpatch_model(model)))
    assert_close(actual, expected, plain)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "llama4"])
def test_a_mask_that_shows_what_gathered_layers_have_forgotten_is_refused(family: str) -> None:
    needs(family)
    model = patch_model(make_model(family), block_size=BLOCK_SIZE, gather=True)
    ids = ragged_batch()["input_ids"]
    mask = torch.zeros(3, 1, 1, PROMPT_COLUMNS)
    cache = PagedCache(model.config, block_size=BLOCK_SIZE)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask must hide the keys that gathered layers with (w|c)"):
            model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
        mask[..., : -WINDOW_TOKENS if family != "llama4" else -1] = torch.finfo(torch.float32).min
        model(ids[:, -1:], attention_mask=mask, past_key_values=cache)


def test_weights_of_the_attention_are_not_returned() -> None:
    model = patch_model(make_model("gpt2"))
    ids = ragged_batch()["input_ids"]
    with pytest.raises(NotImplementedError, match=r"output_attentions is not supported.*unpatch_model\(model\)"):
        model(ids, output_attentions=True)
    unpatch_model(model)
    assert len(model(ids, output_attentions=True).attentions) == 4
