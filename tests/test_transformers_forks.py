"""Copies of a cache, rolling back over several forwards, quantised caches and half precision."""

import copy
import gc
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, PROMPT_COLUMNS, VOCAB_SIZE, as_reference, make_model, ragged_batch
from torch import Tensor
from transformers import EncoderDecoderCache

from torch_paged.integrations.transformers import PagedCache, patch_model, unpatch_model
from torch_paged.testing.compare import assert_close

BLOCK_SIZE = 4
KINDS = ["llama", "mistral", "llama4", "deepseek_v3", "bloom", "gpt_oss"]
QUANTISED = [torch.int8, torch.float8_e4m3fn]


def prompt(columns: int, rows: int = 1) -> Tensor:
    return torch.randint(2, VOCAB_SIZE, (rows, columns), generator=torch.Generator().manual_seed(columns))


def forward(model: Any, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options).logits


@pytest.mark.parametrize("family", [family for family in (*KINDS, "qwen3_next", "gemma4") if family in FAMILIES])
def test_a_copy_goes_its_own_way(family: str) -> None:
    model = patch_model(make_model(family), block_size=BLOCK_SIZE)
    cache, batch = PagedCache(model.config, block_size=BLOCK_SIZE), ragged_batch()
    forward(model, **batch_of(batch), cache=cache)
    fork = copy.deepcopy(cache)
    used = cache.blocks_in_use
    assert fork.get_seq_length() == PROMPT_COLUMNS
    assert {layer.kv_cache.data_ptr() for layer in fork.paged_layers} == {
        layer.kv_cache.data_ptr() for layer in cache.paged_layers
    }
    tokens = {cache: prompt(7, 3), fork: prompt(5, 3)}
    for own, ids in tokens.items():
        alone = PagedCache(model.config, block_size=BLOCK_SIZE)
        forward(model, **batch_of(batch), cache=alone)
        for column in ids.split(1, dim=1):
            assert torch.equal(forward(model, column, own), forward(model, column, alone))
    grown = cache.blocks_in_use
    assert grown > used
    assert fork.blocks_in_use == grown
    del fork, own, tokens
    gc.collect()
    assert cache.blocks_in_use < grown


def batch_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_a_copy_shares_what_it_does_not_write() -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE)
    cache = PagedCache(model.config, block_size=BLOCK_SIZE)
    forward(model, prompt(61), cache)
    forks = [copy.deepcopy(cache) for _ in range(4)]
    assert cache.blocks_in_use == 16
    cache.reset()
    for fork in forks:
        for column in prompt(17).split(1, dim=1):
            forward(model, column, fork)
    assert forks[0].blocks_in_use <= 36


def test_the_pool_grows_in_all_copies() -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE)
    cache = PagedCache(model.config, block_size=BLOCK_SIZE)
    expected = forward(model, prompt(40), PagedCache(model.config, block_size=BLOCK_SIZE))
    forward(model, prompt(40)[:, :9], cache)
    fork = copy.deepcopy(cache)
    size = cache.pool_bytes
    torch.testing.assert_close(forward(model, prompt(40)[:, 9:], fork), expected[:, 9:])
    assert cache.pool_bytes == fork.pool_bytes > size
    torch.testing.assert_close(forward(model, prompt(40)[:, 9:30], cache), expected[:, 9:30])


def test_a_copy_of_an_empty_or_a_wrapped_cache() -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE)
    empty = PagedCache(model.config, block_size=BLOCK_SIZE)
    first, second = empty, copy.deepcopy(empty)
    assert torch.equal(forward(model, prompt(9), first), forward(model, prompt(9), second))
    wrapped = EncoderDecoderCache(first, PagedCache(model.config))
    assert copy.deepcopy(wrapped).self_attention_cache.get_seq_length() == 9


def test_a_copy_in_the_middle_of_a_forward_raises() -> None:
    model = patch_model(make_model("llama"))
    cache, key = PagedCache(model.config), torch.randn(1, 2, 3, 16)
    cache.update(key, key, 0)
    with pytest.raises(RuntimeError, match="got lost"):
        copy.deepcopy(cache)


@pytest.mark.parametrize("family", ["mistral", "llama4", "gpt_oss"])
def test_rolling_back_over_several_forwards(family: str) -> None:
    model = patch_model(make_model(family), block_size=BLOCK_SIZE)
    cache, ids = PagedCache(model.config, block_size=BLOCK_SIZE), prompt(40)
    cache.activate_past_recording()
    expected = forward(model, ids, PagedCache(model.config, block_size=BLOCK_SIZE))
    forward(model, ids[:, :17], cache)
    for column in prompt(20).split(1, dim=1):
        forward(model, column, cache)
    recorded = cache.blocks_in_use
    cache.crop(-20)
    assert cache.get_seq_length() == 17
    torch.testing.assert_close(forward(model, ids[:, 17:], cache), expected[:, 17:])
    cache.crop(-3)
    forward(model, ids[:, -3:], cache)
    assert cache.blocks_in_use < recorded + 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", KINDS)
def test_half_precision_is_as_close_as_the_unpatched_model(family: str, dtype: torch.dtype) -> None:
    model = make_model(family).to(dtype)
    ids = prompt(30)
    plain = forward(model, ids, None, use_cache=False)
    cache = PagedCache(patch_model(model).config, block_size=BLOCK_SIZE)
    parts = [forward(model, part, cache) for part in (ids[:, :21], *ids[:, 21:].split(1, dim=1))]
    assert cache.paged_layers[0].kv_cache.dtype == dtype
    expected = forward(as_reference(unpatch_model(model)), ids, None, use_cache=False)
    actual = torch.cat(parts, 1)
    if family in ("llama4", "gpt_oss", "deepseek_v3"):  # an expert more or less is no rounding error
        error, allowed = ((x.double() - expected).abs().median() for x in (actual, plain))
        assert error <= 2 * allowed
    else:
        assert_close(actual, expected, plain)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("family", KINDS)
def test_a_quantised_cache_generates(family: str, dtype: torch.dtype) -> None:
    model = make_model(family)
    batch, options = ragged_batch(), {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(**batch, **options, output_logits=True)
    exact = patch_model(model, block_size=BLOCK_SIZE).generate(**batch, **options).past_key_values
    patch_model(model, block_size=BLOCK_SIZE, dtype=dtype)
    actual = model.generate(**batch, **options, output_logits=True)
    cache = actual.past_key_values
    assert {layer.kv_cache.dtype for layer in cache.layers} == {dtype}
    assert cache.pool_bytes < 0.6 * exact.pool_bytes
    error = (actual.logits[0] - plain.logits[0]).abs().median()
    assert 0 < error < (0.1 if dtype == torch.int8 else 0.2) * plain.logits[0].std()


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_a_quantised_cache_forks_and_grows(dtype: torch.dtype) -> None:
    model = patch_model(make_model("gemma2"), block_size=BLOCK_SIZE)
    cache, alone = (PagedCache(model.config, block_size=BLOCK_SIZE, dtype=dtype) for _ in range(2))
    forward(model, prompt(9), cache)
    forward(model, prompt(9), alone)
    fork = copy.deepcopy(cache)
    for column in prompt(20).split(1, dim=1):
        forward(model, VOCAB_SIZE - column, fork)
        assert torch.equal(forward(model, column, cache), forward(model, column, alone))


def test_another_dtype_is_refused() -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"PagedCache: dtype must be None, int8, float8_e4m3fn or float8_e5m2, got"):
        PagedCache(model.config, dtype=torch.float16)
