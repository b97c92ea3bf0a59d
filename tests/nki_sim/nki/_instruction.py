"""What every instruction does before and after its own work."""

import functools
import inspect
from typing import Any, Callable

from nki._errors import fail, kernel_line, require
from nki._machine import machine
from nki._tensor import NkiTensor


class NkiInstruction:
    """What an instruction returns (SDK 2.32 API reference): a handle for explicit dependencies."""

    def __init__(self, name: str, turns: tuple[Any, ...]) -> None:
        self._name = name
        self._turns = turns

    def depends_on(self, *producers: "NkiInstruction") -> "NkiInstruction":
        """Wait for other instructions of the same turn of the same dynamic loop."""
        for producer in producers:
            good = isinstance(producer, NkiInstruction)
            require(good, self._name, "producers", "be instructions", type(producer).__name__)
            rule = "be in the same turn of the same dynamic loop"
            require(producer._turns == self._turns, self._name, "producers", rule, producer._name)
        return self


def _static(value: Any) -> Any:
    """Give what a traced instruction fixes of an operand: no contents, no register values."""
    if isinstance(value, NkiTensor):
        return (value.shape, value.strides, value.offset, value.dtype, value.buffer, value.storage.line)
    if isinstance(value, (list, tuple)):
        return tuple(_static(part) for part in value)
    return value if isinstance(value, (bool, int, float, str)) else type(value).__name__


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function an instruction of nki.isa.

    Checks the arguments against the signature and a `name` for being unique, names the running instruction for
    counters and messages, compares the turns of dynamic loops (a body is traced once), and returns an NkiInstruction
    unless the function returns something itself.
    """
    signature = inspect.signature(function)
    title = function.__name__

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        core = machine()
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            fail(title, "arguments", f"match {title}{signature}", error)
        label = bound.arguments.get("name")
        if label is not None:
            require(isinstance(label, str), title, "name", "be a string", label)
            if not core.loops or core.loops[-1].turns == 0:
                require(f"instruction {label}" not in core.names, title, "name", "be used once", repr(label))
                core.names.add(f"instruction {label}")
        for loop in core.loops[-1:]:
            loop.turn.append((title, kernel_line(), _static(list(bound.arguments.values()))))
        outer, core.instruction = core.instruction, title
        try:
            result = function(*args, **kwargs)
        finally:
            core.instruction = outer
        return NkiInstruction(title, core.turns) if result is None else result

    return run
