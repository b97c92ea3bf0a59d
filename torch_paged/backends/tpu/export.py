"""A JAX function of this folder as a portable program, made once for each platform, chip, set of shapes and options."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from torch_paged.backends.tpu.block_sizes import CHIPS
from torch_paged.backends.tpu.calls import JaxCall
from torch_paged.backends.tpu.support import chip_refusal


@dataclass(frozen=True)
class Program:
    """All that a program depends on.

    Attributes:
        module: the function's module, such as ``"decode"``.
        function: its name.
        arrays: shape and dtype of each argument, None where the argument is None.
        options: its static arguments but ``chip`` and ``interpret``.
        platform: "tpu", or "cpu", for which kernels are interpreted.
        chip: whose tiling the kernels use; None where there is no kernel.
        donated: the arguments whose memory the results get.
    """

    module: str
    function: str
    arrays: tuple[tuple[tuple[int, ...], str] | None, ...]
    options: tuple[tuple[str, Any], ...]
    platform: str
    chip: str | None
    donated: tuple[int, ...] = ()


def program_of(call: JaxCall, platform: str, chip: str, *, donate: bool = False) -> Program:
    """Return the program of a call; its arguments are the call's arrays that are not None, in order.

    Args:
        call: which function, with which arrays and options.
        platform: "tpu" or "cpu".
        chip: name of the chip whose tiling the kernels use.
        donate: give the memory of what is written to the results. Whoever runs the program may do so itself.

    Raises:
        NotImplementedError: The chip cannot do it.
    """
    refused = chip_refusal(call.function, call.kv_cache, chip) if platform == "tpu" else None
    if refused is not None:
        raise NotImplementedError(refused)
    return Program(
        call.module,
        call.function,
        tuple(None if x is None else (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in call.arrays),
        tuple(sorted(call.options.items())),
        platform,
        chip if call.attends else None,
        call.written if donate else (),
    )


def jax_function(program: Program, interpret: Any) -> Callable[..., Any]:
    """Return the function of a program with its options bound; ``interpret`` as ``pallas_call`` takes it."""
    function = getattr(importlib.import_module(f"torch_paged.backends.tpu.{program.module}"), program.function)
    chip = {} if program.chip is None else {"chip": CHIPS[program.chip]}
    return partial(function, **dict(program.options), **chip, interpret=interpret)


@cache
def exported(program: Program) -> jax.export.Exported:
    """Return the lowered program."""
    arrays = [None if x is None else jax.ShapeDtypeStruct(x[0], jnp.dtype(x[1])) for x in program.arrays]
    jitted = jax.jit(jax_function(program, program.platform == "cpu"), keep_unused=True, donate_argnums=program.donated)
    return jax.export.export(jitted, platforms=(program.platform,))(*arrays)
