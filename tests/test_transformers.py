"""Generation through the paged cache writes the tokens that the unpatched model writes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import (
    COMMON,
    CONTINUES_LINEAR_ATTENTION,
    FAMILIES,
    PLAIN,
    PROMPT_COLUMNS,
    VOCAB_SIZE,
    WINDOW_TOKENS,
    as_reference,
    make_model,
    make_tokenizer,
    ragged_batch,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
)

from torch_paged.integrations.transformers import ATTENTION_NAME, PagedCache, patch_model, patch_report, unpatch_model
from torch_paged.integrations.transformers.block_group import BlockGroup
from torch_paged.integrations.transformers.layer_plan import Reach
from torch_paged.testing.compare import assert_close

BLOCK_SIZE = 4
NEW_TOKENS = 24
LEAST_DISTINCT_TOKENS = 8


MATRIX = pytest.mark.transformers_matrix
pytestmark = pytest.mark.filterwarnings("ignore:`position_ids` have no functionality in BLOOM:FutureWarning")


@pytest.fixture(params=[*PLAIN, *(pytest.param(family, marks=MATRIX) for family in FAMILIES if family not in PLAIN)])
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


@pytest.fixture
def llama() -> Any:
    return make_model("llama")


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def generate(model: Any, **options: Any) -> Tensor:
    settings: dict[str, Any] = {**ragged_batch(), "max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(**settings)[:, PROMPT_COLUMNS:]


def patched(model: Any) -> Any:
    return patch_model(model, block_size=BLOCK_SIZE)


def last_cache(model: Any, **options: Any) -> PagedCache:
    settings: dict[str, Any] = {**ragged_batch(), "max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(**settings, return_dict_in_generate=True).past_key_values


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_equal_and_logits_close(family: str) -> None:
    model = make_model(family)
    batch = ragged_batch()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**batch, **options)
    assert min(len(set(row.tolist())) for row in plain.sequences[:, PROMPT_COLUMNS:]) >= LEAST_DISTINCT_TOKENS
    patched(model)
    actual = model.generate(**batch, **options)
    assert isinstance(actual.past_key_values, PagedCache)
    assert torch.equal(actual.sequences, plain.sequences)
    with torch.no_grad():
        try:
            expected = logits_alone(as_reference(unpatch_model(model)), plain.sequences, batch["attention_mask"])
        except RuntimeError:  # some models of older versions do not run in float64
            expected = logits_alone(make_model(family), plain.sequences, batch["attention_mask"]).double()
    assert_close(torch.stack(actual.logits, 1), expected, torch.stack(plain.logits, 1))


def logits_alone(model: Any, sequences: Tensor, mask: Tensor) -> Tensor:
    """Return the logits of the generated tokens, each row without padding in one forward."""
    prompts = [ids[:PROMPT_COLUMNS][real] for ids, real in zip(sequences, mask.bool(), strict=True)]
    rows = [torch.cat([prompt, ids[PROMPT_COLUMNS:-1]]) for prompt, ids in zip(prompts, sequences, strict=True)]
    return torch.stack([model(row[None]).logits[0, -NEW_TOKENS:] for row in rows])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"prefill_chunk_size": 6},
    ],
    ids=["sample", "beams", "beams returned", "samples returned", "chunked prefill"],
)
def test_other_ways_to_generate_are_equal(model: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(7)
    expected = generate(model, **options)
    torch.manual_seed(7)
    assert torch.equal(generate(patched(model), **options), expected)


def test_logits_are_close(model: Any, request: pytest.FixtureRequest) -> None:
    batch = ragged_batch()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**batch).logits[real]
        patched(model)
        cached = model(**batch, past_key_values=PagedCache(model.config, block_size=BLOCK_SIZE)).logits[real]
        dense = model(**batch, use_cache=False).logits[real]
        as_reference(unpatch_model(model))
        rows = [ids[mask][None] for ids, mask in zip(batch["input_ids"], real, strict=True)]
        try:
            expected = torch.cat([model(row, use_cache=False).logits[0] for row in rows])
        except RuntimeError:  # some models of older versions make their masks in the default dtype
            request.getfixturevalue("float64_by_default")
            expected = torch.cat([model(row, use_cache=False).logits[0] for row in rows])
    assert_close(cached, expected, plain)
    assert_close(dense, expected, plain)


def test_generation_from_embeddings(model: Any) -> None:
    batch = ragged_batch()
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = model.generate(**batch, **settings)
    assert torch.equal(patched(model).generate(**batch, **settings), expected)


@pytest.mark.parametrize("chunk", [PROMPT_COLUMNS, 5])
@pytest.mark.parametrize("layout", ["left", "right", "holes"])
def test_hand_written_loop_over_a_padded_batch(model: Any, layout: str, chunk: int) -> None:
    if model._is_stateful and chunk < PROMPT_COLUMNS and not CONTINUES_LINEAR_ATTENTION:
        pytest.skip("in this version of transformers linear attention takes a prompt in one forward only")
    batch = ragged_batch()
    mask = batch["attention_mask"]
    if layout == "right":
        mask = mask.flip(1)
    elif layout == "holes":
        mask = mask.clone()
        mask[1, 4:9] = 0
        mask[0, -2] = 0

    def forward(ids: Tensor, seen: Tensor, cache: DynamicCache) -> Tensor:
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return model(input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache).logits

    def loop(ids: Tensor, seen: Tensor, cache: DynamicCache, chunk: int) -> Tensor:
        columns = range(0, ids.shape[1], chunk)
        parts = [forward(ids[:, c : c + chunk], seen[:, : c + chunk], cache) for c in columns]
        last = seen.cumsum(-1).argmax(-1)
        out = [torch.cat(parts, 1)[torch.arange(len(ids)), last].argmax(-1, keepdim=True)]
        for _ in range(10):
            seen = torch.cat([seen, torch.ones_like(out[-1])], 1)
            out.append(forward(out[-1], seen, cache)[:, -1:].argmax(-1))
        return torch.cat(out, 1)

    with torch.no_grad():
        expected = []  # transformers counts padding columns as part of a window; a row alone has none
        if type(model).__name__.startswith(("Mpt", "Qwen3Next")):  # these count columns in any case
            expected.append(loop(batch["input_ids"], mask, DynamicCache(config=model.config), chunk))
        else:
            for ids, real in zip(batch["input_ids"], mask.bool(), strict=True):
                prompt = ids[real][None]
                cache = DynamicCache(config=model.config)
                expected.append(loop(prompt, torch.ones_like(prompt), cache, PROMPT_COLUMNS))
        patched(model)
        actual = loop(batch["input_ids"], mask, PagedCache(model.config, block_size=BLOCK_SIZE), chunk)
    assert torch.equal(actual, torch.cat(expected))


@pytest.mark.parametrize("layout", ["right", "both sides", "hole at the end", "a row of padding"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "deepseek_v3"])
def test_generation_from_a_batch_that_ends_with_padding(family: str, layout: str) -> None:
    model, batch = make_model(family), ragged_batch()
    mask = batch["attention_mask"]
    if layout == "right":
        mask = mask.flip(1)
    elif layout == "both sides":
        mask[:, -4:] = 0
    elif layout == "hole at the end":
        mask[1, -3:-1] = 0
        mask[0, -1] = 0
    else:
        mask[1] = 0
        model.set_attn_implementation("sdpa")  # eager attends to all padding where there is nothing else
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings: dict[str, Any] = {**batch, "attention_mask": mask, "pad_token_id": 0, **options}
    expected = model.generate(**settings)
    actual = patched(model).generate(**settings)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-4)


def test_second_turn_continues_the_cache(model: Any) -> None:
    def two_turns() -> Tensor:
        first = model.generate(
            **ragged_batch(), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
        )
        ids = torch.cat([first.sequences, torch.tensor([[9, 8, 7]] * 3)], 1)
        mask = torch.ones_like(ids)
        mask[:, :PROMPT_COLUMNS] = ragged_batch()["attention_mask"]
        cache = first.past_key_values
        return model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False
        )

    expected = two_turns()
    patched(model)
    assert torch.equal(two_turns(), expected)


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_rejected_tokens_are_rolled_back(model: Any, way: str, request: pytest.FixtureRequest) -> None:
    family = request.node.callspec.params["model"]
    prompt = ragged_batch()["input_ids"][1:2]
    options: dict[str, Any] = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    if model._is_stateful:
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            generate(patched(model), **options, prompt_lookup_num_tokens=3)
        return
    assistant = make_model(family)
    if way == "assistant":
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in assistant.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
        options["assistant_model"] = assistant
    else:
        options |= {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCAB_SIZE}  # some versions need one
    expected = generate(model, **options)
    patched(assistant)
    assert torch.equal(generate(patched(model), **options), expected)


def test_a_corrupt_block_id_is_caught(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(model)
    write_tables = BlockGroup.write_tables

    def corrupt(group: BlockGroup) -> None:
        write_tables(group)
        last = len(group._tables[1]) - 1
        group.block_tables[1, last] = (group.block_tables[1, last] + 1) % group.num_blocks

    monkeypatch.setattr(BlockGroup, "write_tables", corrupt)
    actual = generate(patched(model))
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    assert not torch.equal(actual[1], expected[1])


def test_blocks_behind_the_window_are_reused() -> None:
    model = patched(make_model("mistral"))
    prompt = ragged_batch()["input_ids"][1:2]
    options = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 60}
    cache = last_cache(model, **options, prefill_chunk_size=BLOCK_SIZE)
    visible_blocks = -(-WINDOW_TOKENS // BLOCK_SIZE)
    assert cache.peak_blocks <= visible_blocks + 2
    assert cache.blocks_in_use <= visible_blocks + 1
    group = cache.groups[Reach(window=WINDOW_TOKENS)]
    assert group.num_blocks <= visible_blocks + 2


def test_stop_strings_end_rows_where_they_do_unpatched(llama: Any) -> None:
    tokenizer = make_tokenizer()
    text = tokenizer.decode(generate(llama)[1])
    options = {"stop_strings": [text[9:12]], "tokenizer": tokenizer, "eos_token_id": VOCAB_SIZE}  # or no row is padded
    expected = generate(llama, **options)
    assert tokenizer.decode(expected[1], skip_special_tokens=True) == text[:12]
    assert torch.equal(generate(patched(llama), **options), expected)


def test_forks_share_blocks_until_they_write(llama: Any) -> None:
    prompt_tokens, forks, new_tokens = 61, 4, 17
    patched(llama)
    cache = PagedCache(llama.config, block_size=BLOCK_SIZE)
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(2, 256, (1, prompt_tokens), generator=generator)
    tokens = torch.randint(2, 256, (forks, new_tokens), generator=generator)
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
        prompt_blocks = -(-prompt_tokens // BLOCK_SIZE)
        assert cache.blocks_in_use == prompt_blocks
        cache.batch_repeat_interleave(forks)
        assert cache.blocks_in_use == prompt_blocks
        for column in tokens.split(1, dim=1):
            logits = llama(column, past_key_values=cache).logits
        whole = torch.cat([prompt.expand(forks, -1), tokens], 1)
        plain = llama(whole, use_cache=False).logits[:, -1:]
        expected = unpatch_model(llama).double()(whole, use_cache=False).logits[:, -1:]
    full_blocks = prompt_tokens // BLOCK_SIZE
    own_blocks = -(-(prompt_tokens + new_tokens) // BLOCK_SIZE) - full_blocks
    assert cache.blocks_in_use == full_blocks + forks * own_blocks
    assert_close(logits, expected, plain)


def test_padding_takes_no_blocks(llama: Any) -> None:
    cache = last_cache(patched(llama))
    lengths = (ragged_batch()["attention_mask"].sum(1) + NEW_TOKENS - 1).tolist()
    assert cache.blocks_in_use == sum(-(-length // BLOCK_SIZE) for length in lengths)
    assert cache.peak_bytes <= cache.pool_bytes


def test_patching_is_reversible_and_touches_no_class() -> None:
    model, other = make_model("llama"), make_model("llama")
    before = dict(vars(model))
    method = type(model)._prepare_cache_for_generation
    assert patched(patched(model)) is model
    assert model.config._attn_implementation == ATTENTION_NAME
    assert isinstance(last_cache(model), PagedCache)
    assert type(last_cache(other)) is DynamicCache
    unpatch_model(unpatch_model(model))
    assert model.config._attn_implementation == "eager"
    assert type(last_cache(model)) is DynamicCache
    assert type(model)._prepare_cache_for_generation is method
    assert vars(model).keys() == before.keys()


TINY = {**COMMON, "vocab_size": 32}
UNSUPPORTED = {
    "no keys": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1)),
        "no layer of mamba has keys to page|a cache of its own kind",
    ),
    "no head": (lambda: LlamaModel(LlamaConfig(**TINY)), "cannot generate"),
    "no backend": (lambda: LlamaForCausalLM(LlamaConfig(**TINY)), "no backend serves device 'meta'"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_model_gets_one_sentence(name: str) -> None:
    make, reason = UNSUPPORTED[name]
    with torch.device("meta"):
        model = make()
    implementation = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=reason) as refusal:
        patch_model(model)
    assert "\n" not in str(refusal.value)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("device", ["xpu", "mtia"])
def test_another_device_is_refused_when_patching(device: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**TINY))
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
        assert model.device.type == device
        with pytest.raises(NotImplementedError, match=f"patch_model: no backend serves device '{device}'"):
            patch_model(model)
    assert patch_report(model) is None


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"patch_model: model must be a transformers PreTrainedModel, got Linear"):
        patch_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"patch_model: block_size must be an int >= 1, got 0"):
        patch_model(LlamaForCausalLM(LlamaConfig(**TINY)), block_size=0)
