"""What the cache ops compute, in plain PyTorch: write, quantise, copy, gather. Arguments are taken as valid.

``q = cast(clamp(x / scale, -qmax, qmax))`` in float32, round to nearest even; ``x ~= q * scale``. int8 needs the
explicit rounding because a cast truncates; the fp8 casts round by themselves but do not saturate, so the clamp comes
first.
"""

import torch
from torch import Tensor

QMAX: dict[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""Largest magnitude stored in a quantised cache, by dtype."""


def reshape_and_cache(
    key: Tensor,  # (T, KH, D)
    value: Tensor | None,  # (T, KH, DV)
    kv_cache: Tensor,  # (2 | 1, N, KH, S, DS)
    slot_mapping: Tensor,  # (T,)
    kv_scales: Tensor | None = None,  # (2 | 1,) or (2 | 1, KH)
) -> None:
    """Write new keys and values to their slots, in place; lanes up to the stored head_dim become zero."""
    for side, new in enumerate(_sides(key, value)):
        if kv_scales is None:
            rows = new.to(kv_cache.dtype)
        else:
            rows = quantize(new, kv_scales[side][..., None], kv_cache.dtype)
        _write(rows, kv_cache[side], slot_mapping)


def quantize_and_cache(
    key: Tensor,  # (T, KH, D)
    value: Tensor | None,  # (T, KH, DV)
    kv_cache: Tensor,  # (2 | 1, N, KH, S, DS), quantised
    kv_scales: Tensor,  # (2 | 1, N, KH, S)
    slot_mapping: Tensor,  # (T,)
) -> None:
    """Write new keys and values with a scale ``amax / qmax`` for each token and head, in place."""
    for side, new in enumerate(_sides(key, value)):
        amax = new.float().abs().nan_to_num(nan=0.0).amax(-1)  # (T, KH)
        scales = amax / QMAX[kv_cache.dtype]
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        _write(quantize(new, scales[..., None], kv_cache.dtype), kv_cache[side], slot_mapping)
        _write(scales[..., None], kv_scales[side][..., None], slot_mapping)


def copy_blocks(
    kv_cache: Tensor,  # (2 | 1, N, KH, S, DS)
    src_blocks: Tensor,  # (P,)
    dst_blocks: Tensor,  # (P,)
    kv_scales: Tensor | None = None,
) -> None:
    """Copy whole blocks, in place; all sources are read before the first write, and a pair with -1 is skipped."""
    live = (src_blocks >= 0) & (dst_blocks >= 0)
    src, dst = src_blocks[live].long(), dst_blocks[live].long()
    movable = _movable(kv_cache)
    movable[:, dst] = movable[:, src]
    if kv_scales is not None and kv_scales.dim() == 4:
        kv_scales[:, dst] = kv_scales[:, src]


def gather_cache(
    kv_cache: Tensor,  # (2 | 1, N, KH, S, DS)
    block_tables: Tensor,  # (B, M)
    context_lens: Tensor,  # (B,)
    max_len: int,
    kv_scales: Tensor | None = None,
    starts: Tensor | None = None,  # (B,)
) -> tuple[Tensor, Tensor]:
    """Gather dense ``(B, KH, max_len, DS)`` keys and values; zeros where there is no token or the entry is negative."""
    sides, _, kv_heads, block_size, stored_dim = kv_cache.shape
    dtype = kv_cache.dtype if kv_scales is None else torch.float32
    dense = torch.zeros(
        (sides, block_tables.size(0), kv_heads, max_len, stored_dim), dtype=dtype, device=kv_cache.device
    )
    columns = [0] * block_tables.size(0) if starts is None else starts.tolist()
    for seq, (start, length) in enumerate(zip(columns, context_lens.tolist(), strict=True)):
        entries = block_tables[seq, : -(-length // block_size)]
        tokens = read_blocks(kv_cache, kv_scales, entries, entries >= 0, dtype)[:, :length]
        dense[:, seq, :, start : start + length] = tokens.transpose(1, 2)
    return dense[0], dense[1] if sides == 2 else dense.new_zeros((block_tables.size(0), kv_heads, max_len, 0))


def quantize(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantise ``x`` to ``dtype`` with scales that broadcast against it."""
    qmax = QMAX[dtype]
    scaled = (x.float() / scales).clamp(-qmax, qmax)
    return scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)


def read_blocks(
    kv_cache: Tensor,
    kv_scales: Tensor | None,
    entries: Tensor,  # (M,) block ids
    used: Tensor,  # (M,) bool
    dtype: torch.dtype,
) -> Tensor:
    """Return ``(2 | 1, M * S, KH, DS)`` tokens of one sequence; entries that are not used are never looked at."""
    sides, _, kv_heads, block_size, stored_dim = kv_cache.shape
    ids = entries[used].long()
    read = _movable(kv_cache)[:, ids].view(kv_cache.dtype)  # (2 | 1, used, KH, S, DS)
    if kv_scales is None:
        read = read.to(dtype)
    else:
        scales = kv_scales[:, ids] if kv_scales.dim() == 4 else kv_scales.reshape(sides, 1, -1, 1)
        wide = torch.promote_types(dtype, torch.float32)
        read = (read.to(wide) * scales[..., None].to(wide)).to(dtype)
    blocks = read.new_zeros((sides, entries.numel(), kv_heads, block_size, stored_dim))
    blocks[:, used] = read
    return blocks.transpose(2, 3).flatten(1, 2)


def _sides(key: Tensor, value: Tensor | None) -> tuple[Tensor, ...]:
    return (key,) if value is None else (key, value)


def _write(rows: Tensor, side: Tensor, slot_mapping: Tensor) -> None:
    """Put ``rows`` (T, KH, width) into ``side`` (N, KH, S, DS), zeros behind them; slot -1 is padding."""
    live = slot_mapping >= 0
    slots = slot_mapping[live].long()
    rows, side = _movable(rows), _movable(side)
    padded = torch.zeros((slots.numel(), side.size(1), side.size(3)), dtype=side.dtype, device=side.device)
    padded[..., : rows.size(-1)] = rows[live]
    side[slots // side.size(2), :, slots % side.size(2)] = padded


def _movable(x: Tensor) -> Tensor:
    """Return a tensor that torch can index: torch 2.9 cannot index the fp8 formats, only their bytes."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
