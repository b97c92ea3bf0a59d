"""Instructions that fold their results into the accumulators of the Vector engine."""

from typing import Any

import numpy as np

import nki._dtypes as dt
from nki._tensor import NkiTensor
from nki.isa._access import broadcast_f32, demand, f32, int32, is_number, values, write
from nki.isa._accumulators import accumulate, check_command, registers, start
from nki.isa._alu import OPERATORS, Kind
from nki.isa._arithmetic import arithmetic, check_integers, combine, find, find_reduction
from nki.isa._enums import reduce_cmd as Command
from nki.isa._instruction import instruction
from nki.isa._operands import FLOATS, Spec, result, scalar_or_vector, tile, vector
from nki.language import maximum  # type: ignore[attr-defined]

FP32_MIN = float(np.finfo(np.float32).min)
_VECTOR_FLOATS = (dt.float8_e4m3, dt.float8_e5m2, dt.float16, dt.bfloat16, dt.float32)
_SMALL_INTS = (dt.int8, dt.int16, dt.uint8, dt.uint16)
_FOLDED = ("add", "multiply", "maximum", "minimum")

reduced = vector(dtypes=FLOATS, optional=True, written=True)


@instruction(
    Spec(
        {
            "dst": result(indirect=True),
            "data": tile(indirect=True),
            "operand0": scalar_or_vector(optional=True),
            "reduce_res": reduced,
            "reduce_init": scalar_or_vector(optional=True),
        },
        equal=("dst", "data"),
        accumulates=True,
    )
)
def tensor_scalar_reduce(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: float | NkiTensor | None,
    reduce_op: Any,
    reduce_res: NkiTensor | None = None,
    reverse0: bool = False,
    reduce_cmd: Command = Command.reset_reduce,
    reduce_init: float | NkiTensor | None = None,
    reduce_res_negate: bool = False,
    name: str | None = None,
) -> None:
    """dst = data op0 operand0, and its fold over the free dimensions (nki.isa.tensor_scalar_reduce, SDK 2.32)."""
    operator = find("op0", op0, Kind.arithmetic, Kind.unary)
    fold = find_reduction("reduce_op", reduce_op, _FOLDED)
    demand(not reverse0, "reverse0", "be False: the document calls it unsupported", reverse0)
    check_command(reduce_cmd, (Command.reset_reduce, Command.reduce, Command.load_reduce))
    loads = reduce_cmd is Command.load_reduce
    rule = "be given" if loads else "be None without load_reduce"
    demand((reduce_init is not None) == loads, "reduce_init", rule, reduce_init)
    outcome = arithmetic(operator, f32("data", data), "operand0", operand0, False)
    check_integers(outcome, dst, data)
    write(dst, outcome)
    accumulate("vector", reduce_cmd, data, outcome, fold, reduce_res, reduce_init, reduce_res_negate)


_CUMULATIVE = (*_VECTOR_FLOATS, dt.float8_e4m3fn, *_SMALL_INTS)


@instruction(
    Spec(
        {
            "dst": result(dtypes=_CUMULATIVE, indirect=True),
            "src": tile(dtypes=_CUMULATIVE, indirect=True),
            "imm0": scalar_or_vector(),
            "imm1": scalar_or_vector(optional=True),
        },
        equal=("dst", "src"),
        accumulates=True,
    )
)
def tensor_scalar_cumulative(
    dst: NkiTensor,
    src: NkiTensor,
    op0: Any,
    op1: Any,
    imm0: float | NkiTensor,
    imm1: float | NkiTensor | None = None,
    reduce_cmd: Command = Command.reset_reduce,
    name: str | None = None,
) -> None:
    """dst[i] = register = (src[i] op0 imm0) op1 register (nki.isa.tensor_scalar_cumulative, SDK 2.32 API reference)."""
    operator = find("op0", op0, Kind.arithmetic, Kind.unary)
    fold = find_reduction("op1", op1, ("subtract", *_FOLDED))
    check_command(reduce_cmd, (Command.reset_reduce, Command.reduce, Command.load_reduce))
    loads = reduce_cmd is Command.load_reduce
    demand((imm1 is not None) == loads, "imm1", "be given with load_reduce alone", imm1)
    scaled = arithmetic(operator, f32("src", src), "imm0", imm0, False)
    file = registers("vector")
    lanes = slice(src.start_partition, src.start_partition + src.partitions)
    start(file, lanes, reduce_cmd, fold, imm1)
    carry, outcome = file.values[lanes].copy(), np.empty_like(scaled)
    for i in range(scaled.shape[1]):
        carry = combine(fold, scaled[:, i], carry)
        outcome[:, i] = carry
    file.values[lanes] = carry
    write(dst, outcome)


_RESULTS = (*_VECTOR_FLOATS, dt.tfloat32)


@instruction(
    Spec(
        {
            "dst": result(dtypes=(*_RESULTS, *_SMALL_INTS, dt.int32), indirect=True, rank=4),
            "src": tile(dtypes=(*_VECTOR_FLOATS, *_SMALL_INTS, dt.int32, dt.uint32), indirect=True, rank=4),
            "max_value": scalar_or_vector(),
            "reduce_res": vector(dtypes=_RESULTS, optional=True, written=True),
            "reduce_init": scalar_or_vector(),
        },
        equal=("dst", "src"),
        since=4,
        accumulates=True,
    )
)
def exponential(
    dst: NkiTensor,
    src: NkiTensor,
    max_value: float | NkiTensor = 0.0,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Command = Command.idle,
    reduce_init: float | NkiTensor = 0.0,
    name: str | None = None,
) -> None:
    """dst = exp(src - max_value), and its sum over the free dimensions (nki.isa.exponential, SDK 2.32)."""
    check_command(reduce_cmd, (Command.idle, Command.reset_reduce, Command.reduce, Command.load_reduce))
    unset = not isinstance(reduce_init, NkiTensor) and reduce_init == 0
    demand(unset or reduce_cmd is Command.load_reduce, "reduce_init", "be 0.0 without load_reduce", reduce_init)
    with np.errstate(all="ignore"):
        outcome = np.exp((f32("src", src) - broadcast_f32("max_value", max_value)).astype(np.float64))
        outcome = outcome.astype(np.float32)
    write(dst, outcome)
    fold = OPERATORS["add"]
    accumulate("vector", reduce_cmd, src, outcome, fold, reduce_res, reduce_init)


@instruction(
    Spec(
        {
            "dst": result(dtypes=FLOATS),
            "on_true_tile": tile(dtypes=FLOATS),
            "bound0": vector(),
            "bound1": vector(),
            "reduce_res": reduced,
        },
        equal=("dst", "on_true_tile"),
        since=3,
        accumulates=True,
    )
)
def range_select(
    dst: NkiTensor,
    on_true_tile: NkiTensor,
    comp_op0: Any,
    comp_op1: Any,
    bound0: NkiTensor,
    bound1: NkiTensor,
    reduce_cmd: Command = Command.reset_reduce,
    reduce_res: NkiTensor | None = None,
    reduce_op: Any = maximum,
    range_start: int = 0,
    on_false_value: float = FP32_MIN,
    name: str | None = None,
) -> None:
    """dst = on_true_tile where its free index passes both comparisons, else FP32_MIN; and the maximum of that.

    nki.isa.range_select, SDK 2.32 API reference. The index, range_start + i, and the bounds compare in fp32.
    """
    check_command(reduce_cmd, (Command.idle, Command.reset_reduce, Command.reduce))
    least = is_number(on_false_value) and np.float32(on_false_value) == np.float32(FP32_MIN)
    demand(least, "on_false_value", f"be {FP32_MIN}, the least float32", on_false_value)
    fold = find_reduction("reduce_op", reduce_op, ("maximum",))
    first = int32("range_start", range_start)
    last = first + on_true_tile.free - 1
    exact = first >= -(2**24) and last <= 2**24
    demand(exact, "range_start", "keep the index within 2**24, exact in fp32", f"{first} to {last}")
    if reduce_res is not None and dst.dtype.itemsize < 4:
        rule = "be nl.float32 with a dst of 8 or 16 bits, where the fill is minus infinity"
        demand(reduce_res.dtype is dt.float32, "reduce_res", rule, reduce_res.dtype)
    index = np.arange(first, last + 1, dtype=np.float32)[None]
    chosen = np.ones((on_true_tile.partitions, on_true_tile.free), np.bool_)
    for number, (op, bound) in enumerate(((comp_op0, bound0), (comp_op1, bound1))):
        compare = find(f"comp_op{number}", op, Kind.arithmetic)
        legal = ("equal", "less", "less_equal", "greater", "greater_equal")
        demand(compare.name in legal, f"comp_op{number}", "be a comparison other than not_equal", f"nl.{compare.name}")
        chosen &= compare.value(index, f32(f"bound{number}", bound)) != 0
    outcome = np.where(chosen, f32("on_true_tile", on_true_tile), np.float32(FP32_MIN))
    write(dst, outcome)
    accumulate("vector", reduce_cmd, on_true_tile, outcome, fold, reduce_res)


_PREDICATES = (dt.int8, dt.uint8, dt.int16, dt.uint16)
_SELECTED = tuple(d for d in (*FLOATS, *_SMALL_INTS, dt.bool_) if d is not dt.tfloat32)


@instruction(
    Spec(
        {
            "dst": result(),
            "predicate": tile(dtypes=_PREDICATES),
            "on_true": tile(dtypes=_SELECTED),
            "on_false": scalar_or_vector(dtypes=FLOATS),
            "reduce_res": reduced,
        },
        equal=("dst", "predicate", "on_true"),
        one_in_psum=("predicate", "on_true"),
        accumulates=True,
    )
)
def select_reduce(
    dst: NkiTensor,
    predicate: NkiTensor,
    on_true: NkiTensor,
    on_false: float | NkiTensor,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Command = Command.idle,
    reduce_op: Any = maximum,
    reverse_pred: bool = False,
    name: str | None = None,
) -> None:
    """dst = on_true where the predicate is not 0, else on_false; and its maximum (nki.isa.select_reduce, SDK 2.32)."""
    check_command(reduce_cmd, (Command.idle, Command.reset_reduce, Command.reduce))
    fold = find_reduction("reduce_op", reduce_op, ("maximum",))
    chosen = (values("predicate", predicate) != 0) != reverse_pred
    outcome = np.where(chosen, f32("on_true", on_true), broadcast_f32("on_false", on_false))
    write(dst, outcome)
    accumulate("vector", reduce_cmd, on_true, outcome, fold, reduce_res)
