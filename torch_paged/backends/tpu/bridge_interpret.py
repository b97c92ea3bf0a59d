"""The kernels on CPU tensors, interpreted by jax: the same functions, no TPU, no torch_xla. Slow, and for checking.

Plain interpretation runs a kernel as an XLA program for the CPU. With words of ``support.SIMULATION`` jax simulates
the memories of a TPU instead: copies happen when they are waited for (``on_wait``) or at once (``eager``), and races
between them are looked for. Memory that nothing was written to holds NaN either way.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
from jax.experimental.pallas import tpu as pltpu
from torch import Tensor

from torch_paged.backends import BackendInfo
from torch_paged.backends.tpu import calls
from torch_paged.backends.tpu.calls import JaxCall
from torch_paged.backends.tpu.export import Program, jax_function, program_of
from torch_paged.backends.tpu.support import INTERPRETED_CHIP, SIMULATION

_NUMPY = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.int8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.int8, ml_dtypes.float8_e5m2),
}
"""Dtypes that torch does not give to numpy: integers of the same width, and what numpy calls them."""
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Options of XLA's compiler with which it takes a quarter of the time, for programs that run once or twice."""
_ATTENTION_OPTIONS = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
"""The same where bits are compared: code of level 0 rounds a row's lse by the row's place in its tile."""
_LARGE = 2**19
"""Elements of an array from which on a call's program is worth being compiled well."""
_KEPT = 16
"""Programs that are kept: one takes up to 2000 memory mappings, of which a process has 65530, and some 10 MB."""


def kernels(info: BackendInfo) -> dict[str, Callable[..., Any]]:
    """Return an interpreted kernel for each op."""
    if not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")  # jax would look for a TPU first
    return calls.kernels(info, _run)


def _run(call: JaxCall) -> tuple[Tensor, ...]:
    arrays = [None if tensor is None else _to_jax(tensor) for tensor in call.arrays]
    function = _jitted(program_of(call, "cpu", INTERPRETED_CHIP))
    with no_races(call.function):
        results = jax.block_until_ready(function(*arrays))
    results = results if isinstance(results, tuple) else (results,)
    if not call.written:
        return tuple(_to_torch(result) for result in results)
    for position, result in zip(call.written, results, strict=True):
        target = call.arrays[position]
        assert target is not None
        target.copy_(_to_torch(result))
    return ()


@lru_cache(maxsize=_KEPT)
def _jitted(program: Program) -> Callable[..., Any]:
    """Return the function of a program, which jax compiles when it is called first."""
    large = max(math.prod(array[0]) for array in program.arrays if array is not None) >= _LARGE
    # other ops are soon compiled, and such options change their rounding: to float8, and of a row alone
    quickly = _ATTENTION_OPTIONS if program.chip is not None and not large else None
    return jax.jit(jax_function(program, _interpreter()), compiler_options=quickly)


def _interpreter() -> bool | pltpu.InterpretParams:
    if not SIMULATION:
        return True
    copies: Any = "eager" if "eager" in SIMULATION else "on_wait"
    return pltpu.InterpretParams(dma_execution_mode=copies, detect_races="races" in SIMULATION)


@contextlib.contextmanager
def no_races(function: str) -> Iterator[None]:
    """Raise where a kernel races that is simulated within.

    jax prints that one does. What it keeps of it, it keeps of the last kernel only, and a call may run several.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield
    print(printed.getvalue(), end="")
    if "RACE DETECTED" in printed.getvalue():
        raise RuntimeError(f"{function}: the interpreter found a race: {printed.getvalue()}")


def _to_jax(tensor: Tensor) -> jax.Array:
    tensor = tensor.detach().contiguous()
    integers, dtype = _NUMPY.get(tensor.dtype, (None, None))
    if integers is None:
        return jax.numpy.array(tensor.numpy())
    return jax.numpy.array(tensor.view(integers).numpy().view(dtype))


def _to_torch(array: jax.Array) -> Tensor:
    found = np.array(array)
    for dtype, (integers, name) in _NUMPY.items():
        if found.dtype == name:
            return torch.from_numpy(found.view(str(integers).removeprefix("torch."))).view(dtype)
    return torch.from_numpy(found)
