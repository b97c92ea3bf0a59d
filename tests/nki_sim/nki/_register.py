"""Values that are known at run time only: registers (nki.isa.VirtualRegister) and scalars (nki.isa.NkiScalar)."""

from typing import Any, NoReturn

from nki._dtypes import DType, int32
from nki._errors import fail, kernel_line, require


class RunTimeValue:
    """What Python cannot look at: instructions, addresses and loops read it, in the turn of the loop that made it."""

    kind = "value"

    def __init__(self, state: int | None) -> None:
        from nki._machine import machine

        self._state = state
        self._turns = machine().turns

    def read(self, instruction: str, operand: str) -> int:
        """Give the value; fails where none was loaded, or after the turn of the loop that made it."""
        from nki._machine import machine

        inside = machine().turns[: len(self._turns)] == self._turns
        require(inside, instruction, operand, "be used in the turn of the loop body that allocated it only", self.kind)
        if self._state is None:
            fail(instruction, operand, "be a register that holds a value", "an uninitialised register")
        return self._state

    def _refuse(self, what: str) -> NoReturn:
        fail(self.kind, "use", "be as scalar_offset, loop bound or operand of an instruction", what)

    def __int__(self) -> int:
        self._refuse(f"int({self.kind})")

    def __index__(self) -> int:
        self._refuse(f"a {self.kind} as a Python integer")

    def __bool__(self) -> bool:
        self._refuse(f"a {self.kind} as a Python condition")

    def __float__(self) -> float:
        self._refuse(f"float({self.kind})")

    def _compute(self, *other: Any) -> NoReturn:
        self._refuse(f"Python arithmetic or comparison of a {self.kind}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _compute
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __mod__ = __rmod__ = __pow__ = __neg__ = _compute
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __and__ = __rand__ = __or__ = __ror__ = _compute
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _compute
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return self.kind


class VirtualRegister(RunTimeValue):
    """A 32-bit register (SDK 2.32 API reference); Python cannot compute with it."""

    kind = "register"

    def __init__(self, state: int | None = None, frozen: bool = False) -> None:
        super().__init__(state)
        self._frozen = frozen

    @property
    def state(self) -> int | None:
        """The value, None without one."""
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


class NkiScalar(RunTimeValue):
    """An integer of 32 or 64 bits that is computed on device, new in 0.7 (SDK 2.33 API reference and guide on scalars).

    Addition, subtraction and multiplication with Python integers and scalars of the same dtype give new scalars; 32
    bits wrap. No document says that 64 bits do, nor that a number of more than 32 bits may stand in the source: both
    fail. Comparisons are documented as traced but without use (int32) or as refused (int64): all fail here.
    """

    kind = "scalar"

    def __init__(self, state: Any, dtype: Any = None, is_comparison: bool = False) -> None:
        fail("NkiScalar", "use", "be to name the class: nisa.scalar_load and nl.fori_loop make scalars", "a call")

    @classmethod
    def make(cls, value: int, dtype: DType = int32) -> "NkiScalar":
        """Give a scalar of the running turn."""
        scalar = cls.__new__(cls)
        RunTimeValue.__init__(scalar, value)
        scalar.dtype = dtype
        return scalar

    dtype: DType

    def _operate(self, title: str, left: Any, right: Any) -> "NkiScalar":
        """Give left op right, one of which is this scalar."""
        from nki._instruction import record
        from nki._machine import machine

        core = machine()
        core.instruction = f"NkiScalar.{title}"
        x, y = (self._number(core.instruction, value) for value in (left, right))
        value = {"add": x + y, "subtract": x - y, "multiply": x * y}[title]
        limit = 2 ** (8 * self.dtype.itemsize - 1)
        if self.dtype is int32:
            value = (value + limit) % (2 * limit) - limit
        require(-limit <= value < limit, core.instruction, "result", "fit 64 bits: nothing says that it wraps", value)
        record(core.instruction, kernel_line(), self.dtype)
        core.count("sync", elements=1)
        return NkiScalar.make(value, self.dtype)

    def _number(self, title: str, value: Any) -> int:
        if isinstance(value, NkiScalar):
            require(value.dtype is self.dtype, title, "operand", f"have the other's dtype {self.dtype}", value.dtype)
            return value.read(title, "operand")
        rule = f"be a Python integer or a scalar of {self.dtype}"
        require(type(value) is int, title, "operand", rule, type(value).__name__)
        require(-(2**31) <= value < 2**31, title, "operand", "fit 32 bits where it is a number", value)
        return int(value)

    def __add__(self, other: Any) -> "NkiScalar":  # type: ignore[override]
        return self._operate("add", self, other)

    def __radd__(self, other: Any) -> "NkiScalar":  # type: ignore[override]
        return self._operate("add", other, self)

    def __sub__(self, other: Any) -> "NkiScalar":  # type: ignore[override]
        return self._operate("subtract", self, other)

    def __rsub__(self, other: Any) -> "NkiScalar":  # type: ignore[override]
        return self._operate("subtract", other, self)

    def __mul__(self, other: Any) -> "NkiScalar":  # type: ignore[override]
        return self._operate("multiply", self, other)

    def __rmul__(self, other: Any) -> "NkiScalar":  # type: ignore[override]
        return self._operate("multiply", other, self)

    def __neg__(self) -> "NkiScalar":  # type: ignore[override]
        return self._operate("subtract", 0, self)
