"""The kernels on torch_xla's tensors: each call becomes one computation in the lazy graph. torch_xla is never imported
before something else did.

torch_xla cannot trace an op that writes in place. Once torch_xla is imported, such an op gets a functional twin in
``torch.ops.paged_functional``, which returns what the op would write, and a kernel that calls the twin and copies back:
XLA then gives the memory of the old contents to the new ones. On torch_xla's CPU client the kernels are interpreted.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from torch_paged.backends import BackendInfo
from torch_paged.backends.on_import import on_import
from torch_paged.backends.tpu import calls
from torch_paged.backends.tpu.calls import JaxCall
from torch_paged.backends.tpu.support import INTERPRETED_CHIP, chip_of_kind, xla_client
from torch_paged.contract.schema import NAMESPACE, SCHEMAS, tags

TWINS = f"{NAMESPACE}_functional"
"""Namespace of the twins."""

_libraries: list[torch.library.Library] = []


def kernels(info: BackendInfo) -> dict[str, Callable[..., Any]]:
    """Return a kernel for each op on XLA tensors; the ops that write are completed when torch_xla is imported."""
    on_import("torch_xla", lambda: _define_twins(calls.kernels(info, _run_twin)))
    return calls.kernels(info, _run)


def _run(call: JaxCall) -> tuple[Tensor, ...]:
    results = _compute(call)
    if not call.written:
        return results
    for position, result in zip(call.written, results, strict=True):
        call.arrays[position].copy_(result)  # type: ignore[union-attr]
    return ()


def _run_twin(call: JaxCall) -> tuple[Tensor, ...]:
    import torch_xla

    for position in call.written:  # else a compiled graph would copy the whole cache first
        torch_xla._XLAC._set_buffer_donation(call.arrays[position], True)
    return _compute(call)


def _compute(call: JaxCall) -> tuple[Tensor, ...]:
    from torch_xla._internal.jax_workarounds import jax_env_context, jax_import_guard

    jax_import_guard()
    with jax_env_context():
        from torch_paged.backends.tpu.export import program_of

        arrays = [x for x in call.arrays if x is not None]
        platform, chip = target(str(arrays[0].device))
        return tuple(_computation(program_of(call, platform, chip))(arrays))


@cache
def target(device: str) -> tuple[str, str]:
    """Return platform and chip that the kernels are lowered for on an XLA device."""
    import torch_xla

    if xla_client() == "CPU":
        return "cpu", INTERPRETED_CHIP
    return "tpu", chip_of_kind(torch_xla._XLAC._xla_device_kind(device))


@cache
def _computation(program: Any) -> Callable[[list[Tensor]], list[Tensor]]:
    """Return a program as a function of XLA tensors."""
    import jax
    from jaxlib import _jax
    from torch_xla.core import xla_builder

    from torch_paged.backends.tpu.export import exported

    if not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")  # torch_xla holds the TPU
    jax.config.update("jax_use_shardy_partitioner", False)  # torch_xla reads the older dialect
    lowered = _jax.mlir.mlir_module_to_xla_computation(
        exported(program).mlir_module(), use_tuple_args=False, return_tuple=True
    )
    name = f"{NAMESPACE}_{program.function}"
    computation = xla_builder.computation_from_module_proto(name, lowered.as_serialized_hlo_module_proto())
    return xla_builder.xla_computation_as_func(computation, name)


def _define_twins(kernels: dict[str, Callable[..., Any]]) -> None:
    twins = torch.library.Library(TWINS, "DEF")
    originals = torch.library.Library(NAMESPACE, "IMPL")
    for name, signature in SCHEMAS.items():
        if "!" in signature:
            parameters, _, _ = signature.partition(" -> ")
            twins.define(f"{name}{re.sub('[(][a-z]![)]', '', parameters)} -> Tensor[]", tags=tags())
            twins.impl(name, _as_list(kernels[name]), "XLA")
            twins.impl(name, _on_copies(name), "CompositeExplicitAutograd")
            torch.library.register_fake(f"{TWINS}::{name}", _fake(name), lib=twins)
            originals.impl(name, _by_twin(name), "Functionalize")
    _libraries.extend((twins, originals))


def _as_list(kernel: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    def call(*args: Any) -> list[Tensor]:
        results = kernel(*args)
        return [results] if isinstance(results, Tensor) else list(results)

    return call


def _by_twin(op: str) -> Callable[..., None]:
    """Return the kernel of an op that writes, in terms of its twin."""

    def call(*args: Any, **kwargs: Any) -> None:
        arguments = _arguments(op, args, kwargs)
        contents = getattr(getattr(torch.ops, TWINS), op)(*arguments.values())
        for name, content in zip(calls.written(op, arguments), contents, strict=True):
            arguments[name].copy_(content)

    return call


def _on_copies(op: str) -> Callable[..., list[Tensor]]:
    """Return the twin where it is not for XLA tensors: a compiled program of CPU tensors, beside torch_xla."""

    def call(*args: Any, **kwargs: Any) -> list[Tensor]:
        arguments = _arguments(op, args, kwargs)
        copies = {name: arguments[name].clone() for name in calls.written(op, arguments)}
        getattr(getattr(torch.ops, NAMESPACE), op)(*(arguments | copies).values())
        return list(copies.values())

    return call


def _arguments(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    schema = getattr(getattr(torch.ops, NAMESPACE), op).default._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    return defaults | dict(zip(defaults, args, strict=False)) | kwargs


def _fake(op: str) -> Callable[..., list[Tensor]]:
    def call(*args: Any, **kwargs: Any) -> list[Tensor]:
        arguments = _arguments(op, args, kwargs)
        return [torch.empty_like(arguments[name]) for name in calls.written(op, arguments)]

    return call
