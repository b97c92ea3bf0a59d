"""The plan of a decode step against a walk over every key."""

import pytest
import torch

from torch_paged.backends.neuron.plan import CHUNK_UNITS, decode_plan, unit_tokens

BLOCKS, HEADS, BLOCK_SIZE = 200, 3, 16
LENS = (0, 1, 777, 1120, 5000, -3)


def tables() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(0, BLOCKS, (len(LENS), 70), generator=generator, dtype=torch.int32)
    found[1, 3], found[2, 0], found[3, 69] = -1, BLOCKS, 2**31 - 1
    return found


def seen(length: int, window: int | None, chunk: int | None) -> list[int]:
    """Return the keys that the last of so many tokens sees."""
    last = length - 1
    return [
        key
        for key in range(length)
        if (window is None or last - key < window) and (chunk is None or last // chunk == key // chunk)
    ]


@pytest.mark.parametrize("unit", [1, 4, 16])
@pytest.mark.parametrize(("window", "chunk"), [(None, None), (37, None), (None, 50), (600, 2000), (2**40, 2**40)])
def test_each_key_that_is_seen_is_in_one_slot_in_order(unit: int, window: int | None, chunk: int | None) -> None:
    block_tables, lens = tables(), torch.tensor(LENS, dtype=torch.int32)
    plan = decode_plan(
        *(block_tables, lens),
        num_blocks=BLOCKS,
        num_kv_heads=HEADS,
        block_size=BLOCK_SIZE,
        unit=unit,
        sliding_window=window,
        attention_chunk=chunk,
    )
    parts = BLOCK_SIZE // unit
    slots = plan.slots[plan.slots >= 0].tolist()
    assert slots == list(range(len(slots)))
    assert int(plan.num_tiles) == -(-len(slots) // 4)
    for seq, length in enumerate(LENS):
        wanted = {}
        for key in seen(min(max(length, 0), 70 * BLOCK_SIZE), window, chunk):
            block = int(block_tables[seq, key // BLOCK_SIZE])
            if 0 <= block < BLOCKS:
                wanted[key] = (block * HEADS * parts + key % BLOCK_SIZE // unit, key % unit)
        found = {}
        for slot in (int(slot) for slot in plan.slots[seq] if slot >= 0):
            assert int(plan.sequences[slot]) == seq
            for place in range(slot * CHUNK_UNITS, (slot + 1) * CHUNK_UNITS):
                keys, values = plan.units[place].tolist()
                low, high = map(int, plan.bounds[place])
                assert (keys < 0) == (values < 0) == (low >= high)
                assert keys < 0 or values - keys == BLOCKS * HEADS * parts
                found |= {int(plan.positions[place]) + token: (keys, token) for token in range(low, high)}
        assert found == wanted
        assert list(found) == sorted(found)


def test_a_sequence_is_cut_alike_in_any_batch() -> None:
    block_tables, lens = tables(), torch.tensor(LENS, dtype=torch.int32)
    options = {"num_blocks": BLOCKS, "num_kv_heads": HEADS, "block_size": BLOCK_SIZE, "unit": 4}
    options |= {"sliding_window": None, "attention_chunk": None}
    together = decode_plan(block_tables, lens, **options)
    alone = decode_plan(block_tables[3:4], lens[3:4], **options)
    mine = together.slots[3][together.slots[3] >= 0]
    assert mine.numel() == (alone.slots >= 0).sum()
    for name in ("units", "bounds", "positions"):
        rows = getattr(together, name).reshape(-1, CHUNK_UNITS, getattr(together, name).shape[1])[mine]
        assert torch.equal(rows.flatten(0, 1), getattr(alone, name)[: rows.shape[0] * CHUNK_UNITS])


@pytest.mark.parametrize(
    ("block_size", "row_bytes", "tokens"), [(16, 256, 16), (32, 256, 16), (8, 128, 8), (16, 8192, 1)]
)
def test_units_fill_a_descriptor(block_size: int, row_bytes: int, tokens: int) -> None:
    assert unit_tokens(block_size, row_bytes) == tokens
