"""The kernel of ``varlen``: the tiles of a core, one after the other.

Queries of the next tile and results of the last two are in flight while a tile is computed, and blocks of keys while
the one before is. Per kv head, the rows of a tile are multiplied by the keys of a block, take one step of the online
softmax, in powers of two, and weigh the values; the products of the next head fill what this waits for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_paged.backends.tpu import tiles as t
from torch_paged.backends.tpu.block_sizes import LANES, VarlenBlocks
from torch_paged.backends.tpu.logits import NOTHING, dot, weighted_sum
from torch_paged.backends.tpu.pages import PageStream

_LOG2_E = 1.4426950408889634
_UNROLLED_MEMBERS = 16
"""Query heads of a kv head that are laid out without a loop."""


@dataclass(frozen=True)
class Static:
    """What a program is made for."""

    blocks: VarlenBlocks
    width: int
    sources: tuple[str, ...]
    group: int
    head_dim: int
    softmax_scale: float
    logits_soft_cap: float
    causal: bool
    window: int | None
    listed: bool
    mask_heads: int
    table_columns: int
    scales_rank: int
    stats: bool
    interpreted: bool

    def unit(self, r: SimpleNamespace) -> float:
        """Return what a logit is kept in units of: the scale, where nothing else becomes of a product.

        The scale is then multiplied with the difference to the maximum, which has to go to base 2 anyway. A scale that
        could be 0 there, or with the factor of base 2 inf, is multiplied with the products, before some are hidden.
        """
        plain = not self.logits_soft_cap and "slopes" not in vars(r) and not self.scales_rank
        return self.softmax_scale if plain and 2.0**-64 < self.softmax_scale < 2.0**64 else 1.0


class _Consecutive:
    """A table of pages that lie one behind the other: with one column, a row is the first page of a sequence."""

    def __getitem__(self, page: Any) -> Any:
        return page


def run_tiles(r: SimpleNamespace, static: Static) -> None:
    """Compute the tiles of this core; ``r`` holds the refs by name."""
    tokens = static.blocks.tokens
    core, part = pl.program_id(0), pl.program_id(1)
    first = jnp.where(core == 0, 0, r.ends[jnp.maximum(core - 1, 0)])
    last = r.ends[core]

    def field(tile: Any, index: int) -> Any:
        return r.fields[tile * static.width + index]

    sources = [_Source(r, static, field, name, i, last, part) for i, name in enumerate(static.sources)]

    def query_copies(tile: Any) -> list[Any]:
        slot = lax.rem(tile, 2)
        semaphore = r.query_semaphores.at[slot]
        token = field(tile, t.TOKEN)
        copies = [pltpu.make_async_copy(r.query.at[part, pl.ds(token, tokens)], r.query_buffer.at[slot], semaphore)]
        if static.listed:
            copies.append(pltpu.make_async_copy(r.listed.at[tile], r.listed_buffer.at[slot], semaphore))
        return copies

    def out_copies(tile: Any, act: Any) -> None:
        """Start or await the copies of a tile's own rows: as many powers of two as their number has."""
        slot = lax.rem(tile, 2)
        semaphore = r.out_semaphores.at[slot]
        row, size = field(tile, t.FIRST), field(tile, t.ROWS)
        token = field(tile, t.TOKEN) + row
        run = tokens
        while run:
            done = size - lax.rem(size, 2 * run)

            @pl.when(lax.rem(size, 2 * run) >= run)
            def _(done: Any = done, run: int = run) -> None:
                source = r.out_buffer.at[slot, pl.ds(row + done, run)]
                act(pltpu.make_async_copy(source, r.out.at[part, pl.ds(token + done, run)], semaphore))

            run //= 2
        if static.stats:
            act(pltpu.make_async_copy(r.statistics_buffer.at[slot], r.statistics.at[part, tile], semaphore))

    def tile_body(tile: Any, carry: Any) -> Any:
        slot = lax.rem(tile, 2)

        @pl.when(tile + 1 < last)
        def prefetch() -> None:
            for copy in query_copies(tile + 1):
                copy.start()

        for copy in query_copies(tile):
            copy.wait()
        _lay_out_queries(r, static, slot)
        r.maxima[...] = jnp.full(r.maxima.shape, NOTHING, jnp.float32)
        r.totals[...] = jnp.zeros(r.totals.shape, jnp.float32)
        r.sums[...] = jnp.zeros(r.sums.shape, jnp.float32)
        for source in sources:
            source.attend(tile)

        @pl.when(tile - 2 >= first)
        def free() -> None:
            out_copies(tile - 2, lambda copy: copy.wait())

        _finish(r, static, slot, part)
        out_copies(tile, lambda copy: copy.start())
        return carry

    @pl.when(first < last)
    def run() -> None:
        for copy in query_copies(first):
            copy.start()
        for source in sources:
            source.stream.open(first)
        lax.fori_loop(first, last, tile_body, 0)
        for back in (2, 1):

            @pl.when(last - back >= first)
            def drain(back: int = back) -> None:
                out_copies(last - back, lambda copy: copy.wait())


def _lay_out_queries(r: SimpleNamespace, static: Static, slot: Any) -> None:
    """Lay the queries of a tile (tokens, H, D) out as (KH, G * tokens, D)."""
    _, tokens, heads, width = r.query_buffer.shape
    size = tokens * heads
    for column in range(width // LANES):
        queries = r.query_buffer[slot, :, :, column * LANES : (column + 1) * LANES].astype(jnp.float32)
        r.interleaved[column * size : (column + 1) * size] = queries.reshape(size, LANES)

    def kv_head(head: Any, carry: Any) -> Any:
        def lay_out(member: Any) -> None:
            for column in range(width // LANES):
                place = pl.ds(column * size + head * static.group + member, tokens, heads)
                lanes = slice(column * LANES, (column + 1) * LANES)
                rows = r.interleaved[place].astype(r.query_rows.dtype)
                r.query_rows[head, _rows_of(member, tokens), lanes] = rows

        _each_member(static.group, lay_out)
        return carry

    lax.fori_loop(0, r.query_rows.shape[0], kv_head, 0)


def _finish(r: SimpleNamespace, static: Static, slot: Any, part: Any) -> None:
    """Turn sums into results and lay them out as (tokens, H, DV)."""
    _, tokens, heads, width = r.out_buffer.shape
    size = tokens * heads

    def kv_head(head: Any, carry: Any) -> Any:
        total = jnp.sum(r.totals[head], axis=1, keepdims=True)
        seen = jnp.logical_not(total == 0)  # also a NaN
        maximum = jnp.where(seen, r.maxima[head][:, :1] * static.unit(r), NOTHING)
        top, denominator = maximum, jnp.where(seen, total, 1.0)
        if "sinks" in vars(r):
            sinks = _per_member(r.sinks, part * r.sums.shape[0] + head, static.group, tokens)
            top = jnp.maximum(maximum, sinks)
            denominator = jnp.exp(sinks - top) + total * jnp.exp(maximum - top)
        factor = jnp.where(seen, jnp.exp(maximum - top) / denominator, 0.0)
        out = r.sums[head] * factor
        if static.group > _UNROLLED_MEMBERS:
            r.sums[head] = out

        def take_apart(member: Any) -> None:
            for column in range(width // LANES):
                place = pl.ds(column * size + head * static.group + member, tokens, heads)
                rows, lanes = _rows_of(member, tokens), slice(column * LANES, (column + 1) * LANES)
                unrolled = static.group <= _UNROLLED_MEMBERS
                r.interleaved[place] = out[rows, lanes] if unrolled else r.sums[head, rows, lanes]

        _each_member(static.group, take_apart)
        if static.stats:
            known = seen if "sinks" not in vars(r) else jnp.full(seen.shape, True)
            lse = jnp.where(known, top + jnp.log(denominator), -jnp.inf)
            largest = jnp.where(seen, maximum, -jnp.inf)
            for i, values in enumerate((lse, largest)):
                r.statistics_buffer[slot, i, pl.ds(head, 1)] = _transposed(values)
        return carry

    lax.fori_loop(0, r.sums.shape[0], kv_head, 0)
    for column in range(width // LANES):
        out = r.interleaved[column * size : (column + 1) * size].reshape(tokens, heads, LANES)
        r.out_buffer[slot, :, :, column * LANES : (column + 1) * LANES] = out.astype(r.out_buffer.dtype)


def _each_member(group: int, body: Callable[[Any], None]) -> None:
    """Call ``body`` with the index of each query head of a kv head."""
    if group <= _UNROLLED_MEMBERS:
        for member in range(group):
            body(member)
        return

    def turn(member: Any, carry: Any) -> Any:
        body(member)
        return carry

    lax.fori_loop(0, group, turn, 0)  # a program of hundreds of copies takes minutes to compile


def _rows_of(member: Any, tokens: int) -> Any:
    """Return the rows of a query head in (G * tokens, D)."""
    if isinstance(member, int):
        return slice(member * tokens, (member + 1) * tokens)
    return pl.ds(pl.multiple_of(member * tokens, tokens), tokens)


def _not_finite(values: jax.Array) -> jax.Array:
    """Return int32, other than 0 where a value, or one of two, is not finite; values are (KH, S, DS)."""
    if values.dtype == jnp.bfloat16 and values.shape[1] % 16 == 0:
        carried = (pltpu.bitcast(values, jnp.int32) & 0x7F807F80) + 0x00800080
        return carried & -0x7FFF8000  # 0x80008000: a carry out of an exponent of ones
    return (jnp.logical_not(jnp.abs(values.astype(jnp.float32)) < jnp.inf)).astype(jnp.int32)


def _transposed(column: jax.Array) -> jax.Array:
    """Return (1, R up to whole lanes) of (R, 1)."""
    num_rows = column.shape[0]
    parts = []
    for start in range(0, num_rows, LANES):
        part = column[start : start + LANES]
        shape = (part.shape[0], LANES)
        diagonal = lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)
        parts.append(jnp.sum(jnp.where(diagonal, part, 0.0), axis=0, keepdims=True))  # a maximum may lose NaN
    return jnp.concatenate(parts, axis=1)


def _per_member(values: Any, head: Any, group: int, tokens: int) -> jax.Array:
    """Return (G * tokens, 1) of the values (H,) in SMEM of a kv head's query heads."""
    return jnp.concatenate([jnp.full((tokens, 1), values[head * group + member]) for member in range(group)])


@dataclass(frozen=True)
class _Keys:
    """Keys of a fetched block that a tile takes one step with.

    Attributes:
        tile: the tile.
        slot: of the buffer that the block lies in.
        page: first of their pages, in the block.
        size: how many keys.
        key: the first one.
        start: the same, counted from the tile's first block.
        lanes: their place in the block.
        masked: some row does not see some key.
        infinite: some value is not finite, and some rows may not see it.
    """

    tile: Any
    slot: Any
    page: Any
    size: int
    key: Any
    start: Any
    lanes: Any
    masked: bool = False
    infinite: bool = False


class _Source:
    """The keys of one source, as a tile attends to them."""

    def __init__(
        self, r: SimpleNamespace, static: Static, field: Any, name: str, index: int, last: Any, part: Any
    ) -> None:
        self.r, self.static = r, static
        self.scales_rank = static.scales_rank if name == "cache" else 0
        self.buffer, self.unusable = getattr(r, f"{name}_buffer"), getattr(r, f"{name}_unusable")
        self.mask: Any = getattr(r, f"{name}_mask") if static.mask_heads else None
        _, self.pages_per_block, _, self.num_kv_heads, self.page_size, _ = self.buffer.shape
        self.part, self.first_head = part, part * self.num_kv_heads
        self.table: Any = r.table if name == "cache" else _Consecutive()
        self.columns = static.table_columns if name == "cache" else 1
        place = t.TILE_FIELDS + index * t.SOURCE_FIELDS
        self.field = lambda tile, which: field(tile, place + which)
        self.position = lambda tile: field(tile, t.POSITION)
        block_sources = []
        if self.scales_rank == 4:
            block_sources.append((lambda row, block: r.token_scales.at[row, block, part], r.scale_buffer))
        self.stream = PageStream(
            (getattr(r, name),),
            (self.buffer,),
            getattr(r, f"{name}_semaphores"),
            self.table,
            getattr(r, f"{name}_state"),
            self.unusable,
            self._span,
            self.columns,
            last,
            head=self.first_head if static.blocks.parts > 1 else None,
            aligned=True,
            block_sources=block_sources,
            unrolled=not static.interpreted,
        )

    def _span(self, tile: Any) -> tuple[Any, Any, Any]:
        begin, end = self.field(tile, t.BEGIN), self.field(tile, t.END)
        return self.field(tile, t.PAGE_ROW), lax.div(begin, self.page_size), pl.cdiv(end, self.page_size)

    def attend(self, tile: Any) -> None:
        """Add the keys of this source to a tile's sums."""
        row, first_page, end_page = self._span(tile)
        begin, end = self.field(tile, t.BEGIN), self.field(tile, t.END)
        full_begin, full_end = self.field(tile, t.FULL_BEGIN), self.field(tile, t.FULL_END)
        base = self.stream.base(first_page)
        keys, chunk = self.pages_per_block * self.page_size, self.static.blocks.chunk

        def block(i: Any, carry: Any) -> Any:
            self.stream.fetch()
            page = base + i * self.pages_per_block
            first, stop = self.stream.part(page, first_page, end_page)
            slot = self.stream.wait(stop - first)
            key = page * self.page_size
            if self.mask is not None:
                self._fetch_mask(tile, i * keys)
            usable = self.unusable[slot] == 0

            def seen_by_all(key: Any, size: int) -> Any:
                return (key >= full_begin) & (key + size <= full_end) & usable & (self.mask is None)

            pages = chunk // self.page_size
            lowest = lax.div(jnp.maximum(begin - key, 0), chunk)
            highest = jnp.minimum(pl.cdiv(end - key, chunk), keys // chunk)

            @pl.when(jnp.logical_not(seen_by_all(key, keys)))
            def hide() -> None:
                self._hide(slot, row, page, begin, end, (lowest * pages, highest * pages))

            def chunk_body(c: Any, carry: Any) -> Any:
                lanes = pl.ds(pl.multiple_of(c * chunk, LANES), chunk)
                these = _Keys(tile, slot, c * pages, chunk, key + c * chunk, i * keys + c * chunk, lanes)
                masked = jnp.logical_not(seen_by_all(these.key, chunk))
                if self.mask is None:
                    pl.when(jnp.logical_not(masked))(partial(self._step_heads, these))
                for infinite in (False, True):
                    here = masked & (self.r.infinite[0] == int(infinite))
                    pl.when(here)(partial(self._step_heads, replace(these, masked=True, infinite=infinite)))
                return carry

            lax.fori_loop(lowest, highest, chunk_body, 0)
            return carry

        lax.fori_loop(0, pl.cdiv(end_page - base, self.pages_per_block), block, 0)
        if 0 < self.scales_rank < 4:

            def scale_values(head: Any, carry: Any) -> Any:
                self.r.sums[head] = self.r.sums[head] * self._scale(1, head)
                return carry

            lax.fori_loop(0, self.num_kv_heads, scale_values, 0)

    def _fetch_mask(self, tile: Any, start: Any) -> None:
        """Fetch the words of the mask with the keys from ``start`` on, where a new set of words begins."""

        @pl.when(lax.rem(start, t.WORD_KEYS) == 0)
        def fetch() -> None:
            buffer = self.r.mask_buffer
            count, place = buffer.shape[0], lax.div(start, t.WORD_KEYS)
            first = 0 if self.static.mask_heads == 1 else self.part * count

            @pl.when(place < self.mask.shape[2])
            def words() -> None:
                words = self.mask.at[tile, pl.ds(first, count), place]
                copy = pltpu.make_async_copy(words, buffer, self.r.mask_semaphore)
                copy.start()
                copy.wait()

            @pl.when(place >= self.mask.shape[2])
            def columns_behind_the_last_are_not_seen() -> None:
                buffer[...] = jnp.zeros(buffer.shape, buffer.dtype)

    def _hide(self, slot: Any, row: Any, page: Any, begin: Any, end: Any, used: tuple[Any, Any]) -> None:
        """Mark the keys of unusable pages, clear the values of keys that no row sees, and look for infinite ones."""
        r, size, keys = self.r, self.page_size, self.pages_per_block * self.page_size
        key = page * size
        spoilt = self.unusable[slot] != 0
        r.alive[...] = jnp.ones(r.alive.shape, jnp.int32)

        def drop(j: Any) -> None:
            lane = lax.broadcasted_iota(jnp.int32, r.alive.shape, 1)
            r.alive[...] = jnp.where((lane >= j * size) & (lane < (j + 1) * size), 0, r.alive[...])

        @pl.when((key < begin) | (key + keys > end) | spoilt)
        def hide() -> None:
            self.stream.hide(slot, row, page, begin, end, drop, used)

        r.infinite[0] = 0
        if self.buffer.dtype != jnp.int8:
            nothing = jnp.zeros_like(_not_finite(self.buffer[slot, 0, 1]))
            first, stop = used
            found = lax.fori_loop(first, stop, lambda j, found: found | _not_finite(self.buffer[slot, j, 1]), nothing)
            r.infinite[0] = (jnp.max(jnp.where(found == 0, 0.0, 1.0)) > 0).astype(jnp.int32)

    def _step_heads(self, keys: _Keys) -> None:
        """Take one step for all kv heads: the logits of the next are computed beside the softmax of this one."""
        heads = self.num_kv_heads
        if heads % 2:

            def head_body(head: Any, carry: Any) -> Any:
                self._score(keys, head, 0)
                self._absorb(keys, head, 0)
                return carry

            lax.fori_loop(0, heads, head_body, 0)
            return

        def pair_body(i: Any, carry: Any) -> Any:
            self._score(keys, 2 * i + 1, 1)
            self._absorb(keys, 2 * i, 0)
            self._score(keys, jnp.minimum(2 * i + 2, heads - 1), 0)  # in the last turn for nothing
            self._absorb(keys, 2 * i + 1, 1)
            return carry

        self._score(keys, 0, 0)
        lax.fori_loop(0, heads // 2, pair_body, 0)

    def _score(self, keys: _Keys, head: Any, place: int) -> None:
        """Compute the logits of a kv head's rows for some keys."""
        r, static = self.r, self.static
        query = r.query_rows[head]
        rows = self._rows(keys, 0, head)
        if static.head_dim < rows.shape[1]:
            lane = lax.broadcasted_iota(jnp.int32, (1, rows.shape[1]), 1)
            rows = jnp.where(lane < static.head_dim, rows, jnp.zeros_like(rows))[:, : query.shape[1]]
        logits = dot(query, rows, (1, 1))
        if static.unit(r) == 1:
            scale: Any = static.softmax_scale
            if self.scales_rank == 4:
                scale = scale * r.scale_buffer[keys.slot, head, :, keys.lanes]
            elif self.scales_rank:
                scale = scale * self._scale(0, head)
            logits = logits * scale
        if static.logits_soft_cap:
            logits = jnp.tanh(logits * (1 / static.logits_soft_cap)) * static.logits_soft_cap
        if "slopes" in vars(r):
            slopes = _per_member(r.slopes, self.first_head + head, static.group, static.blocks.tokens)
            position = self._limits(keys.tile)[2]
            logits = logits - slopes * jnp.abs(position - self._index(keys)).astype(jnp.float32)
        if keys.masked:
            logits = jnp.where(self._seen(keys, head), logits, -jnp.inf)
        r.logits[place] = logits

    def _absorb(self, keys: _Keys, head: Any, place: int) -> None:
        """Take a step of the online softmax of a kv head's rows with the logits of some keys."""
        r, static, size = self.r, self.static, keys.size
        logits = r.logits[place]
        before = r.maxima[head]
        maximum = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        unit = static.unit(r) * _LOG2_E
        weights = jnp.exp2((logits - jnp.concatenate([maximum] * (size // LANES), axis=1)) * unit)
        factor = jnp.exp2((before - maximum) * unit)
        partial = weights[:, :LANES]
        for begin in range(LANES, size, LANES):
            partial = partial + weights[:, begin : begin + LANES]
        r.maxima[head] = maximum
        r.totals[head] = r.totals[head] * factor + partial
        if self.scales_rank == 4:
            weights = weights * r.scale_buffer[keys.slot, self.num_kv_heads + head, :, keys.lanes]
            if keys.masked:
                weights = jnp.where(self._seen(keys, head), weights, 0.0)
        width = r.sums.shape[2]
        r.weights[place] = weights.astype(r.weights.dtype)
        r.sums[head] = r.sums[head] * jnp.concatenate([factor] * (width // LANES), axis=1)
        values, weights = self._rows(keys, 1, head)[:, :width], r.weights[place]
        if keys.infinite:
            product = weighted_sum(weights, self._seen(keys, head), values)
        else:
            product = dot(weights, values, (1, 0))
        r.sums[head] = r.sums[head] + product

    def _rows(self, keys: _Keys, side: int, head: Any) -> jax.Array:
        """Return (keys, DS) of one side and head, as the queries' dtype."""
        dtype = self.r.query_rows.dtype
        found = self.buffer[keys.slot, pl.ds(keys.page, keys.size // self.page_size), side, head]
        if found.dtype != dtype:
            found = found.astype(jnp.float32)
        return found.reshape(keys.size, found.shape[2]).astype(dtype)

    def _scale(self, side: int, head: Any) -> Any:
        """Return the scale of a head's keys or values."""
        return self.r.scales[(side * self.static.blocks.parts) * self.num_kv_heads + self.first_head + head]

    def _index(self, keys: _Keys) -> jax.Array:
        """Return the keys' positions in their sequence (1, keys)."""
        return keys.key + self.field(keys.tile, t.OFFSET) + lax.broadcasted_iota(jnp.int32, (1, keys.size), 1)

    def _seen(self, keys: _Keys, head: Any) -> jax.Array:
        """Return (R, keys) bool: which keys each row of a kv head sees."""
        low, high, _ = self._limits(keys.tile)
        last = self.field(keys.tile, t.END) + self.field(keys.tile, t.OFFSET) - 1
        index = jnp.where(self.r.alive[:1, keys.lanes] == 0, 2 * t.FAR - 1, self._index(keys))
        seen = index <= (last if high is None else jnp.minimum(high, last))
        if low is not None:
            seen = seen & (index >= low)
        if self.mask is not None:
            seen = seen & self._masked(head, keys.start, keys.size)
        return jnp.broadcast_to(seen, (self.r.query_rows.shape[1], keys.size))

    def _masked(self, head: Any, start: Any, size: int) -> jax.Array:
        """Return (R, keys) bool: what the mask lets the rows of a kv head see."""
        r, static = self.r, self.static
        heads = [0 if static.mask_heads == 1 else head] * static.group
        if r.mask_buffer.shape[0] == self.num_kv_heads * static.group:
            heads = [head * static.group + member for member in range(static.group)]
        words = jnp.concatenate([r.mask_buffer[mask_head] for mask_head in heads])
        bit = lax.div(lax.rem(start, t.WORD_KEYS), LANES)
        parts = [lax.shift_right_logical(words, jnp.full_like(words, bit + i)) & 1 for i in range(size // LANES)]
        return jnp.concatenate(parts, axis=1) != 0

    def _limits(self, tile: Any) -> tuple[Any, Any, Any]:
        """Return, per row, the first and the last key that it sees, None where any, and its position: (R, 1)."""
        static = self.static
        if static.listed:
            slot = lax.rem(tile, 2)
            low, high, position = (
                jnp.concatenate([self.r.listed_buffer[slot, i][:, :1]] * static.group) for i in range(3)
            )
            return low, high, position
        rows = (static.group * static.blocks.tokens, 1)
        token = lax.rem(lax.broadcasted_iota(jnp.int32, rows, 0), static.blocks.tokens)
        own = self.position(tile) + token
        first = None if static.window is None else own - (static.window - 1)
        if static.causal:
            return first, own, own
        return first, None if static.window is None else own + (static.window - 1), own
