"""Reductions, scans and statistics of the Vector engine, and the reduction across partitions of GpSimd."""

from typing import Any

import numpy as np

from nki._tensor import NkiTensor
from nki.isa._access import Array, broadcast_f32, demand, f32, reject, values, write
from nki.isa._alu import Kind
from nki.isa._arithmetic import check_bitvec_dtypes, check_integers, combine, find, find_reduction, reduce_free
from nki.isa._enums import engine as Engine
from nki.isa._instruction import instruction
from nki.isa._operands import NUMBERS, SBUF_ONLY, Spec, result, scalar_or_vector, tile

BN_STATS_MAX = 512


def _reduced_dims(data: NkiTensor, axis: Any) -> int:
    """How many of the last dimensions the axes name; they must be those."""
    axes = (axis,) if isinstance(axis, int) else axis
    good = isinstance(axes, (list, tuple)) and len(axes) > 0 and all(type(a) is int for a in axes)
    demand(good, "axis", "be an integer or a list of them", repr(axis))
    count = len(axes)
    expected = tuple(range(data.ndim - count, data.ndim))
    rule = f"be the last free dimensions, not negative, in order, of shape {data.shape}"
    demand(0 < count < data.ndim and tuple(axes) == expected, "axis", rule, axis)
    return count


@instruction(Spec({"dst": result(indirect=True), "data": tile(indirect=True)}, partitions=("dst", "data")))
def tensor_reduce(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    axis: Any,
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> None:
    """dst = data folded over its last dimensions (nki.isa.tensor_reduce, SDK 2.32 API reference).

    Bitvec operators fold bit patterns, arithmetic ones fp32. Elements per partition count, not shapes, so keepdims
    changes nothing. The order of an fp32 sum is not documented; subtraction is
    taken to fold from the left. `negate` multiplies an arithmetic result by -1.
    """
    operator = find_reduction("op", op)
    folded = _reduced_dims(data, axis)
    kept = int(np.prod(data.shape[1 : data.ndim - folded], dtype=np.int64))
    demand(dst.free == kept, "dst", f"have the {kept} elements per partition that remain", dst.shape)
    grouped = (data.partitions, kept, -1)
    if operator.bitvec:
        check_bitvec_dtypes(data=data, dst=dst)
        demand(not negate, "negate", "be False with bitvec operators", negate)
        write(dst, reduce_free(operator, values("data", data).reshape(grouped)))
        return
    outcome = reduce_free(operator, f32("data", data).reshape(grouped))
    check_integers(outcome, dst, data)
    write(dst, -outcome if negate else outcome)


_PARTITION_OPS = ("add", "maximum", "bitwise_or", "bitwise_and", "bitwise_xor")


@instruction(
    Spec(
        {"dst": result(memories=SBUF_ONLY), "data": tile(memories=SBUF_ONLY)},
        engines=(Engine.gpsimd,),
    )
)
def tensor_partition_reduce(dst: NkiTensor, op: Any, data: NkiTensor, name: str | None = None) -> None:
    """dst (1, F) = data folded over its partitions (nki.isa.tensor_partition_reduce, SDK 2.32 API reference).

    bitwise_xor: SDK 2.33. 2.32 names average and 2.33 mean, without saying what of nki.language stands for it: refused.
    """
    operator = find_reduction("op", op, _PARTITION_OPS)
    demand(dst.partitions == 1, "dst", "have 1 partition", dst.shape)
    demand(dst.free == data.free, "dst", f"have the {data.free} elements per partition of data", dst.shape)
    if operator.bitvec:
        check_bitvec_dtypes(data=data, dst=dst)
        write(dst, reduce_free(operator, values("data", data).T)[None])
        return
    outcome = reduce_free(operator, np.ascontiguousarray(f32("data", data).T))[None]
    check_integers(outcome, dst, data)
    write(dst, outcome)


@instruction(
    Spec(
        {
            "dst": result(),
            "data0": tile(),
            "data1": tile(),
            "initial": scalar_or_vector(dtypes=NUMBERS),
        },
        equal=("dst", "data0", "data1"),
        one_in_psum=("data0", "data1"),
    )
)
def tensor_tensor_scan(
    dst: NkiTensor,
    data0: NkiTensor,
    data1: NkiTensor,
    initial: float | NkiTensor,
    op0: Any,
    op1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """dst[i] = (data0[i] op0 dst[i - 1]) op1 data1[i], from initial (nki.isa.tensor_tensor_scan, SDK 2.32).

    The carry is fp32: the text promises fp32 arithmetic, its pseudo code carries the result as stored.
    """
    first, second = find("op0", op0, Kind.arithmetic), find("op1", op1, Kind.arithmetic)
    x, y = f32("data0", data0), f32("data1", data1)
    carry = np.broadcast_to(broadcast_f32("initial", initial)[:, 0], x.shape[:1])
    outcome = np.empty_like(x)
    for i in range(x.shape[1]):
        carry = combine(second, combine(first, x[:, i], carry, reverse0), y[:, i], reverse1)
        outcome[:, i] = carry
    check_integers(outcome, dst, data0, data1)
    write(dst, outcome)


def _half_stats(x: Array) -> Array:
    """Count, mean and count * variance of the last axis, as fp32 (P, 3)."""
    count = x.shape[1]
    mean = x.mean(axis=1) if count else np.zeros(x.shape[0], np.float32)
    spread = ((x - mean[:, None]) ** 2).sum(axis=1)
    return np.stack([np.full(x.shape[0], count, np.float32), mean, spread], axis=1)


@instruction(Spec({"dst": result(free=(6, 6)), "data": tile(free=(1, BN_STATS_MAX))}, partitions=("dst", "data")))
def bn_stats(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> None:
    """dst (P, 6) = count, mean, count * variance of the even, then of the odd elements (nki.isa.bn_stats, SDK 2.32)."""
    x = f32("data", data)
    write(dst, np.concatenate([_half_stats(x[:, 0::2]), _half_stats(x[:, 1::2])], axis=1))


@instruction(
    Spec({"dst": result(free=(2, 2), rank=3), "data": tile(free=(3, 2**16), rank=5)}, partitions=("dst", "data"))
)
def bn_aggr(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> None:
    """dst (P, 2) = mean and variance of what triples of bn_stats describe together (nki.isa.bn_aggr, SDK 2.32)."""
    if data.free % 3:
        reject("data", "have a multiple of 3 elements per partition", data.free)
    triples = f32("data", data).reshape(data.partitions, -1, 3)
    count, mean, spread = triples[..., 0], triples[..., 1], triples[..., 2]
    total = count.sum(axis=1)
    with np.errstate(all="ignore"):
        center = (count * mean).sum(axis=1) / total
        within = (spread + count * (mean - center[:, None]) ** 2).sum(axis=1)
        write(dst, np.stack([center, within / total], axis=1))
