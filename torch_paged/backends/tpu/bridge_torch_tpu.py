"""The kernels on torch_tpu's tensors (device "tpu"): each program becomes an op made by torch_tpu from the function.

What a call writes is donated, so that XLA updates it in place, and the result takes its place in the tensor.
"""

from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from torch_paged.backends import BackendInfo
from torch_paged.backends.tpu import calls
from torch_paged.backends.tpu.calls import JaxCall
from torch_paged.backends.tpu.support import chip_of_kind

_number = count()


def kernels(info: BackendInfo) -> dict[str, Callable[..., Any]]:
    """Return a kernel for each op."""
    return calls.kernels(info, run)


def run(call: JaxCall) -> tuple[Tensor, ...]:
    """Run a call; what it writes holds the new contents afterwards."""
    from torch_paged.backends.tpu.export import program_of

    program = program_of(call, "tpu", _chip())
    donated = [call.arrays[position] for position in call.written]
    others = [x for position, x in enumerate(call.arrays) if x is not None and position not in call.written]
    results = _op(program, call.written)(donated, others)
    if not call.written:
        return tuple(results)
    for tensor, result in zip(donated, results, strict=True):
        tensor.copy_(result)  # type: ignore[union-attr]
    return ()


@cache
def _chip() -> str:
    from torch_tpu._internal.device import _device_ops_backend

    return chip_of_kind(_device_ops_backend._get_local_device_attributes()["device_kind"])


@cache
def _op(program: Any, written: tuple[int, ...]) -> Callable[[list[Any], list[Any]], list[Tensor]]:
    """Return a program as an op on the tensors that it writes and the others that it reads."""
    import jax

    from torch_paged.backends.tpu.export import jax_function

    function = jax_function(program, program.platform == "cpu")
    given = [position for position, array in enumerate(program.arrays) if array is not None]
    read = [position for position in given if position not in written]

    def call(donated: list[jax.Array], others: list[jax.Array]) -> list[jax.Array]:
        arrays = dict(zip((*written, *read), (*donated, *others), strict=True))
        results = function(*(arrays.get(position) for position in range(len(program.arrays))))
        return list(results) if isinstance(results, tuple) else [results]

    name = f"torch_paged_programs::{program.function}_{next(_number)}"
    return torch.tpu.pallas.jax_op(name, call, donate_argnums=(0,))  # type: ignore[attr-defined,no-any-return]
