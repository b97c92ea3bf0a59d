"""Registers: 32-bit integers that are known at run time only (nki.isa.VirtualRegister, SDK 2.32 API reference)."""

from typing import Any, NoReturn

from nki._errors import fail, require


class VirtualRegister:
    """A register; Python cannot compute with it, only instructions and loops can read it."""

    def __init__(self, state: int | None = None, frozen: bool = False) -> None:
        from nki._machine import machine

        self._state = state
        self._frozen = frozen
        self._turns = machine().turns

    @property
    def state(self) -> int | None:
        """The value, None without one."""
        return self._state

    def read(self, instruction: str, operand: str) -> int:
        """Give the value; fails where none was loaded, or after the turn of the loop that made the register."""
        from nki._machine import machine

        inside = machine().turns[: len(self._turns)] == self._turns
        require(inside, instruction, operand, "be used in the turn of the loop body that allocated it only", "register")
        if self._state is None:
            fail(instruction, operand, "be a register that holds a value", "an uninitialised register")
        return self._state

    def check_writable(self, instruction: str) -> None:
        """Fail where the register may not change: a loop carries its state in tensors, not in registers."""
        from nki._machine import machine

        require(not self._frozen, instruction, "dst", "not be the variable of a loop", "a loop variable")
        own = machine().turns == self._turns
        require(own, instruction, "dst", "be a register allocated in the same body of a dynamic loop", "an outer one")

    def load(self, value: int, instruction: str) -> None:
        """Set the value."""
        require(-(2**31) <= value < 2**32, instruction, "src", "fit 32 bits", value)
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
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _compute
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return "register"
