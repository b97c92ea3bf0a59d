"""The plan of packed queries against a walk over every row and key."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from torch_paged.backends.neuron.plan import NOTHING, PARTITIONS
from torch_paged.backends.neuron.plan_varlen import (
    BODIES,
    GATHER_KEYS,
    KEY_UNIT,
    NARROW,
    STEP_KEYS,
    TileShape,
    VarlenPlan,
    VarlenSizes,
    VarlenTiles,
    diagonal_keys,
    varlen_plan,
)

BLOCKS, BLOCK_SIZE, COLUMNS, PADDING = 500, 16, 300, 3
QUERIES = (700, 0, 5, 1, 130, 33)
CONTEXTS = (2100, 40, 4700, 0, 513, 3)
NEW = (700, 0, 2500, 4, 0, 33)
SIZES = VarlenSizes(
    num_tokens=sum(QUERIES) + PADDING,
    num_new_keys=sum(NEW) + PADDING,
    num_blocks=BLOCKS,
    num_heads=12,
    num_kv_heads=3,
    block_size=BLOCK_SIZE,
    wide=TileShape(2, 4),
    middle=TileShape(2, 1),
    mask_heads=None,
    mask_columns=0,
    causal=True,
    sliding_window=None,
    attention_chunk=None,
    cores=1,
)
OPTIONS: dict[str, dict[str, object]] = {
    "causal": {},
    "not causal": {"causal": False},
    "narrow": {"wide": None, "middle": None},
    "wide and narrow": {"wide": TileShape(2, 2), "middle": None},
    "two cores": {"cores": 2, "wide": TileShape(4, 1)},
    "window": {"sliding_window": 300},
    "window, not causal": {"sliding_window": 300, "causal": False},
    "widest window": {"sliding_window": 2**62},
    "widest window, not causal": {"sliding_window": 2**62, "causal": False},
    "chunk": {"attention_chunk": 1000, "cores": 2},
    "widest chunk": {"attention_chunk": 2**62, "causal": False},
    "window and chunk": {"attention_chunk": 3000, "sliding_window": 700},
    "mask": {"mask_heads": 12, "mask_columns": 2300},
}


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).int()


def tables() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, BLOCKS, (len(QUERIES), COLUMNS), generator=generator, dtype=torch.int32)


def make(sizes: VarlenSizes, positions: Tensor | None = None, block_tables: Tensor | None = None) -> VarlenPlan:
    contexts = torch.tensor(CONTEXTS, dtype=torch.int32)
    return varlen_plan(
        starts(QUERIES), contexts, starts(NEW), tables() if block_tables is None else block_tables, positions, sizes
    )


def seen(positions: list[int], sizes: VarlenSizes) -> list[tuple[int, int]]:
    """Return the keys that each token sees, from and to; all options together leave an interval."""
    found, token = [], 0
    for seq, count in enumerate(QUERIES):
        p = torch.tensor(positions[token : token + count])[:, None]
        keys = torch.arange(CONTEXTS[seq] + NEW[seq])
        kept = torch.ones((count, keys.numel()), dtype=torch.bool)
        if sizes.causal or sizes.attention_chunk is not None:
            kept &= keys <= p
        if sizes.sliding_window is not None:
            kept &= (p - keys).abs() < sizes.sliding_window
        if sizes.attention_chunk is not None:
            kept &= keys // sizes.attention_chunk == p // sizes.attention_chunk
        if sizes.mask_heads is not None:
            kept &= keys < sizes.mask_columns
        low, number = kept.int().argmax(1), kept.sum(1)
        found += list(zip(low.tolist(), (low + number).tolist(), strict=True))
        token += count
    return found


def common(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, high) if low < high else (0, 0)


def check(tiles: VarlenTiles, shape: TileShape, positions: list[int], sizes: VarlenSizes) -> list[int]:
    """Check what each unit of each tile sees and that its steps are computed; return the rows, token by token."""
    owners = [seq for seq, count in enumerate(QUERIES) for _ in range(count)]
    group = sizes.num_heads // sizes.num_kv_heads
    group_units = group // shape.member_rows
    intervals, new_starts = seen(positions, sizes), starts(NEW).tolist()
    first_rows, ends = tiles.starts.tolist(), tiles.ends.tolist()
    bounds = tiles.rows.reshape(-1, shape.units, 2, 3)
    turns = tiles.turns.reshape(-1, 2, len(BODIES) + 1)
    tokens = PARTITIONS // group_units
    units, members, lists = tiles.query_units.tolist(), tiles.member_units.tolist(), bounds.tolist()
    assert tiles.query_units.shape[0] % sizes.cores == 0
    assert (tiles.query_units[int(tiles.count) * sizes.cores :] == NOTHING).all()
    rows = []
    for tile in range(int(tiles.count) * sizes.cores):
        live = [unit for unit, row in enumerate(units[tile]) if row >= 0]
        executed, skipped, needed, seqs = [0, 0], [False, False], [0, 0], set()
        for source in range(2):
            *bodies, chunks = turns[tile, source].tolist()
            assert sum(bodies) == chunks
            assert sum(bodies[1:]) <= 1
            skipped[source] = any(count for (_, diagonal), count in zip(BODIES, bodies, strict=True) if diagonal)
            executed[source] = STEP_KEYS * sum(steps * count for (steps, _), count in zip(BODIES, bodies, strict=True))
        for unit in live:
            row = units[tile][unit]
            token, member = row // (sizes.num_kv_heads * group_units), row % group_units
            assert row % (sizes.num_kv_heads * group_units) == member  # of kv head 0
            rows += [token * group + member * shape.member_rows + i for i in range(shape.member_rows)]
            if token >= len(owners):
                assert members[tile][unit] == NOTHING
                assert not tiles.turns[tile].any() or sizes.cores > 1
                continue
            assert members[tile][unit] == member
            seqs.add(owners[token])
            seq, context = owners[token], CONTEXTS[owners[token]]
            first = first_rows[tile][0] - seq * -(-COLUMNS * BLOCK_SIZE // GATHER_KEYS)
            origins = first * GATHER_KEYS, context + first_rows[tile][1] - new_starts[seq]
            limits = (0, context), (context, context + NEW[seq])
            for source in range(2):
                low, high, own = lists[tile][unit][source]
                found = common((low + origins[source], high + origins[source]), limits[source])
                assert found == common(intervals[token], limits[source])
                assert abs(own + origins[source] - positions[token]) <= 1e-6 * abs(positions[token])
                reach = int(found[1]) - origins[source] if found[1] else 0
                seen_of_step = diagonal_keys(unit // PARTITIONS, tokens) if skipped[source] else STEP_KEYS
                assert reach <= executed[source] - STEP_KEYS + seen_of_step
                assert not found[1] or reach <= ends[tile][source]
                needed[source] = max(needed[source], reach)
        assert len(seqs) <= 1
        if sizes.cores == 1:
            for source in range(2):
                assert executed[source] < needed[source] + (2 - source) * STEP_KEYS
    return rows


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("listed", [False, True], ids=["in order", "listed"])
def test_every_row_is_in_one_tile_and_reaches_what_it_sees(name: str, listed: bool) -> None:
    sizes = replace(SIZES, **OPTIONS[name])  # type: ignore[arg-type]
    positions = [CONTEXTS[seq] + NEW[seq] - count + i for seq, count in enumerate(QUERIES) for i in range(count)]
    given = None
    if listed:
        generator = torch.Generator().manual_seed(1)
        positions = [position + int(torch.randint(-90, 90, (), generator=generator)) for position in positions]
        positions[:4] = [2**31 - 1, -(2**31), 2**31 - 2, -1]
        given = torch.tensor(positions + [2**31 - 1] * PADDING, dtype=torch.int32)
    plan = make(sizes, given)
    rows, counts = [], plan.counts[0].tolist()
    shapes = (sizes.wide, sizes.middle, NARROW)
    for tiles, shape, count in zip((plan.wide, plan.middle, plan.narrow), shapes, counts, strict=False):
        assert (tiles is None) == (shape is None)
        if tiles is not None and shape is not None:
            rows += check(tiles, shape, positions, sizes)
        assert count == (0 if tiles is None else int(tiles.count))
    if name == "causal" and not listed:
        assert plan.wide is not None
        assert plan.wide.turns[:, -4:-1].any(), "no tile lies on the diagonal"
    assert sorted(rows) == list(range(sizes.num_tokens * 4))
    assert bool(counts[0]) == (sizes.wide is not None)
    assert counts[3] == 0


def test_units_of_keys_and_entries_that_hold_none() -> None:
    wild = tables()
    wild[0, 50], wild[2, 3], wild[4, 299] = BLOCKS, -1, -7  # the last one is behind the context
    plan = make(SIZES, block_tables=wild)
    assert plan.counts[0, 3] == 1
    assert plan.key_units is not None
    assert (plan.key_units[-2:] == NOTHING).all()
    units = plan.key_units[:-2].reshape(len(QUERIES), -1)
    parts = BLOCK_SIZE // KEY_UNIT
    for seq, context in enumerate(CONTEXTS):
        for unit in range(units.shape[1]):
            block = int(wild[seq, min(unit * KEY_UNIT // BLOCK_SIZE, COLUMNS - 1)])
            needed = unit * KEY_UNIT < context and QUERIES[seq] and 0 <= block < BLOCKS
            assert int(units[seq, unit]) == (block * 3 * parts + unit % parts if needed else NOTHING)
    wild[0, 50] = wild[2, 3] = 0
    assert make(SIZES, block_tables=wild).counts[0, 3] == 0
    windowed = replace(SIZES, sliding_window=10)
    wild[2] = -1
    wild[2, (4700 + 2500 - 5 - 10) // BLOCK_SIZE :] = -1  # all that is seen lies beside the cache
    assert make(windowed, block_tables=wild).counts[0, 3] == 0


def test_a_sequence_has_the_same_tiles_in_any_batch() -> None:
    alone = varlen_plan(
        starts(QUERIES[:1]),
        torch.tensor(CONTEXTS[:1], dtype=torch.int32),
        starts(NEW[:1]),
        tables()[:1],
        None,
        replace(SIZES, num_tokens=QUERIES[0], num_new_keys=NEW[0]),
    )
    plan = make(SIZES)
    for one, all_ in ((alone.wide, plan.wide), (alone.middle, plan.middle), (alone.narrow, plan.narrow)):
        assert one is not None
        assert all_ is not None
        count = int(one.count)
        for name in ("query_units", "member_units", "ends", "starts", "turns"):
            assert torch.equal(getattr(one, name)[:count], getattr(all_, name)[:count]), name
        live = one.query_units[:count] >= 0
        assert torch.equal(*(tiles.rows[:count].reshape(*live.shape, 6)[live] for tiles in (one, all_)))


def test_lengths_that_do_not_fit_are_cut() -> None:
    cu_seqlens = starts(QUERIES)
    wild = varlen_plan(
        torch.cat((cu_seqlens[:-1], torch.tensor([2**31 - 1], dtype=torch.int32))),
        torch.tensor((*CONTEXTS[:3], -9, *CONTEXTS[4:5], 2**31 - 1), dtype=torch.int32),
        starts(NEW),
        tables(),
        None,
        SIZES,
    )
    cut = varlen_plan(
        torch.cat((cu_seqlens[:-1], torch.tensor([SIZES.num_tokens], dtype=torch.int32))),
        torch.tensor((*CONTEXTS[:3], 0, *CONTEXTS[4:5], COLUMNS * BLOCK_SIZE), dtype=torch.int32),
        starts(NEW),
        tables(),
        None,
        SIZES,
    )
    for one, other in ((wild.wide, cut.wide), (wild.middle, cut.middle), (wild.narrow, cut.narrow)):
        assert one is not None
        assert other is not None
        for field in fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert a is b or torch.equal(a, b), field.name


def test_shapes_depend_on_shapes_alone() -> None:
    none = starts((0,) * len(QUERIES))
    few = varlen_plan(none, torch.zeros(len(QUERIES), dtype=torch.int32), none, tables(), None, SIZES)
    plan = make(SIZES)
    for one, other in ((few.wide, plan.wide), (few.middle, plan.middle), (few.narrow, plan.narrow)):
        assert one is not None
        assert other is not None
        assert one.query_units.shape == other.query_units.shape
        assert not one.turns.any()
    assert few.counts.tolist() == [[3, 2, 0, 0]]  # of padding tokens
