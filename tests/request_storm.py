"""A storm of requests on packed generation, for ten minutes by ``make storm-requests``.

Requests arrive, sample, share prefixes, are cancelled, fail in all ways that their own callbacks, settings and the size
of the cache allow, interrupt the generation, and are preempted; the model fails in the middle of steps. Whoever ends
well has the tokens that ``generate`` gives for the prompt alone on the unpatched model, or leaves them at a tie;
whoever fails or is cancelled has the first of them. After every step the blocks in use are those of running requests.
"""

import argparse
import functools
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from allocator_storm import check_owners
from rich.console import Console
from rich.table import Table
from tiny_models import FAMILIES, VOCAB_SIZE, make_model
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from torch_paged.cache import allocate_kv_cache
from torch_paged.integrations.transformers import (
    BatchGenerator,
    GenerationOutput,
    GenerationRequest,
    NewToken,
    batch_generator,
    patch_model,
    shared_blocks,
)
from torch_paged.integrations.transformers.sampling import probabilities_of_alike

STORMED = [name for name in ("llama", "gemma2", "mistral", "gpt_oss", "qwen3", "deepseek_v3") if name in FAMILIES]
TIE = 1e-4
"""Share of the scores' standard deviation; a smaller gap of the best two is a tie that either token may win."""
MOST_PROMPT_TOKENS = 40
MOST_NEW_TOKENS = 24
STEPS_WITHOUT_TOKEN = 5000
END = -2
"""Where a callback acts that does so at the end of a stream."""
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"eos_token_id": list(range(0, VOCAB_SIZE, 11))},
    {"repetition_penalty": 1.3},
    {"do_sample": True, "temperature": 0.7},
    {"do_sample": True, "top_k": 20, "top_p": 0.8},
)
ALLOCATION, SAMPLING = "allocations that failed", "samplings that failed"
FATES = {
    "ends": 60,
    "is cancelled by its streamer": 6,
    "processor raises": 4,
    "processor makes too many scores": 3,
    "probabilities are no numbers": 4,
    "criterion raises": 4,
    "streamer raises": 4,
    "processor interrupts": 4,
    "streamer interrupts": 4,
    "end of the streamer interrupts": 3,
    "prompt is refused": 3,
    "outgrows the cache": 2,
}


class Fault(ArithmeticError):
    """What a callback of the storm raises."""


class Callback(BaseStreamer):
    """A processor, criterion or streamer that does something once, at the token of a number."""

    def __init__(self, at: int, then: Callable[[], Any], prompt_tokens: int) -> None:
        self.at, self.then, self.prompt_tokens = at, then, prompt_tokens
        self.streamed = -1  # the prompt comes first
        self.ended = 0

    def process(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Act before the token of that number is chosen; what the act returns is multiplied with the scores."""
        factor = self._at(ids.shape[1] - self.prompt_tokens)
        if factor == "too many":
            return torch.cat([scores, scores + scores.abs().max() + 1], 1)
        return scores if factor is None else scores * factor

    def stop(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Act when the token of that number was chosen."""
        self._at(ids.shape[1] - self.prompt_tokens - 1)
        return torch.zeros(1, dtype=torch.bool)

    def put(self, value: Tensor) -> None:
        """Act when the token of that number is handed over."""
        self.streamed += 1
        self._at(self.streamed - 1)

    def end(self) -> None:
        """Count the ends of the stream, and act there."""
        self.ended += 1
        self._at(END)

    def _at(self, number: int) -> Any:
        if number != self.at or self.then is None:
            return None
        then, self.then = self.then, lambda: None
        return then()


def throw(error: BaseException) -> Any:
    """Raise an error where a statement cannot stand."""
    raise error


@dataclass(eq=False)
class Job:
    """One request, and what is to become of it."""

    prompt: list[int]
    settings: dict[str, Any]
    seed: int
    fate: str
    at: int
    streamer: Callback | None = None
    request: GenerationRequest | None = None
    handed_out: list[int] = field(default_factory=list)


@functools.cache
def models(family: str) -> tuple[Any, Any]:
    """Return a model as it is, and the same model patched."""
    return make_model(family), patch_model(make_model(family))


class Storm:
    """Random requests to one generator.

    Args:
        family: of the model.
        seed: decides the sizes of the generator, the requests, and when what happens.

    Attributes:
        counts: requests by what became of them, and what happened to the generator.
    """

    def __init__(self, family: str, seed: int) -> None:
        self.draw = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.plain, self.model = models(family)
        block_size = self.draw.choice([1, 3, 4, 16])
        least = -(-(MOST_PROMPT_TOKENS + MOST_NEW_TOKENS) // block_size) + 1
        self.grows = self.draw.random() < 0.15
        self.batch = BatchGenerator(
            self.model,
            num_blocks=None if self.grows else self.draw.choice([least, least + 2, 2 * least]),
            block_size=block_size,
            max_batch_tokens=self.draw.choice([3, 11, 64, 1024]),
            max_requests_per_batch=self.draw.choice([2, 5, 20]),
            prefix_reuse=self.draw.random() < 0.6,
        )
        self.capacity = self.batch.cache.num_blocks * block_size
        self.starts = [self.tokens(MOST_PROMPT_TOKENS - 2) for _ in range(4)]
        self.prompts = [self.prompt() for _ in range(30)]
        self.jobs: dict[int, Job] = {}
        self.expected: dict[Any, list[int]] = {}
        self.idle_steps = 0
        self.fault: tuple[int | str, BaseException] | None = None

    def tokens(self, count: int) -> list[int]:
        """Return random token ids."""
        return [self.draw.randrange(2, VOCAB_SIZE) for _ in range(count)]

    def prompt(self) -> list[int]:
        """Return a prompt that may begin like others, or have their blocks behind another one."""
        first = self.tokens(self.draw.choice([0, 0, self.batch.cache.block_size]))
        start = self.draw.choice(self.starts)[: self.draw.randrange(MOST_PROMPT_TOKENS - 2 - len(first))]
        return [*first, *start, *self.tokens(self.draw.randrange(1, 3))]

    def run(self, requests: int, seconds: float = float("inf")) -> None:
        """Add so many requests, or as many as the time allows, and run until all have ended."""
        layers = self.model.model.layers
        hooks = [
            layer.register_forward_pre_hook(lambda *_, index=index: self.raise_fault(index))
            for index, layer in enumerate(layers)
        ]
        until = time.monotonic() + seconds
        patches = (
            patch.object(shared_blocks, "allocate_kv_cache", self.allocate),
            patch.object(batch_generator, "probabilities_of_alike", self.sample),
        )
        for patched in patches:
            patched.start()
        try:
            while (requests and time.monotonic() < until) or self.batch.has_unfinished:
                while requests and time.monotonic() < until and self.draw.random() < 0.6:
                    self.add()
                    requests -= 1
                if self.jobs and self.draw.random() < 0.01:
                    job = self.draw.choice(list(self.jobs.values()))
                    assert job.request is not None
                    job.request.cancel()
                if self.draw.random() < 0.02:
                    error = self.draw.choice([Fault("of the model"), KeyboardInterrupt(), MemoryError()])
                    self.fault = self.draw.choice([*range(len(layers)), SAMPLING]), error
                self.step()
                self.check_blocks()
                for number in [number for number in self.jobs if self.batch.outputs[number].is_finished]:
                    self.settle(number)
        finally:
            for patched in patches:
                patched.stop()
            for hook in hooks:
                hook.remove()
        assert not self.jobs, "requests did not end"
        assert all(not group.blocks_in_use for group in self.batch.cache.groups.values()), "blocks are in use"

    def add(self) -> None:
        """Draw a request and add it."""
        [fate] = self.draw.choices(list(FATES), list(FATES.values()))
        new_tokens = self.draw.randrange(1, MOST_NEW_TOKENS + 1)
        settings = {"do_sample": False, **self.draw.choice(SETTINGS)}
        if fate == "probabilities are no numbers":
            settings = {"do_sample": True, "temperature": 0.7}
        prompt = self.draw.choice(self.prompts)
        if fate == "prompt is refused":
            prompt = self.draw.choice([[], [5, VOCAB_SIZE], [True], [5, -1]])
        elif fate == "outgrows the cache":
            if self.grows or self.capacity > 150:
                return
            new_tokens, settings = self.capacity + 2 - len(prompt), {"do_sample": False}
        job = Job(prompt, {**settings, "max_new_tokens": new_tokens}, self.draw.randrange(3), fate, 0)
        if fate not in ("ends", "prompt is refused", "outgrows the cache"):
            job.at = self.draw.randrange(len(self.alone(job)))
        job.request = self.request(job)
        number = self.batch.add_request(job.request)
        assert number not in self.jobs, "a number was given twice"
        self.jobs[number] = job

    def request(self, job: Job) -> GenerationRequest:
        """Return the request of a job, with callbacks for its fate."""
        request = GenerationRequest(job.prompt, GenerationConfig(**job.settings), seed=job.seed)
        acts: dict[str, Callable[[], Any]] = {
            "is cancelled by its streamer": request.cancel,
            "processor makes too many scores": lambda: "too many",
            "probabilities are no numbers": lambda: float("nan"),
        }
        error: BaseException = KeyboardInterrupt() if job.fate.endswith("interrupts") else Fault("of a callback")
        at = END if job.fate.startswith("end") and job.fate != "ends" else job.at
        callback = Callback(at, acts.get(job.fate, lambda: throw(error)), len(job.prompt))
        if job.fate.startswith(("processor", "probabilities")):
            request.logits_processor = LogitsProcessorList([callback.process])
        elif job.fate.startswith("criterion"):
            request.stopping_criteria = StoppingCriteriaList([callback.stop])
        elif "streamer" in job.fate:
            request.streamer = job.streamer = callback
        return request

    def raise_fault(self, place: Any) -> None:
        """Fail in a layer's forward, or elsewhere in a step."""
        if self.fault is not None and self.fault[0] == place:
            raise self.fault[1]

    def allocate(self, *args: Any, **options: Any) -> Any:
        """Allocate a layer's cache, or run out of memory."""
        if self.draw.random() < 0.1:
            self.fault = ALLOCATION, MemoryError()
            self.raise_fault(ALLOCATION)
        return allocate_kv_cache(*args, **options)

    def sample(self, *args: Any) -> Any:
        """Sample for requests together, or fail."""
        self.raise_fault(SAMPLING)
        return probabilities_of_alike(*args)

    def step(self) -> None:
        """Run one step, or read some tokens and stop reading; go on after whatever was raised."""
        made: list[NewToken] = []
        try:
            if self.draw.random() < 0.9:
                made += self.batch.step()
            else:
                most = self.draw.randrange(1, 9)
                for token in self.batch:
                    made.append(token)
                    if len(made) == most:
                        break
        except (Fault, MemoryError) as error:
            if self.fault is None or error is not self.fault[1]:
                raise AssertionError("a callback's fault came out of a step") from error
            self.counts[self.fault[0] if isinstance(self.fault[0], str) else "forwards that failed"] += 1
        except KeyboardInterrupt:
            self.counts["interrupts"] += 1
        self.fault = None
        for new in made:
            self.jobs[new.request].handed_out.append(new.token_id)
        self.idle_steps = 0 if made else self.idle_steps + 1
        assert self.idle_steps < STEPS_WITHOUT_TOKEN, "no request gets on"
        self.counts["steps"] += 1
        self.counts["tokens"] += len(made)

    def check_blocks(self) -> None:
        """Check that the blocks in use are those of the requests that run, and that no request is lost."""
        running = self.batch._scheduler.running
        for index, group in enumerate(self.batch.cache._pools):
            check_owners(group.allocator, [state.sequence.seqs[index] for state in running])
        going = {state.number for state in [*running, *self.batch._scheduler.waiting]}
        assert going == {number for number in self.jobs if not self.batch.outputs[number].is_finished}

    def settle(self, number: int) -> None:
        """Check what became of a request that has ended, and forget it."""
        output = self.batch.outputs[number]
        if any(token.request == number for token in self.batch._made):
            return
        del self.batch.outputs[number]
        job = self.jobs.pop(number)
        assert job.handed_out == output.generated_tokens, f"{job}: tokens were lost, or handed out twice"
        assert job.streamer is None or job.streamer.ended == 1, f"{job}: its stream was ended {job.streamer} times"
        self.counts["preemptions"] += output.preemptions
        self.counts["prompt tokens reused"] += output.reused_tokens
        self.check_outcome(job, output)

    def check_outcome(self, job: Job, output: GenerationOutput) -> None:
        """Check the tokens and the error of a request."""
        assert job.request is not None
        tokens = output.generated_tokens
        if job.fate == "prompt is refused":
            assert isinstance(output.error, ValueError), output.error
            assert not tokens
            self.counts[job.fate] += 1
            return
        expected = self.alone(job)
        wanted: dict[str, tuple[type[Exception], int]] = {
            "processor raises": (Fault, job.at),
            "processor makes too many scores": (ValueError, job.at),
            "probabilities are no numbers": (RuntimeError, job.at),
            "criterion raises": (Fault, job.at + 1),
            "streamer raises": (Fault, job.at + 1),
        }
        if output.is_cancelled:
            assert job.request.is_cancelled
            assert output.error is None
            self.counts["cancelled"] += 1
            expected = expected[: len(tokens)]
        elif job.fate == "outgrows the cache":
            is_full = output.error is not None and "is full after" in str(output.error)
            assert is_full or all(group.window is not None for group in self.batch.cache.groups.values()), output.error
            expected = expected[: len(tokens)] if is_full else expected
            self.counts[job.fate] += is_full
        elif job.fate in wanted:
            kind, count = wanted[job.fate]
            unasked = job.fate == "criterion raises" and count == len(expected)  # the last token needs no criterion
            assert isinstance(output.error, kind) or unasked, f"{job}: {output.error!r}"
            expected = expected[:count]
            self.counts[job.fate] += 1
        else:
            assert output.error is None, f"{job}: {output.error!r}"
            self.counts["ended"] += 1
        if tokens != expected:
            assert self.is_tie(job, tokens), f"{job}: tokens {tokens}, expected {expected}"
            self.counts["ties"] += 1

    def alone(self, job: Job) -> list[int]:
        """Return the new tokens that ``generate`` gives for a request alone, without its callbacks."""
        key = str((job.prompt, job.settings, job.seed if job.settings["do_sample"] else None))
        if key not in self.expected:
            self.expected[key] = self.generate(job)[0]
        return self.expected[key]

    def generate(self, job: Job) -> tuple[list[int], list[Tensor]]:
        """Return the new tokens of a request alone, and for each the processed scores, (V,)."""
        torch.manual_seed(job.seed)
        ids = torch.tensor([job.prompt])
        options = {"return_dict_in_generate": True, "output_scores": True}
        out = self.plain.generate(ids, attention_mask=torch.ones_like(ids), **job.settings, **options)
        return out.sequences[0, len(job.prompt) :].tolist(), [score[0] for score in out.scores]

    def is_tie(self, job: Job, tokens: list[int]) -> bool:
        """Say whether tokens leave those of the prompt alone where the best two scores are a tie.

        A sampled token is the best of scores to which random numbers were added, as ``torch.multinomial`` does it.
        """
        expected, scores = self.generate(job)
        torch.manual_seed(job.seed)
        for actual, wanted, score in zip(tokens, expected, scores, strict=False):
            noise = torch.zeros_like(score)
            if job.settings["do_sample"]:
                noise = -torch.empty_like(score)[None].exponential_()[0].log()
            best, second = (score + noise).topk(2).indices.tolist()
            assert best == wanted, "the storm does not know how tokens are drawn"
            if actual != wanted:
                gap = (score + noise)[best] - (score + noise)[second]
                return bool(actual == second and gap < TIE * score[score.isfinite()].std())
        return False


def main() -> None:
    """Storm generators of several families one after the other; print what became of the requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--requests", type=int, default=150, help="to one generator")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    console, began, seed = Console(), time.monotonic(), arguments.seed
    while (left := began + arguments.seconds - time.monotonic()) > 0:
        storm = Storm(STORMED[seed % len(STORMED)], seed)
        try:
            storm.run(arguments.requests, left)
        except BaseException:
            console.print(f"{STORMED[seed % len(STORMED)]}, seed {seed}")
            raise
        counts += storm.counts
        seed += 1
    table = Table("what happened", "times")
    for name, count in counts.most_common():
        table.add_row(name, f"{count:,}")
    console.print(table)
    happened = ("ended", "cancelled", "preemptions", "interrupts", "forwards that failed", ALLOCATION, SAMPLING)
    assert all(counts[name] for name in happened), "not everything happened that a storm is for"
    assert counts["ties"] <= counts["ended"] // 100, "too many ties"
    seconds = time.monotonic() - began
    console.print(f"{seed - arguments.seed} generators in {seconds:.0f} s; every request had the tokens it has alone")


if __name__ == "__main__":
    main()
