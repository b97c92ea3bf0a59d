"""The kernel of ``decode``: the sequences of a step of the grid.

Blocks of pages stream from HBM into a ring of VMEM buffers (``pages``); while one is in flight, the one before it is
multiplied, a tile of pages at a time: per kv head, the group's rows by the keys, one step of the online softmax
(``logits``), the weights by the values. Sums and maxima stay in VMEM scratch until the sequence ends.

For one token, length, window and chunk together are a span of keys ``[begin, end)``. Values outside of it, and those of
unusable block ids, are cleared in VMEM, so that their weight of 0 leaves nothing of them; most blocks hold none.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from torch_paged.backends.tpu.block_sizes import SUBLANES, Blocks
from torch_paged.backends.tpu.logits import NOTHING, across, dot, modify, statistics, weigh, weighted_sum
from torch_paged.backends.tpu.pages import PageStream


@dataclass(frozen=True)
class Plan:
    """What is static in a call: shapes, options, tiling."""

    num_seqs: int
    num_heads: int
    head_dim: int
    value_dim: int
    num_kv_heads: int
    block_size: int
    stored_dim: int
    width: int
    blocks: Blocks
    cores: int
    split_heads: bool
    scales_rank: int
    sinks: bool
    alibi: bool
    mask_heads: int
    """Heads of the mask: 0 (no mask), 1, KH or H."""
    softmax_scale: float
    soft_cap: float
    window: int | None
    chunk: int | None
    stats: bool
    query_dtype: Any
    cache_dtype: Any
    interpreted: bool

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def rows(self) -> int:
        """Query rows of a kv head, padded."""
        return -(-self.group // SUBLANES) * SUBLANES

    @property
    def core_kv_heads(self) -> int:
        return self.num_kv_heads // (self.cores if self.split_heads else 1)

    @property
    def core_heads(self) -> int:
        return self.core_kv_heads * self.group

    @property
    def steps(self) -> int:
        """Sequences of a core, the last of which may be one too many."""
        return self.num_seqs if self.split_heads else -(-self.num_seqs // self.cores)

    @property
    def members(self) -> int:
        """Sequences of a step of the grid."""
        return self.blocks.sequences

    @property
    def block_sources(self) -> tuple[str, ...]:
        """What is copied for each block beside its pages."""
        return (("scale",) if self.scales_rank == 4 else ()) + (("mask",) if self.mask_heads else ())

    @property
    def tile_keys(self) -> int:
        return self.blocks.tile_pages * self.block_size

    @property
    def block_keys(self) -> int:
        return self.blocks.pages * self.block_size


@dataclass(frozen=True)
class _Member:
    """A tile of keys of one of the sequences that are multiplied together."""

    member: Any
    slot: Any
    tile: Any
    first_key: Any
    begin: Any
    end: Any


class Kernel:
    """The body for the sequences of a step; ``refs`` by name."""

    def __init__(self, plan: Plan, refs: dict[str, Any]) -> None:
        self.plan = plan
        self.refs = refs
        self.buffer = refs["buffer"]
        self.core, self.step = pl.program_id(0), pl.program_id(1)
        first = self.core * 0 if plan.split_heads else self.core * plan.steps
        self.first, self.last = first, jnp.minimum(first + plan.steps, plan.num_seqs)
        self.seq = first + self.step * plan.members
        block_sources = [
            (functools.partial(lambda ref, row, block: ref.at[row, block], refs[name]), refs[f"{name}_buffer"])
            for name in plan.block_sources
        ]
        self.stream = PageStream(
            (refs["cache"],),
            (refs["buffer"],),
            refs["semaphores"],
            refs["table"],
            refs["state"],
            refs["unusable"],
            self.pages,
            plan.width,
            self.last,
            head=self.core * plan.core_kv_heads if plan.split_heads else None,
            aligned=bool(block_sources),
            in_use=plan.members,
            block_sources=block_sources,
            unrolled=not plan.interpreted,
        )

    def keys(self, seq: Any) -> tuple[Any, Any]:
        """Return the span of the keys that a sequence sees."""
        plan = self.plan
        end = jnp.clip(self.refs["context_lens"][seq], 0, plan.width * plan.block_size)
        begin = jnp.zeros_like(end)
        if plan.window is not None:
            begin = jnp.maximum(begin, end - min(plan.window, plan.width * plan.block_size))
        if plan.chunk is not None:
            position = jnp.maximum(end - 1, 0)
            begin = jnp.maximum(begin, position - lax.rem(position, min(plan.chunk, 2**31 - 1)))
        return begin, end

    def pages(self, seq: Any) -> tuple[Any, Any, Any]:
        """Return the row of the table, and the span of the pages that a sequence reads."""
        begin, end = self.keys(seq)
        shift = self.plan.block_size.bit_length() - 1
        return (
            seq,
            lax.shift_right_logical(begin, shift),
            lax.shift_right_logical(end + self.plan.block_size - 1, shift),
        )

    def run(self) -> None:
        @pl.when(self.step == 0)
        def start() -> None:
            self.stream.open(self.first)
            for name in ("sinks", "alibi"):
                if getattr(self.plan, name):
                    self.spread(self.refs[name], self.refs[f"{name}_rows"])

        pl.when(self.seq < self.last)(self.attend)

    def spread(self, scalars: Any, rows: Any) -> None:
        """Write a scalar for each head as a row of its kv head."""
        row = lax.broadcasted_iota(jnp.int32, rows.shape[1:], 0)
        first = self.core * self.plan.core_heads if self.plan.split_heads else 0
        for head in range(self.plan.core_kv_heads):
            tile = jnp.zeros(rows.shape[1:], jnp.float32)
            for i in range(self.plan.group):
                tile = jnp.where(row == i, scalars[first + head * self.plan.group + i], tile)
            rows[head] = tile

    def attend(self) -> None:
        refs = self.refs
        refs["live"][...] = jnp.ones(refs["live"].shape, jnp.float32)
        refs["maxima"][...] = jnp.full(refs["maxima"].shape, NOTHING, jnp.float32)
        refs["totals"][...] = jnp.zeros(refs["totals"].shape, jnp.float32)
        refs["sums"][...] = jnp.zeros(refs["sums"].shape, jnp.float32)
        for member in range(self.plan.members):
            self.lay_out_queries(member)
        if self.plan.members == 1:
            self.attend_to_blocks()
        else:
            self.attend_to_one_block_each()
        for member in range(self.plan.members):
            self.finish(member)

    def lay_out_queries(self, member: int) -> None:
        plan, heads, queries = self.plan, self.refs["heads"], self.refs["queries"]
        heads[member, : plan.core_heads, : plan.head_dim] = self.refs["query"][member].astype(jnp.float32)
        for head in range(plan.core_kv_heads):
            first = head * plan.group
            rows = heads[member, first : first + plan.rows, : plan.head_dim]
            queries[member, head] = rows.astype(queries.dtype)

    def attend_to_blocks(self) -> None:
        """Attend from one sequence to all its blocks."""
        plan, stream = self.plan, self.stream
        begin, end = self.keys(self.seq)
        _, first_page, end_page = self.pages(self.seq)
        base = stream.base(first_page)

        def block(i: Any, carry: Any) -> Any:
            page = base + i * plan.blocks.pages
            slot = self.next_block(0, page)
            first_key = page * plan.block_size
            if plan.blocks.tile_pages == plan.blocks.pages:
                self.multiply([_Member(0, slot, 0, first_key, begin, end)])
            else:
                tiles = pl.cdiv(jnp.minimum(end - first_key, plan.block_keys), plan.tile_keys)

                def tile(t: Any, carry: Any) -> Any:
                    self.multiply([_Member(0, slot, t, first_key + t * plan.tile_keys, begin, end)])
                    return carry

                lax.fori_loop(0, tiles, tile, 0)
            return carry

        num_blocks = lax.shift_right_logical(
            end_page - base + plan.blocks.pages - 1, plan.blocks.pages.bit_length() - 1
        )
        lax.fori_loop(0, num_blocks, block, 0)

    def attend_to_one_block_each(self) -> None:
        """Attend from each of some sequences to its only block; from all of them at a time, if none is empty."""
        plan, slots = self.plan, self.refs["slots"]

        def first_page(member: Any) -> Any:
            return self.stream.base(self.pages(self.seq + member)[1])

        def fill(member: Any, filled: Any) -> Any:
            _, begin, end = self.pages(self.seq + member)

            @pl.when(begin < end)
            def wait() -> None:
                slots[member] = self.next_block(member, first_page(member))

            return filled + jnp.where(begin < end, 1, 0)

        def of(member: Any) -> _Member:
            begin, end = self.keys(self.seq + member)
            return _Member(member, slots[member], 0, first_page(member) * plan.block_size, begin, end)

        filled = lax.fori_loop(0, plan.members, fill, jnp.int32(0))

        @pl.when(filled == plan.members)
        def all_members() -> None:
            self.multiply([of(member) for member in range(plan.members)])

        @pl.when((filled > 0) & (filled < plan.members))
        def some_members() -> None:
            def one_member(member: Any, carry: Any) -> Any:
                _, begin, end = self.pages(self.seq + member)
                pl.when(begin < end)(lambda: self.multiply([of(member)]))
                return carry

            lax.fori_loop(0, plan.members, one_member, 0)

    def next_block(self, member: Any, page: Any) -> Any:
        """Return the buffer of a sequence's block that begins with a page, without what is not seen."""
        begin, end = self.keys(self.seq + member)
        _, first_page, end_page = self.pages(self.seq + member)
        self.stream.fetch()
        first, stop = self.stream.part(page, first_page, end_page)
        slot = self.stream.wait(stop - first)
        self.hide(member, slot, page, begin, end)
        return slot

    def hide(self, member: Any, slot: Any, page: Any, begin: Any, end: Any) -> None:
        """Keep what is not seen in a block from its products: clear its values, mark the keys of unusable pages."""
        plan, live = self.plan, self.refs["live"]
        first_key = page * plan.block_size
        spoilt = self.refs["unusable"][slot] != 0

        def drop(j: Any) -> None:
            for t in range(live.shape[1]):
                index = t * plan.tile_keys + lax.broadcasted_iota(jnp.int32, live.shape[2:], 1)
                mine = (index >= j * plan.block_size) & (index < (j + 1) * plan.block_size)
                live[member, t] = jnp.where(mine, 0.0, live[member, t])

        @pl.when((first_key < begin) | (first_key + plan.block_keys > end) | spoilt)
        def hide() -> None:
            live[member] = jnp.ones(live.shape[1:], jnp.float32)
            self.stream.hide(slot, self.seq + member, page, begin, end, drop)

    def multiply(self, members: list[_Member]) -> None:
        """Take the keys and values of one tile of each member into its sums."""
        plan, refs = self.plan, self.refs
        maxima, totals, sums = refs["maxima"], refs["totals"], refs["sums"]
        parts = [(member, self.beside(member)) for member in members]
        heads = [(of, beside, head) for of, beside in parts for head in range(plan.core_kv_heads)]
        # all products of a kind together: heads are independent, and the units work on several at a time
        products = [
            dot(refs["queries"][of.member, head], self.load(of, 0, head)[:, : plan.head_dim], (1, 1))
            for of, _, head in heads
        ]
        weighed = []
        for (of, (seen, distances, token_scales, mask), head), product in zip(heads, products, strict=True):
            scale: Any = plan.softmax_scale
            if 0 < plan.scales_rank < 4:
                scale = scale * self.scale(0, head)
            elif plan.scales_rank == 4:
                scale = scale * token_scales[head : head + 1]
            slopes = refs["alibi_rows"][head][:, :1] if plan.alibi else None
            logits = modify(product, scale, plan.soft_cap, slopes, distances)
            visible = seen & self.mask_rows(mask, head) if plan.mask_heads else seen
            weights, total, factor, maxima[of.member, head] = weigh(logits, visible, maxima[of.member, head])
            totals[of.member, head] = totals[of.member, head] * factor + total
            if plan.scales_rank == 4:
                row = plan.core_kv_heads + head
                weights = jnp.where(visible, weights * token_scales[row : row + 1], 0.0)
            weighed.append((weights.astype(plan.query_dtype), visible, factor))
        for (of, _, head), (weights, visible, factor) in zip(heads, weighed, strict=True):
            value = self.load(of, 1, head)
            product = weighted_sum(weights, visible, value) if plan.mask_heads else dot(weights, value, (1, 0))
            sums[of.member, head] = sums[of.member, head] * across(factor, plan.stored_dim) + product

    def beside(self, of: _Member) -> tuple[Any, Any, Any, Any]:
        """Return which of a tile's keys its sequence sees, their distances for ALiBi, their scales, and the mask."""
        plan = self.plan
        rows = SUBLANES if plan.rows == SUBLANES else 1
        position = of.first_key + lax.broadcasted_iota(jnp.int32, (rows, plan.tile_keys), 1)
        live = self.refs["live"][of.member, of.tile, :rows]
        seen = (position >= of.begin) & (position < of.end) & (live > 0)
        distances = (of.end - 1 - position).astype(jnp.float32) if plan.alibi else None
        token_scales = self.tile("scale_buffer", of) if plan.scales_rank == 4 else None
        mask = self.tile("mask_buffer", of).astype(jnp.int32) if plan.mask_heads else None
        return seen, distances, token_scales, mask

    def load(self, of: _Member, side: int, head: int) -> jax.Array:
        """Return keys or values (tile_keys, DS) in the dtype of the products."""
        plan = self.plan
        pages = pl.ds(of.tile * plan.blocks.tile_pages, plan.blocks.tile_pages)
        rows = self.buffer[of.slot, pages, side, head]
        if rows.dtype != plan.query_dtype:
            rows = rows.astype(jnp.float32)
        return rows.reshape(plan.tile_keys, plan.stored_dim).astype(plan.query_dtype)

    def scale(self, side: int, head: int) -> Any:
        """Return the scale of a kv head's keys or values."""
        if self.plan.scales_rank == 1:
            return self.refs["scales"][side]
        first = self.core * self.plan.core_kv_heads if self.plan.split_heads else 0
        return self.refs["scales"][side, first + head]

    def tile(self, name: str, of: _Member) -> jax.Array:
        """Return a tile's part of what is copied for each block, (rows, tile_keys)."""
        keys = self.plan.tile_keys
        if keys == self.plan.block_keys:
            return self.refs[name][of.slot]
        return self.refs[name][of.slot, :, pl.ds(pl.multiple_of(of.tile * keys, keys), keys)]

    def mask_rows(self, mask: jax.Array, head: int) -> jax.Array:
        """Return the mask of a kv head's rows."""
        plan = self.plan
        if plan.mask_heads == 1:
            return mask[:1] != 0
        if plan.mask_heads == plan.num_kv_heads:
            return mask[head : head + 1] != 0
        rows = mask[head * plan.group : (head + 1) * plan.group]
        return jnp.pad(rows, ((0, plan.rows - plan.group), (0, 0))) != 0

    def finish(self, member: int) -> None:
        """Write the results of a sequence."""
        plan, refs = self.plan, self.refs
        heads = refs["heads"]
        stats: list[list[jax.Array]] = [[], []]
        for head in range(plan.core_kv_heads):
            sinks = refs["sinks_rows"][head][:, :1] if plan.sinks else None
            total = jnp.sum(refs["totals"][member, head], axis=1, keepdims=True)
            factor, *found = statistics(total, refs["maxima"][member, head][:, :1], sinks)
            if 0 < plan.scales_rank < 4:
                factor = factor * self.scale(1, head)
            rows = refs["sums"][member, head] * factor
            heads[member, head * plan.group : (head + 1) * plan.group] = rows[: plan.group]
            for kind, value in zip(stats, found, strict=True):
                kind.append(value)
        refs["out"][member] = heads[member, : plan.core_heads, : plan.value_dim].astype(refs["out"].dtype)
        if plan.stats:
            for name, values in zip(("lse", "max_logits"), stats, strict=True):
                refs[name][member, 0] = self.as_lanes(values)

    def as_lanes(self, columns: list[jax.Array]) -> jax.Array:
        """Return (1, heads) from a column (rows, 1) for each kv head."""
        plan = self.plan
        shape = (plan.rows, plan.core_heads)
        row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        line = jnp.zeros((1, plan.core_heads), jnp.float32)
        for head, column in enumerate(columns):
            mine = (row + head * plan.group == lane) & (row < plan.group)
            line = line + jnp.sum(jnp.where(mine, column, 0.0), axis=0, keepdims=True)
        return line
