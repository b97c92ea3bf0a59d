"""Loops, program ids and debugging (nki.language, SDK 2.32 and 2.33; guides on dynamic loops and LNC)."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from nki._dtypes import int32
from nki._errors import fail, require
from nki._instruction import record
from nki._launch import meet
from nki._layout import as_int
from nki._machine import Core, Loop, machine
from nki._register import NkiScalar, RunTimeValue, VirtualRegister
from nki._tensor import NkiTensor


def affine_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Give Python's range: the loop is unrolled."""
    return range(0, start, step) if stop is None else range(start, stop, step)


def sequential_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Give Python's range: the loop is unrolled."""
    return affine_range(start, stop, step)


def static_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Give Python's range: the loop is unrolled."""
    return affine_range(start, stop, step)


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> None:
    """Fail: the tracing compiler of 0.7 has it no more."""
    fail("dynamic_range", "loop", "be written with nl.fori_loop, which 0.6 and 0.7 both take", "nl.dynamic_range")


def _bound(title: str, operand: str, value: Any) -> int:
    if isinstance(value, NkiScalar):
        require(value.dtype is int32, title, operand, "be a scalar of 32 bits", value.dtype)
    if isinstance(value, RunTimeValue):
        number = value.read(title, operand)
        require(number < 2**31, title, operand, "fit a signed 32-bit bound", number)
        return number
    return as_int(title, operand, value)


def _check_body(title: str, body: Any) -> None:
    needed = [p for p in inspect.signature(body).parameters.values() if p.default is p.empty] if callable(body) else []
    require(len(needed) == 1, title, "body_fun", "be a function of one argument, others having defaults", body)


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[Any], None], step: int = 1) -> None:
    """Run body_fun(i) for i in range(lower, upper, step), with bounds that may be registers or scalars of 32 bits.

    i is a register where a bound is one, else a scalar (SDK 2.33 API reference; in 0.6 it is always a register), which
    only `scalar_offset`, `select` and instructions read. Both cores of an LNC make equally many
    turns. Loops do not lie inside nl.no_reorder.
    """
    core = machine()
    _check_body("fori_loop", body_fun)
    step = as_int("fori_loop", "step", step)
    require(step >= 1, "fori_loop", "step", "be positive", step)
    require(core.no_reorder == 0, "fori_loop", "loop", "not lie inside nl.no_reorder", "nl.no_reorder")
    turns = range(_bound("fori_loop", "lower", lower), _bound("fori_loop", "upper", upper), step)
    record("fori_loop", step)
    meet(core, "fori_loop", (len(turns),))
    loop = Loop()
    for number in turns:
        result = _turn(core, loop, body_fun, partial(loop_index, number, lower, upper))
        require(result is None, "fori_loop", "body_fun", "return None", type(result).__name__)


def while_loop(init: VirtualRegister, body_fun: Callable[[VirtualRegister], VirtualRegister]) -> None:
    """Run r = body_fun(r) while the register r is not 0, beginning with `init`."""
    core = machine()
    _check_body("while_loop", body_fun)
    require(isinstance(init, VirtualRegister), "while_loop", "init", "be a register", type(init).__name__)
    require(core.no_reorder == 0, "while_loop", "loop", "not lie inside nl.no_reorder", "nl.no_reorder")
    record("while_loop")
    loop, condition = Loop(), init.read("while_loop", "init")
    while True:
        meet(core, "while_loop", (condition != 0,))
        if condition == 0:
            return
        result = _turn(core, loop, body_fun, partial(VirtualRegister, condition))
        good = isinstance(result, VirtualRegister) and result.state is not None
        require(good, "while_loop", "body_fun", "return a register that holds the next condition", result)
        condition = result.state


def loop_index(number: int, lower: Any, upper: Any) -> RunTimeValue:
    """Give the index of a turn: what it is depends on the bounds."""
    if isinstance(lower, VirtualRegister) or isinstance(upper, VirtualRegister):
        return VirtualRegister(number, frozen=True)
    return NkiScalar.make(number)


def _turn(core: Core, loop: Loop, body: Callable[[Any], Any], variable: Callable[[], RunTimeValue]) -> Any:
    """Run one turn: its allocations are its own, and it does what the first turn did."""
    outer = core.turns, core.loops
    loop.turn = []
    core.turns, core.loops = (*core.turns, object()), (*core.loops, loop)
    no_reorder, core.no_reorder = core.no_reorder, 0
    core.lanes.clear()
    try:
        result = body(variable())
        if loop.first is not None and len(loop.turn) < len(loop.first):
            rule = "do the same in every turn, since it is traced once"
            fail("loop", "body", rule, f"an end before {loop.first[len(loop.turn)][0]} in turn {loop.turns}")
    finally:
        core.turns, core.loops = outer
        core.no_reorder = no_reorder
        core.lanes.clear()
    loop.first = loop.turn if loop.first is None else loop.first
    loop.turns += 1
    return result


def program_id(axis: int = 0) -> int:
    """Give the number of the core within its LNC."""
    require(axis == 0, "program_id", "axis", "be 0, the grid being one number", axis)
    return machine().core


def num_programs(axes: int = 0) -> int:
    """Give the number of cores of the LNC."""
    require(axes == 0, "num_programs", "axes", "be 0, the grid being one number", axes)
    return machine().num_cores


def program_ndim() -> int:
    """Give 1 with a grid, 0 without."""
    return 1 if machine().launched_with_grid else 0


class no_reorder:
    """Keep the order of the instructions inside a `with` block."""

    def __enter__(self) -> None:
        machine().no_reorder += 1

    def __exit__(self, *error: object) -> None:
        machine().no_reorder -= 1


def device_print(print_prefix: str, tensor: NkiTensor) -> None:
    """Print a tensor of HBM or SBUF after a constant prefix."""
    require(isinstance(print_prefix, str), "device_print", "print_prefix", "be a string", type(print_prefix).__name__)
    good = isinstance(tensor, NkiTensor) and tensor.buffer.name != "psum"
    require(good, "device_print", "tensor", "be a tensor of HBM or SBUF", tensor)
    print(print_prefix, tensor.read("device_print", "tensor"))
