"""The decorator that makes an instruction of a function holding its semantics alone."""

import enum
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import numpy as np
from nki._errors import fail
from nki._machine import machine
from nki._tensor import NkiTensor
from nki.isa._access import demand, reject
from nki.isa._operands import Spec

P = ParamSpec("P")


class NkiInstruction:
    """Handle of an instruction that was run (nki.isa.NkiInstruction, SDK 2.32 API reference)."""

    def __init__(self, name: str) -> None:
        self._name = name

    def depends_on(self, *producers: "NkiInstruction") -> "NkiInstruction":
        """Run after the producers, which the simulator, running in order, always does."""
        for producer in producers:
            if not isinstance(producer, NkiInstruction):
                fail(f"{self._name}.depends_on", "producers", "be instructions", repr(producer))
        return self


def instruction(spec: Spec) -> Callable[[Callable[P, None]], Callable[P, NkiInstruction]]:
    """Make an instruction of nki.isa of a function with the documented signature.

    A call binds its arguments to the signature, checks them against the table, runs the function on the operands and
    counts one instruction of the engine that the caller or the compiler's rule chose: its elements per partition and
    the bytes of all operands.
    """

    def decorate(function: Callable[P, None]) -> Callable[P, NkiInstruction]:
        signature = inspect.signature(function)
        name = function.__name__

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> NkiInstruction:
            core = machine()
            core.instruction = name
            arguments = _bind(name, signature, args, kwargs)
            spec.check(arguments)
            chosen = spec.pick_engine(arguments)
            function(**arguments)  # type: ignore[call-arg]
            tensors = [arguments[operand] for operand in spec.operands if isinstance(arguments[operand], NkiTensor)]
            elements = spec.work(arguments) if spec.work else max(t.free for t in tensors)
            core.count(chosen.name, elements=elements, bytes=sum(t.size * t.dtype.itemsize for t in tensors))
            return NkiInstruction(name)

        return run

    return decorate


def _bind(name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        fail(name, "arguments", f"be those of {name}{_documented(signature)}", error)
    bound.apply_defaults()
    for operand, value in bound.arguments.items():
        default = signature.parameters[operand].default
        if isinstance(default, enum.Enum) and not isinstance(value, type(default)):
            reject(operand, f"be a member of nki.isa.{type(default).__name__}", repr(value))
        if isinstance(default, bool) and not isinstance(value, (bool, np.bool_)):
            reject(operand, "be True or False", repr(value))
    label = bound.arguments.get("name")
    demand(label is None or isinstance(label, str), "name", "be a string or None", repr(label))
    return dict(bound.arguments)


def _documented(signature: inspect.Signature) -> str:
    return "(" + ", ".join(signature.parameters) + ")"
