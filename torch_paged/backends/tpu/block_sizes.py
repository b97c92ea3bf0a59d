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
