"""Packed generation for many requests gives the tokens that generate() gives for each prompt alone."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import COMMON, FAMILIES, GATHERED, PLAIN, VOCAB_SIZE, make_model, make_tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from torch_paged.integrations.transformers import (
    ATTENTION_NAME,
    BatchGenerator,
    GenerationOutput,
    GenerationRequest,
    generate_batch,
    patch_model,
    patch_report,
)
from torch_paged.integrations.transformers.versions import draws_its_own_mask

PROMPT_LENGTHS = (12, 17, 6, 1, 40, 33, 25, 3)
NEW_TOKENS = 20
LEAST_DISTINCT_TOKENS = 8
TIE = 1e-4
"""Share of the logits' standard deviation; a smaller gap of the best two is a tie that either token may win."""
BLOCK_SIZE = 4


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def generate_alone(model: Any, prompt: list[int], **options: Any) -> tuple[list[int], Tensor]:
    """Return the new tokens of one prompt and the logits of each, (new tokens, V)."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), **settings, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def assert_same_tokens(outputs: Sequence[GenerationOutput], expected: list[tuple[list[int], Tensor]]) -> None:
    """Every request has its tokens, or leaves them where the best two logits are a tie."""
    ties = 0
    for number, (output, (tokens, logits)) in enumerate(zip(outputs, expected, strict=True)):
        assert output.error is None
        if output.generated_tokens == tokens:
            continue
        pairs = zip(output.generated_tokens, tokens, strict=True)
        first = next(index for index, (actual, wanted) in enumerate(pairs) if actual != wanted)
        best, second = logits[first].topk(2).values
        assert best - second < TIE * logits[first].std(), f"request {number} differs from token {first} on"
        ties += 1
    assert ties <= len(expected) // 100


OTHERS = [name for name in FAMILIES if name not in (*PLAIN, *GATHERED, "qwen3_next")]


@pytest.fixture(
    scope="module",
    params=[*PLAIN, *(pytest.param(name, marks=pytest.mark.transformers_matrix) for name in OTHERS)],
)
def family(request: pytest.FixtureRequest) -> tuple[Any, list[tuple[list[int], Tensor]]]:
    """A model and what it generates alone and unpatched, then patched."""
    model = make_model(request.param)
    if draws_its_own_mask(model):
        pytest.skip("this version of transformers lets the model draw its own masks, which generate_batch refuses")
    expected = [generate_alone(model, prompt) for prompt in prompts()]
    assert max(len(set(tokens)) for tokens, _ in expected) >= LEAST_DISTINCT_TOKENS
    return patch_model(model), expected


@pytest.fixture
def llama() -> Any:
    return make_model("llama")


def run(model: Any, requests: Sequence[Any], **options: Any) -> list[GenerationOutput]:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "progress_bar": False, **options}
    return generate_batch(model, requests, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_size": BLOCK_SIZE, "max_batch_tokens": 7},
        {"block_size": BLOCK_SIZE, "num_blocks": 17, "max_batch_tokens": 16},
        {"block_size": BLOCK_SIZE, "num_blocks": 24, "prefix_reuse": False},
        {"max_requests_per_batch": 3},
    ],
    ids=["all at once", "small steps", "few blocks", "few blocks, no reuse", "few at once"],
)
def test_tokens_are_those_of_generate(family: tuple[Any, Any], settings: dict[str, Any]) -> None:
    model, expected = family
    assert_same_tokens(run(model, prompts(), **settings), expected)


def test_a_model_that_draws_its_own_masks_is_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(llama.model), "_update_causal_mask", None, raising=False)
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM draws its own masks in this version; use generate"):
        run(llama, prompts())


def test_a_mask_of_ones_hides_nothing(llama: Any) -> None:
    expected = [generate_alone(llama, prompt) for prompt in prompts()]
    forward = llama.forward

    def with_mask(input_ids: Tensor, **options: Any) -> Any:
        return forward(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)

    llama.forward = with_mask
    assert_same_tokens(run(llama, prompts()), expected)


def test_a_swapped_block_is_caught(family: tuple[Any, Any]) -> None:
    model, expected = family
    batch = BatchGenerator(model, block_size=BLOCK_SIZE)
    pack = batch.cache.pack

    def swap(row: list[Any]) -> Tensor:
        position_ids = pack(row)
        for group in batch.cache.groups.values():
            used = group.block_tables[0] >= 0
            last = int(used.nonzero()[-1])
            group.block_tables[0, last] = (group.block_tables[0, last] + 1) % group.num_blocks
        return position_ids

    batch.cache.pack = swap  # type: ignore[method-assign]
    for prompt in prompts():
        batch.add_request(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert list(batch)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_tokens(list(batch.outputs.values()), expected)


def test_an_unpatched_model_is_patched_only_for_the_call(llama: Any) -> None:
    expected = [generate_alone(llama, prompt) for prompt in prompts()]
    assert_same_tokens(run(llama, prompts()), expected)
    assert llama.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"must be 'torch_paged', got 'eager'; call patch_model\(model\)"):
        BatchGenerator(llama)


def test_a_patched_model_stays_patched() -> None:
    model = patch_model(make_model("deepseek_v3"), block_size=BLOCK_SIZE)
    expected = run(model, prompts()[:2])
    assert patch_report(model) is not None
    assert [output.generated_tokens for output in run(model, prompts()[:2])] == [
        output.generated_tokens for output in expected
    ]


def test_few_blocks_mean_preemption_and_no_loss(llama: Any) -> None:
    patch_model(llama)
    outputs = run(llama, prompts(), block_size=BLOCK_SIZE, num_blocks=17)
    assert sum(output.preemptions for output in outputs) > 1
    assert all(len(output.generated_tokens) == NEW_TOKENS for output in outputs)


def test_results_are_in_the_order_of_the_prompts(llama: Any) -> None:
    requests = [
        GenerationRequest(torch.tensor(prompt), GenerationConfig(max_new_tokens=30 - 3 * number, do_sample=False))
        for number, prompt in enumerate(prompts())
    ]
    outputs = run(llama, requests)
    assert [output.prompt_ids for output in outputs] == prompts()
    assert [len(output.generated_tokens) for output in outputs] == list(range(30, 6, -3))
    assert all(output.sequence == output.prompt_ids + output.generated_tokens for output in outputs)


SAMPLING: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k and top_p": {"top_k": 20, "top_p": 0.8},
    "min_p": {"min_p": 0.1, "temperature": 1.5},
    "repetition_penalty": {"repetition_penalty": 1.3},
}


def sampled(model: Any, **options: Any) -> list[GenerationOutput]:
    requests = [
        GenerationRequest(prompt, GenerationConfig(do_sample=True, max_new_tokens=NEW_TOKENS, **settings), seed=seed)
        for seed, (prompt, settings) in enumerate(zip(prompts(), 2 * list(SAMPLING.values()), strict=True))
    ]
    return run(model, requests, **options)


def test_sampling_is_that_of_generate_with_the_same_seed(llama: Any) -> None:
    expected = []
    for seed, (prompt, settings) in enumerate(zip(prompts(), 2 * list(SAMPLING.values()), strict=True)):
        torch.manual_seed(seed)
        expected.append(generate_alone(llama, prompt, do_sample=True, **settings)[0])
    assert [output.generated_tokens for output in sampled(llama)] == expected
    crowded = sampled(llama, block_size=BLOCK_SIZE, num_blocks=17)
    assert any(output.preemptions for output in crowded)
    assert [output.generated_tokens for output in crowded] == expected


def test_requests_with_the_same_settings_are_sampled_together(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(self: Any, ids: Tensor, scores: Tensor) -> Tensor:
        rows.append(len(scores))
        return apply(self, ids, scores)

    rows: list[int] = []
    apply = TopPLogitsWarper.__call__
    monkeypatch.setattr(TopPLogitsWarper, "__call__", count)
    settings: dict[str, Any] = {"do_sample": True, "top_k": 20, "top_p": 0.8, "max_new_tokens": NEW_TOKENS}
    requests = [GenerationRequest(prompt, seed=seed) for seed, prompt in enumerate(prompts())]
    requests[3].generation_config = GenerationConfig(**{**settings, "top_p": 0.7})
    requests[5].generation_config = GenerationConfig(**settings, repetition_penalty=1.1)
    for number in (1, 2):
        requests[number].logits_processor = LogitsProcessorList([TopPLogitsWarper(0.9)])
    together = run(llama, requests, **settings)
    assert rows == NEW_TOKENS * [4, 2, 2, 1, 1]
    for number, request in enumerate(requests):
        assert run(llama, [request], **settings)[0].generated_tokens == together[number].generated_tokens
    assert set(rows[5 * NEW_TOKENS :]) == {1}


def test_settings_may_change_while_requests_run(llama: Any) -> None:
    def cool(*_: Any) -> Tensor:
        temperature.temperature = 0.01
        return torch.zeros(1, dtype=torch.bool)

    temperature = TemperatureLogitsWarper(1.5)
    processors = LogitsProcessorList([temperature])
    requests = [GenerationRequest(prompt, seed=seed) for seed, prompt in enumerate(prompts()[:2])]
    requests[0].logits_processor, requests[0].stopping_criteria = processors, StoppingCriteriaList([cool])
    requests[1].logits_processor = LogitsProcessorList([TemperatureLogitsWarper(1.5)])
    together = run(llama, requests, do_sample=True)
    temperature.temperature = 1.5
    for request, output in zip(requests, together, strict=True):
        assert run(llama, [request], do_sample=True)[0].generated_tokens == output.generated_tokens


def test_seeds_are_drawn_from_torch_where_none_is_given(llama: Any) -> None:
    def tokens(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return [output.generated_tokens for output in run(llama, prompts(), do_sample=True)]

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 9, "eos_token_id": list(range(0, VOCAB_SIZE, 3))},
        {"eos_token_id": 7, "suppress_tokens": list(range(8, VOCAB_SIZE, 2))},
        {"max_length": 45},
        {"max_length": 45, "forced_eos_token_id": 5},
        {"begin_suppress_tokens": list(range(100))},
        {"sequence_bias": [[[9], 4.0]]},
    ],
    ids=lambda options: " ".join(options),
)
def test_processors_and_criteria_are_those_of_generate(llama: Any, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": None if "max_length" in options else NEW_TOKENS, "pad_token_id": 0, **options}
    expected = [generate_alone(llama, prompt, **options)[0] for prompt in prompts()]
    assert [output.generated_tokens for output in run(llama, prompts(), **options)] == expected


def test_stop_strings_are_those_of_generate(llama: Any) -> None:
    tokenizer = make_tokenizer()
    texts = [tokenizer.decode(generate_alone(llama, prompt)[0]) for prompt in prompts()]
    configs = [
        GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, stop_strings=[text[2 * index + 3 : 2 * index + 6]])
        for index, text in enumerate(texts)
    ]
    expected = []
    for prompt, config in zip(prompts(), configs, strict=True):
        expected.append(generate_alone(llama, prompt, generation_config=config, tokenizer=tokenizer)[0])
    assert len({len(tokens) for tokens in expected}) >= 4
    requests = [GenerationRequest(prompt, config) for prompt, config in zip(prompts(), configs, strict=True)]
    assert [output.generated_tokens for output in run(llama, requests, tokenizer=tokenizer)] == expected


def test_the_defaults_are_those_of_generate(llama: Any) -> None:
    llama.generation_config.eos_token_id = list(range(0, VOCAB_SIZE, 9))
    llama.generation_config.repetition_penalty = 1.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions say that a default length is used
        expected = [generate_alone(llama, prompt, max_new_tokens=None)[0] for prompt in prompts()]
    assert len(set(map(len, expected))) > 2
    outputs = generate_batch(llama, prompts(), progress_bar=False)
    assert [output.generated_tokens for output in outputs] == expected


def test_a_model_that_cannot_choose_its_logits(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [generate_alone(llama, prompt) for prompt in prompts()]
    monkeypatch.setattr(llama, "_supports_logits_to_keep", lambda: False)
    assert_same_tokens(run(llama, prompts(), max_batch_tokens=9), expected)


def test_half_precision_and_one_prompt(llama: Any) -> None:
    llama.bfloat16()
    (output,) = run(llama, [[5, 6, 7]])
    assert len(output.generated_tokens) == NEW_TOKENS
    assert run(llama, []) == []


def test_the_implementation_may_be_set_by_hand(llama: Any) -> None:
    expected = [generate_alone(llama, prompt) for prompt in prompts()]
    llama.set_attn_implementation(ATTENTION_NAME)
    assert_same_tokens(run(llama, prompts()), expected)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_are_not_those_of_a_longer_request(rope: str) -> None:
    limit = 32
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "longrope":
        parameters |= {
            "short_factor": [1.0] * 8,
            "long_factor": [3.0] * 8,
            "original_max_position_embeddings": limit,
        }
    given = "rope_parameters" if hasattr(LlamaConfig(), "rope_parameters") else "rope_scaling"
    settings = {**COMMON, given: parameters, "max_position_embeddings": limit if rope == "dynamic" else 4 * limit}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    lengths = (3, 40, 25, 10)
    requests = [prompts()[4][:length] for length in lengths]
    requests[1] = prompts()[4] * 2
    expected = {number: generate_alone(model, requests[number], max_new_tokens=10)[0] for number in (0, 3)}
    outputs = run(model, requests, max_new_tokens=10)
    assert {number: outputs[number].generated_tokens for number in (0, 3)} == expected
    assert outputs[1].generated_tokens == []
    assert len(outputs[2].generated_tokens) == limit + 1 - 25
    for number in (1, 2):
        assert "beyond 32 tokens the model's rotary frequencies or attention temperatures" in str(outputs[number].error)


@pytest.mark.skipif("llama4" not in FAMILIES, reason="not in this transformers")
@pytest.mark.parametrize("floor", [8, 24])
def test_temperatures_are_not_those_of_another_place_in_the_row(floor: int) -> None:
    model = make_model("llama4")
    model.config.floor_scale = floor
    for layer in model.model.layers:
        layer.self_attn.floor_scale, layer.self_attn.attn_scale = floor, 2.0
    short = [prompt[:4] for prompt in prompts()]
    expected = [generate_alone(model, prompt, max_new_tokens=3) for prompt in short]
    assert_same_tokens(run(model, short, max_new_tokens=3, prefix_reuse=False), expected)
    [output] = run(model, [prompts()[4]], max_new_tokens=3)
    assert "attention temperatures depend on the other sequences" in str(output.error)
    padded = {"input_ids": torch.tensor(short[:3]), "attention_mask": torch.ones(3, 4, dtype=torch.long)}
    padded["attention_mask"][0, 0] = 0
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    tokens = model.generate(**padded, **options)
    assert torch.equal(patch_model(model).generate(**padded, **options), tokens)
