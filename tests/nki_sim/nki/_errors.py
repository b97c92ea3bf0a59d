"""The one error of the simulator, which names the instruction, the operand, the rule and the kernel's line."""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

PACKAGE = str(Path(__file__).resolve().parent)


class NkiValidationError(Exception):
    """A kernel broke a rule of NKI (nki.isa.NkiValidationError, SDK 2.32 API reference)."""


def kernel_line() -> str:
    """Give "<file>:<line>" of the innermost frame that is not the simulator's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def fail(instruction: str, operand: str, rule: str, got: Any) -> NoReturn:
    """Raise "<instruction>: <operand> must <rule>, got <got> (<file>:<line>)".

    Args:
        instruction: the instruction or the function of nki.language.
        operand: name of the argument.
        rule: what the operand must do or be, to be read after "must".
        got: the offending value.
    """
    raise NkiValidationError(f"{instruction}: {operand} must {rule}, got {got} ({kernel_line()})")


def require(condition: bool, instruction: str, operand: str, rule: str, got: Any) -> None:
    """Call `fail` unless the condition holds."""
    if not condition:
        fail(instruction, operand, rule, got)
