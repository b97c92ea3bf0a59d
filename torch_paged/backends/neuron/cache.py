"""The ops that write, copy and gather the cache: which rows they are about, for kernels that move them."""

import torch
from torch import Tensor

from torch_paged.backends import Arguments
from torch_paged.backends.neuron.copy_kernel import copy_rows
from torch_paged.backends.neuron.float8 import float8_values
from torch_paged.backends.neuron.gather_kernel import gather_units
from torch_paged.backends.neuron.launch import Launch
from torch_paged.backends.neuron.write_kernel import write_tokens

OUTSIDE = -1
"""A row that no tensor has: kernels skip it."""
UNIT_BYTES = 4096
"""Bytes moved by one descriptor where blocks are large enough: DMA engines lose little with that much."""


def reshape_and_cache(launch: Launch, arguments: Arguments) -> None:
    """Write new keys and values to their slots, in place."""
    scales = arguments["kv_scales"]
    _write(launch, arguments, None if scales is None else scales.reshape(1, -1), None)


def quantize_and_cache(launch: Launch, arguments: Arguments) -> None:
    """Write new keys and values with a scale for each token and head, in place."""
    kv_scales = arguments["kv_scales"]
    written = kv_scales.contiguous()
    _write(launch, arguments, None, written.view(-1, 1))
    if written is not kv_scales:
        kv_scales.copy_(written)


def _write(launch: Launch, arguments: Arguments, scales: Tensor | None, token_scales: Tensor | None) -> None:
    key, value, kv_cache = arguments["key"], arguments["value"], arguments["kv_cache"]
    if key.numel() == 0 or kv_cache.numel() == 0:
        return
    launch(
        write_tokens,
        key.flatten(1).contiguous(),
        None if value is None else value.flatten(1).contiguous(),
        _stored(kv_cache).view(-1, kv_cache.size(-1)),
        _rows_of_slots(arguments["slot_mapping"], kv_cache.shape[:4]),
        scales,
        token_scales,
        kv_cache.size(2),
    )


def copy_blocks(launch: Launch, arguments: Arguments) -> None:
    """Copy whole blocks, in place; all sources are read before the first write."""
    kv_cache, kv_scales = arguments["kv_cache"], arguments["kv_scales"]
    if arguments["src_blocks"].numel() == 0 or kv_cache.numel() == 0:
        return
    _copy(launch, arguments, _stored(kv_cache))
    if kv_scales is not None and kv_scales.dim() == 4:
        written = kv_scales.contiguous()
        _copy(launch, arguments, written[..., None])
        if written is not kv_scales:
            kv_scales.copy_(written)


def _copy(launch: Launch, arguments: Arguments, blocks: Tensor) -> None:
    """Copy blocks of a tensor (C, N, KH, S, W), some tokens of a head at a time."""
    sides, num_blocks, kv_heads, block_size, width = blocks.shape
    unit = _unit_tokens(blocks)
    parts = block_size // unit
    src, dst = arguments["src_blocks"], arguments["dst_blocks"]
    live = _one_of_equals(dst, (src >= 0) & (src < num_blocks) & (dst >= 0) & (dst < num_blocks), num_blocks)
    part = torch.arange(parts, dtype=torch.int32, device=src.device)
    first = _first_rows(sides, num_blocks, kv_heads, parts, src.device)[:, None] + part  # (C * KH, parts)
    sources, targets = (
        torch.where(live, ids, 0).to(torch.int32)[:, None, None] * (kv_heads * parts) + first for ids in (src, dst)
    )
    targets = torch.where(live[:, None, None], targets, OUTSIDE)
    launch(
        copy_rows,
        blocks.view(-1, unit * width),
        sources.reshape(-1, 1).to(torch.int32),
        targets.reshape(-1, 1).to(torch.int32),
    )


def gather_cache(launch: Launch, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Gather dense keys and values (B, KH, max_len, DS); zeros where there is no token."""
    kv_cache, kv_scales, max_len = arguments["kv_cache"], arguments["kv_scales"], arguments["max_len"]
    sides, _, kv_heads, _, stored_dim = kv_cache.shape
    num_seqs, width = arguments["block_tables"].shape
    dtype = kv_cache.dtype if kv_scales is None else torch.float32
    shape = (num_seqs, kv_heads, max_len, stored_dim)
    no_value = torch.zeros((*shape[:3], 0), dtype=dtype, device=kv_cache.device)
    if num_seqs * width * max_len == 0 or kv_cache.numel() == 0:
        keys, values = (torch.zeros(shape, dtype=dtype, device=kv_cache.device) for _ in range(2))
        return keys, values if sides == 2 else no_value
    unit = 1
    if arguments["starts"] is None:
        unit = _unit_tokens(kv_cache)
        while max_len % unit:
            unit //= 2
    rows, counts = _units(arguments, unit)
    row_scales, token_scales = None, None
    if kv_scales is not None and kv_scales.dim() == 4:
        token_scales = kv_scales.reshape(-1, unit)
    elif kv_scales is not None:
        of_heads = kv_scales.reshape(sides, -1).expand(sides, kv_heads).T  # (KH, C)
        units = max_len // unit
        row_scales = of_heads[None, :, None].expand(num_seqs, kv_heads, units, sides).reshape(-1, sides)
    table = None
    if kv_cache.dtype == torch.float8_e4m3fn and launch.generation == "trn2":
        table, kv_cache = float8_values(torch.float32, kv_cache.device), _stored(kv_cache)
    cache = kv_cache.view(-1, unit * stored_dim)
    dense = launch(gather_units, cache, rows, counts, row_scales, token_scales, table, unit)
    if sides == 1:
        return dense.reshape(shape), no_value
    return dense[0].reshape(shape), dense[1].reshape(shape)


def _units(arguments: Arguments, unit: int) -> tuple[Tensor, Tensor]:
    """Return for each sequence, head and ``unit`` columns of the result: what lies there.

    Returns:
        rows (R, C) int32 of the cache as (C * N * KH * parts, unit * DS), -1 where there is no token; counts (R, 1)
        float32 of tokens.
    """
    sides, num_blocks, kv_heads, block_size, _ = arguments["kv_cache"].shape
    tables, starts = arguments["block_tables"], arguments["starts"]
    parts, device = block_size // unit, tables.device
    num_seqs, width = tables.shape
    position = torch.arange(0, arguments["max_len"], unit, dtype=torch.int32, device=device).expand(num_seqs, -1)
    if starts is not None:
        position = position - starts[:, None]
    length = arguments["context_lens"].clamp(0, width * block_size)[:, None]
    column = position.clamp(0, width * block_size - 1) // block_size  # (B, U)
    block = tables.gather(1, column.long())
    live = (position >= 0) & (position < length) & (block >= 0) & (block < num_blocks)
    row = torch.where(live, block, 0) * (kv_heads * parts) + position.clamp(min=0) % block_size // unit
    first = _first_rows(sides, num_blocks, kv_heads, parts, device).reshape(sides, kv_heads).T  # (KH, C)
    rows = row[:, None, :, None] + first[:, None]  # (B, KH, U, C)
    rows = torch.where(live[:, None, :, None], rows, OUTSIDE)
    counts = (length - position).clamp(0, unit)[:, None].expand(rows.shape[:3])
    return rows.reshape(-1, sides).to(torch.int32), counts.reshape(-1, 1).to(torch.float32)


def _stored(kv_cache: Tensor) -> Tensor:
    """Return the cache as kernels write it: trn2 knows the bytes of float8_e4m3fn only."""
    return kv_cache.view(torch.uint8) if kv_cache.dtype == torch.float8_e4m3fn else kv_cache


def _rows_of_slots(slot_mapping: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """Return (T, C * KH) int32: row of (C * N * KH * S, DS) for each token, side and head; -1 where none is written."""
    sides, num_blocks, kv_heads, block_size = sizes
    num_slots = num_blocks * block_size
    inside = _one_of_equals(slot_mapping, (slot_mapping >= 0) & (slot_mapping < num_slots), num_slots)
    slots = torch.where(inside, slot_mapping, 0).to(torch.int32)
    first = slots // block_size * (kv_heads * block_size) + slots % block_size
    rows = first[:, None] + _first_rows(sides, num_blocks, kv_heads, block_size, slots.device)
    return torch.where(inside[:, None], rows, OUTSIDE).to(torch.int32)


def _one_of_equals(places: Tensor, live: Tensor, size: int) -> Tensor:
    """Return ``live``, with one alone of the live entries of ``places`` (L,) in [0, size) that are equal.

    Kernels write one row for each place, since the order of a DMA's rows is in no document.
    """
    index = torch.where(live, places, size).long()
    number = torch.arange(places.shape[0], dtype=torch.int32, device=places.device)
    winner = number.new_empty(size + 1).scatter_(0, index, number)
    return live & (winner.gather(0, index) == number)


def _unit_tokens(blocks: Tensor) -> int:
    """Return how many tokens of a head one descriptor moves: a power of two that divides S."""
    tokens, row_bytes = blocks.size(3), blocks.size(4) * blocks.element_size()
    while tokens > 1 and tokens * row_bytes > UNIT_BYTES:
        tokens //= 2
    return tokens


def _first_rows(sides: int, num_blocks: int, kv_heads: int, rows: int, device: torch.device) -> Tensor:
    """Return (C * KH,) int32: first row of block 0 for each side and head, where a block has ``rows`` of a head."""
    side = torch.arange(sides, dtype=torch.int32, device=device) * (num_blocks * kv_heads)
    head = torch.arange(kv_heads, dtype=torch.int32, device=device)
    return ((side[:, None] + head) * rows).flatten()
