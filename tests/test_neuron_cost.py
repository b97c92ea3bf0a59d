"""The model of the Neuron kernels' cost: its rules by hand, how it counts, and figures that may only get better."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from nki_sim_kernels import load, strict_only
from old_neuron_contract import Case, attention, draw, padded, plan, reorder

pytestmark = strict_only
from benchmarks import neuron, neuron_gate, neuron_points, neuron_report  # noqa: E402
from benchmarks.neuron_counts import Counted, recorded  # noqa: E402
from benchmarks.neuron_old import P, old_scheme  # noqa: E402
from benchmarks.neuron_points import Point  # noqa: E402
from torch_paged.backends.neuron import cache, decode, varlen  # noqa: E402
from torch_paged.backends.neuron.cost import (  # noqa: E402
    BARRIER_US,
    CHIPS,
    START_US,
    TURN_US,
    Counts,
    Instruction,
    cost,
    cycles,
    efficiency,
    moving_us,
    torch_us,
)

TRN2, TRN3 = CHIPS["trn2"], CHIPS["trn3"]


@pytest.mark.parametrize(
    ("instruction", "trn2", "trn3"),
    [
        (Instruction("nc_matmul", "tensor", 512, 128, bits=16), 512, 512),
        (Instruction("nc_matmul", "tensor", 16, 128, bits=16), 64, 64),
        (Instruction("nc_matmul", "tensor", 512, 128, bits=32), 2048, 2048),
        (Instruction("nc_transpose", "tensor", 128, 128, bits=16), 128, 128),
        (Instruction("nc_transpose", "tensor", 128, 128, bits=32), 256, 256),
        (Instruction("tensor_copy", "vector", 512), 572, 572),
        (Instruction("tensor_copy", "vector", 512, bits=16), 188, 188),
        (Instruction("tensor_copy", "vector", 512, bits=8), 572, 188),
        (Instruction("tensor_copy", "vector", 512, bits=16, contiguous=False), 316, 316),
        (Instruction("tensor_copy", "vector", 512, bits=16, in_psum=1), 316, 316),
        (Instruction("tensor_copy", "vector", 512, bits=16, in_psum=2), 572, 572),
        (Instruction("tensor_tensor", "vector", 512, inputs=2), 1084, 1084),
        (Instruction("tensor_tensor", "vector", 512, inputs=2, in_psum=1), 572, 572),
        (Instruction("tensor_tensor", "vector", 512, inputs=2, bits=16), 572, 572),
        (Instruction("select_reduce", "vector", 512, inputs=2, bits=16), 1084, 1084),
        (Instruction("range_select", "vector", 512, in_psum=1, results=2), 636, 636),
        (Instruction("reciprocal", "vector", 512), 4156, 4156),
        (Instruction("tensor_tensor_scan", "vector", 512, inputs=2, in_psum=1), 1084, 1084),
        (Instruction("memset", "vector", 512, inputs=0, bits=16), 316, 316),
        (Instruction("activation", "scalar", 512, bits=16), 572, 572),
        (Instruction("activation", "scalar", 512, results=2), 636, 636),
        (Instruction("tensor_copy", "scalar", 512, bits=16), 572, 316),
        (Instruction("iota", "gpsimd", 512, inputs=0), 662, 662),
        (Instruction("tensor_tensor", "gpsimd", 512, inputs=2), 1174, 1174),
        (Instruction("nc_n_gather", "gpsimd", 1024), 1324, 1324),
    ],
)
def test_cycles(instruction: Instruction, trn2: int, trn3: int) -> None:
    assert (cycles(instruction, TRN2), cycles(instruction, TRN3)) == (trn2, trn3)


@pytest.mark.parametrize(("size", "share"), [(256, 0.10), (128, 0.05), (1024, 0.42), (1536, 0.615), (4096, 0.97)])
def test_descriptors(size: int, share: float) -> None:
    assert efficiency(size) == pytest.approx(share)
    assert efficiency(2**20) == 0.97
    move = Instruction("dma_copy", "dma", bytes=128 * size, descriptors=128)
    assert moving_us(move, TRN2) == pytest.approx(128 * size / (362.5e9 * share) * 1e6)


def test_engines_overlap_and_turns_do_not() -> None:
    copy = Instruction("tensor_copy", "vector", 512)
    product = Instruction("nc_matmul", "tensor", 512, bits=16)
    found = cost(Counts({copy: 10, product: 10}, turns=3, barriers=1), TRN2)
    assert found.engines["vector"] == pytest.approx(10 * 572 / 960)
    assert found.engines["tensor"] == pytest.approx(10 * 512 / 2400)
    assert found.bound == "vector"
    assert found.us == pytest.approx(10 * 572 / 960 + 3 * TURN_US + BARRIER_US + 2 * START_US)


def test_descriptors_of_gathers_are_told_apart() -> None:
    gather = Instruction("dma_copy", "dma", bytes=128 * 4096, descriptors=128, gathered=True)
    found = cost(Counts({gather: 100}), TRN2)
    assert found.gather_us == pytest.approx(100 * 128 * 0.0265)
    assert found.us == pytest.approx(100 * 128 * 4096 / (362.5e3 * 0.97) + 2 * START_US)
    assert found.us_with_descriptors == pytest.approx(found.gather_us + 2 * START_US)
    point = Point(1, 64, head_dim=128)
    tokens = cost(neuron_points.token_gather(Counts({gather: 100}), point), TRN2)
    assert tokens.engines["dma"] == pytest.approx(100 * 128 * 4096 / (362.5e3 * 0.10))


def test_many_small_moves_wait_for_their_descriptors() -> None:
    found = cost(Counts({Instruction("dma_copy", "dma", bytes=64, descriptors=1): 100}), TRN2)
    assert found.engines["dma"] == pytest.approx(100 * 0.6 / 2)


def test_operations_of_torch() -> None:
    assert torch_us([0, 362_500_000], TRN2) == pytest.approx(2 * 2 * START_US + 1000)


SMALL = """
@nki.jit
def kernel(x):
    out = nl.ndarray((64, 96), nl.float32, buffer=nl.shared_hbm)
    a, b = nl.zeros((64, 96), nl.float32), nl.zeros((64, 96), nl.bfloat16)
    p = nl.ndarray((96, 96), nl.float32, buffer=nl.psum)
    m = nl.ndarray((64, 1), nl.float32)
    nisa.nc_matmul(dst=p, stationary=b, moving=b[:, 0:96], accumulate=False)
    nisa.tensor_copy(dst=b[:, 0:48], src=a[:, 0:96:2])
    nisa.tensor_tensor(dst=b, data1=b, data2=b, op=nl.add)
    nisa.tensor_scalar(dst=b, data=b, op0=nl.multiply, operand0=m_of(m))
    nisa.activation(dst=a, op=nl.exp, data=a, reduce_op=nl.add, reduce_res=m, reduce_cmd=nisa.reduce_cmd.reset_reduce)

    def outer(i):
        nisa.tensor_copy(dst=a, src=a)

        def inner(j):
            nisa.dma_copy(dst=a, src=x)

        nl.fori_loop(0, {inner}, inner)

    nl.fori_loop(0, {outer}, outer)
    nisa.dma_copy(dst=out, src=a)
    return out


def m_of(m):
    nisa.memset(dst=m, value=1.0)
    return m
"""


def test_instructions_are_described() -> None:
    kernel = load(SMALL.format(inner=2, outer=3)).kernel
    counted = Counted("trn2", 1, None)
    counted.launch(kernel, torch.zeros(64, 96))
    found = counted.kernels[0][1]
    for key, number in {
        Instruction("nc_matmul", "tensor", 96, 96, inputs=2, bits=16): 1,
        Instruction("tensor_copy", "vector", 48, contiguous=False): 1,
        Instruction("tensor_tensor", "vector", 96, inputs=2, bits=16): 1,
        Instruction("tensor_scalar", "vector", 96, bits=16): 1,
        Instruction("activation", "scalar", 96, results=2): 1,
        Instruction("tensor_copy", "vector", 96): 3,
        Instruction("dma_copy", "dma", bytes=64 * 96 * 4, descriptors=64): 7,
    }.items():
        assert found.instructions[key] == number, key
    assert found.turns == 3 + 3 * 2


def test_one_turn_counts_for_all() -> None:
    kernel = load(SMALL.format(inner=5, outer=4)).kernel
    slow, quick = Counted("trn2", 1, None), Counted("trn2", 1, {})
    for counted in (slow, quick):
        counted.launch(kernel, torch.zeros(64, 96))
    assert slow.kernels == quick.kernels


def whole(point: Point) -> list[tuple[str, Counts]]:
    """Return what a point's op runs, every turn of every loop."""
    counted = Counted("trn2", point.cores, None)
    op: Callable[..., Any] = decode.paged_attention if point.is_decode else varlen.flash_attn_varlen
    arguments = neuron_points._decode(point) if point.is_decode else neuron_points._prefill(point)
    op(counted.launch, arguments)
    return counted.kernels


def without_gathers(counts: Counts) -> tuple[Counts, float]:
    """Return counts without the rows that gathers moved, and these rows: a turn may have fewer than the first."""
    found, rows = Counts({}, counts.turns, counts.barriers), 0.0
    for key, number in counts.instructions.items():
        alike = replace(key, bytes=0, descriptors=0) if key.gathered else key
        found.instructions[alike] = found.instructions.get(alike, 0) + number
        rows += number * key.descriptors if key.gathered else 0
    return found, rows


@pytest.mark.parametrize("cores", [1, 2])
def test_decode_is_counted_from_few_turns(cores: int) -> None:
    """Tiles of a turn, and turns, are counted by those of fewer."""
    point = Point(7 * cores, 4096, kv_heads=1, group=2, head_dim=32, block_size=32, cores=cores)
    attend, merge = neuron_points.attention(point, {}).kernels
    whole_attend, whole_merge = whole(point)
    assert attend == whole_attend
    quick, wanted = without_gathers(merge[1]), without_gathers(whole_merge[1])
    assert quick[0] == wanted[0]
    assert quick[1] >= wanted[1]


@pytest.mark.parametrize(
    "point",
    [
        Point(1, 1024, 512, kv_heads=1, group=2, head_dim=32, block_size=16),
        Point(1, 0, 2048, kv_heads=1, group=4, head_dim=32, block_size=16),  # one, two, three and four steps
    ],
    ids=["cache", "alone"],
)
def test_prefill_is_counted_from_few_turns(point: Point) -> None:
    for quick, wanted in zip(neuron_points.attention(point, {}).kernels, whole(point), strict=True):
        assert without_gathers(quick[1])[0] == without_gathers(wanted[1])[0]
        assert without_gathers(quick[1])[1] >= without_gathers(wanted[1])[1]


def test_generations_run_the_same() -> None:
    found = []
    for generation in CHIPS:
        counted = Counted(generation, 1, None)
        decode.paged_attention(counted.launch, neuron_points._decode(Point(1, 100, kv_heads=1, head_dim=32)))
        varlen.flash_attn_varlen(counted.launch, neuron_points._prefill(Point(1, 0, 64, kv_heads=1, head_dim=32)))
        tokens = torch.zeros(3, 1, 32, dtype=torch.bfloat16)
        arguments = {"key": tokens, "value": tokens, "kv_cache": torch.zeros(2, 1, 1, 8, 32, dtype=torch.bfloat16)}
        cache.reshape_and_cache(counted.launch, {**arguments, "kv_scales": None, "slot_mapping": torch.arange(3)})
        found.append(counted.kernels)
    assert found[0] == found[1]


def test_operations_around_kernels() -> None:
    """A plan is made once; views cost nothing."""
    work = neuron_points.attention(Point(2, 100, kv_heads=1, head_dim=32), {})
    assert len(work.plan) > 20
    assert len(work.around) < 10


def test_the_old_scheme_computes_what_the_old_kernel_did() -> None:
    heads, kv_heads, size, tile, dim = 4, 2, 16, 512, 32
    batch = draw(Case(1, 2, size, tile, heads, heads // kv_heads, dim), 0, 400, 80)
    query, key, value = padded(batch, P)
    call = plan(batch.query_lens, batch.context_lens, batch.block_tables, size, tile, P)
    slots, blocks = tile // P, batch.kv_cache.shape[1]
    tables = call.block_table.reshape(-1, tile // size)
    side, head, parts = np.arange(2)[:, None], np.arange(kv_heads)[:, None, None, None], size // slots
    blocks_of = (side * blocks + tables[:, None, :]) * kv_heads + head  # (KH, tiles, 2, blocks)
    rows = blocks_of[..., None] * parts + np.arange(parts)
    counted = Counted("trn2", 1, None)
    out = counted.launch(
        old_scheme,
        torch.from_numpy(query[0]),
        torch.from_numpy(key[0].copy()),
        torch.from_numpy(value[0].copy()),
        torch.from_numpy(batch.kv_cache.reshape(-1, slots * dim)),
        torch.from_numpy(rows.reshape(kv_heads * len(tables), 2 * P).astype(np.int32)),
        torch.from_numpy(reorder(call.mask, tile, size).astype(np.uint8)),
        dim**-0.5,
    )
    wanted, _ = attention(query, key, value, batch.kv_cache, call)
    live = sum(batch.query_lens)
    np.testing.assert_allclose(out.numpy()[:, :live], wanted[0][:, :live], atol=1e-5)


def test_the_old_scheme_is_counted_from_one_and_two() -> None:
    point = Point(3, 1500, kv_heads=2, group=3, head_dim=32)  # 3 tiles of context
    wanted = neuron_points.old_counts(32, P, 16, 3, 3, 2)
    assert neuron_points.old(point, {}) == wanted
    assert neuron_points.old(replace(point, head_dim=256), {}) is None


@pytest.mark.parametrize("name", neuron_gate.CASES)
def test_kernels_run_no_more_than_they_did(name: str) -> None:
    committed = json.loads(neuron_gate.FIGURES.read_text())
    assert neuron_gate.worse({name: neuron_gate.figures(name)}, {name: committed[name]}) == []


def test_figures_that_grow_are_told() -> None:
    before = {"a": {"instructions": 100.0, "turns": 2.0}, "b": {"turns": 5.0}}
    assert neuron_gate.worse(before, before) == []
    now = {"a": {"instructions": 101.0, "turns": 1.0}, "b": {"bytes": 4.0}, "c": {"turns": 1.0}}
    assert neuron_gate.worse(now, before) == [
        "c has no committed figures",
        "a: instructions grew from 100.0 to 101.0",
        "b has no turns any more",
    ]


def test_committed_tables_are_of_the_committed_rows() -> None:
    rows = neuron.read_csv(neuron.RESULTS / "neuron.csv")
    page = (neuron.RESULTS / "README.md").read_text()
    assert neuron.MODEL in page.splitlines()[0]
    for table in neuron_report.tables(rows):
        assert neuron.MODEL in table.title
        assert table.markdown() in page
    for name in ("decode", "engines", "prefill"):
        assert neuron.MODEL in (neuron.RESULTS / f"neuron_{name}.svg").read_text()


def test_recording_ends() -> None:
    """What wraps instructions is gone after a run, and after a run that fails."""
    import nki.isa as nisa

    before = nisa.tensor_copy

    def fail() -> None:
        with recorded():
            assert nisa.tensor_copy is not before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert nisa.tensor_copy is before
