"""The decorator that makes an instruction of its table and of a function that holds its semantics alone."""

import enum
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, cast

import numpy as np

from nki._instruction import NkiInstruction
from nki._instruction import instruction as named_instruction
from nki._machine import machine
from nki._tensor import NkiTensor
from nki.isa._access import demand, in_psum
from nki.isa._enums import engine as Engine
from nki.isa._operands import Spec

P = ParamSpec("P")


def instruction(spec: Spec) -> Callable[[Callable[P, None]], Callable[P, NkiInstruction]]:
    """Make an instruction of nki.isa of a function with the documented signature.

    A call checks its arguments against the table, runs the function on the operands, and counts one instruction of the
    engine that the caller or the compiler's rule chose, its elements per partition and the bytes of all operands.
    """

    def decorate(function: Callable[P, None]) -> Callable[P, NkiInstruction]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
            _check_constants(signature, arguments)
            spec.check(arguments)
            chosen = spec.pick_engine(arguments)
            if chosen is Engine.scalar:
                scattered = in_psum(arguments["dst"]) and arguments["dst"].is_indirect()
                demand(not scattered, "dst", "not be scattered in PSUM by the Scalar engine", arguments["dst"])
            function(*args, **kwargs)
            tensors = [arguments[operand] for operand in spec.operands if isinstance(arguments[operand], NkiTensor)]
            elements = spec.work(arguments) if spec.work else max(t.free for t in tensors)
            machine().count(chosen.name, elements=elements, bytes=sum(t.size * t.dtype.itemsize for t in tensors))

        return cast("Callable[P, NkiInstruction]", named_instruction(run))

    return decorate


def _check_constants(signature: inspect.Signature, arguments: dict[str, Any]) -> None:
    """Fail where an argument with an enum or a flag for its default is something else."""
    for operand, value in arguments.items():
        default = signature.parameters[operand].default
        if isinstance(default, enum.Enum):
            rule = f"be a member of nki.isa.{type(default).__name__}"
            demand(isinstance(value, type(default)), operand, rule, repr(value))
        if isinstance(default, bool):
            demand(isinstance(value, (bool, np.bool_)), operand, "be True or False", repr(value))
