"""Paged attention for decode: one query token per sequence.

The grid runs over the sequences, on two cores over halves of them (or of the kv heads, if there is one sequence).
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
from jax.experimental.pallas import tpu as pltpu

from torch_paged.backends.tpu.block_sizes import LANES, SUBLANES, Blocks, Chip, Page, decode_blocks
from torch_paged.backends.tpu.logits import NOTHING, across, dot, modify, statistics, weigh, weighted_sum
from torch_paged.backends.tpu.pages import STATE_WORDS, PageStream, flat_table

MASK_ROWS = 32
"""Rows of a tile of int8."""
TABLE_WORDS = 3 * 2**16
"""Block ids that SMEM (1 MiB) has room for; longer tables take several kernels."""


@dataclass(frozen=True)
class _Plan:
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


def paged_attention(
    query: jax.Array,  # (B, H, D)
    kv_cache: jax.Array,  # (2, N, KH, S, DS)
    block_tables: jax.Array,  # (B, M)
    context_lens: jax.Array,  # (B,)
    kv_scales: jax.Array | None = None,  # (2,), (2, KH) or (2, N, KH, S)
    sinks: jax.Array | None = None,  # (H,)
    alibi_slopes: jax.Array | None = None,  # (H,)
    attn_mask: jax.Array | None = None,  # (B, C), (KH, B, C) or (H, B, C)
    *,
    softmax_scale: float,
    logits_soft_cap: float = 0.0,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    stats: bool = False,
    chip: Chip,
    interpret: Any = False,
) -> Any:
    """Attend from one token of each sequence to its cache.

    Returns:
        out (B, H, value_dim or D) in the query dtype; with ``stats`` also lse and max_logits (B, H) float32.
    """
    num_seqs, num_heads, head_dim = query.shape
    _, num_blocks, num_kv_heads, block_size, stored_dim = kv_cache.shape
    width = block_tables.shape[1]
    value_dim = head_dim if value_dim is None else value_dim
    if not (num_seqs and num_blocks and width and value_dim):
        return _no_keys(query, sinks, value_dim, stats)

    seqs_at_a_time = max(1, TABLE_WORDS // width)
    if num_seqs > seqs_at_a_time:
        parts = []
        for first in range(0, num_seqs, seqs_at_a_time):
            part = slice(first, first + seqs_at_a_time)
            results = paged_attention(
                query[part],
                kv_cache,
                block_tables[part],
                context_lens[part],
                kv_scales,
                sinks,
                alibi_slopes,
                None if attn_mask is None else attn_mask[..., part, :],
                softmax_scale=softmax_scale,
                logits_soft_cap=logits_soft_cap,
                sliding_window=sliding_window,
                attention_chunk=attention_chunk,
                value_dim=value_dim,
                stats=stats,
                chip=chip,
                interpret=interpret,
            )
            parts.append(results if stats else (results,))
        joined = tuple(jnp.concatenate(pieces) for pieces in zip(*parts, strict=True))
        return joined if stats else joined[0]

    scales_rank = 0 if kv_scales is None else kv_scales.ndim
    mask_heads = 0 if attn_mask is None else attn_mask.shape[0] if attn_mask.ndim == 3 else 1
    split_heads = num_seqs < chip.cores and num_kv_heads % chip.cores == 0 and not mask_heads and scales_rank < 4
    cores = chip.cores if split_heads or num_seqs >= chip.cores else 1
    group_rows = -(-(num_heads // num_kv_heads) // SUBLANES) * SUBLANES
    core_seqs = num_seqs if split_heads else num_seqs // cores if num_seqs % cores == 0 else 1
    # of all heads, also where a core takes a part of them: else a sequence would sum in another order in a batch
    page = Page(num_kv_heads, block_size, stored_dim, kv_cache.dtype.itemsize)
    key_bytes = (8 * num_kv_heads if scales_rank == 4 else 0) + -(-mask_heads // MASK_ROWS) * MASK_ROWS
    plan = _Plan(
        num_seqs,
        num_heads,
        head_dim,
        value_dim,
        num_kv_heads,
        block_size,
        stored_dim,
        width,
        decode_blocks(chip, page, width, num_kv_heads * group_rows, key_bytes, core_seqs),
        cores,
        split_heads,
        scales_rank,
        sinks is not None,
        alibi_slopes is not None,
        mask_heads,
        softmax_scale,
        logits_soft_cap,
        sliding_window,
        attention_chunk,
        stats,
        query.dtype,
        kv_cache.dtype,
        bool(interpret),
    )
    scalars = [context_lens, flat_table(block_tables, num_blocks)]
    scalars += [kv_scales] if kv_scales is not None and scales_rank < 4 else []
    scalars += [x for x in (sinks, alibi_slopes) if x is not None]
    arrays = [query, kv_cache]
    if kv_scales is not None and scales_rank == 4:
        arrays.append(_scale_blocks(kv_scales, block_tables, plan))
    if attn_mask is not None:
        arrays.append(_mask_blocks(attn_mask, plan))
    if not interpret:  # else XLA may copy a whole cache to VMEM first
        arrays[1:] = [pltpu.with_memory_space_constraint(x, pltpu.MemorySpace.HBM) for x in arrays[1:]]
    out, *rest = _call(plan, chip, interpret)(*scalars, *arrays)
    if not stats:
        return out
    return (out, *(x.reshape(num_seqs, num_heads) for x in rest))


def _no_keys(query: jax.Array, sinks: jax.Array | None, value_dim: int, stats: bool) -> Any:
    out = jnp.zeros((*query.shape[:2], value_dim), query.dtype)
    nothing = jnp.full(query.shape[:2], -jnp.inf, jnp.float32)
    lse = nothing if sinks is None else jnp.broadcast_to(sinks.astype(jnp.float32), nothing.shape)
    return (out, lse, nothing) if stats else out


def _scale_blocks(kv_scales: jax.Array, block_tables: jax.Array, plan: _Plan) -> jax.Array:
    """Return the scales of all columns as (B, blocks, rows, keys of a block): keys of all heads, then values."""
    ids = jnp.clip(block_tables, 0, kv_scales.shape[1] - 1)
    scales = kv_scales[:, ids]  # (2, B, M, KH, S)
    rows = scales.transpose(1, 0, 3, 2, 4).reshape(plan.num_seqs, 2 * plan.num_kv_heads, -1)
    return _key_blocks(rows.astype(jnp.float32), SUBLANES, plan)


def _mask_blocks(attn_mask: jax.Array, plan: _Plan) -> jax.Array:
    """Return a mask as (B, blocks, rows, keys of a block)."""
    mask = attn_mask if attn_mask.ndim == 3 else attn_mask[None]
    return _key_blocks(mask.astype(jnp.int8).transpose(1, 0, 2), MASK_ROWS, plan)


def _key_blocks(rows: jax.Array, multiple: int, plan: _Plan) -> jax.Array:
    """Return (B, R, keys) as (B, blocks, R up to a multiple, keys of a block)."""
    num_blocks = -(-plan.width // plan.blocks.pages)
    keys = num_blocks * plan.block_keys
    rows = rows[..., :keys]
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % multiple), (0, keys - rows.shape[2])))
    return rows.reshape(*rows.shape[:2], num_blocks, plan.block_keys).transpose(0, 2, 1, 3)


def _call(plan: _Plan, chip: Chip, interpret: Any) -> Any:
    """Return the compiled kernel."""

    def block_index(core: Any, step: Any, *_: Any) -> tuple[Any, ...]:
        if plan.split_heads:
            return step, core, 0
        steps = plan.steps // plan.members
        return jnp.minimum(core * steps + step, -(-plan.num_seqs // plan.members) - 1), 0, 0

    def stat_index(*indices: Any) -> tuple[Any, ...]:
        seq, part, _ = block_index(*indices)
        return seq, part, 0, 0

    parts = plan.cores if plan.split_heads else 1
    query_block = pl.BlockSpec((plan.members, plan.core_heads, plan.head_dim), block_index)
    out_shape = [jax.ShapeDtypeStruct((plan.num_seqs, plan.num_heads, plan.value_dim), plan.query_dtype)]
    out_specs = [pl.BlockSpec((plan.members, plan.core_heads, plan.value_dim), block_index)]
    if plan.stats:
        stat = jax.ShapeDtypeStruct((plan.num_seqs, parts, 1, plan.core_heads), jnp.float32)
        out_shape += [stat, stat]
        out_specs += [pl.BlockSpec((plan.members, 1, 1, plan.core_heads), stat_index)] * 2

    buffers, pages, tiles = plan.blocks.buffers, plan.blocks.pages, plan.blocks.pages // plan.blocks.tile_pages
    kv_heads, rows, size, members = plan.core_kv_heads, plan.rows, plan.block_size, plan.members
    scratch = {
        "buffer": pltpu.VMEM((buffers, pages, 2, kv_heads, size, plan.stored_dim), plan.cache_dtype),
        "semaphores": pltpu.SemaphoreType.DMA((buffers,)),
        "state": pltpu.SMEM((STATE_WORDS,), jnp.int32),
        "unusable": pltpu.SMEM((buffers,), jnp.int32),
        "slots": pltpu.SMEM((members,), jnp.int32),
        "live": pltpu.VMEM((members, tiles, SUBLANES, plan.tile_keys), jnp.float32),
        "heads": pltpu.VMEM((members, plan.core_heads + rows - plan.group, plan.stored_dim), jnp.float32),
        "queries": pltpu.VMEM((members, kv_heads, rows, plan.head_dim), plan.query_dtype),
        "maxima": pltpu.VMEM((members, kv_heads, rows, LANES), jnp.float32),
        "totals": pltpu.VMEM((members, kv_heads, rows, LANES), jnp.float32),
        "sums": pltpu.VMEM((members, kv_heads, rows, plan.stored_dim), jnp.float32),
    }
    if plan.scales_rank == 4:
        height = -(-2 * kv_heads // SUBLANES) * SUBLANES
        scratch["scale_buffer"] = pltpu.VMEM((buffers, height, plan.block_keys), jnp.float32)
    if plan.mask_heads:
        height = -(-plan.mask_heads // MASK_ROWS) * MASK_ROWS
        scratch["mask_buffer"] = pltpu.VMEM((buffers, height, plan.block_keys), jnp.int8)
    for name in ("sinks", "alibi"):
        if getattr(plan, name):
            scratch[f"{name}_rows"] = pltpu.VMEM((kv_heads, rows, LANES), jnp.float32)

    scalars = ["context_lens", "table"]
    scalars += ["scales"] if 0 < plan.scales_rank < 4 else []
    scalars += [name for name in ("sinks", "alibi") if getattr(plan, name)]
    in_hbm = ["cache", *plan.block_sources]
    outputs = ["out", "lse", "max_logits"] if plan.stats else ["out"]
    names = [*scalars, "query", *in_hbm, *outputs, *scratch]

    def kernel(*refs: Any) -> None:
        _Kernel(plan, dict(zip(names, refs, strict=True))).run()

    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.cores, plan.steps // plan.members),
            in_specs=[query_block, *[pl.BlockSpec(memory_space=pl.ANY)] * len(in_hbm)],
            out_specs=out_specs,
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=chip.kernel_bytes,
            disable_bounds_checks=True,
        ),
        name="paged_attention",
        interpret=interpret,
    )


@dataclass(frozen=True)
class _Member:
    """A tile of keys of one of the sequences that are multiplied together."""

    member: Any
    slot: Any
    tile: Any
    first_key: Any
    begin: Any
    end: Any


class _Kernel:
    """The body for the sequences of a step; ``refs`` by name."""

    def __init__(self, plan: _Plan, refs: dict[str, Any]) -> None:
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
