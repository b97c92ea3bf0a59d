"""Access patterns (`.ap`): strides, offsets that are known at run time only, and what lies outside (SDK 2.31, 2.32)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Result, dtype_of, i32, random, rejected, rejects, run, same

A = random(4, 24)
H = random(10, 3, 4)
READ = "nisa.tensor_copy(dst=dst, src=a.ap(pattern={pattern}, offset={offset}))"


def read(flat: Any, pattern: list[list[int]], offset: int) -> Any:
    """Return what a pattern reads from flat storage."""
    index = np.asarray(offset)
    for step, count in pattern:
        index = index[..., None] + step * np.arange(count)
    return flat.reshape(-1)[index]


@pytest.mark.parametrize(
    ("pattern", "offset"),
    [
        ([[24, 4], [1, 24]], 0),
        ([[24, 4], [1, 5]], 19),
        ([[24, 4], [3, 8]], 2),
        ([[24, 4], [1, 4], [4, 6]], 0),
        ([[24, 4], [0, 3], [1, 7]], 5),
        ([[24, 4], [12, 2], [4, 3], [1, 4]], 0),
        ([[24, 4], [12, 2], [0, 2], [6, 2], [2, 3]], 1),
        ([[24, 1], [1, 24]], 0),
        ([[24, 3], [1, 1]], 23),
    ],
)
def test_static(pattern: list[list[int]], offset: int) -> None:
    wanted = read(A, pattern, offset)
    body = READ.format(pattern=pattern, offset=offset)
    same(run(body, a=A, dst=Result(wanted.shape)), wanted)
    same(run(body.replace("tensor_copy", "dma_copy"), a=A, dst=Result(wanted.shape)), wanted)


@pytest.mark.parametrize(
    ("pattern", "offset"),
    [
        ([[12, 10], [1, 12]], 0),
        ([[4, 4], [12, 7], [1, 4]], 30),
        ([[0, 5], [7, 3]], 1),
        ([[1, 4], [4, 20]], 3),
        ([[1, 1], [2, 9]], 101),
    ],
)
def test_static_in_hbm(pattern: list[list[int]], offset: int) -> None:
    """Any pattern goes in HBM, its first pair being one like the others."""
    wanted = read(H, pattern, offset)
    body = f"nisa.dma_copy(dst=dst, src=x.ap(pattern={pattern}, offset={offset}))"
    same(run(body, hbm={"x": H}, dst=Result(wanted.shape)), wanted)


def test_partition_in_the_offset() -> None:
    a = random(128, 6)
    body = "nisa.tensor_copy(dst=dst, src=a.ap(pattern=[[6, 32], [1, 2]], offset=64 * 6 + 3))"
    same(run(body, a=a, dst=Result((32, 2))), a[64:96, 3:5])
    change = ("64 * 6", "65 * 6")
    rejects(body, "tensor_copy|ap", ".*", "partition", change, a=a, dst=Result((32, 2)))


def test_writing() -> None:
    body = "nisa.tensor_copy(dst=dst.ap(pattern=[[8, 4], [4, 2], [1, 3]], offset=1), src=a[:, 0:6])"
    wanted = np.zeros((4, 8), np.float32)
    wanted[:, [1, 2, 3, 5, 6, 7]] = A[:, :6]
    same(run(body, a=A, dst=Result((4, 8), fill=0.0)), wanted)


@pytest.mark.parametrize(("data", "dtype"), [("int32", "bfloat16"), ("float32", "uint8"), ("uint8", "int32")])
def test_another_dtype(data: str, dtype: str) -> None:
    """Steps, counts and offset are in elements of the new dtype, the partition's step too."""
    a = np.arange(4 * 24 * dtype_of(data).itemsize).astype(np.uint8).view(dtype_of(data)).reshape(4, 24)
    wanted = a.view(dtype_of(dtype))
    free = wanted.shape[1]
    body = f"nisa.tensor_copy(dst=dst, src=a.ap(pattern=[[{free}, 4], [1, {free - 1}]], offset=1, dtype=nl.{dtype}))"
    same(run(body, a=a, dst=Result((4, free - 1), dtype)), wanted[:, 1:])


REGISTER = "at = nisa.register_alloc({value})\n"
TILE = "at = nl.ndarray((1, 1), nl.int32)\nnisa.memset(dst=at, value={value})\n"


@pytest.mark.parametrize("made", [REGISTER, TILE])
@pytest.mark.parametrize("value", [0, 7, 9])
def test_scalar_offset_in_hbm(made: str, value: int) -> None:
    """The offset counts what lies below the indirect dimension of the whole tensor."""
    read_it = "nisa.dma_copy(dst=dst, src=x.ap(pattern=[[4, 3], [1, 2]], offset=2, scalar_offset=at, indirect_dim=0))"
    same(run(made.format(value=value) + read_it, hbm={"x": H}, dst=Result((3, 2))), H[value, :, 2:4])


@pytest.mark.parametrize("made", [REGISTER, TILE])
def test_scalar_offset_of_an_inner_dimension(made: str) -> None:
    body = "nisa.dma_copy(dst=dst, src=x.ap(pattern=[[12, 10], [1, 4]], offset=0, scalar_offset=at, indirect_dim=1))"
    same(run(made.format(value=2) + body, hbm={"x": H}, dst=Result((10, 4))), H[:, 2])


@pytest.mark.parametrize("made", [REGISTER, TILE])
def test_scalar_offset_on_chip(made: str) -> None:
    body = "nisa.tensor_copy(dst=dst, src=b.ap(pattern=[[12, 10], [1, 4]], offset=0, scalar_offset=at, indirect_dim=1))"
    same(run(made.format(value=1) + body, b=H, dst=Result((10, 4))), H[:, 1])
    body = body.replace("dst=dst", "dst=dst.ap(pattern=[[8, 10], [1, 4]], offset=0, scalar_offset=at, indirect_dim=1)")
    wanted = np.zeros((10, 2, 4), np.float32)
    wanted[:, 1] = H[:, 1]
    same(run(made.format(value=1) + body, b=H, dst=Result((10, 2, 4), fill=0.0)), wanted)


def test_scalar_offset_of_a_destination_in_hbm() -> None:
    x = H.copy()
    body = TILE.format(value=4) + "nisa.dma_copy(dst=x.ap(pattern=[[4, 3], [1, 4]], offset=0, scalar_offset=at), src=a)"
    a = random(3, 4, seed=5)
    run(body, hbm={"x": x}, a=a)
    wanted = H.copy()
    wanted[4] = a
    same(x, wanted)


def test_select_at_run_time() -> None:
    body = TILE.format(value=2) + "nisa.tensor_copy(dst=dst, src=b.select(1, at))"
    same(run(body, b=H, dst=Result((10, 4))), H[:, 2])


IDX = i32([[7], [0], [3], [7]])
GATHER = "nisa.dma_copy(dst=dst, src=x.ap(pattern=[[12, 4], [1, 12]], offset=0, vector_offset=idx, indirect_dim=0))"


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_gather(dtype: str) -> None:
    same(run(GATHER, hbm={"x": H}, idx=IDX.astype(dtype), dst=Result((4, 12))), H[IDX[:, 0]].reshape(4, 12))


def test_gather_of_part_of_each_row() -> None:
    body = "nisa.dma_copy(dst=dst, src=x.ap(pattern=[[12, 4], [4, 3], [1, 2]], offset=1, vector_offset=idx))"
    same(run(body, hbm={"x": H}, idx=IDX, dst=Result((4, 3, 2))), H[IDX[:, 0], :, 1:3])


def test_vector_select() -> None:
    body = "nisa.dma_copy(dst=dst, src=x.vector_select(0, idx))"
    same(run(body, hbm={"x": H}, idx=IDX, dst=Result((4, 3, 4))), H[IDX[:, 0]])


STEP = "pattern|first step|first count"
STRICT_PATTERNS = [
    rejected("ap", STEP, "24", ("[24, 4]", "[12, 4]"), READ.format(pattern=[[24, 4], [1, 12]], offset=0)),
    rejected("ap", "pattern|offset", "", ("[1, 12]", "[2, 13]"), READ.format(pattern=[[24, 4], [1, 12]], offset=0)),
    rejected(
        "ap", "pattern|offset", "", ("offset=12", "offset=13"), READ.format(pattern=[[24, 4], [1, 12]], offset=12)
    ),
    rejected("ap", "pattern", "", ("[24, 4]", "[24, 5]"), READ.format(pattern=[[24, 4], [1, 12]], offset=0)),
    rejected("ap", ".*", "", ("offset=0", "offset=-1"), READ.format(pattern=[[24, 4], [1, 12]], offset=0)),
    rejected(
        "ap",
        ".*",
        "whole|base|slice|view",
        ("a.ap", "a[:, 0:24:2].ap"),
        READ.format(pattern=[[24, 4], [1, 12]], offset=0),
    ),
    rejected(
        "ap",
        ".*",
        "whole|base|slice|view",
        ("a.ap", "a[0:4, 1:24].ap"),
        READ.format(pattern=[[24, 4], [1, 12]], offset=0),
    ),
    rejected("ap", "pattern", "", ("[[24, 4], [1, 12]]", "[]"), READ.format(pattern=[[24, 4], [1, 12]], offset=0)),
    rejected(
        "ap",
        "pattern|tensor",
        "5",
        ("[12, 2], [6, 2]", "[12, 2], [6, 1], [6, 1], [6, 2]"),
        READ.format(pattern=[[24, 4], [12, 2], [6, 2], [3, 1], [1, 3]], offset=0),
    ),
]


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT_PATTERNS)
def test_strict_patterns(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    del setup
    rejects(body + "  # !", instruction, operand, rule, but, a=A, dst=Result((4, 12)))


HBM_READ = "nisa.dma_copy(dst=dst, src=x.ap(pattern=[[12, 10], [1, 12]], offset=0))"
DYNAMIC = "nisa.dma_copy(dst=dst, src=x.ap(pattern=[[4, 3], [1, 4]], offset=0, scalar_offset=at, indirect_dim=0))"
ROW = Result((3, 4))
IDS: dict[str, Any] = {"idx": IDX, "dst": Result((4, 12))}
TILE_AT_0 = TILE.format(value=0) + DYNAMIC
STRICT_DYNAMIC = [
    rejected("ap", "pattern|offset", "", ("offset=0", "offset=1"), HBM_READ, dst=Result((10, 12))),
    rejected("dma_copy", "src", "", ("value=9", "value=10"), TILE.format(value=9) + DYNAMIC, dst=ROW),
    rejected("dma_copy", "src", "", ("value=0", "value=-1"), TILE_AT_0, dst=ROW),
    rejected("dma_copy", "src", "", ("alloc(9)", "alloc(10)"), REGISTER.format(value=9) + DYNAMIC, dst=ROW),
    rejected("ap", "scalar_offset", "", ("(1, 1), nl.int32", "(2, 1), nl.int32"), TILE_AT_0, dst=ROW),
    rejected("ap", "scalar_offset", "int32", ("nl.int32", "nl.int16"), TILE_AT_0, dst=ROW),
    rejected("ap", "indirect_dim|dim", "", ("indirect_dim=0", "indirect_dim=3"), TILE_AT_0, dst=ROW),
    rejected("ap", ".*", "scalar_offset", ("dim=0))", "dim=0, scalar_offset=idx[0:1]))"), GATHER, **IDS),
    rejected("ap", STEP, "12", ("[12, 4]", "[4, 4]"), GATHER, **IDS),
    rejected("ap", STEP, "", ("idx,", "idx[0:3],"), GATHER, **IDS),
    rejected("ap", "indirect_dim", "0", ("indirect_dim=0", "indirect_dim=1"), GATHER, **IDS),
    rejected("ap", "vector_offset", "int32", {"idx": IDX.astype(np.float32)}, GATHER, **IDS),
    rejected("dma_copy", "src", "", {"idx": IDX + 3}, GATHER, idx=IDX + 2, dst=Result((4, 12))),
    rejected("dma_copy", "src", "", {"idx": IDX - 1}, GATHER, **IDS),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT_DYNAMIC)
def test_strict_dynamic(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body + "  # !", instruction, operand, rule, but, hbm={"x": H}, **setup)


def test_vector_offset_needs_hbm() -> None:
    gather = GATHER + "  # !"
    rejects(gather, "ap", ".*", "HBM", ("x.ap", "b.ap"), hbm={"x": H}, idx=IDX, b=H, dst=Result((4, 12)))


def test_dynamic_partition_on_chip() -> None:
    body = REGISTER.format(value=0) + (
        "nisa.tensor_copy(dst=dst, src=b.ap(pattern=[[12, 4], [1, 4]], offset=0, scalar_offset=at, indirect_dim=1))"
    )
    rejects(
        body + "  # !", "ap", "indirect_dim", "partition", ("indirect_dim=1", "indirect_dim=0"), b=H, dst=Result((4, 4))
    )


def test_number_of_another_kind_as_offset() -> None:
    body = REGISTER.format(value=0) + READ.format(pattern=[[24, 4], [1, 12]], offset=0) + "  # !"
    rejects(body, "ap", "offset", "", ("offset=0", "offset=at"), a=A, dst=Result((4, 12)))


@pytest.mark.parametrize("generation", ["trn2", "trn3"])
def test_indirect_columns_are_of_trn3(generation: str) -> None:
    """Offset i of a group of 16 partitions is at partition i % 16 of it and column i // 16."""
    a, index = random(32, 40), np.random.default_rng(1).integers(0, 40, (32, 2)).astype(np.uint16)
    body = "nisa.tensor_copy(dst=dst, src=a.indirect(idx, num_elem=20), engine=nisa.engine.vector)"
    columns = np.stack([index[16 * (p // 16) : 16 * (p // 16) + 16].T.reshape(-1)[:20] for p in range(32)])
    tiles: dict[str, Any] = {"a": a, "idx": index, "dst": Result((32, 20))}
    if generation == "trn3":
        same(run(body, generation="trn3", **tiles), np.take_along_axis(a, columns.astype(np.int64), 1))
    else:
        rejects(
            body + "  # !", "indirect", ".*", "trn3|generation|v4", {"generation": "trn2"}, generation="trn3", **tiles
        )
