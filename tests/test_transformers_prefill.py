"""The prefill of a patched model's generate() computes no padding, and no prefix that an earlier call left."""

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, PROMPT_COLUMNS, VOCAB_SIZE, make_model, ragged_batch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, GenerationMixin

from torch_paged.integrations.transformers import patch_model, unpatch_model
from torch_paged.integrations.transformers.packed_prefill import cache_salt

pytestmark = pytest.mark.skipif(not hasattr(GenerationMixin, "_prefill"), reason="its prefill is part of its loops")

BLOCK_SIZE = 4
NEW_TOKENS = 12
QUICK = ("llama", "mistral", "gemma2", "gpt_oss", "qwen3")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(**batch, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **options})


@contextmanager
def first_forward(model: Any) -> Iterator[list[int]]:
    """Yield what will hold the tokens of each forward."""
    tokens: list[int] = []

    def count(_: Any, __: Any, options: dict[str, Any]) -> None:
        tokens.append(options["input_ids"].numel())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    yield tokens
    hook.remove()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", QUICK)
def test_padding_is_not_computed_and_the_tokens_stay(family: str, way: str) -> None:
    assert family in FAMILIES
    model, batch = make_model(family), ragged_batch()
    expected = generate(model, batch, **WAYS[way])
    patch_model(model, block_size=BLOCK_SIZE)
    with first_forward(model) as tokens:
        actual = generate(model, batch, **WAYS[way])
    assert torch.equal(actual, expected)
    assert tokens[0] == int(batch["attention_mask"].sum()) * WAYS[way].get("num_beams", 1)


def test_what_is_not_padded_left_stays_a_rectangle() -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE)
    ids = ragged_batch()["input_ids"]
    with first_forward(model) as tokens:
        generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        generate(model, ragged_batch(), prefill_chunk_size=9)
    assert tokens[0] == ids.numel()
    assert tokens[NEW_TOKENS] == 3 * 9


def batch_of(prompts: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def batches() -> list[dict[str, Tensor]]:
    """Return two batches of ragged prompts that begin alike."""
    generator = torch.Generator().manual_seed(2)
    draw = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (30, 5, 9, 2, 17)]
    return [batch_of([draw[0] + draw[1], draw[0] + draw[2]]), batch_of([draw[0] + draw[3], draw[0], draw[4]])]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_prefix_of_an_earlier_call_is_not_computed(family: str, autocast: bool) -> None:
    model = make_model(family)
    if autocast:  # which rounds what the unpatched model attends with
        patch_model(model, block_size=BLOCK_SIZE)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = [generate(model, batch) for batch in batches()]
        patch_model(model, block_size=BLOCK_SIZE, prefix_reuse=True)
        for _ in range(2):
            with first_forward(model) as tokens:
                actual = [generate(model, batch) for batch in batches()]
            assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    real = [int(batch["attention_mask"].sum()) for batch in batches()]
    assert tokens[0] < real[0] - 50
    assert tokens[NEW_TOKENS] < real[1] - 50


def test_changed_weights_are_not_taken_for_the_old_ones() -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE, prefix_reuse=True)
    [batch, _] = batches()
    before = generate(model, batch)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    with first_forward(model) as tokens:
        after = generate(model, batch)
    assert tokens[0] == int(batch["attention_mask"].sum())
    assert not torch.equal(before, after)
    assert torch.equal(after, generate(unpatch_model(model), batch))


def test_a_returned_cache_keeps_its_rows() -> None:
    plain = make_model("llama")
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE, prefix_reuse=True)
    [first, second] = batches()

    def two_turns(model: Any, *, between: bool) -> Tensor:
        out = generate(model, first, return_dict_in_generate=True)
        if between:
            generate(model, second)
        ids = torch.cat([out.sequences, torch.full((2, 3), 9)], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, NEW_TOKENS + 3, dtype=torch.long)], 1)
        return generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=out.past_key_values)

    assert torch.equal(two_turns(model, between=True), two_turns(plain, between=False))


def test_blocks_are_released_when_a_call_ends_or_fails() -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE, prefix_reuse=True)
    caches: list[Any] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, options: caches.append(options["past_key_values"]), with_kwargs=True
    )
    generate(model, batches()[0])
    pool = caches[0].groups[next(iter(caches[0].groups))].blocks
    assert pool.in_use == 0
    size = pool.num_blocks
    with pytest.raises(ZeroDivisionError):
        generate(model, batches()[0], logits_processor=[lambda ids, scores: 1 / 0])
    hook.remove()
    assert pool.in_use == 0
    for _ in range(3):
        generate(model, batches()[0])
    assert pool.num_blocks <= size + 20


def test_blocks_are_released_where_generate_was_replaced_after_patching() -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE, prefix_reuse=True)
    model.generate = functools.partial(type(model).generate, model)
    out = generate(model, batches()[0], return_dict_in_generate=True)
    pool = next(iter(out.past_key_values.groups.values())).blocks
    assert pool.in_use
    del out
    gc.collect()
    assert pool.in_use == 0


def test_unpatching_leaves_nothing_on_the_instance() -> None:
    model = make_model("llama")
    before = set(vars(model))
    unpatch_model(patch_model(model, prefix_reuse=True))
    assert set(vars(model)) == before


def test_prefix_reuse_is_refused_where_it_cannot_be() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    before = set(vars(bloom))
    with pytest.raises(NotImplementedError, match="prefix_reuse is not supported: the keys of BloomForCausalLM are"):
        patch_model(bloom, prefix_reuse=True)
    assert set(vars(bloom)) == before


def test_padding_columns_are_counted_as_ever() -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE)
    out = generate(model, ragged_batch(), return_dict_in_generate=True)
    assert out.past_key_values.get_seq_length() == PROMPT_COLUMNS + NEW_TOKENS - 1


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("prefix_reuse", [False, True])
def test_positions_of_the_user_are_taken(rows: int, prefix_reuse: bool) -> None:
    model = make_model("llama")
    positions = (torch.arange(PROMPT_COLUMNS) * 2 + 5).expand(rows, -1)
    expected = generate(model, ragged_batch(), position_ids=positions)
    patch_model(model, block_size=BLOCK_SIZE, prefix_reuse=prefix_reuse)
    for _ in range(2):
        assert torch.equal(generate(model, ragged_batch(), position_ids=positions), expected)


def test_adapters_are_told_apart() -> None:
    model = make_model("llama")
    adapter = torch.nn.Module()
    vars(adapter).update(active_adapters=["one"], merged_adapters=[], disable_adapters=False)
    model.adapter = adapter
    salts = [cache_salt(model)]
    for name, value in (("active_adapters", ["two"]), ("merged_adapters", ["two"]), ("disable_adapters", True)):
        vars(adapter)[name] = value
        salts.append(cache_salt(model))
    assert len(set(salts)) == len(salts)
    assert cache_salt(model) == salts[-1]


def test_precisions_are_told_apart() -> None:
    model = make_model("llama")
    salts = {cache_salt(model)}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            salts.add(cache_salt(model))
    assert len(salts) == 3
