"""The errors of importing, installing and settings."""

import functools
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from backend_provocations import kernel_of
from error_table import Error, Group

from torch_paged import backends, dispatch
from torch_paged.backends import cpu, neuron, tpu
from torch_paged.backends.neuron import support as neuron_support
from torch_paged.backends.tpu import support as tpu_support
from torch_paged.testing import MergeCase, build
from torch_paged.testing.processes import run_python

_SERVED = "<setting> cannot be served: "
_INSTALL = "Install what the text names, or unset the setting."


def chosen(**settings: str) -> Callable[[], Any]:
    """Return the choice of backends that an import makes, with these settings."""

    def provoke() -> None:
        with patch.dict(os.environ, settings):
            dispatch._chosen_backends()

    return provoke


def asked_for(name: str, *patches: Any) -> Callable[[], Any]:
    """Return the choice of backends where a setting asks for one, on another machine."""

    def provoke() -> None:
        with ExitStack() as stack:
            for change in patches:
                stack.enter_context(change())
            chosen(TORCH_PAGED_BACKEND=name)()

    return provoke


@contextmanager
def _versions(**versions: str | None) -> Iterator[None]:
    """Let packages have these versions; None for those that are missing, as all others are."""

    def version(package: str) -> str:
        found = versions.get(package.replace("-", "_"))
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    with patch.object(importlib.metadata, "version", version), patch("importlib.util.find_spec", lambda name: None):
        yield


def _on_a_tpu() -> Any:
    return patch.object(tpu, "_in_reach", lambda device_type: device_type == "tpu")


def _on_a_neuron_core() -> Any:
    return patch.object(neuron, "_in_reach", lambda device_type: device_type == "neuron")


def _two_settings() -> None:
    known = dict(backends.discover())
    known["tpu"] = replace(known["tpu"], asked_for={"cpu": "TORCH_PAGED_TPU_INTERPRET=1"})
    with patch.object(backends, "discover", lambda: known):
        chosen(TORCH_PAGED_BACKEND="cpu")()


def _defined_twice() -> None:
    with patch.object(dispatch, "_library", None):
        dispatch.register()


def _library_that_does_not_load() -> None:
    with tempfile.NamedTemporaryFile(suffix=".so") as file, patch.object(cpu, "LIBRARY", Path(file.name)):
        cpu.load("cpu")


def _unknown_isa() -> Exception:
    code = """
import torch, torch_paged
try:
    torch_paged.merge_attention_states(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1))
except ValueError as error:
    print(error)
"""
    return ValueError(run_python(code, TORCH_PAGED_CPU_ISA="sse9").stdout.strip())


def _merge(info: backends.BackendInfo, *patches: Any) -> Callable[[], Any]:
    def provoke() -> None:
        with ExitStack() as stack:
            for change in patches:
                stack.enter_context(change())
            kernel_of(info, "merge_attention_states", build(MergeCase("merge")))

    return provoke


def _off(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("ImportError", f"torch_paged: {_SERVED}{text}", cause, remedy, provoke)


IMPORT = Group(
    "Importing, installing, settings",
    (
        Error(
            "ImportError",
            "torch_paged: TORCH_PAGED_BACKEND must be one of auto, <backends>, got <value>",
            "The variable names no backend.",
            "Unset it, or name one of these.",
            (chosen(TORCH_PAGED_BACKEND="gpu"),),
        ),
        Error(
            "ImportError",
            "torch_paged: <setting> must be 0 or 1, got <value>",
            "`TORCH_PAGED_DEBUG` or `TORCH_PAGED_LOG` has another value, such as `true`.",
            "Set it to 1 to switch it on; 0, an empty value and none switch it off.",
            (chosen(TORCH_PAGED_DEBUG="true"), chosen(TORCH_PAGED_LOG=" 1")),
        ),
        Error(
            "ImportError",
            "torch_paged: <setting> and <setting> contradict each other: unset one of them",
            "Two settings ask for different backends of one device.",
            "Keep one of them.",
            (_two_settings,),
        ),
        Error(
            "ImportError",
            "torch_paged: the ops of torch.ops.paged are already defined in this process, by libtorch_paged_schema.so "
            "or another library; load that one or import torch_paged, not both",
            "The library for processes without Python was loaded first, or another project uses the namespace.",
            "Do not load it in Python.",
            (_defined_twice,),
        ),
        Error(
            "ImportError",
            "torch_paged: <file> does not load (<error>); rebuild torch_paged here",
            "The C++ library was built for another machine or against a torch that differs too much.",
            "`pip install --no-build-isolation --force-reinstall torch_paged`.",
            (_library_that_does_not_load,),
        ),
        _off(
            "it needs torch >= 2.9, got <version>: upgrade torch",
            "The stable interface that the kernels are built on is newer than this torch.",
            "`pip install 'torch>=2.9'`.",
            asked_for("cpu", lambda: patch("torch.__version__", torch.torch_version.TorchVersion("2.8.0"))),
        ),
        _off(
            "this install has no C++ extension: reinstall with `pip install --no-build-isolation` and without "
            "TORCH_PAGED_NO_EXT, or set TORCH_PAGED_BACKEND=reference for slow kernels in plain PyTorch",
            "The package was installed without its library: TORCH_PAGED_NO_EXT was set, or this is the source folder.",
            "Reinstall; in the source folder run `make demo` or `python setup.py build_ext --inplace`.",
            asked_for("cpu", lambda: patch.object(cpu, "LIBRARY", Path("missing"))),
        ),
        _off(
            "it needs <package> >= <version>, which is not installed: <command>",
            "A package of the accelerator's stack is missing: jax, libtpu, torch_xla, nki, torch-neuronx.",
            _INSTALL,
            asked_for("tpu", _on_a_tpu, _versions),
            asked_for("neuron", _on_a_neuron_core, _versions),
        ),
        _off(
            "it needs nki >= <version>, which is not installed, and neuronx-cc <version> has only neuronxcc.nki, an "
            "older language: <command>",
            "The kernels are written in the NKI that is a package of its own.",
            _INSTALL,
            asked_for("neuron", _on_a_neuron_core, functools.partial(_versions, neuronx_cc="2.21")),
        ),
        _off(
            "it needs <package> >= <version>, got <version>: <command>",
            "A package of the accelerator's stack is too old.",
            _INSTALL,
            asked_for("tpu", _on_a_tpu, functools.partial(_versions, jax="0.4.1")),
            asked_for("neuron", _on_a_neuron_core, functools.partial(_versions, nki="0.1")),
        ),
        _off(
            "no tensor here is on a TPU<how>, or set TORCH_PAGED_TPU_INTERPRET=1 to interpret the kernels",
            "Neither torch_xla nor torch_tpu is there, or they found no TPU.",
            _INSTALL,
            asked_for(
                "tpu",
                lambda: patch.object(tpu, "_in_reach", lambda kind: False),
                lambda: _versions(jax="9", libtpu="9"),
            ),
        ),
        _off(
            "no tensor here is on a NeuronCore: <command>, or set TORCH_PAGED_NKI_SIM=1 to simulate kernels",
            "torch-neuronx is not there, or found no NeuronCore.",
            _INSTALL,
            asked_for("neuron", lambda: patch.object(neuron, "_in_reach", lambda kind: False)),
        ),
        _off(
            "it needs Trainium 2 or 3 (trn2, trn3), got <machine>: set NEURON_PLATFORM_TARGET_OVERRIDE",
            "The chip is another one, or its type cannot be read.",
            "Run on Trainium 2 or 3; where it is one, name it in the variable.",
            asked_for(
                "neuron",
                _on_a_neuron_core,
                lambda: _versions(nki="9", neuronx_cc="9", torch_neuronx="9"),
                lambda: patch.dict(os.environ, {"NEURON_PLATFORM_TARGET_OVERRIDE": "trn1"}),
            ),
        ),
        Error(
            "NotImplementedError",
            "torch_paged: backend 'neuron' is off because <reason>",
            "The generation was changed after the import to one that the kernels do not run on.",
            "Set NEURON_PLATFORM_TARGET_OVERRIDE to trn2 or trn3.",
            (
                lambda: _in_environment(
                    lambda: neuron_support.generation(False), NEURON_PLATFORM_TARGET_OVERRIDE="trn1"
                ),
            ),
        ),
        Error(
            "ValueError",
            "torch_paged: TORCH_PAGED_CPU_ISA must name kernels that this machine runs (<names>), got <value>",
            "The variable names an instruction set that is unknown or not here.",
            "Unset it.",
            (_unknown_isa,),
        ),
        Error(
            "ValueError",
            "torch_paged: TORCH_PAGED_TPU_INTERPRET must be 0, 1 or a list of <words>, but not on_wait with eager, "
            "got <value>",
            "The variable has an unknown word, or two that contradict each other.",
            "Set it to 1.",
            (_merge(tpu.BACKEND, lambda: patch.object(tpu_support, "SIMULATION", frozenset({"quick"}))),),
        ),
        Error(
            "ValueError",
            "torch_paged: TORCH_PAGED_NKI_SIM must be 0 or 1, got <value>",
            "The variable has another value.",
            "Set it to 1.",
            (_merge(neuron.BACKEND, lambda: patch.object(neuron_support, "_asked", "yes")),),
        ),
        Error(
            "ValueError",
            "torch_paged: NEURON_LOGICAL_NC_CONFIG must be 1 or 2, got <value>",
            "Kernels run on one core, or on two that share memory.",
            "Set it to what the Neuron runtime uses.",
            (_merge(neuron.BACKEND, lambda: patch.dict(os.environ, {"NEURON_LOGICAL_NC_CONFIG": "3"})),),
        ),
    ),
)


def _in_environment(call: Callable[[], Any], **settings: str) -> Any:
    with patch.dict(os.environ, settings):
        return call()
