"""Operators of nki.language: operands `op` of instructions, and experimental functions on tensors of SBUF.

Called, f(x, dtype=None) and f(x, y, dtype=None) make the result in SBUF by one instruction (release notes 0.3.0).
"""

from collections.abc import Callable
from typing import Any

from nki._errors import require
from nki._tensor import NkiTensor
from nki.language._allocation import ndarray

UNARY = (
    "abs", "arctan", "copy", "erf", "erf_dx", "exp", "gelu", "gelu_apprx_sigmoid", "gelu_apprx_sigmoid_dx",
    "gelu_apprx_tanh", "gelu_dx", "log", "mish", "prelu", "reciprocal", "relu", "rsqrt", "sigmoid", "sign", "silu",
    "silu_dx", "sin", "softplus", "sqrt", "square", "tanh",
)  # fmt: skip
BINARY = (
    "abs_max", "abs_min", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "equal", "greater", "greater_equal",
    "left_shift", "less", "less_equal", "logical_and", "logical_or", "logical_xor", "maximum", "minimum", "multiply",
    "not_equal", "power", "right_shift", "subtract",
)  # fmt: skip


def _unary(name: str) -> Callable[..., NkiTensor]:
    def function(x: NkiTensor, dtype: Any = None) -> NkiTensor:
        from nki import isa

        require(isinstance(x, NkiTensor), name, "x", "be a tensor", type(x).__name__)
        dst = ndarray(x.shape, x.dtype if dtype is None else dtype)
        if name == "reciprocal":
            isa.reciprocal(dst=dst, data=x)
        else:
            isa.activation(dst=dst, op=globals()[name], data=x)
        return dst

    function.__doc__ = f"Give {name}(x), or name the operator."
    return _named(function, name)


def _binary(name: str) -> Callable[..., NkiTensor]:
    def function(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
        from nki import isa

        require(isinstance(x, NkiTensor), name, "x", "be a tensor", type(x).__name__)
        dst = ndarray(x.shape, x.dtype if dtype is None else dtype)
        vector = isinstance(y, NkiTensor) and y.free == 1 and x.free > 1
        if isinstance(y, NkiTensor) and not vector:
            isa.tensor_tensor(dst=dst, data1=x, data2=y, op=globals()[name])
        else:
            isa.tensor_scalar(dst=dst, data=x, op0=globals()[name], operand0=y)
        return dst

    function.__doc__ = f"Give {name}(x, y), or name the operator."
    return _named(function, name)


def _named(function: Callable[..., NkiTensor], name: str) -> Callable[..., NkiTensor]:
    function.__name__ = function.__qualname__ = name
    return function


def invert(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Give the bits of x inverted, or name the operator."""
    from nki import isa

    dst = ndarray(x.shape, x.dtype if dtype is None else dtype)
    isa.tensor_scalar(dst=dst, data=x, op0=invert, operand0=None)
    return dst


def bypass(x: Any, y: Any) -> Any:
    """Name the operator of activate2 that leaves its input; it is no function."""
    require(False, "bypass", "use", "be as op0 or op1 of activate2", "a call")


globals().update({name: _unary(name) for name in UNARY})
globals().update({name: _binary(name) for name in BINARY})
__all__ = ["bypass", "invert", *BINARY, *UNARY]
