"""Pages of the cache, moved from HBM to VMEM ahead of their use.

The blocks of all sequences of a core form one stream: block after block of a sequence, then the next sequence that has
any. ``PageStream`` keeps the buffers of a ring filled ahead, also across sequences. Each page is one strided copy (keys
and values of all heads), each buffer has its own semaphore, and a full buffer is awaited once, by its bytes. Only pages
of the span of a sequence are read. An id outside ``[0, N)`` is replaced by one inside, and its page is marked.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

STATE_WORDS = 5
_SLOT, _ITEM, _PAGE, _END, _FETCH_SLOT = range(STATE_WORDS)

_UNROLLED_PAGES = 32
"""Copies that are started in a row without a loop."""


@dataclass(frozen=True)
class PageStream:
    """The stream of blocks of one core.

    Attributes:
        sources: refs in HBM, page on axis 1: the cache, and per-token scales where there are any.
        buffers: one ref in VMEM per source, ``(num_buffers, pages_per_block, *a page)``.
        semaphores: ``(num_buffers,)`` DMA semaphores.
        table: SMEM ref ``(rows * M,)`` of block ids.
        state: SMEM ref ``(STATE_WORDS,)`` int32; it lives as long as the stream.
        unusable: SMEM ref ``(num_buffers,)`` int32: not 0 where a block has ids outside ``[0, N)``.
        span: item -> (row of the table, first page, end page); the pages that the item reads.
        num_columns: M.
        last: one past the last item of this core.
        head: first kv head of this core where it takes a part of them, else None.
        aligned: blocks begin at multiples of ``pages_per_block``, else at the first page of the span.
        block_sources: pairs of (row, block index) -> ref, and a ref in VMEM ``(num_buffers, ...)``: what is copied once
            for each block. Needs ``aligned``.
    """

    sources: Sequence[Any]
    buffers: Sequence[Any]
    semaphores: Any
    table: Any
    state: Any
    unusable: Any
    span: Callable[[Any], tuple[Any, Any, Any]]
    num_columns: int
    last: Any
    head: Any = None
    aligned: bool = False
    block_sources: Sequence[tuple[Callable[[Any, Any], Any], Any]] = ()

    @property
    def num_buffers(self) -> int:
        """Depth of the ring."""
        return self.buffers[0].shape[0]

    @property
    def pages_per_block(self) -> int:
        """Pages that a buffer holds."""
        return self.buffers[0].shape[1]

    def base(self, first_page: Any) -> Any:
        """Return the page with which the first block of a span begins."""
        return first_page - lax.rem(first_page, self.pages_per_block) if self.aligned else first_page

    def open(self, first: Any) -> None:
        """Start the stream of a core at its first item."""
        self.state[_SLOT] = 0
        self.state[_FETCH_SLOT] = 0
        self._seek(first)
        for _ in range(self.num_buffers - 1):
            self.fetch()

    def fetch(self) -> None:
        """Start the copies of the next block of the stream, if there is one."""
        page, end, slot = self.state[_PAGE], self.state[_END], self.state[_FETCH_SLOT]
        row, first_page, _ = self.span(jnp.minimum(self.state[_ITEM], self.last - 1))
        begin, stop = self.part(page, first_page, end)
        place = row * self.num_columns + page

        def start(j: Any, difference: Any) -> Any:
            block_id = self.table[place + j]
            inside = jnp.clip(block_id, 0, self.sources[0].shape[1] - 1)
            for copy in self._copies(inside, slot, j):
                copy.start()
            return difference | (block_id ^ inside)

        full = stop - begin == self.pages_per_block

        @pl.when(full)
        def start_full() -> None:
            run = math.gcd(self.pages_per_block, _UNROLLED_PAGES)

            def start_run(i: Any, difference: Any) -> Any:
                for j in range(run):
                    difference = start(i * run + j, difference)
                return difference

            self.unusable[slot] = lax.fori_loop(
                0, self.pages_per_block // run, start_run, 0, unroll=self.pages_per_block == run
            )

        @pl.when(jnp.logical_not(full))
        def start_partial() -> None:
            self.unusable[slot] = lax.fori_loop(begin, stop, start, 0)

        @pl.when(begin < stop)
        def start_block() -> None:
            for copy in self._block_copies(row, lax.div(page, self.pages_per_block), slot):
                copy.start()

        self.state[_FETCH_SLOT] = jnp.where(slot + 1 == self.num_buffers, 0, slot + 1)
        self.state[_PAGE] = page + self.pages_per_block

        @pl.when(page + self.pages_per_block >= end)
        def seek() -> None:
            self._seek(self.state[_ITEM] + 1)

    def wait(self, count: Any) -> Any:
        """Wait for the ``count`` pages of the oldest block in flight; return its buffer, which is then to be read."""
        slot = self.state[_SLOT]
        self.state[_SLOT] = jnp.where(slot + 1 == self.num_buffers, 0, slot + 1)

        @pl.when(count == self.pages_per_block)
        def wait_full() -> None:
            for buffer in self.buffers:
                pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], self.semaphores.at[slot]).wait()

        @pl.when(count < self.pages_per_block)
        def wait_partial() -> None:
            def wait_page(j: Any, carry: Any) -> Any:
                for copy in self._copies(0, slot, j):
                    copy.wait()
                return carry

            lax.fori_loop(0, count, wait_page, 0)

        for copy in self._block_copies(0, 0, slot):
            copy.wait()
        return slot

    def part(self, page: Any, first_page: Any, end_page: Any) -> tuple[Any, Any]:
        """Return which pages of the block that begins with ``page`` belong to a span: from, and up to."""
        begin = jnp.maximum(first_page - page, 0) if self.aligned else jnp.zeros_like(page)
        return begin, jnp.minimum(end_page - page, self.pages_per_block)

    def _copies(self, block_id: Any, slot: Any, j: Any) -> list[Any]:
        copies = []
        for source, buffer in zip(self.sources, self.buffers, strict=True):
            page = source.at[:, block_id]
            if self.head is not None:
                page = source.at[:, block_id, pl.ds(self.head, buffer.shape[3])]
            copies.append(pltpu.make_async_copy(page, buffer.at[slot, j], self.semaphores.at[slot]))
        return copies

    def _block_copies(self, row: Any, block: Any, slot: Any) -> list[Any]:
        return [
            pltpu.make_async_copy(source(row, block), buffer.at[slot], self.semaphores.at[slot])
            for source, buffer in self.block_sources
        ]

    def _seek(self, item: Any) -> None:
        """Move the front of the stream to the first item, from ``item`` on, that has pages."""

        def empty(item: Any) -> Any:
            _, first_page, end_page = self.span(jnp.minimum(item, self.last - 1))
            return (item < self.last) & (first_page >= end_page)

        # jax 0.7 does not interpret a loop whose condition reads a reference: the body looks ahead for it.
        item, _ = lax.while_loop(lambda at: at[1], lambda at: (at[0] + 1, empty(at[0] + 1)), (item, empty(item)))
        _, first_page, end_page = self.span(jnp.minimum(item, self.last - 1))
        self.state[_ITEM] = item
        self.state[_PAGE] = jnp.where(item < self.last, self.base(first_page), 0)
        self.state[_END] = jnp.where(item < self.last, end_page, 0)


def hide_rows(buffer: Any, slot: Any, first_key: Any, begin: Any, end: Any) -> None:
    """Zero the values of a block whose keys lie outside ``[begin, end)``, so that a weight of 0 leaves nothing of them.

    Args:
        buffer: ref ``(num_buffers, pages_per_block, 2, KH, S, DS)``.
        slot: the block's buffer.
        first_key: position of its first key.
        begin: position of the first key that is seen.
        end: one past the last one.
    """
    _, pages_per_block, _, _, block_size, _ = buffer.shape

    def clear(j: Any, carry: Any) -> Any:
        key = first_key + j * block_size

        @pl.when((key < begin) | (key + block_size > end))
        def hide() -> None:
            values = buffer[slot, j, 1]
            position = key + lax.broadcasted_iota(jnp.int32, values.shape, 1)
            seen = (position >= begin) & (position < end)
            buffer[slot, j, 1] = jnp.where(seen, values, jnp.zeros_like(values))

        return carry

    lax.fori_loop(0, pages_per_block, clear, 0)
