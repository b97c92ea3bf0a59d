"""Which rows and keys a tile of packed queries has: small integer arrays, made by XLA before the attention kernel runs.

A tile is ``size`` query tokens of one sequence, cut from its first row on; what lies behind the last sequence is cut in
the same way and sees no key. A tile at the end of the queries starts early enough to be read whole: its own rows are
then the last ones. Each row sees the keys ``low .. high`` of its sequence, and nothing where ``low > high``.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

TOKEN, FIRST, ROWS, POSITION, TILE_FIELDS = range(5)
"""Fields of a tile: its first token; its own rows, ``FIRST .. FIRST + ROWS``; the position of row 0."""
PAGE_ROW, BEGIN, END, FULL_BEGIN, FULL_END, OFFSET, SOURCE_FIELDS = range(7)
"""Fields of a tile in a source of keys: where its pages are; the keys that some row sees; those that all rows see;
the position of the source's first key. Keys are counted from the source's first one."""

FAR = 2**30
"""Positions and windows beyond it act as it does; no sum of two overflows."""
WORD_KEYS = 32 * 128
"""Keys of a row of mask words: key ``128 * bit + lane``."""
_TILE_KEYS = 256
"""Keys that take about as long as a tile without any."""


@dataclass(frozen=True)
class KeySource:
    """Where keys of each sequence lie, one entry per sequence.

    Attributes:
        page_rows: row of the page table, or first page.
        lengths: keys.
        offsets: position of the first key.
    """

    page_rows: jax.Array
    lengths: jax.Array
    offsets: jax.Array


@dataclass(frozen=True)
class Tiles:
    """The tiles of a call.

    Attributes:
        size: query tokens of a tile.
        fields: (num_tiles * width,) int32, the fields of each tile and of its sources.
        width: fields of one tile.
        count: (1,) int32, how many tiles there are.
        rows: (3, num_tiles, size) int32, low, high and position of each row.
        first_tiles: (B + 1,) first tile of each sequence, and of the rows behind the last one.
    """

    size: int
    fields: jax.Array
    width: int
    count: jax.Array
    rows: jax.Array
    first_tiles: jax.Array


def bounds(cu_seqlens: jax.Array, limit: int) -> jax.Array:
    """Return prefix sums made harmless: never decreasing, in ``[0, limit]``."""
    return lax.cummax(jnp.clip(cu_seqlens.astype(jnp.int32), 0, limit))


def cut(
    begins: jax.Array,  # (B + 1,) bounds of the queries
    sources: list[KeySource],
    positions: jax.Array | None,  # (T,)
    skipped: jax.Array | None,  # (B,) bool, sequences that get no tile
    *,
    num_tokens: int,
    size: int,
    causal: bool,
    window: int | None,
    chunk: int | None,
) -> Tiles:
    """Cut the queries into tiles, and find the keys of each tile and row."""
    num_seqs = begins.shape[0] - 1
    num_tiles = num_tokens // size + num_seqs + 1
    kv_lens = jnp.sum(jnp.stack([source.lengths for source in sources]), axis=0)
    lens = jnp.diff(begins, append=num_tokens)
    counts = -(-lens // size)
    if skipped is not None:
        counts = jnp.where(jnp.append(skipped, False), 0, counts)
    ends = jnp.cumsum(counts).astype(jnp.int32)
    first_tiles = ends - counts

    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(tile[:, None] >= ends, axis=1), num_seqs)
    start = begins[seq] + (tile - first_tiles[seq]) * size
    token = jnp.clip(start, 0, num_tokens - size)
    first = jnp.minimum(start - token, size)
    count = jnp.clip(begins[seq] + lens[seq] - start, 0, size - first)

    def of_tiles(values: jax.Array) -> jax.Array:
        return jnp.append(values, jnp.int32(0))[seq]

    row = jnp.arange(size, dtype=jnp.int32)
    kv_len = of_tiles(kv_lens)
    base = kv_len - lens[seq] - begins[seq] + token  # position of row 0
    position = base[:, None] + row
    if positions is not None:
        position = jnp.clip(positions[token[:, None] + row], -FAR, FAR)
    window = None if window is None else min(window, FAR)
    low = jnp.zeros_like(position) if window is None else position - (window - 1)
    high = jnp.broadcast_to(kv_len[:, None] - 1, position.shape)
    if chunk is not None:
        low = jnp.maximum(low, position // chunk * chunk if chunk < FAR else jnp.where(position < 0, -FAR, 0))
    if causal or chunk is not None:
        high = jnp.minimum(high, position)
    elif window is not None:
        high = jnp.minimum(high, position + (window - 1))

    own = (row >= first[:, None]) & (row < (first + count)[:, None])
    sees = own & (low <= high) & (high >= 0)
    some = jnp.any(sees, axis=1)
    least, most = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
    begin = jnp.where(some, jnp.maximum(jnp.min(jnp.where(sees, low, most), axis=1), 0), 0)
    end = jnp.where(some, jnp.max(jnp.where(sees, high, least), axis=1) + 1, 0)
    full_begin = jnp.max(jnp.where(own, low, least), axis=1)
    full_end = jnp.min(jnp.where(own, high, most - 1), axis=1) + 1
    fields = [token, first, count, base]
    for source in sources:
        offset, length = of_tiles(source.offsets), of_tiles(source.lengths)
        here = jnp.clip(end - offset, 0, length)
        there = jnp.minimum(jnp.maximum(begin - offset, 0), here)
        inside = jnp.minimum(full_end - offset, length)
        fields += [of_tiles(source.page_rows), there, here, full_begin - offset, inside, offset]
    packed = jnp.stack(fields, axis=1).astype(jnp.int32).reshape(-1)
    return Tiles(size, packed, len(fields), ends[-1:], jnp.stack([low, high, position]), first_tiles)


def shares(tiles: Tiles, num_sources: int, cores: int) -> jax.Array:
    """Return (cores,) int32, where the tiles of each core end: all have about equally many keys."""
    if cores == 1:
        return tiles.count
    sources = tiles.fields.reshape(-1, tiles.width)[:, TILE_FIELDS:].reshape(-1, num_sources, SOURCE_FIELDS)
    tile = jnp.arange(sources.shape[0], dtype=jnp.int32)
    keys = jnp.sum(sources[..., END] - sources[..., BEGIN], axis=1) + _TILE_KEYS
    keys = jnp.where(tile < tiles.count, keys, 0).astype(jnp.float32)
    work = jnp.cumsum(keys)
    share = jnp.arange(1, cores, dtype=jnp.float32) * (work[-1] / cores)
    ends = jnp.sum(work - keys / 2 < share[:, None], axis=1, dtype=jnp.int32)
    return jnp.append(jnp.minimum(ends, tiles.count), tiles.count)


def mask_words(mask: jax.Array, tiles: Tiles, source: int, keys: int) -> jax.Array:
    """Return a mask as bits, in the order in which tiles meet the keys of a source.

    Args:
        mask: (heads, T, C) bool.
        tiles: the tiles.
        source: which source.
        keys: keys of a block.

    Returns:
        (num_tiles, heads, C / WORD_KEYS, size, 128) int32; key 0 is the first one of a tile's first block.
    """
    num_heads, num_tokens, columns = mask.shape
    fields = tiles.fields.reshape(-1, tiles.width)
    at = TILE_FIELDS + source * SOURCE_FIELDS
    column = fields[:, at + OFFSET] + fields[:, at + BEGIN] // keys * keys
    row = jnp.minimum(fields[:, TOKEN, None] + jnp.arange(tiles.size, dtype=jnp.int32), num_tokens - 1)
    width = -(-columns // WORD_KEYS) * WORD_KEYS
    wide = jnp.pad(mask, ((0, 0), (0, 0), (0, width)))

    def of_row(row: jax.Array, column: jax.Array) -> jax.Array:
        return lax.dynamic_slice(wide, (0, row, column), (num_heads, 1, width))[:, 0]

    of_tile = jax.vmap(jax.vmap(of_row, (0, None)))(row, jnp.minimum(column, columns))
    bits = of_tile.reshape(*row.shape, num_heads, width // WORD_KEYS, 32, 128)
    words = jnp.zeros((*bits.shape[:4], 128), jnp.int32)
    for bit in range(32):  # one sum after the other: a reduction would first write each bit as an int32
        words = words | (bits[..., bit, :].astype(jnp.int32) << bit)
    return words.transpose(0, 2, 3, 1, 4)


def tile_rows(tiles: Tiles, begins: jax.Array, num_tokens: int) -> jax.Array:
    """Return (T,) where each query token lies among the rows of all tiles, ``tile * size + row``."""
    num_tiles = tiles.fields.shape[0] // tiles.width
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    seq = jnp.sum(token[:, None] >= begins[1:], axis=1)
    tile = jnp.minimum(tiles.first_tiles[seq] + (token - begins[seq]) // tiles.size, num_tiles - 1)
    first_token = tiles.fields.reshape(-1, tiles.width)[tile, TOKEN]
    return tile * tiles.size + token - first_token
