"""GpSimd: numbers by position, gathers within a partition, what is not zero, bounds of segments (SDK 2.32)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Result, cast_to, i32, random, rejected, rejects, run, same, strict_only, whole


@pytest.mark.parametrize("dtype", ["int32", "uint32", "float32", "int16", "bfloat16"])
@pytest.mark.parametrize(
    ("pattern", "offset", "multiplier"),
    [
        ([[1, 12]], 0, 0),
        ([[1, 12]], 5, 1),
        ([[0, 4], [1, 3]], 0, 7),
        ([[6, 2], [3, 2], [-1, 3]], 100, -2),
        ([[0, 12]], 0, 1),
    ],
)
def test_iota(pattern: list[list[int]], offset: int, multiplier: int, dtype: str) -> None:
    value = np.full((9,) + (1,) * len(pattern), offset) + multiplier * np.arange(9).reshape(9, *(1,) * len(pattern))
    for axis, (step, count) in enumerate(pattern):
        value = value + step * np.arange(count).reshape(count, *(1,) * (len(pattern) - axis - 1))
    body = f"nisa.iota(dst=dst, pattern={pattern}, offset={offset}, channel_multiplier={multiplier})"
    same(run(body, dst=Result((9, 12), dtype)), cast_to(value.reshape(9, 12), dtype))


def test_iota_is_exact_beyond_2_24() -> None:
    body = "nisa.iota(dst=dst, pattern=[[1, 5]], offset=16777215, channel_multiplier=1000000007)"
    same(run(body, dst=Result((2, 5), "int32")), i32([16777215 + np.arange(5), 1016777222 + np.arange(5)]))


def test_iota_counts_partitions_from_the_tile() -> None:
    body = (
        "nisa.iota(dst=dst[0:32], pattern=[[1, 3]])\nnisa.iota(dst=dst[32:64], pattern=[[1, 3]], channel_multiplier=10)"
    )
    wanted = np.tile(np.arange(3, dtype=np.int32), (64, 1))
    wanted[32:] += 10 * np.arange(32, dtype=np.int32)[:, None]
    same(run(body, dst=Result((64, 3), "int32")), wanted)


def test_iota_from_a_register() -> None:
    body = "start = nisa.register_alloc(40)\nnisa.iota(dst=dst, pattern=[[2, 5]], offset=start)"
    same(run(body, dst=Result((3, 5), "int32")), np.tile(np.arange(40, 50, 2, dtype=np.int32), (3, 1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(5, 7), (128, 3, 4), (1, 600)])
def test_gather(dtype: str, shape: tuple[int, ...]) -> None:
    a = random(*shape, dtype=dtype)
    flat = a.reshape(len(a), -1)
    idx = np.random.default_rng(0).integers(0, flat.shape[1], (len(a), 9)).astype(np.uint32)
    body = "nisa.nc_n_gather(dst=dst, data=a, indices=idx)"
    same(run(body, a=a, idx=idx, dst=Result((len(a), 9), dtype)), np.take_along_axis(flat, idx.astype(np.int64), 1))


@pytest.mark.parametrize(("step", "valid"), [(1, 48), (1, 20), (4, 48), (8, 17)])
def test_local_gather(step: int, valid: int) -> None:
    """Sixteen partitions share their indices, taken column by column; an index is an offset in elements."""
    a = random(32, 64)
    idx = (np.random.default_rng(0).integers(0, 64 // step, (32, 3)) * step).astype(np.uint16)
    body = f"nisa.local_gather(dst=dst, src_buffer=a, index=idx, num_elem_per_idx={step}, num_valid_indices={valid})"
    wanted = np.empty((32, valid * step), np.float32)
    for p in range(32):
        shared = idx[16 * (p // 16) : 16 * (p // 16) + 16].flatten(order="F")[:valid].astype(int)
        wanted[p] = a[p, shared[:, None] + np.arange(step)].reshape(-1)
    same(run(body, a=a, idx=idx, dst=Result(wanted.shape)), wanted)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_nonzero(dtype: str) -> None:
    """One partition in sixteen is looked at; the others of the result stay."""
    a = whole(33, 8, dtype=dtype, limit=1)
    a[0] = [0, 1, 1, 0, 0, 1, 0, 0]
    body = "nisa.nonzero_with_count(dst=dst, src=a, index_offset=16, padding_val=-1)"
    wanted = np.full((33, 9), 5, np.int32)
    for p in (0, 16, 32):
        found = np.flatnonzero(a[p])
        wanted[p] = [*(found + 16), *[-1] * (8 - len(found)), len(found)]
    assert wanted[0].tolist() == [17, 18, 21, -1, -1, -1, -1, -1, 3]
    same(run(body, a=a, dst=Result((33, 9), "int32", fill=5)), wanted)
    older = {"generation": "trn1"}
    result = Result((33, 9), "int32", fill=5)
    rejects(body, "nonzero_with_count", ".*", "trn2|v3|generation", older, a=a, dst=result)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_segments(dtype: str) -> None:
    ids = np.array([[0, 1, 1, 2, 2, 2, 0, 3, 3]], dtype)
    got = run("nisa.sequence_bounds(dst=dst, segment_ids=a)", a=ids, dst=Result((1, 2, 9), dtype))
    same(got, np.array([[[9, 1, 1, 3, 3, 3, 9, 7, 7], [-1, 3, 3, 6, 6, 6, -1, 9, 9]]], dtype))


@pytest.mark.parametrize("op", ["add", "max", "bitwise_or", "bitwise_and", "bitwise_xor"])
@pytest.mark.parametrize("partitions", [1, 33, 128])
def test_over_partitions(op: str, partitions: int) -> None:
    bits = op.startswith("bitwise")
    a = whole(partitions, 6, dtype="int32" if bits else "float32", limit=100)
    function = {"add": np.add, "max": np.maximum}.get(op) or getattr(np, op)
    body = f"nisa.tensor_partition_reduce(dst=dst, op=nl.{op}, data=a)"
    same(run(body, a=a, dst=Result((1, 6), str(a.dtype))), function.reduce(a, 0, keepdims=True))


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_whole_numbers(dtype: str) -> None:
    a = np.random.default_rng(0).integers(0, 2**30, (5, 7)).astype(dtype)
    b = np.random.default_rng(1).integers(0, 2**30, (5, 7)).astype(dtype)
    for op, function in (("add", np.add), ("subtract", np.subtract), ("maximum", np.maximum)):
        body = f"nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.{op}, engine=nisa.engine.gpsimd)"
        if op == "subtract" and dtype == "uint32":
            a, b = np.maximum(a, b), np.minimum(a, b)
        same(run(body, a=a, b=b, dst=Result(a.shape, dtype)), function(a, b))
    change = {"b": np.full_like(b, 2**31 - 1), "a": np.full_like(a, 2**31 - 1) * (1 if dtype == "int32" else 2)}
    body = "nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.add)"
    rejects(body, "tensor_tensor", ".*", "overflow|range|32", change, a=a, b=b, dst=Result(a.shape, dtype))


@strict_only
def test_topk_is_not_simulated() -> None:
    """No document says which partitions of a group receive the result."""
    body = "nisa.topk(val_dst=val, idx_dst=idx, src=a, n=64)"
    tiles: dict[str, Any] = {"val": Result((16, 5), "bfloat16"), "idx": Result((16, 5), "uint32")}
    with pytest.raises(NotImplementedError, match="topk"):
        run(body, a=random(16, 4, dtype="bfloat16"), **tiles)


A, IDX = random(32, 12), np.zeros((32, 3), np.uint32)
GATHER = "nisa.nc_n_gather(dst=dst, data=a, indices=idx)"
LOCAL = "nisa.local_gather(dst=dst, src_buffer=a, index=idx, num_valid_indices=3)"
SHORT: dict[str, Any] = {"idx": IDX.astype(np.uint16)}
IOTA = "nisa.iota(dst=dst, pattern=[[1, 3]], offset=0)"
INT_TILE = Result((32, 3), "int32")
NONZERO = "nisa.nonzero_with_count(dst=dst, src=a)"
COUNTED = {"dst": Result((32, 13), "int32", fill=0)}
BOUNDS = "nisa.sequence_bounds(dst=dst, segment_ids=a)"
SEGMENTS: dict[str, Any] = {"a": np.zeros((1, 9), np.float32), "dst": Result((1, 2, 9))}
OVER = "nisa.tensor_partition_reduce(dst=dst, op=nl.add, data=a)"
SHORTER = {"a": A[:30], "idx": SHORT["idx"][:30], "dst": Result((30, 3))}
INT_ROW = Result((1, 12), "int32")
ROW = {"dst": Result((1, 12))}
STRICT = [
    rejected("nc_n_gather", "indices", "uint32", {"idx": IDX.astype(np.int32)}, GATHER),
    rejected("nc_n_gather", "indices", "12|range|less|below", {"idx": IDX + 12}, GATHER),
    rejected("nc_n_gather", "dst|data", "dtype", {"dst": Result((32, 3), "bfloat16")}, GATHER),
    rejected("nc_n_gather", "dst|indices", "", {"dst": Result((32, 4), fill=0.0)}, GATHER),
    rejected("nc_n_gather", "data", "SBUF|PSUM", {"psum": ("a",)}, GATHER),
    rejected("local_gather", "index", "uint16", {"idx": IDX}, LOCAL, **SHORT),
    rejected("local_gather", "dst", "", ("valid_indices=3", "valid_indices=4"), LOCAL, **SHORT),
    rejected("local_gather", "num_elem_per_idx", "", ("idx, ", "idx, num_elem_per_idx=3, "), LOCAL, **SHORT),
    rejected("local_gather", "index", "", {"idx": SHORT["idx"] + 12}, LOCAL, **SHORT),
    rejected("local_gather", "src_buffer|index", "16", SHORTER, LOCAL, **SHORT),
    rejected("iota", "pattern|dst", "", ("[1, 3]", "[1, 4]"), IOTA, dst=INT_TILE),
    rejected("iota", "pattern", "4", ("[1, 3]", "[1, 1], [1, 1], [1, 1], [1, 1], [1, 3]"), IOTA, dst=INT_TILE),
    rejected("iota", "dst", "SBUF|PSUM", {"dst": Result((32, 3), "int32", memory="psum")}, IOTA, dst=INT_TILE),
    rejected("iota", "offset", "int", ("offset=0", "offset=0.5"), IOTA, dst=INT_TILE),
    rejected("iota", "pattern", "int", ("[1, 3]", "[0.5, 3]"), IOTA, dst=INT_TILE),
    rejected("iota", "channel_multiplier", "int", ("=0)", "=0, channel_multiplier=1.5)"), IOTA, dst=INT_TILE),
    rejected("iota", "dst", "2\\*\\*24", ("offset=0", "offset=2**24 - 1"), IOTA),
    rejected("iota", "dst", "2\\*\\*24", ("offset=0", "offset=-(2**24) - 1"), IOTA, dst=Result((32, 3), "bfloat16")),
    rejected("nonzero_with_count", "dst", "", {"dst": Result((32, 12), "int32", fill=0)}, NONZERO, **COUNTED),
    rejected("nonzero_with_count", "dst", "int32", {"dst": Result((32, 13), fill=0.0)}, NONZERO, **COUNTED),
    rejected("nonzero_with_count", "src", "dtype|float32|int32", {"a": A.astype(np.int16)}, NONZERO, **COUNTED),
    rejected("sequence_bounds", "segment_ids", "1", {"a": np.zeros((2, 9), np.float32)}, BOUNDS, **SEGMENTS),
    rejected("sequence_bounds", "segment_ids", "", {"a": np.zeros((1, 9), np.int16)}, BOUNDS, **SEGMENTS),
    rejected("tensor_partition_reduce", "op", "", ("nl.add", "nl.multiply"), OVER, **ROW),
    rejected("tensor_partition_reduce", "op", "", ("nl.add", "nl.logical_xor"), OVER, a=A.astype("i4"), dst=INT_ROW),
    rejected("tensor_partition_reduce", "op", "", ("nl.add", "nl.mean"), OVER, **ROW),
    rejected("tensor_partition_reduce", "dst", "1", {"dst": Result((2, 12), fill=0.0)}, OVER, **ROW),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT)
def test_strict(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body, instruction, operand, rule, but, **{"a": A, "idx": IDX, "dst": Result((32, 3)), **setup})
