"""The chips, and how many pages a kernel fetches and computes at a time."""

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """A TPU, as far as the kernels care.

    Attributes:
        name: as users write it.
        vmem_bytes: VMEM of one core.
        cores: cores that one kernel runs on (megacore).
        fetch_bytes: bytes that are to be in flight to keep HBM busy.
    """

    name: str
    vmem_bytes: int
    cores: int
    fetch_bytes: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 16 * MIB, 2, 2 * MIB),
        Chip("v5e", 128 * MIB, 1, 2 * MIB),
        Chip("v5p", 64 * MIB, 2, 2 * MIB),
        Chip("v6e", 128 * MIB, 1, 2 * MIB),
        Chip("tpu7x", 64 * MIB, 1, 2 * MIB),
    )
}
"""Chip by name."""


@dataclass(frozen=True)
class Blocks:
    """Tiling of one call.

    Attributes:
        pages: pages of a fetched block.
        buffers: blocks in VMEM.
    """

    pages: int
    buffers: int


def decode_blocks(chip: Chip, num_kv_heads: int, block_size: int, stored_dim: int, itemsize: int, width: int) -> Blocks:
    """Return the tiling of ``paged_attention`` for pages of this size and a table of ``width`` columns."""
    page = 2 * num_kv_heads * block_size * stored_dim * itemsize
    pages = max(1, min(chip.fetch_bytes // page, 512 // block_size, width))
    return Blocks(pages=pages, buffers=2)


@dataclass(frozen=True)
class VarlenBlocks:
    """Tiling of one call of ``flash_attn_varlen``.

    Attributes:
        tokens: query tokens of a tile.
        keys: keys of a fetched block.
        chunk: keys that are computed at a time where a block is not seen whole.
    """

    tokens: int
    keys: int
    chunk: int


def varlen_blocks(chip: Chip, group: int, max_seqlen_q: int) -> VarlenBlocks:
    """Return the tiling of ``flash_attn_varlen`` for ``group`` query heads per kv head."""
    tokens = 16
    while tokens < max_seqlen_q and tokens * group < 512:
        tokens *= 2
    return VarlenBlocks(tokens=tokens, keys=512, chunk=128)
