"""A sequence sums in one order, whatever batch it is in: the tiling of its keys follows from the shapes of a model."""

import itertools

import pytest

from torch_paged.backends.tpu.block_sizes import CHIPS, Chip, Page, decode_blocks, varlen_blocks

KV_HEADS, GROUPS = (1, 2, 4, 8, 16, 32), (1, 2, 3, 4, 8, 16, 71)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_keys_of_a_decode_step_do_not_depend_on_the_width_of_the_table(chip: Chip) -> None:
    for kv_heads, block_size, stored_dim, itemsize, rows, key_bytes in itertools.product(
        KV_HEADS, (8, 16, 128), (128, 256), (1, 2, 4), (8, 72), (0, 32, 64)
    ):
        page = Page(kv_heads, block_size, stored_dim, itemsize)
        wide = decode_blocks(chip, page, 4096, kv_heads * rows, key_bytes).tile_pages
        for width in (1, 3, 8, 20, 64, 300):
            tile = decode_blocks(chip, page, width, kv_heads * rows, key_bytes).tile_pages
            assert tile == wide or width <= tile < wide, "where a smaller step holds less than the whole table"


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_keys_of_a_varlen_step_do_not_depend_on_the_longest_sequence(chip: Chip) -> None:
    for kv_heads, group, lanes, itemsize, sources in itertools.product(
        KV_HEADS, GROUPS, (128, 256, 640), (2, 4), (1, 2)
    ):
        blocks = {
            length: varlen_blocks(
                chip,
                [Page(kv_heads, 128, lanes, itemsize)] * sources,
                kv_heads=kv_heads,
                group=group,
                lanes=lanes,
                itemsize=itemsize,
                mask_heads=0,
                max_seqlen_q=length,
            )
            for length in (2, 16, 32, 64, 128, 512, 4096)
        }
        longest = blocks[4096]
        for length, found in blocks.items():
            assert (found.keys, found.chunk) == (longest.keys, longest.chunk)
            assert found.tokens == longest.tokens or length <= found.tokens, "tiles begin at the same tokens"
