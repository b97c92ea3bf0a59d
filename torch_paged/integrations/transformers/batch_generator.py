"""Many ragged requests at once: every step is one forward over packed tokens, some of each running request."""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from torch_paged.integrations.transformers.packed_cache import CachedSequence, PackedCache
from torch_paged.integrations.transformers.packed_prefill import cache_salt, takes_positions
from torch_paged.integrations.transformers.patch import patch_report
from torch_paged.integrations.transformers.request import GenerationOutput, GenerationRequest
from torch_paged.integrations.transformers.rope import depends_on_others, most_packed_tokens
from torch_paged.integrations.transformers.sampling import Sampler, probabilities_of_alike

_FIRST_BLOCKS = 64


class NewToken(NamedTuple):
    """A token that a step has made: the request's number, as ``add_request`` returned it, and the token's id."""

    request: int
    token_id: int


class _State:
    """A request on its way: all its tokens, and how many of them are in the cache."""

    def __init__(self, number: int, request: GenerationRequest, output: GenerationOutput, sampler: Sampler) -> None:
        self.number = number
        self.request = request
        self.output = output
        self.sampler = sampler
        self.tokens = list(output.prompt_ids)
        self.sequence = CachedSequence((), 0)
        self.published_tokens = 0

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet: 1 for a request that decodes."""
        return len(self.tokens) - self.sequence.length


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
        for name, size in (
            ("max_batch_tokens", max_batch_tokens),
            ("max_requests_per_batch", max_requests_per_batch),
        ):
            if size < 1:
                raise ValueError(f"BatchGenerator: {name} must be >= 1, got {size}")
        self.model = model
        self.max_requests_per_batch = max_requests_per_batch
        self.outputs: dict[int, GenerationOutput] = {}
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
        if not takes_positions(model):
            raise NotImplementedError(
                f"generate_batch: packed tokens need their positions, {type(model).__name__} takes no position_ids; "
                "use generate()"
            )
        self.cache.check_implementation()
        self._grows = num_blocks is None
        self._tokenizer = tokenizer
        self._waiting: deque[_State] = deque()
        self._running: list[_State] = []  # the oldest first
        self._made: deque[NewToken] = deque()  # and not handed out yet
        self._supports_logits_to_keep: bool = model._supports_logits_to_keep()
        self._most_tokens = most_packed_tokens(self.cache.config)
        self.max_batch_tokens = min(max_batch_tokens, self._most_tokens or max_batch_tokens)
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
            The request's number: 0, 1, ...
        """
        if not isinstance(request, GenerationRequest):
            request = GenerationRequest(request)
        number, output = len(self.outputs), GenerationOutput()
        self.outputs[number] = output
        try:
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
            _end(request, output, error)
        else:
            self._waiting.append(_State(number, request, output, sampler))
        return number

    def _prompt_ids(self, request: GenerationRequest) -> list[int]:
        ids = request.input_ids.tolist() if isinstance(request.input_ids, Tensor) else list(request.input_ids)
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
        return bool(self._waiting or self._running or self._made)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a place."""
        return len(self._running)

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
        self._drop_cancelled()
        row: list[tuple[_State, int]] = []
        try:
            self._schedule(row)
            if not row:
                return
            logits = self._forward(row)
        except BaseException:
            self.cache.roll_back([(state.sequence, count) for state, count in row])
            raise
        for state, _ in row:
            state.published_tokens = state.sequence.length
        self._accept([state for state, _ in row if not state.pending], logits)

    def _drop_cancelled(self) -> None:
        for state in [*self._running, *self._waiting]:
            if state.request.is_cancelled:
                state.output.is_cancelled = True
                if state in self._running:
                    self._running.remove(state)
                    self.cache.free(state.sequence)
                else:
                    self._waiting.remove(state)
                _end(state.request, state.output)

    def _schedule(self, row: list[tuple[_State, int]]) -> None:
        """Choose how many tokens each request puts into this step, the oldest first, and give them slots."""
        budget = self.max_batch_tokens
        for state in list(self._running):
            if budget and state in self._running:
                budget -= self._place(state, budget, row)
        if not self._waiting or not budget or len(self._running) == self.max_requests_per_batch:
            return
        salt = cache_salt(self.model) if self.cache.prefix_reuse else b""
        for state in list(self._waiting):
            if not budget or len(self._running) == self.max_requests_per_batch:
                return
            sequence = self.cache.add(state.tokens, salt=salt)
            if self._is_being_computed(state, sequence):
                self.cache.free(sequence)
                continue
            if self._running and not self._fits(state, sequence):
                self.cache.free(sequence)
                return
            if not state.output.generated_tokens:
                state.output.reused_tokens = sequence.length
            state.sequence, state.published_tokens = sequence, sequence.length
            self._waiting.remove(state)
            self._running.append(state)
            budget -= self._place(state, budget, row)

    def _is_being_computed(self, state: _State, sequence: CachedSequence) -> bool:
        """Say whether a running request will soon publish the block that this one would have to compute next."""
        stop = sequence.length + self.cache.block_size
        if not self.cache.prefix_reuse or stop >= len(state.tokens):
            return False
        wanted = state.tokens[:stop]
        return any(other.published_tokens < stop and other.tokens[:stop] == wanted for other in self._running)

    def _fits(self, state: _State, sequence: CachedSequence) -> bool:
        """Say whether the request can start beside those that run, each of which may soon want another block."""
        if self._grows:
            return True
        spare = sum(other.pending + self.cache.block_size for other in self._running)
        return self.cache.fits(sequence, len(state.tokens) - sequence.length, self.max_batch_tokens, spare)

    def _place(self, state: _State, budget: int, row: list[tuple[_State, int]]) -> int:
        """Give slots to as many of a request's tokens as this step takes, and return their number."""
        begin, count = state.sequence.length, min(state.pending, budget)
        while not self.cache.append(state.sequence, state.tokens[begin : begin + count]):
            newest = self._running[-1]
            if self._grows:
                self.cache.grow(2 * self.cache.num_blocks)
            elif newest is not state:
                self._preempt(newest)
            elif len(self._running) > 1:
                return 0  # the older ones go on, and end
            elif count > 1:
                count //= 2
            else:
                self._running.remove(state)
                self._finish(state, _cache_is_full(self.cache, len(state.tokens)))
                return 0
        row.append((state, count))
        return count

    def _preempt(self, state: _State) -> None:
        self._running.remove(state)
        self.cache.free(state.sequence)
        state.output.preemptions += 1
        self._waiting.appendleft(state)

    def _forward(self, row: list[tuple[_State, int]]) -> Tensor:
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

    def _accept(self, states: list[_State], logits: Tensor) -> None:
        if not states:
            return
        best = logits.argmax(-1).tolist()
        drawn_from = probabilities_of_alike([state.sampler for state in states], logits)
        for index, state in enumerate(states):
            is_done, error = False, None
            try:
                sampler = state.sampler
                if sampler.is_greedy:
                    token = best[index]
                elif index in drawn_from:
                    token = sampler.draw(drawn_from[index])
                else:
                    token = sampler.choose(logits[index : index + 1])
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
            except BaseException:  # an interrupt: the tokens that were not chosen are computed again
                self.cache.roll_back([(late.sequence, 1) for late in states[index:] if not late.pending])
                if is_done:
                    self._running.remove(state)
                    self._finish(state, None)
                raise
            if is_done:
                self._running.remove(state)
                self._finish(state, error)

    def _finish(self, state: _State, error: Exception | None) -> None:
        self.cache.free(state.sequence)
        _end(state.request, state.output, error)


def _end(request: GenerationRequest, output: GenerationOutput, error: Exception | None = None) -> None:
    output.is_finished, output.error = True, error
    if request.streamer is not None:
        with contextlib.suppress(Exception):
            request.streamer.end()


def _cache_is_full(cache: PackedCache, num_tokens: int) -> ValueError:
    return ValueError(
        f"generate_batch: the cache of {cache.num_blocks} blocks of {cache.block_size} tokens is full "
        f"after {num_tokens} tokens of this request; make num_blocks larger"
    )
