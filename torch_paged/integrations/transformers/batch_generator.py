"""Many ragged requests at once: every step is one forward over packed tokens, some of each running request."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from torch_paged.integrations.transformers.checks import check_model, check_sizes
from torch_paged.integrations.transformers.packed_cache import PackedCache
from torch_paged.integrations.transformers.packed_prefill import takes_positions
from torch_paged.integrations.transformers.patch import patch_report
from torch_paged.integrations.transformers.request import (
    GenerationOutput,
    GenerationRequest,
    check_settings,
    list_of_ids,
)
from torch_paged.integrations.transformers.rope import depends_on_others, most_packed_tokens
from torch_paged.integrations.transformers.sampling import Sampler, probabilities_of_alike
from torch_paged.integrations.transformers.scheduler import QueuedRequest, Scheduler, end_request
from torch_paged.integrations.transformers.static_sizes import compiles_each_shape
from torch_paged.integrations.transformers.versions import draws_its_own_mask

_FIRST_BLOCKS = 64


class NewToken(NamedTuple):
    """A token that a step has made: the request's number, as ``add_request`` returned it, and the token's id."""

    request: int
    token_id: int


class BatchGenerator:
    """Generate for requests that come and go, a token of each in every step.

    A step packs one token of each request that decodes with chunks of the prompts that wait, and runs the model once.
    When blocks run out, the newest request gives its blocks up and is computed again later.

    Args:
        model: patched by ``patch_model``.
        num_blocks: blocks of the cache. None: it grows with what the running requests need.
        block_size: tokens in a block.
        max_batch_tokens: tokens of one step, at the most.
        max_requests_per_batch: requests that run at once, at the most.
        prefix_reuse: True to compute what prompts begin with alike only once.
        tokenizer: wanted by ``stop_strings``.

    Attributes:
        outputs: what became of each request, by its number. Who serves for long removes those that have ended.

    Raises:
        ValueError: a size below 1, or a model that is not patched.
        NotImplementedError: a layer of the model cannot take packed tokens.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from torch_paged.integrations.transformers import BatchGenerator, patch_model
        >>> config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=1, eos_token_id=None)
        >>> batch = BatchGenerator(patch_model(LlamaForCausalLM(config).eval()))
        >>> first, second = (batch.add_request([5, 6, 7], max_new_tokens=count) for count in (2, 3))
        >>> [request for request, token_id in batch]
        [0, 1, 0, 1, 1]
        >>> len(batch.outputs[second].generated_tokens)
        3
    """

    def __init__(
        self,
        model: Any,
        *,
        num_blocks: int | None = None,
        block_size: int = 16,
        max_batch_tokens: int = 1024,
        max_requests_per_batch: int = 64,
        prefix_reuse: bool = True,
        tokenizer: Any = None,
    ) -> None:
        check_model("BatchGenerator", model)
        check_sizes("BatchGenerator", max_batch_tokens=max_batch_tokens, max_requests_per_batch=max_requests_per_batch)
        self.model = model
        self.outputs: dict[int, GenerationOutput] = {}
        self._next_number = 0
        self.cache = PackedCache(
            model.config,
            num_blocks=_FIRST_BLOCKS if num_blocks is None else num_blocks,
            block_size=block_size,
            device=model.device,
            prefix_reuse=prefix_reuse,
        )
        report = patch_report(model)
        if report is not None and report.way == "gathered":
            raise NotImplementedError(f"generate_batch: packed tokens need paged layers, got {report}; use generate()")
        if compiles_each_shape(model.device):
            raise NotImplementedError(
                f"generate_batch: device '{model.device.type}' compiles each shape, and packed steps have many; "
                "use generate()"
            )
        if not takes_positions(model):
            raise NotImplementedError(
                f"generate_batch: packed tokens need their positions, {type(model).__name__} takes no position_ids; "
                "use generate()"
            )
        if draws_its_own_mask(model):
            raise NotImplementedError(
                f"generate_batch: packed tokens need transformers' mask functions, {type(model).__name__} draws its "
                "own masks in this version; use generate()"
            )
        self.cache.check_implementation()
        self._grows = num_blocks is None
        self._tokenizer = tokenizer
        self._made: deque[NewToken] = deque()  # and not handed out yet
        self._supports_logits_to_keep: bool = model._supports_logits_to_keep()
        self._most_tokens = most_packed_tokens(self.cache.config)
        self._scheduler = Scheduler(
            model,
            self.cache,
            grows=self._grows,
            max_batch_tokens=min(max_batch_tokens, self._most_tokens or max_batch_tokens),
            max_requests_per_batch=max_requests_per_batch,
        )
        self._vocab_size: int = model.get_input_embeddings().num_embeddings

    def add_request(
        self,
        request: GenerationRequest | Sequence[int] | Tensor,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> int:
        """Put a request in the queue.

        A request that cannot run has ended at once: ``outputs[number].error`` says why.

        Args:
            request: a prompt, or a prompt with settings of its own.
            generation_config: settings of a request that has none.
            options: single settings, such as ``max_new_tokens``, that go before ``generation_config``.

        Returns:
            The request's number: 0, 1, ..., never used again.
        """
        if not isinstance(request, GenerationRequest):
            request = GenerationRequest(request)
        number, output = self._next_number, GenerationOutput()
        self._next_number += 1
        self.outputs[number] = output
        try:
            check_settings(request, generation_config)
            output.prompt_ids = self._prompt_ids(request)
            sampler = Sampler(
                self.model,
                request,
                output.prompt_ids,
                tokenizer=self._tokenizer,
                generation_config=generation_config,
                options=options,
            )
            if request.streamer is not None:
                request.streamer.put(torch.tensor([output.prompt_ids]))
        except Exception as error:
            end_request(request, output, error)
        else:
            self._scheduler.waiting.append(QueuedRequest(number, request, output, sampler))
        return number

    def _prompt_ids(self, request: GenerationRequest) -> list[int]:
        ids = list_of_ids(request.input_ids)
        if not ids:
            raise ValueError("generate_batch: a prompt must have at least 1 token, got none")
        for index, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"generate_batch: token ids must be ints in [0, {self._vocab_size - 1}], "
                    f"got {token!r} at index {index}"
                )
        if self._most_tokens is not None and len(ids) > self._most_tokens:
            raise depends_on_others(len(ids), self._most_tokens)
        if not self._grows and not self.cache.can_hold(len(ids)):
            raise ValueError(
                f"generate_batch: a prompt must fit into the cache of {self.cache.num_blocks} blocks of "
                f"{self.cache.block_size} tokens, got {len(ids)} tokens; make num_blocks larger"
            )
        return ids

    @property
    def has_unfinished(self) -> bool:
        """Whether requests wait or run, or a token that they made was not handed out."""
        return bool(self._scheduler.waiting or self._scheduler.running or self._made)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a place."""
        return len(self._scheduler.running)

    def __iter__(self) -> Iterator[NewToken]:
        """Run until every request has ended; yield each token as soon as it is known."""
        while self.has_unfinished:
            if not self._made:
                self._step()
            while self._made:
                yield self._made.popleft()

    def step(self) -> list[NewToken]:
        """Run the model once and return the tokens that it made: none while only prompts are read.

        Tokens that an interrupted step or iteration has made and not handed out come first.

        Raises:
            Exception: what the model raised. The step is undone: it can be run again.
        """
        self._step()
        made = list(self._made)
        self._made.clear()
        return made

    @torch.no_grad()
    def _step(self) -> None:
        self._scheduler.drop_cancelled()
        row: list[tuple[QueuedRequest, int]] = []
        try:
            self._scheduler.schedule(row)
            if not row:
                return
            logits = self._forward(row)
        except BaseException:
            self.cache.roll_back([(state.sequence, count) for state, count in row])
            raise
        for state, _ in row:
            state.published_tokens = state.sequence.length
        self._accept([state for state, _ in row if not state.pending], logits)

    def _forward(self, row: list[tuple[QueuedRequest, int]]) -> Tensor:
        """Run the model on the packed tokens and return the logits of the requests that get a token, (n, V)."""
        ids: list[int] = []
        last_rows: list[int] = []
        for state, count in row:
            stop = state.sequence.length
            ids += state.tokens[stop - count : stop]
            if not state.pending:
                last_rows.append(len(ids) - 1)
        position_ids = self.cache.pack([(state.sequence, count) for state, count in row])
        kept = torch.tensor(last_rows or [0], device=self.model.device)
        keep = {"logits_to_keep": kept} if self._supports_logits_to_keep else {}
        out = self.model(
            input_ids=torch.tensor([ids], device=self.model.device),
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **keep,
        )
        self.cache.finish()
        return out.logits[0] if keep else out.logits[0, kept]

    def _accept(self, states: list[QueuedRequest], logits: Tensor) -> None:
        """Choose a token for each state; whatever interrupts that, those without one are computed again."""
        left = deque(states)
        try:
            if not states:
                return
            best = logits.argmax(-1).tolist()
            drawn_from = probabilities_of_alike([state.sampler for state in states], logits)
            for index, state in enumerate(states):
                self._accept_one(state, best[index], drawn_from.get(index), logits[index : index + 1])
                left.popleft()
        except BaseException:
            running = self._scheduler.running
            self.cache.roll_back([(late.sequence, 1) for late in left if late in running and not late.pending])
            raise

    def _accept_one(self, state: QueuedRequest, best: int, drawn_from: Tensor | None, logits: Tensor) -> None:
        is_done, error = False, None
        try:
            sampler = state.sampler
            if sampler.is_greedy:
                token = best
            elif drawn_from is not None:
                token = sampler.draw(drawn_from)
            else:
                token = sampler.choose(logits)
            if not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"generate_batch: a chosen token must be an id in [0, {self._vocab_size - 1}], got {token}"
                )
            state.tokens.append(token)
            state.output.generated_tokens.append(token)
            self._made.append(NewToken(state.number, token))
            try:
                if state.request.streamer is not None:
                    state.request.streamer.put(torch.tensor([token]))
            finally:
                is_done = sampler.is_done(token)
            if not is_done and self._most_tokens is not None and len(state.tokens) > self._most_tokens:
                raise depends_on_others(len(state.tokens), self._most_tokens)
        except Exception as raised:
            is_done, error = True, raised
        finally:
            if is_done:
                self._scheduler.end(state, error)
