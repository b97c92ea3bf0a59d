"""Activation functions of the Scalar engine and their valid input ranges (SDK 2.32 API reference, shared page).

The engine evaluates piecewise polynomials of undocumented error; here each function is evaluated in float64 and rounded
to float32. An input outside the documented range, where the engine's result is invalid, is an error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_erf_elements = np.frompyfunc(math.erf, 1, 1)


def _erf(x: Array) -> Array:
    return np.asarray(_erf_elements(x), dtype=np.float64)


def _erf_dx(x: Array) -> Array:
    return 2 / math.sqrt(math.pi) * np.exp(-x * x)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _times(x: Array, factor: Array) -> Array:
    """x * factor, with 0 where the factor is 0: the limit of x * sigmoid(x) at minus infinity."""
    return np.where(factor == 0, 0.0, x * factor)


def _silu_dx(x: Array) -> Array:
    s = _sigmoid(x)
    return s + _times(x, s * (1 - s))


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + _erf(x / math.sqrt(2)))


def _gelu_dx(x: Array) -> Array:
    return _normal_cdf(x) + _times(x, np.exp(-x * x / 2) / math.sqrt(2 * math.pi))


def _gelu_tanh(x: Array) -> Array:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return _times(x, 0.5 * (1 + np.tanh(inner)))


def _gelu_sigmoid_dx(x: Array) -> Array:
    s = _sigmoid(1.702 * x)
    return s + _times(1.702 * x, s * (1 - s))


def _softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


@dataclass(frozen=True)
class Activation:
    """One function: its value, and the range of |x| or of x in which the engine is valid."""

    value: Callable[[Array], Array]
    low: float = -math.inf
    high: float = math.inf
    of_magnitude: bool = False

    def invalid(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Which inputs lie outside the valid range (NaN is passed on)."""
        measured = np.abs(x) if self.of_magnitude else x
        return (measured < self.low) | (measured > self.high)


# fmt: off
ACTIVATIONS: dict[str, Activation] = {
    "copy": Activation(lambda x: x),
    "square": Activation(np.square),
    "sigmoid": Activation(_sigmoid),
    "relu": Activation(lambda x: np.maximum(x, 0.0)),
    "gelu": Activation(lambda x: _times(x, _normal_cdf(x))),
    "gelu_dx": Activation(_gelu_dx),
    "gelu_apprx_tanh": Activation(_gelu_tanh),
    "gelu_apprx_sigmoid": Activation(lambda x: _times(x, _sigmoid(1.702 * x))),
    "gelu_apprx_sigmoid_dx": Activation(_gelu_sigmoid_dx),
    "silu": Activation(lambda x: _times(x, _sigmoid(x))),
    "silu_dx": Activation(_silu_dx),
    "tanh": Activation(np.tanh),
    "softplus": Activation(_softplus),
    "mish": Activation(lambda x: _times(x, np.tanh(_softplus(x)))),
    "erf": Activation(_erf),
    "erf_dx": Activation(_erf_dx),
    "exp": Activation(np.exp),
    "sign": Activation(np.sign),
    "abs": Activation(np.abs),
    "log": Activation(np.log, 2.0**-64, 2.0**64),
    "sqrt": Activation(np.sqrt, 2.0**-116, 2.0**118),
    "rsqrt": Activation(lambda x: 1 / np.sqrt(x), 2.0**-87, 2.0**97),
    "reciprocal": Activation(lambda x: 1 / x, 2.0**-42, 2.0**42, of_magnitude=True),
    # The ends of these two ranges are rounded to float32, the inputs' precision.
    "arctan": Activation(np.arctan, -float(np.float32(math.pi / 2)), float(np.float32(math.pi / 2))),
    "sin": Activation(np.sin, -float(np.float32(math.pi)), float(np.float32(math.pi))),
}
# fmt: on


def activate(name: str, x: npt.NDArray[np.float32], relu_param: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The function's value in float32; `relu_param` is the slope of `prelu` below zero."""
    with np.errstate(all="ignore"):
        if name == "prelu":
            return np.where(x >= 0, x, x * relu_param).astype(np.float32)
        return ACTIVATIONS[name].value(x.astype(np.float64)).astype(np.float32)
