"""What every instruction does before and after its own work."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nki._errors import fail, kernel_line, require
from nki._machine import machine
from nki._register import NkiScalar, RunTimeValue
from nki._tensor import NkiTensor


class NkiInstruction:
    """What an instruction returns (SDK 2.32 API reference): a handle for explicit dependencies."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._turns = machine().turns

    def depends_on(self, *producers: "NkiInstruction") -> "NkiInstruction":
        """Wait for other instructions of the same turn of the same dynamic loop.

        The reference allows producers in an enclosing scope, and forbids edges into loops: the latter holds here.
        """
        for producer in producers:
            good = isinstance(producer, NkiInstruction)
            require(good, f"{self._name}.depends_on", "producers", "be instructions", type(producer).__name__)
            rule = "be in the same turn of the same dynamic loop"
            require(producer._turns == self._turns, f"{self._name}.depends_on", "producers", rule, producer._name)
        return self


def _static(value: Any) -> Any:
    """Give what tracing fixes of an operand: neither contents nor run-time indices."""
    if isinstance(value, NkiTensor):
        return (value.shape, value.strides, value.offset, value.dtype, value.buffer, value.storage.line)
    if isinstance(value, (list, tuple)):
        return tuple(_static(part) for part in value)
    if isinstance(value, NkiScalar):
        return (value.kind, value.dtype)
    if isinstance(value, RunTimeValue):
        return value.kind
    return repr(value)


def record(*event: Any) -> None:
    """Add to what the present turn of the innermost dynamic loop does, and compare with the first turn."""
    loops = machine().loops
    if not loops:
        return
    loop = loops[-1]
    at = len(loop.turn)
    loop.turn.append(event)
    if loop.first is not None and (at >= len(loop.first) or loop.first[at] != event):
        rule = "do the same in every turn, since it is traced once"
        earlier = loop.first[at][0] if at < len(loop.first) else "nothing more"
        fail(
            "loop",
            "body",
            rule,
            f"{event[0]} in turn {loop.turns}, where the first turn has {earlier} or operands differ",
        )


def begin(title: str, arguments: Mapping[str, Any]) -> None:
    """Start an instruction on arguments that were bound to its signature."""
    core = machine()
    core.instruction = title
    label = arguments.get("name")
    if label is not None:
        require(isinstance(label, str), title, "name", "be a string or None", repr(label))
        use_name(f"instruction {label}", title)
    record(title, kernel_line(), tuple(_static(value) for value in arguments.values()))


def use_name(label: str, title: str) -> None:
    """Fail where a name is used again, the further turns of a loop's body apart."""
    core = machine()
    if not any(loop.turns for loop in core.loops):
        require(label not in core.names, title, "name", "be used once", repr(label.split(" ", 1)[1]))
        core.names.add(label)


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function an instruction of nki.isa: its arguments are checked against its signature.

    Returns an NkiInstruction unless the function returns something itself.
    """
    signature = inspect.signature(function)
    title = function.__name__

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        for key in kwargs:
            rule = f"be an argument of {title}({', '.join(signature.parameters)})"
            require(key in signature.parameters, title, key, rule, "an unknown one")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            fail(title, "arguments", f"be those of {title}({', '.join(signature.parameters)})", error)
        bound.apply_defaults()
        begin(title, bound.arguments)
        result = function(**bound.arguments)
        return NkiInstruction(title) if result is None else result

    return run
