"""Packed ragged queries: the torch side, which lays out what the kernel reads and computes nothing."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_paged.backends import Arguments
from torch_paged.backends.neuron.float8 import float8_values
from torch_paged.backends.neuron.launch import Launch
from torch_paged.backends.neuron.plan import PARTITIONS
from torch_paged.backends.neuron.plan_memory import remembered
from torch_paged.backends.neuron.plan_varlen import (
    CHUNK_KEYS,
    KEY_UNIT,
    TileShape,
    VarlenPlan,
    VarlenSizes,
    VarlenTiles,
    varlen_plan,
)
from torch_paged.backends.neuron.varlen_kernel import attend_tiles

ROW_TILES = 16
"""128 rows each, of a wide tile's kv head; keys are turned once for all of them."""
MIDDLE = 4
"""A wide tile is worth so many middle ones."""
STATE_BYTES = 96 * 1024
"""Of a partition, for queries and weighted values of a tile; keys of float32 queries take half of it."""


def flash_attn_varlen(launch: Launch, arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from packed ragged queries to the cache, to new keys, or to both in one softmax.

    Args:
        launch: runs kernels.
        arguments: all arguments by schema name, checked, defaults filled in.

    Returns:
        out (T, H, value_dim or DV or D) in the query dtype, lse and max_logits (T, H) float32.
    """
    query, key, value, kv_cache = (arguments[name] for name in ("query", "key", "value", "kv_cache"))
    sinks, slopes, attn_mask = arguments["sinks"], arguments["alibi_slopes"], arguments["attn_mask"]
    kv_scales, tables, scale = arguments["kv_scales"], arguments["block_tables"], arguments["softmax_scale"]
    num_tokens, num_heads, head_dim = query.shape
    value_dim = arguments["value_dim"]
    if value_dim is None:
        value_dim = head_dim if value is None else value.shape[-1]
    if kv_cache is not None and not (kv_cache.shape[1] and tables.numel()):
        kv_cache = None
    if key is not None and not key.shape[0]:
        key = value = None
    if not num_tokens or (kv_cache is None and key is None):
        return _no_keys(query, arguments["cu_seqlens_q"], sinks, value_dim)
    dtype = query.dtype
    if dtype == torch.float16 and kv_scales is not None and kv_scales.dim() == 4:  # keys times scales may overflow
        query, key, value = (None if x is None else x.float() for x in (query, key, value))

    sides, num_blocks, block_size = (0, 0, 1) if kv_cache is None else (*kv_cache.shape[:2], kv_cache.shape[3])
    num_kv_heads = key.shape[1] if kv_cache is None else kv_cache.shape[2]
    group, lanes = num_heads // num_kv_heads, -(-head_dim // PARTITIONS) * PARTITIONS
    row_tiles = _row_tiles(
        arguments["max_seqlen_q"] * group,
        num_kv_heads * (lanes * query.dtype.itemsize + value_dim * 4) * (lanes // PARTITIONS),
        attn_mask is None and slopes is None,
        query.dtype.itemsize,
    )
    wide, middle = _tile_shape(group, row_tiles), _tile_shape(group, row_tiles // MIDDLE)
    sizes = VarlenSizes(
        num_tokens=num_tokens,
        num_new_keys=0 if key is None else key.shape[0],
        num_blocks=num_blocks,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        wide=wide,
        middle=middle,
        mask_heads=None if attn_mask is None else 1 if attn_mask.dim() == 2 else attn_mask.shape[0],
        mask_columns=0 if attn_mask is None else attn_mask.shape[-1],
        causal=arguments["causal"],
        sliding_window=arguments["sliding_window"],
        attention_chunk=arguments["attention_chunk"],
        cores=launch.cores,
    )
    names = ["cu_seqlens_q"]
    names += [] if key is None else ["cu_seqlens_k"]
    names += [] if kv_cache is None else ["block_tables", "context_lens"]
    names += [] if arguments["query_positions"] is None else ["query_positions"]
    lengths = tuple(arguments[name] for name in names)
    plan: VarlenPlan = remembered(_plan, lengths, (tuple(names), sizes))
    mask = new_mask = None
    if attn_mask is not None and kv_cache is not None:
        mask = remembered(_mask, (attn_mask,), sizes.mask_chunks(tables.shape[1])[0])
    if attn_mask is not None and key is not None:
        new_mask = remembered(_new_mask, (attn_mask, *lengths), (tuple(names), sizes))

    cache = table = head_scales = token_scales = None
    parts = max(1, block_size // KEY_UNIT)
    if kv_cache is not None:
        num_rows = sides * num_blocks * num_kv_heads * parts
        cache = kv_cache.view(num_rows, -1)
        if cache.dtype == torch.float8_e4m3fn and launch.generation == "trn2":
            cache, table = cache.view(torch.uint8), float8_values(query.dtype, query.device)
        if kv_scales is not None and kv_scales.dim() == 4:
            token_scales = kv_scales.reshape(num_rows, KEY_UNIT)
        elif kv_scales is not None:
            head_scales = kv_scales.reshape(sides, -1).expand(2, num_kv_heads).reshape(1, -1)
    out, found = launch(
        attend_tiles,
        query.reshape(-1, head_dim),
        cache,
        plan.key_units,
        None if key is None else key.reshape(key.shape[0], -1),
        None if value is None else value.reshape(value.shape[0], -1),
        *_tiles(plan.wide),
        *_tiles(plan.middle),
        *_tiles(plan.narrow),
        plan.counts,
        mask,
        new_mask,
        None if sinks is None else sinks.reshape(-1, 1),
        None if slopes is None else slopes.reshape(-1, 1),
        head_scales,
        token_scales,
        table,
        num_heads,
        num_kv_heads,
        sides,
        parts,
        1 if wide is None else wide.member_rows,
        1 if middle is None else middle.member_rows,
        sizes.mask_heads or 0,
        value_dim,
        1 / math.sqrt(head_dim) if scale is None else scale,
        arguments["logits_soft_cap"],
    )
    lse, max_logits = (part.contiguous() for part in found.reshape(num_tokens, num_heads, 2).unbind(-1))
    return out.reshape(num_tokens, num_heads, value_dim).to(dtype), lse, max_logits


def _row_tiles(most_rows: int, row_bytes: int, plain: bool, itemsize: int) -> int:
    """Return the row tiles of a wide tile.

    Args:
        most_rows: of a sequence and kv head.
        row_bytes: that a row of each kv head takes on chip while its keys are attended to; twice as many where keys
            have more than 128 lanes, since these take more as well.
        plain: rows have no masks or distances to keys, which take room on chip as well.
        itemsize: of queries and keys on chip.
    """
    most = ROW_TILES if plain else ROW_TILES // MIDDLE
    fitting = STATE_BYTES * 2 // (max(2, itemsize) * row_bytes)
    return min(most, fitting, 1 << max(0, most_rows // PARTITIONS - 1).bit_length())


def _tile_shape(group: int, row_tiles: int) -> TileShape | None:
    """Return the shape of a tile of so many row tiles and a group of so many query heads; None: it is a narrow one."""
    member_rows = max(rows for rows in range(1, max(1, row_tiles) + 1) if group % rows == 0)
    return TileShape(member_rows, row_tiles // member_rows) if row_tiles > 1 else None


def _tiles(tiles: VarlenTiles | None) -> tuple[Tensor | None, ...]:
    """Return the tensors of a plan that the kernel reads for tiles of one shape."""
    if tiles is None:
        return (None,) * 7
    return (
        tiles.query_units,
        tiles.member_units,
        tiles.rows,
        tiles.ends,
        tiles.starts,
        tiles.turns,
        tiles.mask_rows,
    )


def _lengths(given: tuple[Any, ...]) -> tuple[dict[str, Tensor], VarlenSizes]:
    """Return lengths, tables and positions by name, what a source does not have as zeros.

    Rows in front of the first sequence, of which the contract has none, are a sequence without keys, so that no row of
    the results holds what was in memory before.
    """
    *tensors, (names, sizes) = given
    found = dict(zip(names, tensors, strict=True))
    cu_seqlens_q = found["cu_seqlens_q"]
    found.setdefault("cu_seqlens_k", torch.zeros_like(cu_seqlens_q))
    found.setdefault("context_lens", torch.zeros_like(cu_seqlens_q[1:]))
    found.setdefault("block_tables", cu_seqlens_q.new_zeros((cu_seqlens_q.shape[0] - 1, 0)))
    found["cu_seqlens_k"] = torch.cat((found["cu_seqlens_k"][:1], found["cu_seqlens_k"]))
    for name, front in (("cu_seqlens_q", (1, 0)), ("context_lens", (1, 0)), ("block_tables", (0, 0, 1, 0))):
        found[name] = pad(found[name], front)
    return found, sizes


def _plan(*given: Any) -> VarlenPlan:
    found, sizes = _lengths(given)
    return varlen_plan(
        found["cu_seqlens_q"],
        found["context_lens"],
        found["cu_seqlens_k"],
        found["block_tables"],
        found.get("query_positions"),
        sizes,
    )


def _mask(attn_mask: Tensor, chunks: int) -> Tensor:
    """Return a mask as rows of the chunks of a token, (mask heads * T * chunks, CHUNK_KEYS) uint8."""
    mask = attn_mask[..., : chunks * CHUNK_KEYS]
    mask = pad(mask, (0, chunks * CHUNK_KEYS - mask.shape[-1]))
    return mask.reshape(-1, CHUNK_KEYS).view(torch.uint8)


def _new_mask(attn_mask: Tensor, *given: Any) -> Tensor:
    """Return the same for new keys: the columns behind the keys in the cache."""
    found, sizes = _lengths(given)
    tables = found["block_tables"]
    chunks = sizes.mask_chunks(tables.shape[1])[1]
    contexts = pad(found["context_lens"].clamp(0, tables.shape[1] * sizes.block_size), (0, 1))
    token = torch.arange(sizes.num_tokens, dtype=torch.int32, device=attn_mask.device)
    owner = (token[:, None] >= found["cu_seqlens_q"][1:]).sum(1)
    column = torch.arange(chunks * CHUNK_KEYS, device=attn_mask.device)
    columns = contexts[owner][:, None] + column  # (T, chunks * CHUNK_KEYS)
    mask = attn_mask if attn_mask.dim() == 3 else attn_mask[None]
    places = columns.clamp(max=sizes.mask_columns).expand(mask.shape[0], -1, -1)
    return pad(mask, (0, 1)).gather(2, places).reshape(-1, CHUNK_KEYS).view(torch.uint8)


def _no_keys(
    query: Tensor, cu_seqlens_q: Tensor, sinks: Tensor | None, value_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_heads, _ = query.shape
    nothing = torch.full((num_tokens, num_heads), -math.inf, device=query.device)
    lse = nothing.clone()
    if sinks is not None:
        live = torch.arange(num_tokens, device=query.device)[:, None] < cu_seqlens_q[-1]
        lse = torch.where(live, sinks, nothing)
    return query.new_zeros((num_tokens, num_heads, value_dim)), lse, nothing
