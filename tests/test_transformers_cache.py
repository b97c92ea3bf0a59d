"""The paged cache by itself: compiled decode, gradients, misuse that must raise, growth, rolling back."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import PROMPT_COLUMNS, VOCAB_SIZE, as_reference, make_model, positions, ragged_batch
from torch import Tensor
from transformers import DynamicCache

from torch_paged.integrations.transformers import PagedCache, patch_model, unpatch_model
from torch_paged.integrations.transformers.attention import attention_forward
from torch_paged.integrations.transformers.layer_plan import Reach
from torch_paged.integrations.transformers.versions import CROP_IS_RELATIVE, check_version
from torch_paged.testing.compare import assert_close

BLOCK_SIZE = 4
PROMPT = torch.arange(5, 5 + PROMPT_COLUMNS)[None]


@pytest.fixture
def model() -> Any:
    return patch_model(make_model("llama"), block_size=BLOCK_SIZE)


@pytest.fixture
def cache(model: Any) -> PagedCache:
    return PagedCache(model.config, block_size=BLOCK_SIZE)


@pytest.fixture
def no_recompile() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def forward(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def test_hand_compiled_forward(model: Any, no_recompile: None) -> None:
    steps = 40
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")

    def loop(step: Any) -> Tensor:
        cache = PagedCache(model.config, max_cache_length=PROMPT_COLUMNS + steps, block_size=BLOCK_SIZE)
        ids = forward(model, PROMPT, past_key_values=cache)[:, -1:].argmax(-1)
        out = [ids]
        with torch.no_grad():
            for _ in range(steps):
                cache.prepare(1, 1)
                out.append(step(input_ids=out[-1], past_key_values=cache, **positions(cache)).logits.argmax(-1))
        return torch.cat(out, 1)

    assert torch.equal(loop(compiled), loop(model.forward))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_unprepared_compiled_forward_raises(model: Any, cache: PagedCache) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    ids = forward(model, PROMPT, past_key_values=cache)[:, -1:].argmax(-1)
    cache.prepare(1, 1)
    with torch.no_grad():
        compiled(input_ids=ids, past_key_values=cache, **positions(cache))
        with pytest.raises(Exception, match=r"call prepare\(\) before each compiled forward"):
            compiled(input_ids=ids, past_key_values=cache, **positions(cache))


def test_preparing_twice_changes_nothing(model: Any, cache: PagedCache) -> None:
    expected = forward(model, PROMPT, past_key_values=PagedCache(model.config, block_size=BLOCK_SIZE))
    cache.prepare(1, PROMPT_COLUMNS)
    cache.prepare(1, PROMPT_COLUMNS)
    assert cache.get_seq_length() == 0
    assert torch.equal(forward(model, PROMPT, past_key_values=cache), expected)
    assert cache.get_seq_length() == PROMPT_COLUMNS
    assert cache.blocks_in_use == -(-PROMPT_COLUMNS // BLOCK_SIZE)


def test_preparing_again_with_another_mask_starts_the_step_anew(model: Any, cache: PagedCache) -> None:
    mask = torch.ones_like(PROMPT)
    mask[:, :6] = 0
    cache.prepare(1, PROMPT_COLUMNS)
    cache.prepare(1, PROMPT_COLUMNS, mask)
    assert cache.blocks_in_use == -(-(PROMPT_COLUMNS - 6) // BLOCK_SIZE)


def test_a_mask_that_forgets_the_padding_is_refused(model: Any, cache: PagedCache) -> None:
    mask = torch.ones_like(PROMPT)
    mask[:, :6] = 0
    cache.prepare(1, PROMPT_COLUMNS, mask)
    with pytest.raises(RuntimeError, match="must mark the padding that this forward was prepared with"):
        forward(model, PROMPT, attention_mask=torch.ones_like(PROMPT), past_key_values=cache)
    cache.settle()
    forward(model, PROMPT, past_key_values=cache)
    assert cache.blocks_in_use == -(-PROMPT_COLUMNS // BLOCK_SIZE)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "deepseek_v3", "bloom"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_later_mask_may_hide_cached_tokens(family: str, chunk: int) -> None:
    model = make_model(family)
    padding = ragged_batch()["attention_mask"]
    mask = torch.cat([padding, torch.ones(3, chunk, dtype=torch.long)], 1)
    mask[:, 12:15] = 0
    ids = torch.arange(40, 40 + chunk).expand(3, -1)
    has_positions = "position_ids" in inspect.signature(model.forward).parameters

    def two_forwards(cache: DynamicCache) -> Tensor:
        count = padding.cumsum(1) - 1
        for new, seen, places in (
            (ragged_batch()["input_ids"], padding, count.clamp(min=0)),
            (ids, mask, count[:, -1:] + torch.arange(1, chunk + 1)),
        ):
            options = {"position_ids": places} if has_positions else {}
            logits = forward(model, new, attention_mask=seen, past_key_values=cache, **options)
        return logits

    expected = two_forwards(DynamicCache(config=model.config))
    patch_model(model, block_size=BLOCK_SIZE)
    actual = two_forwards(PagedCache(model.config, block_size=BLOCK_SIZE))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
@pytest.mark.parametrize("layout", ["left", "right"])
def test_a_later_mask_that_brings_padding_back_is_refused(family: str, layout: str) -> None:
    model = patch_model(make_model(family), block_size=BLOCK_SIZE)
    cache, batch = PagedCache(model.config, block_size=BLOCK_SIZE), ragged_batch()
    if layout == "right":
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    forward(model, **batch, past_key_values=cache)
    step, mask = torch.tensor([[7], [8], [9]]), torch.ones(3, PROMPT_COLUMNS + 1, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask must hide what was padding in earlier forwards"):
        forward(model, step, attention_mask=mask, past_key_values=cache)
    mask[:, :-1] = batch["attention_mask"]
    forward(model, step, attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == PROMPT_COLUMNS + 1


def test_the_pool_grows(model: Any) -> None:
    sized = PagedCache(model.config, block_size=BLOCK_SIZE, max_cache_length=80)
    growing = PagedCache(model.config, block_size=BLOCK_SIZE)
    generator = torch.Generator().manual_seed(2)
    sizes = set()
    for _ in range(12):
        ids = torch.randint(2, VOCAB_SIZE, (2, 5), generator=generator)
        expected = forward(model, ids, past_key_values=sized)
        assert torch.equal(forward(model, ids, past_key_values=growing), expected)
        sizes.add((growing.groups[Reach()].num_blocks, sized.groups[Reach()].num_blocks))
    assert len({grown for grown, _ in sizes}) > 1
    assert {fixed for _, fixed in sizes} == {2 * 80 // BLOCK_SIZE}


def test_crop_forgets_the_last_columns(model: Any, cache: PagedCache) -> None:
    kept = PROMPT_COLUMNS - 5
    forward(model, PROMPT, past_key_values=cache)
    cache.crop(-5)
    assert (cache.get_seq_length(), cache.blocks_in_use) == (kept, -(-kept // BLOCK_SIZE))
    again = forward(model, PROMPT[:, kept:], past_key_values=cache)
    fresh = PagedCache(model.config, block_size=BLOCK_SIZE)
    forward(model, PROMPT[:, :kept], past_key_values=fresh)
    assert torch.equal(again, forward(model, PROMPT[:, kept:], past_key_values=fresh))


@pytest.mark.parametrize("tokens_to_remove", [1, -PROMPT_COLUMNS - 1] if CROP_IS_RELATIVE else [-PROMPT_COLUMNS - 1])
def test_crop_refuses_a_wrong_number(model: Any, cache: PagedCache, tokens_to_remove: int) -> None:
    forward(model, PROMPT, past_key_values=cache)
    with pytest.raises(
        ValueError, match=rf"PagedCache: tokens_to_remove must be in \[-17, 0\], got {tokens_to_remove}"
    ):
        cache.crop(tokens_to_remove)


def test_crop_counts_the_padding(model: Any, cache: PagedCache) -> None:
    ids, mask = ragged_batch()["input_ids"], ragged_batch()["attention_mask"].clone()
    mask[0, -2] = 0
    forward(model, ids, attention_mask=mask, past_key_values=cache)
    cache.crop(-3)
    assert cache.lengths == mask[:, :-3].sum(1).tolist()
    fresh = PagedCache(model.config, block_size=BLOCK_SIZE)
    forward(model, ids[:, :-3], attention_mask=mask[:, :-3], past_key_values=fresh)
    step = torch.tensor([[7], [8], [9]])
    assert torch.equal(forward(model, step, past_key_values=cache), forward(model, step, past_key_values=fresh))


def test_reset_frees_everything(model: Any, cache: PagedCache) -> None:
    first = forward(model, PROMPT, past_key_values=cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.blocks_in_use, cache.batch_size) == (0, 0, -1)
    assert torch.equal(forward(model, PROMPT, past_key_values=cache), first)


def test_rows_can_be_selected(model: Any, cache: PagedCache) -> None:
    ids = torch.cat([PROMPT, PROMPT + 40, PROMPT + 90])
    forward(model, ids, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    fresh = PagedCache(model.config, block_size=BLOCK_SIZE)
    forward(model, ids[[2, 0]], past_key_values=fresh)
    step = torch.tensor([[7], [8]])
    assert torch.equal(forward(model, step, past_key_values=cache), forward(model, step, past_key_values=fresh))


def test_a_mask_selects_rows_only_if_it_has_one_entry_for_each(model: Any, cache: PagedCache) -> None:
    forward(model, torch.cat([PROMPT, PROMPT + 40, PROMPT + 90]), past_key_values=cache)
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([True, False]))
    assert cache.batch_size == 3
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert cache.batch_size == 2


def test_a_copied_handle_raises(model: Any, cache: PagedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    update = PagedCache.update

    def lose(self: PagedCache, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(handle.clone() for handle in update(self, *args, **kwargs))

    monkeypatch.setattr(PagedCache, "update", lose)
    with pytest.raises(RuntimeError, match=r"key must be the handle that PagedCache.update\(\) returned"):
        forward(model, PROMPT, past_key_values=cache)


def test_a_handle_that_never_arrives_raises(cache: PagedCache) -> None:
    key = torch.randn(1, 2, 3, 16)
    cache.prepare(1, 3)
    cache.update(key, key, 0)
    with pytest.raises(RuntimeError, match=r"keys that update\(\) returned must reach .* got lost"):
        cache.update(key, key, 1)
    with pytest.raises(RuntimeError, match="got lost"):
        cache.prepare(1, 1)


def test_a_forward_that_stops_half_way_raises(model: Any, cache: PagedCache) -> None:
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    handle, _ = cache.update(key, key, 0)
    attention_forward(model.model.layers[0].self_attn, query, handle, handle, None)
    with pytest.raises(RuntimeError, match="wrote 1 of 4 layers"):
        cache.prepare(1, 1)


def test_another_implementation_cannot_read_the_cache(model: Any, cache: PagedCache) -> None:
    unpatch_model(model)
    with pytest.raises(ValueError, match="attention implementation must be 'torch_paged', got 'eager'"):
        forward(model, PROMPT, past_key_values=cache)


def test_another_batch_size_is_refused(model: Any, cache: PagedCache) -> None:
    forward(model, PROMPT, past_key_values=cache)
    with pytest.raises(ValueError, match="batch size must be 1 as cached, got 2"):
        forward(model, torch.tensor([[3], [4]]), past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "bidirectional"),
        ({"sliding_window": 5}, "a window of 5"),
        ({"cu_seq_lens_q": PROMPT}, "cu_seq_lens_q"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_options_without_a_paged_form_are_refused(
    model: Any, cache: PagedCache, options: dict[str, Any], reason: str
) -> None:
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    handle, _ = cache.update(key, key, 0)
    with pytest.raises(NotImplementedError, match=reason):
        attention_forward(model.model.layers[0].self_attn, query, handle, handle, None, **options)


def test_sizes_below_one_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"PagedCache: max_cache_length must be an int >= 1, got 0"):
        PagedCache(model.config, max_cache_length=0)
    with pytest.raises(ValueError, match=r"PagedCache: block_size must be an int >= 1, got 0"):
        PagedCache(model.config, block_size=0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_training_without_a_cache_has_the_gradient_of_the_unpatched_model(family: str) -> None:
    model = make_model(family)

    def gradient() -> Tensor:
        model.zero_grad()
        model(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradient()
    patch_model(model)
    patched = gradient()
    as_reference(unpatch_model(model))
    assert_close(patched, gradient(), plain)


def test_backward_through_the_cache_raises(model: Any, cache: PagedCache) -> None:
    loss = model(PROMPT, labels=PROMPT, past_key_values=cache).loss
    with pytest.raises(NotImplementedError, match="backward"):
        loss.backward()


@pytest.mark.parametrize("version", ["4.56.2", "4.9.0", "3.0"])
def test_an_old_version_of_transformers_is_refused(version: str) -> None:
    with pytest.raises(ImportError, match=rf"transformers must be 4\.57 or newer, got {version}"):
        check_version(version)


def test_dense_keys_can_be_read(model: Any, cache: PagedCache) -> None:
    batch = ragged_batch()
    forward(model, **batch, past_key_values=cache)
    plain = DynamicCache(config=model.config)
    forward(unpatch_model(model), **batch, past_key_values=plain)
    real = batch["attention_mask"].bool()[:, None, :, None]
    for (key, value, *_), (plain_key, plain_value, *_) in zip(cache, plain, strict=True):
        torch.testing.assert_close(key, plain_key * real)
        torch.testing.assert_close(value, plain_value * real)


def test_a_paged_cache_is_a_dynamic_cache(cache: PagedCache) -> None:
    assert isinstance(cache, DynamicCache)
    assert not cache.is_compileable
    assert PagedCache(cache.config, max_cache_length=8).is_compileable
    assert cache.layers[0].get_max_length() == cache.layers[0].get_max_cache_shape() == -1
