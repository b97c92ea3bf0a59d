"""Pages of the cache, moved from HBM to VMEM ahead of their use.

The blocks of all sequences of a core form one stream: block after block of a sequence, then the next sequence that has
any. ``PageStream`` keeps the buffers of a ring filled ahead, also across sequences. Each page is one strided copy (keys
and values of all heads), each buffer has its own semaphore, and a full buffer is awaited once, by its bytes. Only pages
of the span of a sequence are read. Their ids are looked through once, when the stream comes to the sequence: where one
is unusable, it is replaced by another, and the blocks of this sequence are marked.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

STATE_WORDS = 6
_SLOT, _ITEM, _PAGE, _END, _FETCH_SLOT, _UNUSABLE = range(STATE_WORDS)

_UNROLLED_PAGES = 32
"""Copies that are started in a row without a loop."""
STRIDE_BYTES = 2**31
"""One copy takes both sides of a page where they lie closer together."""
_UNROLLED_IDS = 32
"""Block ids that are looked at in a row without a loop."""


def flat_table(block_tables: jax.Array, num_blocks: int) -> jax.Array:
    """Return tables (B, M) as (B * M,), with -1 for each id outside ``[0, num_blocks)``."""
    unusable = (block_tables < 0) | (block_tables >= num_blocks)
    return jnp.where(unusable, -1, block_tables).reshape(-1)


@dataclass(frozen=True)
class PageStream:
    """The stream of blocks of one core.

    Attributes:
        sources: refs in HBM, page on axis 1: what pages are copied from.
        buffers: one ref in VMEM per source, ``(num_buffers, pages_per_block, *a page)``.
        semaphores: ``(num_buffers,)`` DMA semaphores.
        table: SMEM ref ``(rows * M,)``, a ``flat_table``.
        state: SMEM ref ``(STATE_WORDS,)`` int32; it lives as long as the stream.
        unusable: SMEM ref ``(num_buffers,)`` int32: not 0 where the span of a block has ids outside ``[0, N)``.
        span: item -> (row of the table, first page, end page); the pages that the item reads.
        num_columns: M.
        last: one past the last item of this core.
        head: first kv head of this core where it takes a part of them, else None.
        aligned: blocks begin at multiples of ``pages_per_block``, else at the first page of the span.
        in_use: buffers that are read at a time.
        block_sources: pairs of (row, block index) -> ref, and a ref in VMEM ``(num_buffers, ...)``: what is copied once
            for each block. Needs ``aligned``.
        unrolled: unroll short loops; an interpreter compiles a program the longer the more it has of them.
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
    in_use: int = 1
    block_sources: Sequence[tuple[Callable[[Any, Any], Any], Any]] = ()
    unrolled: bool = True

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
        self.state[_ITEM] = first - 1
        self.state[_PAGE] = 0
        self.state[_END] = 0
        self.state[_UNUSABLE] = 0
        self._seek(0)

        def fill(i: Any, carry: Any) -> Any:
            self.fetch()
            return carry

        lax.fori_loop(0, self.num_buffers - self.in_use, fill, 0)

    def fetch(self) -> None:
        """Start the copies of the next block of the stream, if there is one."""
        page, end, slot = self.state[_PAGE], self.state[_END], self.state[_FETCH_SLOT]
        row, first_page, _ = self.span(jnp.minimum(self.state[_ITEM], self.last - 1))
        begin, stop = self.part(page, first_page, end)
        place = row * self.num_columns + page
        unusable = self.state[_UNUSABLE]
        self.unusable[slot] = unusable
        quick = (stop - begin == self.pages_per_block) & (unusable == 0)

        @pl.when(quick)
        def start_full() -> None:
            run = math.gcd(self.pages_per_block, _UNROLLED_PAGES if self.unrolled else 1)

            def start_run(i: Any, carry: Any) -> Any:
                for j in range(run):
                    for copy in self._copies(self.table[place + (i * run + j)], slot, i * run + j):
                        copy.start()
                return carry

            lax.fori_loop(0, self.pages_per_block // run, start_run, 0, unroll=self.pages_per_block == run)

        def start_page(j: Any, carry: Any) -> Any:
            for copy in self._copies(jnp.maximum(self.table[place + j], 0), slot, j):
                copy.start()
            return carry

        lax.fori_loop(begin, jnp.where(quick, begin, stop), start_page, 0)

        if self.block_sources:

            @pl.when(begin < stop)
            def start_block() -> None:
                for copy in self._block_copies(row, lax.div(page, self.pages_per_block), slot):
                    copy.start()

        self.state[_FETCH_SLOT] = jnp.where(slot + 1 == self.num_buffers, 0, slot + 1)
        self._seek(page + self.pages_per_block)

    def wait(self, count: Any) -> Any:
        """Wait for the ``count`` pages of the oldest block in flight; return its buffer, which is then to be read."""
        slot = self.state[_SLOT]
        self.state[_SLOT] = jnp.where(slot + 1 == self.num_buffers, 0, slot + 1)

        @pl.when(count == self.pages_per_block)
        def wait_full() -> None:
            for buffer in self.buffers:
                pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], self.semaphores.at[slot]).wait()

        def wait_page(j: Any, carry: Any) -> Any:
            for copy in self._copies(0, slot, j):
                copy.wait()
            return carry

        lax.fori_loop(0, jnp.where(count == self.pages_per_block, 0, count), wait_page, 0)

        for copy in self._block_copies(0, 0, slot):
            copy.wait()
        return slot

    def part(self, page: Any, first_page: Any, end_page: Any) -> tuple[Any, Any]:
        """Return which pages of the block that begins with ``page`` belong to a span: from, and up to."""
        begin = jnp.maximum(first_page - page, 0) if self.aligned else jnp.zeros_like(page)
        return begin, jnp.minimum(end_page - page, self.pages_per_block)

    def hide(
        self,
        slot: Any,
        row: Any,
        page: Any,
        begin: Any,
        end: Any,
        drop: Callable[[Any], None],
        used: tuple[Any, Any] | None = None,
    ) -> None:
        """Clear the values of a block, of which a weight of 0 would leave what is not finite, where keys are not seen.

        Args:
            slot: the block's buffer.
            row: its row of the table.
            page: its first page.
            begin: first key that is seen; the block may begin before it.
            end: end of the keys that are seen; the block may end behind it.
            drop: called with the place in the block of each page that has an unusable id, whose values are cleared too.
            used: the pages of the block that are used, None: all.
        """
        buffer = self.buffers[0]
        size = buffer.shape[4]
        spoilt = self.unusable[slot] != 0

        def hide_page(j: Any, carry: Any) -> Any:
            key = (page + j) * size
            outside = (key + size <= begin) | (key >= end)
            block_id = self.table[jnp.where(outside, 0, row * self.num_columns + page + j)]
            unusable = spoilt & jnp.logical_not(outside) & (block_id < 0)
            stop = jnp.where(unusable, begin, end)

            if buffer.dtype != jnp.int8:

                @pl.when((key < begin) | (key + size > stop))
                def clear() -> None:
                    values = buffer[slot, j, 1]
                    if values.dtype.itemsize == 1:  # libtpu 0.0.21 cannot compare within them on v4
                        values = values.astype(jnp.float32)
                    position = key + lax.broadcasted_iota(jnp.int32, values.shape, 1)
                    kept = (position >= begin) & (position < stop)
                    buffer[slot, j, 1] = jnp.where(kept, values, jnp.zeros_like(values)).astype(buffer.dtype)

            pl.when(unusable)(lambda: drop(j))
            return carry

        first, stop = used or (0, self.pages_per_block)
        lax.fori_loop(first, stop, hide_page, 0)

    def _copies(self, block_id: Any, slot: Any, j: Any) -> list[Any]:
        copies = []
        heads = () if self.head is None else (pl.ds(self.head, self.buffers[0].shape[3]),)
        for source, buffer in zip(self.sources, self.buffers, strict=True):
            near = math.prod(source.shape[1:]) * source.dtype.itemsize < STRIDE_BYTES
            for side in (slice(None),) if near else range(source.shape[0]):
                from_page = (side, block_id, *heads)
                page, place = source.at[from_page], buffer.at[slot, j, side]
                copies.append(pltpu.make_async_copy(page, place, self.semaphores.at[slot]))
        return copies

    def _block_copies(self, row: Any, block: Any, slot: Any) -> list[Any]:
        return [
            pltpu.make_async_copy(source(row, block), buffer.at[slot], self.semaphores.at[slot])
            for source, buffer in self.block_sources
        ]

    def _seek(self, page: Any) -> None:
        """Move the front of the stream to ``page``, or to the next item that has pages if that is behind the end."""

        def finished(at: Any) -> Any:
            item, page, end_page, _ = at
            return (page >= end_page) & (item < self.last)

        def following(at: Any) -> Any:
            item = at[0] + 1
            row, first_page, end_page = self.span(jnp.minimum(item, self.last - 1))
            end_page = jnp.where(item < self.last, end_page, first_page)
            unusable = self._unusable(row * self.num_columns + first_page, end_page - first_page)
            return item, self.base(first_page), end_page, unusable

        front = (self.state[_ITEM], page, self.state[_END], self.state[_UNUSABLE])
        front = lax.while_loop(finished, following, front)
        for word, value in zip((_ITEM, _PAGE, _END, _UNUSABLE), front, strict=True):
            self.state[word] = value

    def _unusable(self, place: Any, count: Any) -> Any:
        """Return 0 where the ``count`` ids from ``place`` of the table on are all usable."""

        run = _UNROLLED_IDS if self.unrolled else 1

        def look_at_run(i: Any, seen: Any) -> Any:
            ids = [self.table[place + i * run + j] for j in range(run)]
            while len(ids) > 1:
                ids = [a | b for a, b in zip(ids[::2], ids[1::2], strict=True)]
            return seen | ids[0]

        runs = lax.shift_right_logical(count, run.bit_length() - 1)
        seen = lax.fori_loop(0, runs, look_at_run, jnp.zeros_like(count))
        seen = lax.fori_loop(runs * run, count, lambda i, seen: seen | self.table[place + i], seen)
        return jnp.where(seen < 0, 1, 0)
