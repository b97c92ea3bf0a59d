"""The plan of a decode step against a walk over every key, and how long a plan is remembered."""

from dataclasses import fields, replace

import pytest
import torch

from torch_paged.backends.neuron import plan_memory
from torch_paged.backends.neuron.plan import (
    CHUNK_UNITS,
    NOTHING,
    TILE_CHUNKS,
    DecodePlan,
    DecodeSizes,
    decode_plan,
    merge_groups,
    merge_parts,
    query_parts,
    turn_merges,
    turn_tiles,
    unit_tokens,
)
from torch_paged.backends.neuron.plan_memory import remembered

BLOCKS, HEADS, BLOCK_SIZE = 200, 3, 16
LENS = (0, 1, 777, 1120, 5000, -3)
SIZES = DecodeSizes(
    sides=2,
    num_blocks=BLOCKS,
    num_heads=2 * HEADS,
    num_kv_heads=HEADS,
    value_dim=32,
    block_size=BLOCK_SIZE,
    unit=4,
    mask_units=None,
    sliding_window=None,
    attention_chunk=None,
    query_parts=3,
    cores=1,
)


def tables() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(0, BLOCKS, (len(LENS), 70), generator=generator, dtype=torch.int32)
    found[1, 3], found[2, 0], found[3, 69] = -1, BLOCKS, 2**31 - 1
    return found


def lens() -> torch.Tensor:
    return torch.tensor(LENS, dtype=torch.int32)


def slots_of_sequences(plan: DecodePlan, num_seqs: int, cores: int = 1) -> torch.Tensor:
    """Return (B, C): the slots of a sequence's chunks in the order of its keys, -1 behind the last."""
    width = merge_parts(num_seqs, SIZES.num_heads, SIZES.value_dim, cores)
    groups = merge_groups(num_seqs * width, cores)
    turns = plan.places.reshape(groups, -1, 128, 8).transpose(1, 2).reshape(groups * 128, -1)
    assert (turns[num_seqs * width :] == NOTHING).all()
    places = turns[: num_seqs * width].reshape(num_seqs, width, -1)
    slots = torch.where(places >= 0, places // width, -1)
    for row in range(width):
        assert torch.equal(places[:, row], torch.where(slots[:, 0] >= 0, slots[:, 0] * width + row, NOTHING))
    return slots[:, 0]


def units_of_slots(plan: DecodePlan) -> torch.Tensor:
    """Return (X, CHUNK_UNITS, words)."""
    return plan.units.transpose(0, 1).reshape(-1, CHUNK_UNITS, plan.units.shape[2])


def seen(length: int, window: int | None, chunk: int | None) -> list[int]:
    """Return the keys that the last of so many tokens sees."""
    last = length - 1
    return [
        key
        for key in range(length)
        if (window is None or last - key < window) and (chunk is None or last // chunk == key // chunk)
    ]


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("unit", [1, 4, 16])
@pytest.mark.parametrize(("window", "chunk"), [(None, None), (37, None), (None, 50), (600, 2000), (2**40, 2**40)])
def test_each_key_that_is_seen_is_in_one_slot_in_order(
    unit: int, window: int | None, chunk: int | None, sides: int, cores: int
) -> None:
    block_tables = tables()
    sizes = replace(SIZES, sides=sides, unit=unit, mask_units=90, cores=cores)
    plan = decode_plan(block_tables, lens(), replace(sizes, sliding_window=window, attention_chunk=chunk))
    parts = BLOCK_SIZE // unit
    slots = slots_of_sequences(plan, len(LENS), cores)
    assert slots[slots >= 0].tolist() == list(range(num_chunks := int((slots >= 0).sum())))
    tiles = turn_tiles(HEADS, sizes.num_heads)
    turns = plan.turns[0].tolist()
    assert turns[-1] == -(-num_chunks // (TILE_CHUNKS * cores)) == sum(map(int.__mul__, turns[:-1], tiles))
    per_turn = 8 * turn_merges(sizes.num_heads // merge_parts(len(LENS), sizes.num_heads, sizes.value_dim, cores))
    behind = max(0, int((slots >= 0).sum(1).max()) - 8)
    assert int(plan.merge_turns) == -(-behind // per_turn)
    assert plan.places.shape[0] % cores == 0
    for seq, length in enumerate(LENS):
        length = min(max(length, 0), 70 * BLOCK_SIZE)
        wanted = {}
        for key in seen(length, window, chunk):
            block = int(block_tables[seq, key // BLOCK_SIZE])
            if 0 <= block < BLOCKS:
                wanted[key] = (block * HEADS * parts + key % BLOCK_SIZE // unit, key % unit)
        found: dict[int, tuple[int, int]] = {}
        for slot in (int(slot) for slot in slots[seq] if slot >= 0):
            assert int(plan.query_rows.flatten()[slot]) == 3 * seq
            for keys, values, low, high, distance, mask_row in units_of_slots(plan)[slot].tolist():
                assert (keys < 0) == (values < 0) == (low >= high)
                if keys < 0:
                    assert keys == values == mask_row == NOTHING
                    continue
                assert values - keys == (sides - 1) * BLOCKS * HEADS * parts
                first = length - 1 - distance
                assert mask_row == (seq * 90 + first // unit if first // unit < 90 else NOTHING)
                found |= {first + token: (keys, token) for token in range(low, high)}
        assert found == wanted
        assert list(found) == sorted(found)


def test_a_sequence_is_cut_alike_in_any_batch() -> None:
    together = decode_plan(tables(), lens(), SIZES)
    alone = decode_plan(tables()[3:4], lens()[3:4], SIZES)
    mine = slots_of_sequences(together, len(LENS))[3]
    mine = mine[mine >= 0]
    assert mine.numel() == (slots_of_sequences(alone, 1) >= 0).sum()
    assert torch.equal(units_of_slots(together)[mine], units_of_slots(alone)[: mine.numel()])


def test_slots_of_no_chunk_read_nothing() -> None:
    plan = decode_plan(tables(), lens(), SIZES)
    used = int((slots_of_sequences(plan, len(LENS)) >= 0).sum())
    assert (units_of_slots(plan)[used:, :, :2] == NOTHING).all()
    assert (units_of_slots(plan)[used:, :, 2:] == 0).all()
    assert (plan.query_rows.flatten()[used:] == NOTHING).all()


@pytest.mark.parametrize(
    ("block_size", "stored_row_bytes", "row_bytes", "head_bytes", "tokens"),
    [
        (16, 256, 256, 64, 16),
        (32, 256, 256, 64, 16),
        (8, 128, 128, 64, 8),
        (16, 8192, 8192, 64, 1),
        (64, 1152, 1152, 256, 4),
        (64, 192, 192, 64, 32),
        (64, 256, 256, 64, 16),
        (64, 64, 512, 64, 16),
        (64, 64, 128, 256, 16),
        (128, 128, 256, 64, 32),
        (128, 64, 256, 64, 32),
        (128, 1, 2, 8, 32),
        (64, 128, 256, 256, 16),
    ],
)
def test_units_fill_a_descriptor(
    block_size: int, stored_row_bytes: int, row_bytes: int, head_bytes: int, tokens: int
) -> None:
    assert unit_tokens(block_size, stored_row_bytes, row_bytes, head_bytes) == tokens


@pytest.mark.parametrize(
    ("kv_heads", "heads", "tiles"),
    [
        (1, 8, (256, 128, 64, 32, 16, 8, 4, 2, 1)),
        (8, 32, (32, 16, 8, 4, 2, 1)),
        (8, 128, (16, 8, 4, 2, 1)),
        (20, 20, (8, 4, 2, 1)),
        (1, 300, (4, 2, 1)),
        (200, 200, (1,)),
    ],
)
def test_turns_take_much_the_same_number_of_heads(kv_heads: int, heads: int, tiles: tuple[int, ...]) -> None:
    assert turn_tiles(kv_heads, heads) == tiles


@pytest.mark.parametrize(
    ("seqs", "heads", "value_dim", "cores", "parts"),
    [
        (1, 32, 128, 1, 32),
        (4, 32, 128, 1, 16),
        (16, 32, 128, 1, 8),
        (16, 32, 128, 2, 8),
        (64, 32, 128, 1, 2),
        (256, 32, 128, 1, 2),
        (16, 8, 128, 1, 4),
        (64, 8, 128, 1, 2),
        (200, 8, 256, 1, 1),
        (10, 15, 64, 1, 5),
        (300, 7, 4096, 1, 7),
    ],
)
def test_results_of_a_sequence_are_merged_in_rows_that_fill_partitions(
    seqs: int, heads: int, value_dim: int, cores: int, parts: int
) -> None:
    assert merge_parts(seqs, heads, value_dim, cores) == parts


@pytest.mark.parametrize(
    ("heads", "row_bytes", "parts"), [(32, 256, 1), (32, 512, 2), (40, 512, 4), (7, 4096, 7), (3, 2**14, 3)]
)
def test_queries_are_cut_between_heads(heads: int, row_bytes: int, parts: int) -> None:
    assert query_parts(heads, row_bytes) == parts


class Counter:
    """Adds up tensors, and counts how often."""

    calls = 0

    def __call__(self, a: torch.Tensor, b: torch.Tensor, sizes: int) -> torch.Tensor:
        self.calls += 1
        return a + b + sizes


def test_on_the_host_a_plan_is_of_values() -> None:
    """As compilers use memory again, and numpy writes to it: neither identity nor version tells."""
    make, a, b = Counter(), torch.ones(3), torch.full((3,), 2.0)
    first = remembered(make, (a, b), 1)
    assert remembered(make, (a.clone(), b), 1) is first
    with torch.inference_mode():
        assert remembered(make, (a.clone(), b), 1) is first
    assert make.calls == 1
    assert remembered(make, (a, b), 2)[0] == 5
    assert remembered(make, (b, b), 1)[0] == 5
    assert remembered(make, (a.to(torch.int32), b), 1).dtype == torch.float32
    assert remembered(make, (a[:1], b), 1)[0] == 4
    a.numpy()[0] = 7
    assert remembered(make, (a, b), 1)[0] == 10
    assert make.calls == 6
    assert remembered(Counter(), (a, b), 1)[0] == 10


def test_on_a_device_a_plan_is_of_tensors_and_their_versions() -> None:
    make, a, b = Counter(), torch.ones(3, device="meta"), torch.ones(3, device="meta")
    first = remembered(make, (a, b), 1)
    assert remembered(make, (a, b), 1) is first
    for other in ((a, b.clone()), (b, a)):
        assert remembered(make, other, 1) is not first
    assert remembered(make, (a, b), 2) is not first
    assert remembered(make, (a, b), 1) is first
    a[1:].copy_(b[1:])  # a view changes the version too
    assert remembered(make, (a, b), 1) is not first
    assert make.calls == 5


def test_on_a_device_tensors_that_count_no_changes_are_not_remembered() -> None:
    make = Counter()
    with torch.inference_mode():
        a = torch.ones(3, device="meta")
        for _ in range(3):
            remembered(make, (a, a), 1)
    assert make.calls == 3


def test_few_plans_are_kept_and_none_of_tensors_that_are_gone() -> None:
    make = Counter()
    kept = [torch.ones(1, device="meta") for _ in range(2 * plan_memory.ENTRIES)]
    for tensor in kept:
        remembered(make, (tensor, tensor), 1)
    assert len(plan_memory._entries) == plan_memory.ENTRIES
    remembered(make, (kept[-1], kept[-1]), 1)
    assert make.calls == len(kept)
    kept.clear()
    del tensor
    last = torch.ones(1, device="meta")
    remembered(make, (last, last), 1)
    assert len(plan_memory._entries) == 1


def test_the_plan_of_a_step_depends_on_no_value_in_its_shapes() -> None:
    short, long = (decode_plan(tables(), torch.full((len(LENS),), length), SIZES) for length in (1, 1000))
    for field in fields(DecodePlan):
        a, b = getattr(short, field.name), getattr(long, field.name)
        assert (a.shape, a.dtype) == (b.shape, b.dtype) == (a.shape, torch.int32)
