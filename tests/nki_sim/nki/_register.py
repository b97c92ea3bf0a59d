"""Registers: 32-bit integers that are known at run time only (nki.isa.VirtualRegister, SDK 2.32 API reference)."""

from typing import Any, NoReturn, Optional

from nki._errors import fail


class VirtualRegister:
    """A register; Python cannot compute with it, only instructions and loops can read it."""

    def __init__(self, state: Optional[int] = None, frozen: bool = False) -> None:
        self._state = state
        self._frozen = frozen

    def read(self, instruction: str, operand: str) -> int:
        """Give the value; fails where none was loaded."""
        if self._state is None:
            fail(instruction, operand, "be a register that holds a value", "an uninitialised register")
        return self._state

    def load(self, value: int, instruction: str) -> None:
        """Set the value; a loop's variable takes none."""
        if self._frozen:
            fail(instruction, "dst", "not be a loop's variable, which only the loop changes", "a loop variable")
        if not -(2**31) <= value < 2**32:
            fail(instruction, "src", "fit 32 bits", value)
        self._state = value

    def _refuse(self, what: str) -> NoReturn:
        fail("register", "use", "be as scalar_offset, loop bound or operand of an instruction", what)

    def __int__(self) -> int:
        self._refuse("int(register)")

    def __index__(self) -> int:
        self._refuse("a register as a Python integer")

    def __bool__(self) -> bool:
        self._refuse("a register as a Python condition")

    def __float__(self) -> float:
        self._refuse("float(register)")

    def _compute(self, *other: Any) -> NoReturn:
        self._refuse("Python arithmetic or comparison")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _compute
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __mod__ = __rmod__ = __pow__ = __neg__ = _compute
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __and__ = __rand__ = __or__ = __ror__ = _compute
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _compute  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"VirtualRegister({self._state})"
