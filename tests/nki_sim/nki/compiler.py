"""nki.jit, nki.simulate and their configuration (SDK 2.32 and 2.33 API reference, LNC and simulator guides)."""

import ast
import functools
import inspect
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nki import _handed
from nki._dtypes import check_dtype, of_numpy
from nki._errors import NkiValidationError, fail, require
from nki._launch import Launch
from nki._lint import lint
from nki._machine import Core, running
from nki._memory import WRITTEN, Storage, private_hbm, shared_hbm
from nki._tensor import NkiTensor, whole

GENERATIONS = {"trn1": 2, "inf2": 2, "gen2": 2, "trn2": 3, "gen3": 3, "trn3": 4, "gen4": 4}


@dataclass(frozen=True)
class CompileConfig:
    """Options of the compiler, which the simulator has no use for (0.7)."""

    address_rotation: bool = True
    non_ssa_legalization: bool = True
    dead_code_elim: bool = True
    barrier_check: bool = True


@dataclass(frozen=True)
class SpecializationConfig:
    """Options of specialization, which the simulator has no use for (0.7)."""

    allow_nested_config_override: bool = False


def target_generation() -> int:
    """Give the generation that NEURON_PLATFORM_TARGET_OVERRIDE names, trn3 where it is unset."""
    name = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE") or "trn3"
    rule = f"be one of {', '.join(GENERATIONS)}"
    require(name in GENERATIONS, "simulate", "NEURON_PLATFORM_TARGET_OVERRIDE", rule, name)
    return GENERATIONS[name]


def _cores(grid: int | None, generation: int) -> int:
    asked = os.environ.get("NEURON_LOGICAL_NC_CONFIG")
    require(asked in (None, "", "1", "2"), "simulate", "NEURON_LOGICAL_NC_CONFIG", "be 1 or 2", asked)
    if grid is not None and asked:
        require(grid == int(asked), "simulate", "grid", f"be NEURON_LOGICAL_NC_CONFIG ({asked})", grid)
    count = grid or int(asked or 1)
    require(count == 1 or generation >= 3, "simulate", "grid", "be 1 before trn2", count)
    return count


def _check_grid(grid: Any) -> int:
    rule = "be one number, the LNC degree 1 or 2"
    require(type(grid) is int and grid in (1, 2), "jit", "grid", rule, grid)
    return int(grid)


class Kernel:
    """A function made a kernel by nki.jit."""

    def __init__(self, function: Callable[..., Any], grid: int | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.grid = grid

    def __getitem__(self, grid: Any) -> "Kernel":
        """Choose the LNC degree."""
        return Kernel(self.function, _check_grid(grid))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the simulator."""
        if running():
            fail(
                self.function.__name__, "kernel", "not be called by another kernel: nki.jit is for the outermost", "it"
            )
        return simulate(self)(*args, **kwargs)


def jit(fn: Callable[..., Any] | None = None, **config: Any) -> Any:
    """Make a function a kernel; also with `compile_config` and `specialization_config`."""
    for key in config:
        known = key in ("compile_config", "specialization_config")
        require(known, "jit", key, "be compile_config or specialization_config", config[key])
    return Kernel if fn is None else Kernel(fn)


class simulate:
    """Run a kernel on the strict simulator: numpy or torch in, the same out; inputs that it writes change in place.

    `cores` keeps the cores of the last run, with their counters.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
        self.cores: list[Core] = []

    def __getitem__(self, grid: Any) -> "simulate":
        """Choose the LNC degree."""
        return simulate(self.kernel[grid])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check the source, run, and give what the kernel returns."""
        function = self.kernel.function
        rule = "be the outermost function: kernels call no kernels"
        require(not running(), function.__name__, "kernel", rule, "a call inside a kernel")
        generation = target_generation()
        launch = Launch(generation, _cores(self.kernel.grid, generation), self.kernel.grid is not None)
        self.cores = launch.cores
        lint(function)
        name = function.__name__
        try:
            bound = inspect.signature(function).bind(*args, **kwargs)
        except TypeError as error:
            fail(name, "arguments", f"be those of {name}{inspect.signature(function)}", error)
        arguments = {key: _Argument(name, key, value, len(launch.cores)) for key, value in bound.arguments.items()}
        bound.arguments.update({key: argument.value for key, argument in arguments.items()})

        def body() -> Any:
            return function(*bound.args, **bound.kwargs)

        results = launch.run(body)
        _check_counts(launch, name)
        torch_out = any(argument.torch for argument in arguments.values())
        for argument in arguments.values():
            argument.write_back()
        return _give_back(function, results[0], torch_out)


class _Argument:
    """An argument of a kernel: an array becomes a tensor in HBM, all else stays."""

    def __init__(self, kernel: str, name: str, value: Any, cores: int) -> None:
        self.torch = type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "data_ptr")
        self.given: Any = None
        self.flat: Any = None
        self.value = value
        rule = "be an array, a number, a string or a tuple; lists are not arguments of kernels"
        require(not isinstance(value, list), kernel, name, rule, "a list")
        small = not isinstance(value, int) or -(2**31) <= value < 2**31
        require(small, kernel, name, "fit 32 bits, as integers in kernels do", value)
        if self.torch:
            value = _from_torch(value.detach())
        if isinstance(value, np.ndarray):
            self._place(kernel, name, value, cores)

    def _place(self, kernel: str, name: str, array: Any, cores: int) -> None:
        try:
            dtype = of_numpy(array.dtype)
        except TypeError as error:
            fail(kernel, name, "have a dtype of nki.language", error)
        check_dtype(kernel, dtype, target_generation(), name)
        require(array.ndim >= 1 and array.size > 0, kernel, name, "have a dimension and elements", array.shape)
        self.given = array
        self.flat = np.ascontiguousarray(array)
        data = self.flat.reshape(-1).view(np.uint8)
        known = _handed.states_of(array)
        state, line = known or (np.full(data.size, WRITTEN, np.uint8), "")
        buffer = shared_hbm if cores == 2 else private_hbm
        storage = Storage(
            buffer,
            dtype,
            array.shape,
            data,
            state,
            name,
            f"argument {name}" + (f", made at {line}" if line else ""),
            argument=True,
            constant=not data.flags.writeable,
        )
        if cores == 2:
            storage.share()
        self.value = whole(storage)

    def write_back(self) -> None:
        """Copy what the kernel wrote into an array that was no contiguous one."""
        if self.given is not None and not np.shares_memory(self.given, self.flat) and self.given.flags.writeable:
            self.given[...] = self.flat


def _from_torch(tensor: Any) -> Any:
    import ml_dtypes
    import torch

    twins = {"bfloat16": (torch.int16, ml_dtypes.bfloat16)}
    twins |= {name: (torch.uint8, getattr(ml_dtypes, name)) for name in ("float8_e4m3fn", "float8_e5m2")}
    twin = twins.get(str(tensor.dtype).rpartition(".")[2])
    return tensor.numpy() if twin is None else tensor.view(twin[0]).numpy().view(twin[1])


def _to_torch(array: Any) -> Any:
    import torch

    name = array.dtype.name
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        carrier = np.int16 if name == "bfloat16" else np.uint8
        return torch.from_numpy(array.view(carrier)).view(getattr(torch, name))
    return torch.from_numpy(array)


def _return_line(function: Callable[..., Any]) -> str:
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    returns = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return f"{Path(inspect.getsourcefile(function) or '').name}:{first + max(returns, default=1) - 1}"


def _give_back(function: Callable[..., Any], result: Any, torch_out: bool) -> Any:
    if result is None:
        return None
    if isinstance(result, tuple):
        return tuple(_give_back(function, part, torch_out) for part in result)
    good = isinstance(result, NkiTensor) and result.buffer is shared_hbm and not result.storage.argument
    good = good and result.offset == 0 and result.size * result.dtype.itemsize == result.storage.data.size
    if not good:
        rule = "be whole tensors that the kernel made in nl.shared_hbm"
        line = _return_line(function)
        raise NkiValidationError(f"{function.__name__}: results must {rule}, got {result!r} ({line})")
    if not result.storage.state.all() and _handed.may_hand_on(function):
        _handed.hand_on(result.storage)
    elif not result.storage.state.all():
        where = f"elements of {result!r} of {result.storage.line} that no instruction wrote"
        rule = "be written in full, since the caller would read what memory held before"
        raise NkiValidationError(f"{function.__name__}: results must {rule}, got {where} ({_return_line(function)})")
    array = result.storage.data.view(result.dtype.numpy).reshape(result.shape)
    return _to_torch(array) if torch_out else array


def _check_counts(launch: Launch, name: str) -> None:
    counts = {core.shared for core in launch.cores}
    require(len(counts) == 1, name, "cores 0 and 1", "make the same tensors in nl.shared_hbm", sorted(counts))
