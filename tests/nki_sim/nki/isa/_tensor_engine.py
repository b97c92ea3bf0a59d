"""Matrix multiplication and transposition."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import nki._dtypes as dt
from nki._machine import machine
from nki._memory import ACCUMULATED, PARTITIONS, UNWRITTEN
from nki._tensor import NkiTensor
from nki.isa._access import F32, Array, demand, f32, in_psum, listed, reject, values, write
from nki.isa._enums import engine as Engine
from nki.isa._enums import matmul_perf_mode
from nki.isa._instruction import instruction
from nki.isa._operands import ANY, FLOAT8, FLOATS, PSUM_ONLY, SBUF_ONLY, Spec, result, tile

STATIONARY_MAX = 128
MOVING_MAX = {dt.float32: 512, dt.bfloat16: 1024}
ROWS_OF_INDIRECT = 32
_WIDE = (dt.float32, dt.tfloat32)
_INDIRECT = (dt.float16, dt.bfloat16, *FLOAT8)


def check_row_tile(position: Any, size: Any, operands: Mapping[str, NkiTensor]) -> None:
    """Fail unless the operands lie in the rows of the array that tile_position and tile_size choose.

    SDK 2.32 allows column tiles in its text and excludes them in its list of parameters: only rows are tiled here.
    """
    given = [value is not None and value != () for value in (position, size)]
    if not any(given):
        starts = {name: value.start_partition for name, value in operands.items()}
        same = len(set(starts.values())) == 1
        demand(same, " and ".join(operands), "start at the same partition, the array's row", starts)
        return
    demand(all(given), "tile_position and tile_size", "both be given or neither", (position, size))
    for name, pair in (("tile_position", position), ("tile_size", size)):
        good = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(n) is int for n in pair)
        demand(good, name, "be a pair of integers", pair)
    sizes = (128, 64) if machine().generation < 3 else (128, 64, 32)
    demand(size[0] in sizes and size[1] == 128, "tile_size", f"be ({listed(sizes)}, 128)", size)
    row, column = position
    demand(column == 0 and row % size[0] == 0 and 0 <= row < 128, "tile_position", f"be (n * {size[0]}, 0)", position)
    for name, value in operands.items():
        demand(value.partitions <= size[0], name, f"have at most the {size[0]} partitions of the tile", value.shape)
        rule = f"be ({value.start_partition}, 0), where {name} starts"
        demand(value.start_partition == row, "tile_position", rule, position)
        demand(not value.is_indirect() or row == 0, "tile_position", "be (0, 0) with indirect views", position)


def check_output(dst: NkiTensor, rows: int, columns: int) -> None:
    """Fail unless dst is (rows, columns) within one PSUM bank, fp32, or bf16 on generation 4.

    SDK 2.32 lets generation 4 write all banks at once; its architecture guide says one bank, which holds here.
    """
    demand(dst.dtype is dt.float32 or machine().generation >= 4, "dst", "be nl.float32 before generation 4", dst.dtype)
    demand(dst.dtype in MOVING_MAX, "dst", "be " + listed(tuple(MOVING_MAX)), dst.dtype)
    demand(dst.partitions == rows, "dst", f"have {rows} partitions, the free size of stationary", dst.shape)
    demand(dst.free == columns, "dst", f"have {columns} elements per partition, the free size of moving", dst.shape)
    demand(columns <= MOVING_MAX[dst.dtype], "moving", f"have a free size of at most {MOVING_MAX[dst.dtype]}", columns)
    _ = dst.bank


def _states(dst: NkiTensor) -> tuple[Array, Array]:
    """Which elements (P, F) a multiplication wrote last, and which are defined."""
    if not dst.is_indirect():
        return dst.accumulated(), dst.written()
    at = dst._columns(machine().instruction, "dst", ROWS_OF_INDIRECT)
    states = dst.storage.state.reshape(-1, dst.dtype.itemsize)[at]
    return (states == ACCUMULATED).all(-1), (states != UNWRITTEN).all(-1)


def accumulate_psum(dst: NkiTensor, product: F32, accumulate: Any) -> None:
    """Write a product to PSUM, or add it to what a multiplication left there.

    `None`: the first write of an element overwrites, later ones add. What it does where another instruction wrote is
    not documented: an error unless those elements are 0, for which both readings agree.
    """
    good = accumulate is None or isinstance(accumulate, (bool, np.bool_))
    demand(good, "accumulate", "be True, False or None", repr(accumulate))
    total = product
    if accumulate is None or accumulate:
        started, defined = _states(dst)
        rule = "hold what a multiplication with accumulate=False wrote, where accumulate is True"
        demand(accumulate is None or bool(started.all()), "dst", rule, "other or undefined elements")
        if defined.any():
            blank = np.zeros(product.shape, np.float32)
            dst.write(blank, machine().instruction, where=~defined, group=ROWS_OF_INDIRECT)
            old = f32("dst", dst, ROWS_OF_INDIRECT)
            foreign = old[defined & ~started & (old != 0)]
            rule = "be given where another instruction wrote dst"
            demand(not foreign.size, "accumulate", rule, f"None over {foreign[:1]}")
            with np.errstate(all="ignore"):
                total = np.where(started, old + product, product)
    dst.write(total, machine().instruction, accumulated=True, group=ROWS_OF_INDIRECT)


def _check_types(stationary: NkiTensor, moving: NkiTensor, double_row: bool) -> None:
    types = {"stationary": stationary.dtype, "moving": moving.dtype}
    wide = [name for name, dtype in types.items() if dtype in _WIDE]
    if len(wide) == 1:
        other = "moving" if wide[0] == "stationary" else "stationary"
        reject(other, f"be fp32 or tf32 where {wide[0]} is", types[other])
    for name, dtype in types.items():
        if double_row:
            demand(dtype in FLOAT8, f"{name} with perf_mode double_row", "be of an 8-bit float dtype", dtype)
    mixed = set(types.values()) == {dt.float8_e4m3, dt.float8_e4m3fn}
    demand(not mixed, "stationary and moving", "not mix nl.float8_e4m3 and nl.float8_e4m3fn", types)


def _check_indirect(operands: Mapping[str, NkiTensor], is_transpose: bool) -> None:
    for name, value in operands.items():
        if value.is_indirect() and name != "dst":
            demand(value.dtype in _INDIRECT, name, "be " + listed(_INDIRECT) + " as an indirect view", value.dtype)
    if is_transpose:
        demand(not operands["moving"].is_indirect(), "moving", "not be indirect with is_transpose", "an indirect view")


def _check_hint(operand: str, hint: bool, elements: F32) -> None:
    if hint:
        honest = bool(((elements == 0) | (elements == 1)).all())
        demand(honest, operand, "hold zeros and ones only, as its hint says", "other elements")


def _passes(arguments: Mapping[str, Any]) -> int:
    """How often the columns stream: once, four times for fp32, twice for fp32 with a hint or as a transposition."""
    stationary = arguments["stationary"]
    if stationary.dtype is not dt.float32:
        return 1
    hints = ("is_stationary_onezero", "is_moving_onezero", "is_transpose")
    return 2 if any(arguments.get(hint) for hint in hints) else 4


def _columns(arguments: Mapping[str, Any]) -> int:
    rows = 2 if arguments["perf_mode"] is matmul_perf_mode.double_row else 1
    return int(arguments["moving"].free) // rows * _passes(arguments)


@instruction(
    Spec(
        {
            "dst": result(dtypes=(dt.float32, dt.bfloat16, dt.float16), memories=PSUM_ONLY, indirect=True),
            "stationary": tile(dtypes=FLOATS, memories=SBUF_ONLY, indirect=True),
            "moving": tile(dtypes=FLOATS, memories=SBUF_ONLY, indirect=True),
        },
        engines=(Engine.tensor,),
        partitions=("stationary", "moving"),
        work=_columns,
    )
)
def nc_matmul(
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: Any = (),
    tile_size: Any = (),
    perf_mode: matmul_perf_mode = matmul_perf_mode.none,
    name: str | None = None,
) -> None:
    """dst (M, N) = stationary (K, M) transposed times moving (K, N) (nki.isa.nc_matmul, SDK 2.32 API reference).

    Products and sums are fp32; the order of a sum, and how exact the four passes over fp32 inputs are, is not
    documented. double_row: inputs (K, 2, M) and (K, 2, N), summed over K and 2.
    """
    double_row = perf_mode is matmul_perf_mode.double_row
    operands = {"stationary": stationary, "moving": moving, "dst": dst}
    _check_types(stationary, moving, double_row)
    _check_indirect(operands, is_transpose)
    check_row_tile(tile_position, tile_size, {"stationary": stationary, "moving": moving})
    if double_row:
        demand(machine().generation >= 3, "perf_mode", "be none before generation 3", perf_mode)
        demand(not is_transpose, "is_transpose", "be False with double_row", is_transpose)
        for operand in ("stationary", "moving"):
            shape = operands[operand].shape
            demand(len(shape) == 3 and shape[1] == 2, operand, "have the shape (K, 2, n) with double_row", shape)
    rows = stationary.free // (2 if double_row else 1)
    columns = moving.free // (2 if double_row else 1)
    demand(rows <= STATIONARY_MAX, "stationary", f"have a free size of at most {STATIONARY_MAX}", rows)
    x, y = (f32(operand, operands[operand], ROWS_OF_INDIRECT) for operand in ("stationary", "moving"))
    _check_hint("stationary", is_stationary_onezero, x)
    _check_hint("moving", is_moving_onezero, y)
    if is_transpose and machine().generation >= 3:
        identity = y.shape == (x.shape[0], x.shape[0]) and bool((y == np.eye(len(y))).all())
        demand(identity, "moving", "be the identity matrix with is_transpose", f"another of shape {moving.shape}")
        demand(not accumulate, "accumulate", "be False or None with is_transpose", accumulate)
        demand(dst.partitions == rows and dst.free == columns, "dst", f"have the shape {(rows, columns)}", dst.shape)
        transpose_to_psum(dst, "stationary", stationary)
        return
    check_output(dst, rows, columns)
    if double_row:
        x, y = (z.reshape(z.shape[0] * 2, -1) for z in (x, y))
    with np.errstate(all="ignore"):
        accumulate_psum(dst, x.T @ y, accumulate)


def transpose_to_psum(dst: NkiTensor, operand: str, data: NkiTensor) -> None:
    """Transpose bit by bit through the tensor engine.

    The engine widens 8-bit elements to 16 bits, and no document says how that agrees with a dst of the dtype of the
    data: 8-bit elements are refused.
    """
    demand(data.dtype.itemsize > 1, operand, "not have 8-bit elements on the tensor engine", data.dtype)
    demand(dst.dtype is data.dtype, "dst", f"have the dtype of {operand} ({data.dtype})", dst.dtype)
    _ = dst.bank
    dst.write(values(operand, data, ROWS_OF_INDIRECT).T, machine().instruction, group=ROWS_OF_INDIRECT)


def _transposing_engine(arguments: Mapping[str, Any]) -> Engine:
    dst, data = arguments["dst"], arguments["data"]
    return Engine.tensor if in_psum(dst) and not in_psum(data) else Engine.vector


@instruction(
    Spec(
        {"dst": result(dtypes=ANY), "data": tile(dtypes=ANY)},
        engines=(Engine.tensor, Engine.vector),
        choose=_transposing_engine,
        same_dtype=("data", "dst"),
    )
)
def nc_transpose(dst: NkiTensor, data: NkiTensor, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """dst (F, P) = data (P, F) transposed, free dimensions flattened (nki.isa.nc_transpose, SDK 2.32 API reference).

    Without an engine: the tensor engine from SBUF to PSUM, else the vector engine (release notes 0.4.0 go by dst, the
    2.32 page by the shape).
    """
    chosen = _transposing_engine({"dst": dst, "data": data}) if engine is Engine.unknown else engine
    most = PARTITIONS if chosen is Engine.tensor else 32
    demand(max(data.partitions, data.free) <= most, "data", f"be at most {most} x {most} on {chosen}", data.shape)
    demand(dst.partitions == data.free, "dst", f"have {data.free} partitions, the free size of data", dst.shape)
    demand(dst.free == data.partitions, "dst", f"have {data.partitions} elements per partition", dst.shape)
    if chosen is Engine.vector:
        write(dst, values("data", data).T)
        return
    demand(not in_psum(data), "data", "be in nl.sbuf on the tensor engine", data.buffer)
    demand(in_psum(dst), "dst", "be in nl.psum on the tensor engine", dst.buffer)
    if machine().generation < 3 and data.dtype.is_float:
        finite = bool(np.isfinite(values("data", data).astype(np.float32)).all())
        demand(finite, "data", "be finite on the tensor engine of generation 2", "NaN or infinity")
    transpose_to_psum(dst, "data", data)
