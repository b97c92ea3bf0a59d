"""Instructions that move elements between partitions or by index within SBUF."""

from typing import Any

import numpy as np

import nki._dtypes as dt
from nki._machine import machine
from nki._tensor import NkiTensor
from nki.isa._access import Array, check_start_partition, demand, int32, reject, values, write
from nki.isa._enums import engine as Engine
from nki.isa._instruction import instruction
from nki.isa._operands import ANY, SBUF_ONLY, Spec, result, tile

QUADRANT = 32
UNMODIFIED = 255
CORE_PARTITIONS = 16


@instruction(
    Spec(
        {"dst": result(dtypes=ANY, any_start=True), "src": tile(dtypes=ANY, any_start=True)}, same_dtype=("dst", "src")
    )
)
def nc_stream_shuffle(dst: NkiTensor, src: NkiTensor, shuffle_mask: Any, name: str | None = None) -> None:
    """dst[32 q + i] = src[32 q + shuffle_mask[i]] in each quadrant q (nki.isa.nc_stream_shuffle, SDK 2.32).

    255 in the mask leaves the partition of dst as it is.
    """
    demand(dst.free == src.free, "dst", f"have the {src.free} elements per partition of src", dst.shape)
    active = -(-max(src.partitions, dst.partitions) // QUADRANT) * QUADRANT
    check_start_partition("src", src, active)
    check_start_partition("dst", dst, active)
    good = isinstance(shuffle_mask, (list, tuple)) and len(shuffle_mask) == QUADRANT
    good = good and all(type(m) is int and (0 <= m < QUADRANT or m == UNMODIFIED) for m in shuffle_mask)
    demand(good, "shuffle_mask", "be 32 integers of 0 to 31, or 255", shuffle_mask)
    moved = np.zeros((dst.partitions, dst.free), dst.dtype.numpy)
    chosen = np.zeros(moved.shape, np.bool_)
    rows: dict[int, Array] = {}
    for partition in range(dst.partitions):
        lane = shuffle_mask[partition % QUADRANT]
        if lane == UNMODIFIED:
            continue
        source = partition // QUADRANT * QUADRANT + lane
        demand(source < src.partitions, "shuffle_mask", f"name one of the {src.partitions} partitions of src", source)
        if source not in rows:
            rows[source] = values("src", src.slice(0, source, source + 1))[0]
        moved[partition] = rows[source]
        chosen[partition] = True
    dst.write(moved, machine().instruction, where=chosen)


@instruction(
    Spec(
        {
            "dst": result(dtypes=ANY, memories=SBUF_ONLY),
            "data": tile(dtypes=ANY, memories=SBUF_ONLY),
            "indices": tile(dtypes=(dt.uint32,), memories=SBUF_ONLY),
        },
        engines=(Engine.gpsimd,),
        equal=("dst", "indices"),
        partitions=("data",),
        same_dtype=("data", "dst"),
        work=lambda arguments: int(arguments["dst"].free),
    )
)
def nc_n_gather(dst: NkiTensor, data: NkiTensor, indices: NkiTensor, name: str | None = None) -> None:
    """dst[p, j] = data[p, indices[p, j]], free dimensions flattened (nki.isa.nc_n_gather, SDK 2.32 API reference)."""
    at = values("indices", indices).astype(np.int64)
    demand(bool((at < data.free).all()), "indices", f"lie in [0, {data.free})", int(at.max()))
    write(dst, np.take_along_axis(values("data", data), at, axis=1))


@instruction(
    Spec(
        {
            "dst": result(dtypes=ANY, memories=SBUF_ONLY),
            "src_buffer": tile(dtypes=ANY, memories=SBUF_ONLY),
            "index": tile(dtypes=(dt.uint16,), memories=SBUF_ONLY),
        },
        engines=(Engine.gpsimd,),
        partitions=("dst", "src_buffer", "index"),
        same_dtype=("src_buffer", "dst"),
        work=lambda arguments: int(arguments["dst"].free),
    )
)
def local_gather(
    dst: NkiTensor,
    src_buffer: NkiTensor,
    index: NkiTensor,
    num_elem_per_idx: int = 1,
    num_valid_indices: int | None = None,
    name: str | None = None,
) -> None:
    """Gather by the indices of each group of 16 partitions (nki.isa.local_gather, SDK 2.32 API reference).

    A group's indices, partitions first, are element offsets into the flattened free dimensions of src_buffer; each
    brings num_elem_per_idx elements. dst must hold them all (a known issue of release 0.6.0).
    """
    if src_buffer.partitions % CORE_PARTITIONS:
        reject("src_buffer", f"have a multiple of {CORE_PARTITIONS} partitions", src_buffer.partitions)
    count = int32("num_elem_per_idx", num_elem_per_idx)
    demand(count in (1, 2, 4, 8, 16, 32), "num_elem_per_idx", "be 1, 2, 4, 8, 16 or 32", count)
    most = index.free * CORE_PARTITIONS
    valid = most if num_valid_indices is None else int32("num_valid_indices", num_valid_indices)
    demand(1 <= valid <= min(most, 4096), "num_valid_indices", f"be 1 to {min(most, 4096)}", valid)
    demand(dst.free == valid * count, "dst", f"have {valid * count} elements per partition", dst.free)
    source, offsets = values("src_buffer", src_buffer), values("index", index).astype(np.int64)
    gathered = np.empty((dst.partitions, dst.free), dst.dtype.numpy)
    for first in range(0, src_buffer.partitions, CORE_PARTITIONS):
        group = slice(first, first + CORE_PARTITIONS)
        starts = offsets[group].flatten(order="F")[:valid]
        at = (starts[:, None] + np.arange(count)).reshape(-1)
        demand(int(at.max()) < src_buffer.free, "index", f"stay in {src_buffer.free} elements", int(at.max()))
        gathered[group] = source[group][:, at]
    write(dst, gathered)
