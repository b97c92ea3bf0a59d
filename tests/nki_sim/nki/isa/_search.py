"""Searches: the eight largest values, positions of values, nonzero elements, segments."""

import numpy as np

import nki._dtypes as dt
from nki._machine import machine
from nki._tensor import NkiTensor
from nki.isa._access import F32, demand, f32, int32, reject, scalar_f32, unknown, values, write
from nki.isa._enums import engine as Engine
from nki.isa._instruction import instruction
from nki.isa._operands import SBUF_ONLY, Spec, result, tile

_SEARCHED = (8, 16384)
_EIGHT = (8, 8)
_CORE_PARTITIONS = 16


def _ordered(operand: str, tensor: NkiTensor) -> F32:
    """The elements as fp32, which the documents compare; how they order NaN is not documented."""
    x = f32(operand, tensor)
    if np.isnan(x).any():
        reject(operand, "hold no NaN, whose order is not documented", "NaN")
    return x


@instruction(Spec({"dst": result(free=_EIGHT, rank=2), "src": tile(free=_SEARCHED, rank=3)}, partitions=("dst", "src")))
def max8(dst: NkiTensor, src: NkiTensor, name: str | None = None) -> None:
    """dst (P, 8) = the largest elements of src in descending order (nki.isa.max8, SDK 2.32 API reference)."""
    write(dst, np.sort(_ordered("src", src), axis=1)[:, :-9:-1])


@instruction(
    Spec(
        {
            "dst": result(dtypes=(dt.uint16, dt.uint32), free=_EIGHT, rank=2),
            "data": tile(free=_SEARCHED, rank=3),
            "vals": tile(free=_EIGHT, rank=3),
        },
        partitions=("dst", "data", "vals"),
    )
)
def nc_find_index8(dst: NkiTensor, data: NkiTensor, vals: NkiTensor, name: str | None = None) -> None:
    """dst (P, 8) = position in data of each of vals (nki.isa.nc_find_index8, SDK 2.32 API reference).

    Equal vals take successive positions, in ascending order of columns. A value that data lacks gives all ones since
    release 0.6.0, and was undefined before: an error, as are more equal vals than positions.
    """
    x, wanted = _ordered("data", data), _ordered("vals", vals)
    positions = np.empty(wanted.shape, dst.dtype.numpy)
    for p in range(wanted.shape[0]):
        for i in range(8):
            found = np.flatnonzero(x[p] == wanted[p, i])
            earlier = int((wanted[p, :i] == wanted[p, i]).sum())
            rule = f"be found in data: {wanted[p, i]:g} at least {earlier + 1} times"
            demand(earlier < found.size, "vals", rule, f"{found.size} times in partition {p}")
            positions[p, i] = found[earlier]
    write(dst, positions)


@instruction(
    Spec(
        {
            "dst": result(),
            "data": tile(free=_SEARCHED, rank=5),
            "vals": tile(free=_EIGHT, rank=3),
            "dst_idx": result(dtypes=(dt.uint32,), free=_EIGHT, optional=True),
        },
        equal=("dst", "data"),
        partitions=("vals", "dst_idx"),
    )
)
def nc_match_replace8(
    dst: NkiTensor,
    data: NkiTensor,
    vals: NkiTensor,
    imm: float,
    dst_idx: NkiTensor | None = None,
    name: str | None = None,
) -> None:
    """dst = data with imm in place of the first match of each of vals (nki.isa.nc_match_replace8, SDK 2.32).

    Columns 7 to 0 of vals take the first position that is left, which dst_idx records. What dst_idx holds for a value
    that data lacks is not documented: an error.
    """
    x, wanted = _ordered("data", data), _ordered("vals", vals)
    replaced, left = x.copy(), np.ones(x.shape, np.bool_)
    positions = np.zeros(wanted.shape, np.uint32)
    filler = scalar_f32("imm", imm)
    for p in range(wanted.shape[0]):
        for i in reversed(range(8)):
            found = np.flatnonzero(left[p] & (x[p] == wanted[p, i]))
            if found.size:
                left[p, found[0]], replaced[p, found[0]], positions[p, i] = False, filler, found[0]
            elif dst_idx is not None:
                reject("vals", "be found in data where dst_idx is given", f"{wanted[p, i]:g} in partition {p}")
    write(dst, replaced)
    if dst_idx is not None:
        dst_idx.write(positions, machine().instruction, operand="dst_idx")


@instruction(
    Spec(
        {
            "dst": result(dtypes=(dt.int32,), memories=SBUF_ONLY),
            "src": tile(dtypes=(dt.float32, dt.int32), memories=SBUF_ONLY),
        },
        engines=(Engine.gpsimd,),
        partitions=("dst", "src"),
        since=3,
    )
)
def nonzero_with_count(
    dst: NkiTensor, src: NkiTensor, index_offset: int = 0, padding_val: int = -1, name: str | None = None
) -> None:
    """dst (P, T + 1) = positions of the nonzeros of src (P, T), padding, and their count.

    nki.isa.nonzero_with_count, SDK 2.32 API reference. Reads and writes partitions 0, 16, 32, ... alone.
    """
    demand(dst.free == src.free + 1, "dst", f"have {src.free + 1} elements per partition", dst.free)
    offset, padding = int32("index_offset", index_offset), int32("padding_val", padding_val)
    for p in range(0, src.partitions, _CORE_PARTITIONS):
        found = np.flatnonzero(values("src", src.slice(0, p, p + 1))[0])
        row = np.full((1, dst.free), padding, np.int64)
        row[0, : found.size] = found + offset
        row[0, -1] = found.size
        write(dst.slice(0, p, p + 1), row)


_IDS = (dt.float32, dt.int32)


@instruction(
    Spec(
        {"dst": result(dtypes=_IDS, memories=SBUF_ONLY), "segment_ids": tile(dtypes=_IDS, memories=SBUF_ONLY)},
        engines=(Engine.gpsimd,),
        partitions=("dst", "segment_ids"),
        same_dtype=("segment_ids", "dst"),
    )
)
def sequence_bounds(dst: NkiTensor, segment_ids: NkiTensor, name: str | None = None) -> None:
    """dst (1, 2, N) = start and end of each element's segment (nki.isa.sequence_bounds, SDK 2.32 API reference).

    Id 0 is padding: (N, -1). Ids that return after other ids are an error, since no document says what they mean.
    """
    demand(segment_ids.partitions == 1, "segment_ids", "have 1 partition", segment_ids.shape)
    count = segment_ids.free
    demand(dst.shape == (1, 2, count), "dst", f"have the shape {(1, 2, count)}", dst.shape)
    ids = values("segment_ids", segment_ids)[0].astype(np.float64)
    whole = bool(((ids >= 0) & (ids == np.rint(ids))).all())
    demand(whole, "segment_ids", "be integers that are not negative", ids)
    bounds = np.empty((2, count), np.int64)
    bounds[0], bounds[1] = count, -1
    for segment in np.unique(ids[ids != 0]):
        at = np.flatnonzero(ids == segment)
        demand(at[-1] - at[0] + 1 == at.size, "segment_ids", "keep equal ids together", segment)
        bounds[0, at], bounds[1, at] = at[0], at[-1] + 1
    write(dst, bounds.reshape(1, -1))


@instruction(
    Spec(
        {
            "val_dst": result(dtypes=(dt.bfloat16,), memories=SBUF_ONLY, rank=2),
            "idx_dst": result(dtypes=(dt.uint32,), memories=SBUF_ONLY, rank=2),
            "src": tile(dtypes=(dt.bfloat16,), memories=SBUF_ONLY),
        },
        engines=(Engine.gpsimd,),
        equal=("val_dst", "idx_dst"),
        partitions=("src",),
    )
)
def topk(val_dst: NkiTensor, idx_dst: NkiTensor, src: NkiTensor, n: int, name: str | None = None) -> None:
    """The k largest of n elements and their indices, ascending (nki.isa.topk, SDK 2.32 API reference)."""
    count, k = int32("n", n), val_dst.free
    demand(8 <= count < 65536, "n", "be 8 to 65535", count)
    demand(k < 32768 and k <= count, "val_dst", "have at most n and 32767 elements per partition", k)
    demand(src.free >= -(-count // 16), "src", f"have at least {-(-count // 16)} elements per partition", src.free)
    demand(src.partitions % 16 == 0, "src", "have a multiple of 16 partitions", src.partitions)
    unknown("which of the 16 partitions of a group receive the result, nor how ties are broken")
