"""The chips, and how many pages a kernel fetches and multiplies at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

MIB = 2**20
LANES = 128
SUBLANES = 8


@dataclass(frozen=True)
class Chip:
    """A TPU, as far as the kernels care.

    Attributes:
        name: as users write it.
        vmem_bytes: VMEM of one core.
        cores: cores that one kernel runs on (megacore).
        fetch_bytes: bytes of a block that keep HBM busy while another is multiplied.
    """

    name: str
    vmem_bytes: int
    cores: int
    fetch_bytes: int

    @property
    def kernel_bytes(self) -> int:
        """VMEM that a kernel may take; the rest is the compiler's."""
        return self.vmem_bytes * 3 // 4


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

_MULTIPLIED_ROWS = 4096
"""Keys of all kv heads that are multiplied at a time: enough independent work for the units to overlap."""
_MULTIPLIED_KEYS = 4096
"""Most keys of a head that are multiplied at a time: their logits stay in registers."""


_TOGETHER = 4
"""Kv heads, of as many sequences as it takes, that are multiplied together: less leave units idle."""


@dataclass(frozen=True)
class Blocks:
    """Tiling of one call.

    Attributes:
        pages: pages of a fetched block.
        tile_pages: pages that are multiplied at a time; they divide ``pages``.
        buffers: blocks in VMEM.
        sequences: how many are multiplied at a time.
    """

    pages: int
    tile_pages: int
    buffers: int
    sequences: int = 1


@dataclass(frozen=True)
class Page:
    """What a page takes.

    Attributes:
        kv_heads: kv heads of this core.
        block_size: S.
        stored_dim: DS.
        itemsize: bytes of an element.
    """

    kv_heads: int
    block_size: int
    stored_dim: int
    itemsize: int

    @property
    def hbm_bytes(self) -> int:
        """Bytes that are moved."""
        return 2 * self.kv_heads * self.block_size * self.stored_dim * self.itemsize

    @property
    def vmem_bytes(self) -> int:
        """Bytes in VMEM, where rows are padded to tiles."""
        rows = _round_up(self.block_size, SUBLANES * 4 // self.itemsize)
        return 2 * self.kv_heads * rows * self.stored_dim * self.itemsize


def decode_blocks(chip: Chip, page: Page, width: int, rows: int, key_bytes: int, num_seqs: int = 1) -> Blocks:
    """Return the tiling of ``paged_attention``; all its numbers of pages are powers of two.

    Args:
        chip: the chip.
        page: a page of the cache.
        width: M.
        rows: query rows of all heads, padded.
        key_bytes: bytes that come with each key beside the cache: mask and scales.
        num_seqs: sequences of this core, or 1 where their number is not that of all cores.
    """
    keys = max(LANES, min(power_of_two(_MULTIPLIED_ROWS // page.kv_heads), _MULTIPLIED_KEYS))
    tile = min(max(1, keys // page.block_size), power_of_two(width))
    pages = max(tile, min(power_of_two(chip.fetch_bytes // page.hbm_bytes), power_of_two(width)))
    sequences = 1
    while tile >= width and 2 * sequences * page.kv_heads <= _TOGETHER and num_seqs % (2 * sequences) == 0:
        sequences *= 2
    buffers = max(2 * sequences, 3 if pages == tile else 2)

    def vmem_bytes() -> int:
        keys = tile * page.block_size
        logits = 6 * sequences * rows * _round_up(keys, LANES) * 4
        widened = 2 * keys * page.stored_dim * 4
        beside = key_bytes * _round_up(pages * page.block_size, LANES)
        sums = 4 * sequences * rows * page.stored_dim * 4
        return buffers * (pages * page.vmem_bytes + beside) + logits + widened + sums

    while vmem_bytes() > chip.kernel_bytes and (buffers > 2 or pages > 1):
        if sequences > 1:
            sequences //= 2
            buffers = max(2 * sequences, 3)
        elif buffers > 2:
            buffers -= 1
        elif pages > tile:
            pages //= 2
        else:
            pages = tile = tile // 2
    return Blocks(pages, tile, buffers, sequences)


@dataclass(frozen=True)
class VarlenBlocks:
    """Tiling of one call of ``flash_attn_varlen``.

    Attributes:
        tokens: query tokens of a tile.
        keys: keys of a fetched block.
        chunk: keys that are computed at a time.
        parts: parts of the kv heads, computed one after the other.
    """

    tokens: int
    keys: int
    chunk: int
    parts: int


_VARLEN_ROWS = 512
"""Query rows of a kv head that a tile is to have: enough to hide the loading of keys into the matrix unit."""
_VARLEN_CHUNK = 256
"""Keys that are computed at a time: more would need more logits than are worth keeping, and mask more of a diagonal."""


def varlen_blocks(
    chip: Chip,
    pages: Sequence[Page],
    *,
    kv_heads: int,
    group: int,
    lanes: int,
    itemsize: int,
    mask_heads: int,
    max_seqlen_q: int,
) -> VarlenBlocks:
    """Return the tiling of ``flash_attn_varlen``.

    Args:
        chip: the chip.
        pages: a page of each source of keys.
        kv_heads: KH.
        group: query heads per kv head.
        lanes: head_dim, padded.
        itemsize: bytes of an element of the query.
        mask_heads: heads of the mask; 0: no mask.
        max_seqlen_q: query tokens of a sequence, at most.
    """
    tokens, keys, parts = 16, 512, 1
    while tokens * group < _VARLEN_ROWS:
        tokens *= 2

    def vmem_bytes() -> int:
        heads = kv_heads // parts
        rows = tokens * group
        padded_rows = tokens * _round_up(heads * group, SUBLANES)
        queries = padded_rows * lanes * (4 * itemsize + 4) + heads * rows * lanes * (itemsize + 4)
        sums = 2 * heads * rows * LANES * 4 + 4 * _round_up(heads, SUBLANES) * _round_up(rows, LANES) * 4
        fetched = 2 * sum(keys // page.block_size * replace(page, kv_heads=heads).vmem_bytes for page in pages)
        beside = (6 + _round_up(mask_heads, parts) // parts) * tokens * LANES * 4 + 4 * heads * keys * SUBLANES * 4
        chunk = min(keys, _VARLEN_CHUNK)
        logits = chunk * (2 * rows * (4 + itemsize) + rows * 32 + lanes * 32)  # two heads' buffers, and values
        return queries + sums + fetched + beside + logits

    while vmem_bytes() > chip.kernel_bytes:
        if tokens > 16 and tokens * group > 256:
            tokens //= 2
        elif keys > 2 * LANES:
            keys //= 2
        elif parts < kv_heads:
            parts = next(n for n in range(parts + 1, kv_heads + 1) if kv_heads % n == 0)
        elif keys > LANES:
            keys //= 2
        elif tokens > 16:
            tokens //= 2
        else:
            break
    # chunks must not depend on max_seqlen_q, or a sequence would sum in another order in another batch
    tokens = min(tokens, max(16, power_of_two(max_seqlen_q)))
    return VarlenBlocks(tokens, keys, chunk=min(keys, _VARLEN_CHUNK), parts=parts)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is no less than ``size``."""
    return 1 << max(0, size - 1).bit_length()


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
