"""Requests come, stream, share prefixes, fail and go; each on its own."""

from typing import Any

import pytest
import torch
from test_transformers_batch import BLOCK_SIZE, NEW_TOKENS, generate_alone, prompts, run
from tiny_models import VOCAB_SIZE, make_model
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from torch_paged.cache import allocate_kv_cache
from torch_paged.integrations.transformers import (
    BatchGenerator,
    GenerationRequest,
    NewToken,
    batch_generator,
    generate_batch,
    patch_model,
    shared_blocks,
)
from torch_paged.integrations.transformers.sampling import probabilities_of_alike

SETTINGS: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


class Recorder(BaseStreamer):
    """Keeps what it is given; after some tokens it does something else."""

    def __init__(self, tokens: int = 0, then: Any = None) -> None:
        self.values: list[list[int]] = []
        self.ended = 0
        self._tokens, self._then = tokens, then

    def put(self, value: Tensor) -> None:
        self.values.append(value.flatten().tolist())
        if self._then is not None and len(self.values) > self._tokens:
            self._then()

    def end(self) -> None:
        self.ended += 1


def fail(*args: Any, **kwargs: Any) -> Any:
    raise ArithmeticError("a fault of the user's")


@pytest.fixture(scope="module")
def llama() -> Any:
    return patch_model(make_model("llama"))


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    model = make_model("llama")
    return [generate_alone(model, prompt)[0] for prompt in prompts()]


def blocks_in_use(batch: BatchGenerator) -> int:
    return sum(group.blocks_in_use for group in batch.cache.groups.values())


FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": ([], ValueError, "a prompt must have at least 1 token, got none"),
    "vocabulary": ([5, VOCAB_SIZE], ValueError, r"token ids must be ints in \[0, 255\], got 256 at index 1"),
    "bool": ([True, False], ValueError, "token ids must be ints"),
    "no int": ([5, 6.5], ValueError, "token ids must be ints"),
    "too long": ([5] * 200, ValueError, "must fit into the cache of 40 blocks of 4 tokens, got 200 tokens"),
    "grows too long": (
        GenerationRequest([5] * 150, GenerationConfig(max_new_tokens=20)),
        ValueError,
        "the cache of 40 blocks of 4 tokens is full after 161 tokens of this request; make num_blocks larger",
    ),
    "max_length": (
        GenerationRequest([5] * 9, GenerationConfig(max_length=9)),
        ValueError,
        "max_length must be > the prompt's 9 tokens, got 9",
    ),
    "processor": (
        GenerationRequest([5, 6], logits_processor=LogitsProcessorList([fail])),
        ArithmeticError,
        "a fault of the user's",
    ),
    "too many scores": (
        GenerationRequest(
            [5, 6], logits_processor=LogitsProcessorList([lambda ids, scores: torch.cat([scores, scores + 1], 1)])
        ),
        ValueError,
        r"a chosen token must be an id in \[0, 255\], got",
    ),
    "criterion": (
        GenerationRequest([5, 6], stopping_criteria=StoppingCriteriaList([fail])),
        ArithmeticError,
        "a fault of the user's",
    ),
    "streamer": (
        GenerationRequest([5, 6], streamer=Recorder(tokens=3, then=fail)),
        ArithmeticError,
        "a fault of the user's",
    ),
    "nan": (
        GenerationRequest(
            [5, 6],
            GenerationConfig(do_sample=True),
            logits_processor=LogitsProcessorList([lambda ids, scores: scores * float("nan")]),
        ),
        RuntimeError,
        "probability tensor",
    ),
    "beams": (GenerationRequest([5], GenerationConfig(num_beams=2)), NotImplementedError, "beam search"),
    "sequences": (
        GenerationRequest([5], GenerationConfig(num_return_sequences=2, do_sample=True)),
        NotImplementedError,
        "num_return_sequences > 1 is not supported; make a request of each",
    ),
    "guidance": (GenerationRequest([5], GenerationConfig(guidance_scale=2.0)), NotImplementedError, "guidance_scale"),
    "scores": (GenerationRequest([5], GenerationConfig(output_scores=True)), NotImplementedError, "output_scores"),
    "stop strings": (GenerationRequest([5], GenerationConfig(stop_strings=["a"])), ValueError, "tokenizer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_its_request_and_no_other(llama: Any, expected: list[list[int]], fault: str) -> None:
    request, kind, sentence = FAULTS[fault]
    outputs = run(llama, [*prompts()[:4], request, *prompts()[4:]], block_size=BLOCK_SIZE, num_blocks=40)
    failed = outputs.pop(4)
    assert isinstance(failed.error, kind)
    with pytest.raises(kind, match=sentence):
        raise failed.error
    assert failed.is_finished
    assert [output.error for output in outputs] == [None] * len(outputs)
    assert [output.generated_tokens for output in outputs] == expected


def test_a_failed_request_keeps_its_tokens_and_ends_its_stream(llama: Any) -> None:
    streamer = Recorder()
    (output,) = run(llama, [GenerationRequest([5, 6, 7], streamer=streamer)], block_size=BLOCK_SIZE, num_blocks=4)
    assert isinstance(output.error, ValueError)
    assert len(output.generated_tokens) == 4 * BLOCK_SIZE + 1 - 3
    assert streamer.ended == 1
    streamer = Recorder()
    run(llama, [GenerationRequest([], streamer=streamer)])
    assert streamer.ended == 1


def test_an_unknown_option_is_refused(llama: Any) -> None:
    (output,) = run(llama, [[5]], max_new_token=3)
    assert "options must be of a GenerationConfig, got max_new_token" in str(output.error)


@pytest.mark.parametrize("option", ["num_blocks", "block_size", "max_batch_tokens", "max_requests_per_batch"])
def test_sizes_are_checked(llama: Any, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be an int >= 1, got 0"):
        run(llama, [[5]], **{option: 0})


def test_a_model_that_cannot_be_paged_is_refused_in_one_sentence() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(NotImplementedError, match=r"Bloom|bloom"):
        generate_batch(bloom, [[5, 6]], max_new_tokens=2)


def test_cancelling(llama: Any, expected: list[list[int]]) -> None:
    requests = [GenerationRequest(prompt) for prompt in prompts()]
    requests[1].streamer = Recorder(tokens=5, then=requests[1].cancel)
    requests[7].cancel()
    outputs = run(llama, requests, max_requests_per_batch=3)
    assert [output.is_cancelled for output in outputs] == [number in (1, 7) for number in range(8)]
    assert outputs[1].generated_tokens == expected[1][:5]
    assert requests[1].streamer.ended == 1
    assert outputs[7].generated_tokens == []
    for number in (0, 2, 3, 4, 5, 6):
        assert outputs[number].generated_tokens == expected[number]
        assert outputs[number].error is None


def test_every_token_is_streamed_at_once(llama: Any, expected: list[list[int]]) -> None:
    streamer = Recorder()
    batch = BatchGenerator(llama, block_size=BLOCK_SIZE, num_blocks=20)
    for number, prompt in enumerate(prompts()):
        request = GenerationRequest(prompt, streamer=streamer if number == 2 else None)
        assert batch.add_request(request, **SETTINGS) == number
    seen: dict[int, list[int]] = {number: [] for number in range(8)}
    for number, token_id in batch:
        seen[number].append(token_id)
        assert batch.outputs[number].generated_tokens[len(seen[number]) - 1] == token_id
    assert list(seen.values()) == expected
    assert streamer.values == [prompts()[2], *([token] for token in expected[2])]
    assert streamer.ended == 1


def test_requests_may_come_while_others_run(llama: Any, expected: list[list[int]]) -> None:
    batch = BatchGenerator(llama)
    for prompt in prompts():
        batch.add_request(prompt, **SETTINGS)
        batch.step()
    assert 0 < batch.num_running <= 8
    list(batch)
    assert [batch.outputs[number].generated_tokens for number in range(8)] == expected
    assert batch.step() == []
    assert blocks_in_use(batch) == 0


def test_a_step_that_fails_can_be_run_again(
    llama: Any, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = BatchGenerator(llama, block_size=BLOCK_SIZE, max_batch_tokens=30)
    for prompt in prompts():
        batch.add_request(prompt, **SETTINGS)
    for _ in range(3):
        batch.step()
        with monkeypatch.context() as patch:
            patch.setattr(llama.model.layers[2].mlp, "forward", fail)
            with pytest.raises(ArithmeticError):
                batch.step()
    list(batch)
    assert [batch.outputs[number].generated_tokens for number in range(8)] == expected


def test_outputs_may_be_removed(llama: Any, expected: list[list[int]]) -> None:
    batch = BatchGenerator(llama)
    numbers = [batch.add_request(prompt, **SETTINGS) for prompt in prompts()[:2]]
    list(batch)
    del batch.outputs[numbers[0]]
    numbers += [batch.add_request(prompt, **SETTINGS) for prompt in prompts()[2:4]]
    list(batch)
    assert numbers == [0, 1, 2, 3]
    assert [batch.outputs[number].generated_tokens for number in (1, 2, 3)] == expected[1:4]


def test_no_memory_for_a_larger_cache_spoils_nothing(
    llama: Any, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*args: Any, **options: Any) -> Any:
        allocations.append(args)
        if len(allocations) == 3:  # the third of four layers
            raise MemoryError
        return allocate_kv_cache(*args, **options)

    allocations: list[Any] = []
    batch = BatchGenerator(llama, block_size=1)
    for prompt in prompts()[:4]:
        batch.add_request(prompt, **SETTINGS)
    batch.step()
    monkeypatch.setattr(shared_blocks, "allocate_kv_cache", allocate)
    with pytest.raises(MemoryError):
        list(batch)
    list(batch)
    assert [batch.outputs[number].generated_tokens for number in range(4)] == expected[:4]


def read_steps(batch: BatchGenerator, read: list[NewToken]) -> None:
    while batch.has_unfinished:
        read += batch.step()


def test_an_interrupt_loses_no_token(llama: Any, expected: list[list[int]]) -> None:
    def interrupt(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == len(prompts()[2]) + 3 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return scores

    interrupted: list[bool] = []
    batch = BatchGenerator(llama, block_size=BLOCK_SIZE)
    for number, prompt in enumerate(prompts()):
        processors = LogitsProcessorList([interrupt]) if number == 2 else None
        batch.add_request(GenerationRequest(prompt, logits_processor=processors), **SETTINGS)
    read: list[NewToken] = []
    with pytest.raises(KeyboardInterrupt):
        read_steps(batch, read)
    read_steps(batch, read)
    for number, tokens in enumerate(expected):
        assert [token.token_id for token in read if token.request == number] == tokens
    assert [batch.outputs[number].generated_tokens for number in range(8)] == expected
    assert blocks_in_use(batch) == 0


@pytest.mark.parametrize("tokens", [3, NEW_TOKENS])
def test_an_interrupt_of_a_streamer_loses_no_token(llama: Any, expected: list[list[int]], tokens: int) -> None:
    def interrupt() -> None:
        if len(streamer.values) == tokens + 1:
            raise KeyboardInterrupt

    streamer = Recorder(tokens=tokens, then=interrupt)
    batch = BatchGenerator(llama, block_size=BLOCK_SIZE)
    for number, prompt in enumerate(prompts()):
        batch.add_request(GenerationRequest(prompt, streamer=streamer if number == 7 else None), **SETTINGS)
    read: list[NewToken] = []
    with pytest.raises(KeyboardInterrupt):
        read_steps(batch, read)
    read_steps(batch, read)
    for number, wanted in enumerate(expected):
        assert [token.token_id for token in read if token.request == number] == wanted
        assert batch.outputs[number].generated_tokens == wanted
    assert streamer.values[1:] == [[token] for token in expected[7]]
    assert streamer.ended == 1
    assert blocks_in_use(batch) == 0


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_no_token_is_lost_where_choosing_them_fails(
    llama: Any, expected: list[list[int]], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise error
        return probabilities_of_alike(*args)

    calls: list[Any] = []
    monkeypatch.setattr(batch_generator, "probabilities_of_alike", choose)
    batch = BatchGenerator(llama, block_size=BLOCK_SIZE, max_batch_tokens=30)
    for prompt in prompts():
        batch.add_request(prompt, **SETTINGS)
    with pytest.raises(error):
        list(batch)
    list(batch)
    assert [batch.outputs[number].generated_tokens for number in range(8)] == expected


def test_an_interrupt_at_the_end_of_a_stream_loses_no_token(llama: Any, expected: list[list[int]]) -> None:
    class Interrupting(Recorder):
        def end(self) -> None:
            super().end()
            raise KeyboardInterrupt

    streamer = Interrupting()
    batch = BatchGenerator(llama, block_size=BLOCK_SIZE)
    for number, prompt in enumerate(prompts()):
        options = {**SETTINGS, "max_new_tokens": 7} if number == 2 else SETTINGS
        batch.add_request(GenerationRequest(prompt, streamer=streamer if number == 2 else None), **options)
    read: list[NewToken] = []
    with pytest.raises(KeyboardInterrupt):
        read_steps(batch, read)
    read_steps(batch, read)
    for number, wanted in enumerate(expected):
        tokens = wanted[:7] if number == 2 else wanted
        assert [token.token_id for token in read if token.request == number] == tokens
        assert batch.outputs[number].generated_tokens == tokens
    assert streamer.ended == 1
    assert blocks_in_use(batch) == 0


def test_who_stops_reading_loses_no_token(llama: Any, expected: list[list[int]]) -> None:
    batch = BatchGenerator(llama, block_size=BLOCK_SIZE)
    for prompt in prompts():
        batch.add_request(prompt, **SETTINGS)
    seen: dict[int, list[int]] = {number: [] for number in range(8)}
    for stop in (3, 5, 20):
        for count, (number, token_id) in enumerate(batch, 1):
            seen[number].append(token_id)
            if count == stop:
                break
    while batch.has_unfinished:
        for number, token_id in batch.step():
            seen[number].append(token_id)
    assert list(seen.values()) == expected


def test_a_lost_handle_raises(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = BatchGenerator(llama)
    update = batch.cache.layers[1].update
    monkeypatch.setattr(batch.cache.layers[1], "update", lambda *args: tuple(part[:] for part in update(*args)))
    batch.add_request([5, 6, 7], **SETTINGS)
    with pytest.raises(RuntimeError, match="must be the handle"):
        batch.step()


def test_a_common_prefix_is_computed_once(llama: Any) -> None:
    common = prompts()[4]
    requests = [common + prompt for prompt in prompts()]
    plain = make_model("llama")
    computed: list[int] = []

    def count(_: Any, __: Any, options: dict[str, Any]) -> None:
        computed.append(options["input_ids"].numel())

    hook = llama.register_forward_pre_hook(count, with_kwargs=True)
    try:
        outputs = run(llama, requests, block_size=BLOCK_SIZE)
        with_reuse = sum(computed)
        computed.clear()
        others = run(llama, requests, block_size=BLOCK_SIZE, prefix_reuse=False)
        without = sum(computed)
    finally:
        hook.remove()
    alone = [generate_alone(plain, prompt)[0] for prompt in requests]
    assert [output.generated_tokens for output in outputs] == alone
    assert [output.generated_tokens for output in others] == alone
    shared = len(common) // BLOCK_SIZE * BLOCK_SIZE
    assert outputs[0].reused_tokens == 0
    assert all(output.reused_tokens >= shared for output in outputs[1:])
    assert without - with_reuse == sum(output.reused_tokens for output in outputs) >= 7 * shared
    assert [output.reused_tokens for output in others] == [0] * 8


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_prefixes_are_shared_behind_windows_too(family: str) -> None:
    model = make_model(family)
    requests = [prompts()[4] + prompt for prompt in prompts()]
    expected = [generate_alone(model, prompt)[0] for prompt in requests]
    batch = BatchGenerator(patch_model(model), block_size=BLOCK_SIZE, num_blocks=200)
    for turn in range(2):
        for prompt in requests:
            batch.add_request(prompt, **SETTINGS)
        list(batch)
        outputs = [batch.outputs[8 * turn + number] for number in range(8)]
        assert [output.generated_tokens for output in outputs] == expected
    assert all(output.reused_tokens > 30 for output in outputs)


def test_blocks_and_memory(llama: Any) -> None:
    batch = BatchGenerator(llama, block_size=BLOCK_SIZE, num_blocks=30)
    for prompt in prompts():
        batch.add_request(prompt, **SETTINGS)
    in_use = []
    while batch.has_unfinished:
        batch.step()
        in_use.append(blocks_in_use(batch))
    assert 24 <= max(in_use) <= 30
    assert in_use[-1] == 0
    assert batch.cache.pool_bytes == 4 * 2 * 30 * 2 * BLOCK_SIZE * 16 * 4
    outputs = run(llama, prompts(), block_size=BLOCK_SIZE)
    assert all(output.preemptions == 0 for output in outputs)


def test_blocks_behind_a_window_are_freed() -> None:
    model = patch_model(make_model("mistral"))
    batch = BatchGenerator(model, block_size=BLOCK_SIZE, num_blocks=40, max_batch_tokens=8, prefix_reuse=False)
    batch.add_request([5] * 100, max_new_tokens=50, do_sample=False)
    list(batch)
    assert len(batch.outputs[0].generated_tokens) == 50
    assert batch.cache.peak_blocks <= 5


def test_the_progress_bar_can_be_switched_off(
    llama: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    run(llama, [[5]], progress_bar=False)
    assert capsys.readouterr().err == ""
    run(llama, [[5], [6]], progress_bar=True)
    assert "2/2" in capsys.readouterr().err


def test_no_gradient_is_recorded(llama: Any) -> None:
    with torch.enable_grad():
        run(llama, [[5]])
    assert all(parameter.grad is None for parameter in llama.parameters())
