"""Which requests run, and what each puts into a step."""

import contextlib
from collections import deque
from typing import Any

from torch_paged.integrations.transformers.packed_cache import CachedSequence, PackedCache
from torch_paged.integrations.transformers.packed_prefill import cache_salt
from torch_paged.integrations.transformers.request import GenerationOutput, GenerationRequest
from torch_paged.integrations.transformers.sampling import Sampler


class QueuedRequest:
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


class Scheduler:
    """Admit requests by free blocks, the oldest first, and take blocks back from the newest when they run out.

    Args:
        model: patched by ``patch_model``.
        cache: that the requests share.
        grows: whether the cache may grow instead.
        max_batch_tokens: tokens of one step, at the most.
        max_requests_per_batch: requests that run at once, at the most.

    Attributes:
        waiting: requests without a place, in the order in which they get one.
        running: requests with a place, the oldest first.
    """

    def __init__(
        self, model: Any, cache: PackedCache, *, grows: bool, max_batch_tokens: int, max_requests_per_batch: int
    ) -> None:
        self.cache = cache
        self.max_batch_tokens = max_batch_tokens
        self.max_requests_per_batch = max_requests_per_batch
        self.waiting: deque[QueuedRequest] = deque()
        self.running: list[QueuedRequest] = []
        self._model = model
        self._grows = grows

    def drop_cancelled(self) -> None:
        """End the requests that were cancelled."""
        for state in [*self.running, *self.waiting]:
            if state.request.is_cancelled:
                state.output.is_cancelled = True
                if state in self.running:
                    self.end(state, None)
                else:
                    self.waiting.remove(state)
                    end_request(state.request, state.output)

    def schedule(self, row: list[tuple[QueuedRequest, int]]) -> None:
        """Choose how many tokens each request puts into this step, the oldest first, and give them slots."""
        budget = self.max_batch_tokens
        for state in list(self.running):
            if budget and state in self.running:
                budget -= self._place(state, budget, row)
        if not self.waiting or not budget or len(self.running) == self.max_requests_per_batch:
            return
        salt = cache_salt(self._model) if self.cache.prefix_reuse else b""
        for state in list(self.waiting):
            if not budget or len(self.running) == self.max_requests_per_batch:
                return
            sequence = self.cache.add(state.tokens, salt=salt)
            if self._is_being_computed(state, sequence):
                self.cache.free(sequence)
                continue
            if self.running and not self._fits(state, sequence):
                self.cache.free(sequence)
                return
            if not state.output.generated_tokens:
                state.output.reused_tokens = sequence.length
            state.sequence, state.published_tokens = sequence, sequence.length
            self.waiting.remove(state)
            self.running.append(state)
            budget -= self._place(state, budget, row)

    def _is_being_computed(self, state: QueuedRequest, sequence: CachedSequence) -> bool:
        """Say whether a running request will soon publish the block that this one would have to compute next."""
        stop = sequence.length + self.cache.block_size
        if not self.cache.prefix_reuse or stop >= len(state.tokens):
            return False
        wanted = state.tokens[:stop]
        return any(other.published_tokens < stop and other.tokens[:stop] == wanted for other in self.running)

    def _fits(self, state: QueuedRequest, sequence: CachedSequence) -> bool:
        """Say whether the request can start beside those that run, each of which may soon want another block."""
        if self._grows:
            return True
        spare = sum(other.pending + self.cache.block_size for other in self.running)
        return self.cache.fits(sequence, len(state.tokens) - sequence.length, self.max_batch_tokens, spare)

    def _place(self, state: QueuedRequest, budget: int, row: list[tuple[QueuedRequest, int]]) -> int:
        """Give slots to as many of a request's tokens as this step takes, and return their number."""
        begin, count = state.sequence.length, min(state.pending, budget)
        while not self.cache.append(state.sequence, state.tokens[begin : begin + count]):
            newest = self.running[-1]
            if self._grows:
                self.cache.grow(2 * self.cache.num_blocks)
            elif newest is not state:
                self._preempt(newest)
            elif len(self.running) > 1:
                return 0  # the older ones go on, and end
            elif count > 1:
                count //= 2
            else:
                self.end(state, _cache_is_full(self.cache, len(state.tokens)))
                return 0
        row.append((state, count))
        return count

    def _preempt(self, state: QueuedRequest) -> None:
        self.running.remove(state)
        self.cache.free(state.sequence)
        state.output.preemptions += 1
        self.waiting.appendleft(state)

    def end(self, state: QueuedRequest, error: Exception | None) -> None:
        """End a request that runs, and free its blocks."""
        self.running.remove(state)
        self.cache.free(state.sequence)
        end_request(state.request, state.output, error)


def end_request(request: GenerationRequest, output: GenerationOutput, error: Exception | None = None) -> None:
    """Write down that a request has ended, and end its stream."""
    output.is_finished, output.error = True, error
    if request.streamer is not None:
        with contextlib.suppress(Exception):
            request.streamer.end()


def _cache_is_full(cache: PackedCache, num_tokens: int) -> ValueError:
    return ValueError(
        f"generate_batch: the cache of {cache.num_blocks} blocks of {cache.block_size} tokens is full "
        f"after {num_tokens} tokens of this request; make num_blocks larger"
    )
