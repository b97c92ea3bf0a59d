"""Attention of packed ragged queries to keys in the cache, beside it, or both.

The queries of each sequence are cut into tiles of tokens (``tiles``). The queries of a tile, all heads, are copied to
VMEM and laid out per kv head as (G * tokens, D); blocks of keys stream past them (``pages``), cached ones first, then
the new ones, which a first step lays out as pages of their own. Each row sees an interval of keys. Only pages with a
key in some row's interval are read; a block that lies in the intervals of all rows is taken whole and without a mask,
any other one in chunks, of which those that no row sees are left out. A tile writes its own rows and nothing else.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_paged.backends.tpu import tiles as t
from torch_paged.backends.tpu.block_sizes import LANES, Chip, VarlenBlocks, varlen_blocks
from torch_paged.backends.tpu.logits import NOTHING, dot
from torch_paged.backends.tpu.pages import STATE_WORDS, PageStream

SUBLANES = 8
LOG2_E = 1.4426950408889634
NEW_PAGE = 128
"""Tokens of a page of new keys."""


@dataclass(frozen=True)
class _Static:
    """What a program is made for."""

    blocks: VarlenBlocks
    width: int
    sources: tuple[str, ...]
    table_columns: int
    group: int
    head_dim: int
    value_dim: int
    softmax_scale: float
    logits_soft_cap: float
    causal: bool
    window: int | None
    listed: bool
    mask_heads: int
    stats: bool
    cores: int


class _Consecutive:
    """A table of pages that lie one behind the other."""

    def __getitem__(self, page: Any) -> Any:
        return page


def flash_attn_varlen(
    query: jax.Array,  # (T, H, D)
    key: Any,  # (Tk, KH, D) or None
    value: Any,  # (Tk, KH, DV) or None
    cu_seqlens_q: jax.Array,  # (B + 1,)
    cu_seqlens_k: Any,  # (B + 1,) or None
    kv_cache: Any,  # (2, N, KH, S, DS) or None
    block_tables: Any,  # (B, M) or None
    context_lens: Any,  # (B,) or None
    kv_scales: jax.Array | None = None,
    sinks: jax.Array | None = None,  # (H,)
    alibi_slopes: jax.Array | None = None,  # (H,)
    attn_mask: jax.Array | None = None,  # (T, C), (KH, T, C) or (H, T, C)
    query_positions: jax.Array | None = None,  # (T,)
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    stats: bool = False,
    chip: Chip,
    interpret: Any = False,
) -> Any:
    """Return out (T, H, value_dim or DV or D), with ``stats`` also lse and max_logits (T, H) float32."""
    if attn_mask is not None or kv_scales is not None:
        raise NotImplementedError("flash_attn_varlen: backend 'tpu' has no attn_mask and no kv_scales yet")
    num_tokens, num_heads, head_dim = query.shape
    if value_dim is None:
        value_dim = head_dim if value is None else value.shape[-1]
    num_kv_heads = kv_cache.shape[2] if key is None else key.shape[1]
    group = num_heads // num_kv_heads
    blocks = varlen_blocks(chip, group, max_seqlen_q)
    if num_tokens == 0:
        nothing = jnp.zeros((0, num_heads), jnp.float32)
        out = jnp.zeros((0, num_heads, value_dim), query.dtype)
        return (out, nothing, nothing) if stats else out

    tokens = blocks.tokens
    padded_tokens = max(num_tokens, tokens)
    width = -(-head_dim // LANES) * LANES
    value_width = -(-value_dim // LANES) * LANES
    padded_heads = -(-num_heads // SUBLANES) * SUBLANES
    padding = ((0, padded_tokens - num_tokens), (0, padded_heads - num_heads), (0, width - head_dim))
    query = jnp.pad(query, padding)

    begins = t.bounds(cu_seqlens_q, num_tokens)
    num_seqs = begins.shape[0] - 1
    seqs = jnp.arange(num_seqs, dtype=jnp.int32)
    sources, streams = [], []
    contexts = jnp.zeros((num_seqs,), jnp.int32)
    operands: dict[str, Any] = {}
    if kv_cache is not None:
        contexts = jnp.clip(context_lens, 0, block_tables.shape[1] * kv_cache.shape[3])
        sources.append(t.KeySource(seqs, contexts, jnp.zeros_like(contexts)))
        streams.append("cache")
        operands["cache"] = kv_cache
    if key is not None:
        new_begins = t.bounds(cu_seqlens_k, key.shape[0])
        pages, first_pages = _new_pages(key, value, new_begins, width)
        sources.append(t.KeySource(first_pages, jnp.diff(new_begins), contexts))
        streams.append("new")
        operands["new"] = pages
    if query_positions is not None:
        query_positions = jnp.pad(query_positions, (0, padded_tokens - num_tokens))
    tiles = t.cut(
        begins,
        sources,
        query_positions,
        num_tokens=padded_tokens,
        size=tokens,
        causal=causal,
        window=sliding_window,
        chunk=attention_chunk,
    )
    listed = query_positions is not None or attention_chunk is not None
    static = _Static(
        blocks=blocks,
        width=tiles.width,
        sources=tuple(streams),
        table_columns=0 if block_tables is None else block_tables.shape[1],
        group=group,
        head_dim=head_dim,
        value_dim=value_dim,
        softmax_scale=softmax_scale,
        logits_soft_cap=logits_soft_cap,
        causal=causal,
        window=sliding_window,
        listed=listed,
        mask_heads=0,
        stats=stats,
        cores=1,
    )
    rows = group * tokens
    num_tiles = tiles.fields.shape[0] // tiles.width
    float32, anywhere = jnp.float32, pl.BlockSpec(memory_space=pl.ANY)
    operands["query"] = query
    if listed:
        operands["listed"] = jnp.broadcast_to(jnp.swapaxes(tiles.rows, 0, 1)[..., None], (num_tiles, 3, tokens, LANES))
    specs = dict.fromkeys(operands, anywhere)
    for name, values in (("sinks", sinks), ("slopes", alibi_slopes), ("scales", kv_scales)):
        if values is not None:
            operands[name] = values.astype(float32).reshape(-1) * (1.0 if name == "scales" else LOG2_E)
            specs[name] = pl.BlockSpec(memory_space=pltpu.MemorySpace.SMEM)
    prefetched = {"count": tiles.count, "fields": tiles.fields}
    if block_tables is not None:
        prefetched["table"] = block_tables.reshape(-1)

    outputs = {"out": jax.ShapeDtypeStruct((padded_tokens, padded_heads, value_width), query.dtype)}
    scratch: dict[str, Any] = {
        "query_buffer": pltpu.VMEM((2, tokens, padded_heads, width), query.dtype),
        "query_rows": pltpu.VMEM((num_kv_heads, rows, width), query.dtype),
        "interleaved": pltpu.VMEM((tokens * padded_heads, max(width, value_width)), float32),
        "out_buffer": pltpu.VMEM((2, tokens, padded_heads, value_width), query.dtype),
        "maxima": pltpu.VMEM((num_kv_heads, rows, LANES), float32),
        "totals": pltpu.VMEM((num_kv_heads, rows, LANES), float32),
        "sums": pltpu.VMEM((num_kv_heads, rows, value_width), float32),
        "alive": pltpu.VMEM((SUBLANES, blocks.keys), jnp.int32),
        "query_semaphores": pltpu.SemaphoreType.DMA((2,)),
        "out_semaphores": pltpu.SemaphoreType.DMA((2,)),
    }
    if listed:
        scratch["listed_buffer"] = pltpu.VMEM((2, 3, tokens, LANES), jnp.int32)
    if stats:
        padded_rows = -(-rows // LANES) * LANES
        outputs["statistics"] = jax.ShapeDtypeStruct((num_tiles, 2, num_kv_heads, padded_rows), float32)
        scratch["statistics_buffer"] = pltpu.VMEM((2, 2, num_kv_heads, padded_rows), float32)
    for name in streams:
        shape = operands[name].shape
        page = (shape[0], *shape[2:])
        scratch[f"{name}_buffer"] = pltpu.VMEM((2, blocks.keys // shape[3], *page), operands[name].dtype)
        scratch[f"{name}_semaphores"] = pltpu.SemaphoreType.DMA((2,))
        scratch[f"{name}_state"] = pltpu.SMEM((STATE_WORDS,), jnp.int32)
        scratch[f"{name}_unusable"] = pltpu.SMEM((2,), jnp.int32)

    names = (*prefetched, *operands, *outputs, *scratch)
    results = pl.pallas_call(
        lambda *refs: _kernel(SimpleNamespace(**dict(zip(names, refs, strict=True))), static),
        out_shape=list(outputs.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(static.cores,),
            in_specs=[specs[name] for name in operands],
            out_specs=[anywhere] * len(outputs),
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=chip.vmem_bytes * 7 // 8
        ),
        name="flash_attn_varlen",
        interpret=interpret,
    )(*prefetched.values(), *operands.values())
    out = results[0][:num_tokens, :num_heads, :value_dim]
    if not stats:
        return out
    places = t.tile_rows(tiles, begins, num_tokens)
    by_row = results[1][..., :rows].reshape(num_tiles, 2, num_kv_heads, group, tokens)
    by_row = jnp.moveaxis(by_row, 4, 1).reshape(num_tiles * tokens, 2, num_heads)[places]
    behind = jnp.arange(num_tokens, dtype=jnp.int32) >= begins[-1]
    by_row = jnp.where(behind[:, None, None], -jnp.inf, by_row)
    return out, by_row[:, 0], by_row[:, 1]


def _new_pages(
    key: jax.Array,  # (Tk, KH, D)
    value: jax.Array,  # (Tk, KH, DV)
    begins: jax.Array,  # (B + 1,)
    width: int,
) -> tuple[jax.Array, jax.Array]:
    """Return new keys and values as pages (2, P, KH, NEW_PAGE, width), and the first page of each sequence (B,)."""
    num_tokens, num_seqs = key.shape[0], begins.shape[0] - 1
    num_pages = num_tokens // NEW_PAGE + num_seqs
    lens = jnp.diff(begins)
    ends = jnp.cumsum(-(-lens // NEW_PAGE)).astype(jnp.int32)
    first_pages = ends + -lens // NEW_PAGE
    page = jnp.arange(num_pages, dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(page[:, None] >= ends, axis=1), num_seqs - 1)
    token = begins[seq] + (page - first_pages[seq]) * NEW_PAGE
    token = jnp.clip(token[:, None] + jnp.arange(NEW_PAGE, dtype=jnp.int32), 0, num_tokens - 1)
    sides = [jnp.pad(side, ((0, 0), (0, 0), (0, width - side.shape[2]))) for side in (key, value)]
    return jnp.stack([side[token].swapaxes(1, 2) for side in sides]), first_pages


def _kernel(r: SimpleNamespace, static: _Static) -> None:
    tokens = static.blocks.tokens
    count = r.count[0]
    share = pl.cdiv(count, static.cores)
    first = jnp.minimum(pl.program_id(0) * share, count)
    last = jnp.minimum(first + share, count)

    def field(tile: Any, index: int) -> Any:
        return r.fields[tile * static.width + index]

    sources = [_Source(r, static, field, name, i, last) for i, name in enumerate(static.sources)]

    def query_copies(tile: Any) -> list[Any]:
        slot = lax.rem(tile, 2)
        semaphore = r.query_semaphores.at[slot]
        token = field(tile, t.TOKEN)
        copies = [pltpu.make_async_copy(r.query.at[pl.ds(token, tokens)], r.query_buffer.at[slot], semaphore)]
        if static.listed:
            copies.append(pltpu.make_async_copy(r.listed.at[tile], r.listed_buffer.at[slot], semaphore))
        return copies

    def out_copies(tile: Any, act: Any) -> None:
        """Start or await the copies of a tile's own rows: as many powers of two as their number has."""
        slot = lax.rem(tile, 2)
        semaphore = r.out_semaphores.at[slot]
        row, size = field(tile, t.FIRST), field(tile, t.ROWS)
        token = field(tile, t.TOKEN) + row
        part = tokens
        while part:
            done = size - lax.rem(size, 2 * part)

            @pl.when(lax.rem(size, 2 * part) >= part)
            def _(done: Any = done, part: int = part) -> None:
                source = r.out_buffer.at[slot, pl.ds(row + done, part)]
                act(pltpu.make_async_copy(source, r.out.at[pl.ds(token + done, part)], semaphore))

            part //= 2
        if static.stats:
            act(pltpu.make_async_copy(r.statistics_buffer.at[slot], r.statistics.at[tile], semaphore))

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

        _finish(r, static, slot)
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


def _lay_out_queries(r: SimpleNamespace, static: _Static, slot: Any) -> None:
    """Lay the queries of a tile (tokens, H, D) out as (KH, G * tokens, D)."""
    _, tokens, heads, width = r.query_buffer.shape
    r.interleaved[:, :width] = r.query_buffer[slot].astype(jnp.float32).reshape(tokens * heads, width)

    def kv_head(head: Any, carry: Any) -> Any:
        for member in range(static.group):
            rows = r.interleaved[pl.ds(head * static.group + member, tokens, heads), :width]
            r.query_rows[head, member * tokens : (member + 1) * tokens] = rows.astype(r.query_rows.dtype)
        return carry

    lax.fori_loop(0, r.query_rows.shape[0], kv_head, 0)


def _finish(r: SimpleNamespace, static: _Static, slot: Any) -> None:
    """Turn sums into results and lay them out as (tokens, H, DV)."""
    _, tokens, heads, width = r.out_buffer.shape

    def kv_head(head: Any, carry: Any) -> Any:
        maximum = r.maxima[head][:, :1]
        total = jnp.sum(r.totals[head], axis=1, keepdims=True)
        seen = maximum > NOTHING
        top, denominator = maximum, jnp.where(seen, total, 1.0)
        if "sinks" in vars(r):
            sinks = _per_member(r.sinks, head, static.group, tokens)
            top = jnp.maximum(maximum, sinks)
            denominator = jnp.exp2(sinks - top) + total * jnp.exp2(maximum - top)
        factor = jnp.where(seen, jnp.exp2(maximum - top) / denominator, 0.0)
        out = r.sums[head] * factor
        for member in range(static.group):
            place = pl.ds(head * static.group + member, tokens, heads)
            r.interleaved[place, :width] = out[member * tokens : (member + 1) * tokens]
        if static.stats:
            known = seen if "sinks" not in vars(r) else jnp.full(seen.shape, True)
            lse = jnp.where(known, (top + jnp.log2(denominator)) / LOG2_E, -jnp.inf)
            largest = jnp.where(seen, maximum / LOG2_E, -jnp.inf)
            for i, column in enumerate((lse, largest)):
                r.statistics_buffer[slot, i, pl.ds(head, 1)] = _transposed(column)
        return carry

    lax.fori_loop(0, r.sums.shape[0], kv_head, 0)
    out = r.interleaved[:, :width].reshape(tokens, heads, width)
    r.out_buffer[slot] = out.astype(r.out_buffer.dtype)


def _transposed(column: jax.Array) -> jax.Array:
    """Return (1, R up to whole lanes) of (R, 1)."""
    num_rows = column.shape[0]
    parts = []
    for start in range(0, num_rows, LANES):
        part = column[start : start + LANES]
        shape = (part.shape[0], LANES)
        diagonal = lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)
        parts.append(jnp.max(jnp.where(diagonal, jnp.broadcast_to(part, shape), -jnp.inf), axis=0, keepdims=True))
    return jnp.concatenate(parts, axis=1)


def _per_member(values: Any, head: Any, group: int, tokens: int) -> jax.Array:
    """Return (G * tokens, 1) of the values (H,) in SMEM of a kv head's query heads."""
    return jnp.concatenate([jnp.full((tokens, 1), values[head * group + member]) for member in range(group)])


class _Source:
    """The keys of one source, as a tile attends to them."""

    def __init__(self, r: SimpleNamespace, static: _Static, field: Any, name: str, index: int, last: Any) -> None:
        self.r, self.static, self.is_cache = r, static, name == "cache"
        self.buffer, self.unusable = getattr(r, f"{name}_buffer"), getattr(r, f"{name}_unusable")
        self.page_size = self.buffer.shape[4]
        self.pages_per_block = self.buffer.shape[1]
        self.table = r.table if self.is_cache else _Consecutive()
        self.columns = static.table_columns if self.is_cache else 1
        place = t.TILE_FIELDS + index * t.SOURCE_FIELDS
        self.field = lambda tile, which: field(tile, place + which)
        self.position = lambda tile: field(tile, t.POSITION)
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
        )

    def _span(self, tile: Any) -> tuple[Any, Any, Any]:
        begin, end = self.field(tile, t.BEGIN), self.field(tile, t.END)
        return self.field(tile, t.PAGE_ROW), lax.div(begin, self.page_size), pl.cdiv(end, self.page_size)

    def attend(self, tile: Any) -> None:
        """Add the keys of this source to a tile's sums."""
        row, first_page, end_page = self._span(tile)
        begin, end = self.field(tile, t.BEGIN), self.field(tile, t.END)
        full_begin, full_end = self.field(tile, t.FULL_BEGIN), self.field(tile, t.FULL_END)
        keys = self.pages_per_block * self.page_size
        heads = self.buffer.shape[3]

        def block(i: Any, carry: Any) -> Any:
            self.stream.fetch()
            page = first_page + i * self.pages_per_block
            slot = self.stream.wait(jnp.minimum(end_page - page, self.pages_per_block))
            key = page * self.page_size
            whole = (key >= full_begin) & (key + keys <= full_end) & (self.unusable[slot] == 0)

            @pl.when(whole)
            def all_seen() -> None:
                def head_body(head: Any, carry: Any) -> Any:
                    self._step(tile, slot, head, 0, self.pages_per_block, key, masked=False)
                    return carry

                lax.fori_loop(0, heads, head_body, 0)

            @pl.when(jnp.logical_not(whole))
            def some_seen() -> None:
                self._hide(slot, row, page, begin, end)
                chunk = self.static.blocks.chunk
                pages = chunk // self.page_size
                lowest = lax.div(jnp.maximum(begin - key, 0), chunk)
                highest = jnp.minimum(pl.cdiv(end - key, chunk), keys // chunk)

                def chunk_body(i: Any, carry: Any) -> Any:
                    def head_body(head: Any, carry: Any) -> Any:
                        self._step(tile, slot, head, i * pages, pages, key + i * chunk, masked=True)
                        return carry

                    return lax.fori_loop(0, heads, head_body, carry)

                lax.fori_loop(lowest, highest, chunk_body, 0)

            return carry

        lax.fori_loop(0, pl.cdiv(end_page - first_page, self.pages_per_block), block, 0)

    def _hide(self, slot: Any, row: Any, first_page: Any, begin: Any, end: Any) -> None:
        """Mark the keys of a block that exist, and zero the values of the others: a weight of 0 leaves nothing of 0."""
        size, keys = self.page_size, self.pages_per_block * self.page_size
        position = first_page * size + lax.broadcasted_iota(jnp.int32, (SUBLANES, keys), 1)
        self.r.alive[...] = ((position >= begin) & (position < end)).astype(jnp.int32)
        some_unusable = self.unusable[slot] != 0

        def page_body(j: Any, carry: Any) -> Any:
            key = (first_page + j) * size
            inside = (key < end) & (key + size > begin)
            place = jnp.where(inside, row * self.columns + first_page + j, 0)
            block_id = self.table[place]
            usable = jnp.logical_not(some_unusable & inside & ((block_id < 0) | (block_id >= self._num_pages())))

            @pl.when((key < begin) | (key + size > end) | jnp.logical_not(usable))
            def clear() -> None:
                values = self.buffer[slot, j, 1]
                position = key + lax.broadcasted_iota(jnp.int32, values.shape, 1)
                kept = (position >= begin) & (position < jnp.where(usable, end, 0))
                self.buffer[slot, j, 1] = jnp.where(kept, values, jnp.zeros_like(values))

            @pl.when(jnp.logical_not(usable))
            def forget() -> None:
                lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, keys), 1)
                away = (lane >= j * size) & (lane < (j + 1) * size)
                self.r.alive[...] = jnp.where(away, 0, self.r.alive[...])

            return carry

        lax.fori_loop(0, self.pages_per_block, page_body, 0)

    def _num_pages(self) -> int:
        return int(self.stream.sources[0].shape[1])

    def _step(self, tile: Any, slot: Any, head: Any, page: Any, pages: int, key: Any, *, masked: bool) -> None:
        """Take one step of the online softmax: one kv head's rows, the keys of some pages of a block."""
        r, static = self.r, self.static
        size = pages * self.page_size
        query = r.query_rows[head]
        keys = self._rows(slot, page, pages, 0, head, query.dtype)
        values = self._rows(slot, page, pages, 1, head, query.dtype)
        if static.head_dim < keys.shape[1]:
            lane = lax.broadcasted_iota(jnp.int32, (1, keys.shape[1]), 1)
            keys = jnp.where(lane < static.head_dim, keys, jnp.zeros_like(keys))[:, : query.shape[1]]
        logits = dot(query, keys, (1, 1))
        scale: Any = static.softmax_scale
        if static.logits_soft_cap:
            logits = jnp.tanh(logits * (scale / static.logits_soft_cap)) * (static.logits_soft_cap * LOG2_E)
        else:
            logits = logits * (scale * LOG2_E)
        if masked or "slopes" in vars(r):
            index = key + self.field(tile, t.OFFSET) + lax.broadcasted_iota(jnp.int32, (1, size), 1)
            low, high, position = self._limits(tile)
        if "slopes" in vars(r):
            slopes = _per_member(r.slopes, head, static.group, static.blocks.tokens)
            logits = logits - slopes * jnp.abs(position - index).astype(jnp.float32)
        if masked:
            seen = r.alive[:1, pl.ds(page * self.page_size, size)] != 0
            if low is not None:
                seen = seen & (index >= low)
            if high is not None:
                seen = seen & (index <= high)
            logits = jnp.where(seen, logits, -jnp.inf)

        before = r.maxima[head]
        maximum = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp2(logits - jnp.concatenate([maximum] * (size // LANES), axis=1))
        factor = jnp.exp2(before - maximum)
        partial = weights[:, :LANES]
        for start in range(LANES, size, LANES):
            partial = partial + weights[:, start : start + LANES]
        r.maxima[head] = maximum
        r.totals[head] = r.totals[head] * factor + partial
        width = r.sums.shape[2]
        factors = jnp.concatenate([factor] * (width // LANES), axis=1)
        product = dot(weights.astype(values.dtype), values[:, :width], (1, 0))
        r.sums[head] = r.sums[head] * factors + product

    def _rows(self, slot: Any, page: Any, pages: int, side: int, head: Any, dtype: Any) -> jax.Array:
        """Return (keys, DS) of one side and head of some pages."""
        found = self.buffer[slot, pl.ds(page, pages), side, head]
        return found.reshape(pages * self.page_size, found.shape[2]).astype(dtype)

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
        position = self.position(tile) + token
        first = None if static.window is None else position - (static.window - 1)
        if static.causal:
            return first, position, position
        return first, None if static.window is None else position + (static.window - 1), position
