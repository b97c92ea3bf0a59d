"""The errors of importing, of settings, and of what single backends refuse."""

import functools
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from error_table import Error, Group

from torch_paged import backends, dispatch
from torch_paged.backends import cpu, neuron, tpu
from torch_paged.backends.neuron import support as neuron_support
from torch_paged.backends.python_kernels import python_kernels
from torch_paged.backends.tpu import support as tpu_support
from torch_paged.testing import AttentionCase, MergeCase, build
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


def _device_without_backend() -> None:
    dispatch._no_backend_kernel("copy_blocks")(torch.ones(1, device="meta"))


def _off_device() -> None:
    tensor = SimpleNamespace(device=SimpleNamespace(type="tpu"))
    with patch("torch_paged.dispatch.torch.Tensor", SimpleNamespace):
        dispatch._no_backend_kernel("copy_blocks")(tensor)


def _out_of_reach() -> None:
    with patch.dict(dispatch._served, {"cpu": "tpu"}):
        _off_device()


def _unknown_isa() -> Exception:
    code = """
import torch, torch_paged
try:
    torch_paged.merge_attention_states(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1))
except ValueError as error:
    print(error)
"""
    return ValueError(run_python(code, TORCH_PAGED_CPU_ISA="sse9").stdout.strip())


def kernel_of(info: backends.BackendInfo, op: str, arguments: dict[str, Any]) -> None:
    """Call the kernel of a backend in Python up to the point where it would compute."""
    python_kernels(info, lambda name, values: None)[op](**arguments)


def _merge(info: backends.BackendInfo, *patches: Any) -> Callable[[], Any]:
    def provoke() -> None:
        with ExitStack() as stack:
            for change in patches:
                stack.enter_context(change())
            kernel_of(info, "merge_attention_states", build(MergeCase("merge")))

    return provoke


def refused(info: backends.BackendInfo, case: AttentionCase | MergeCase, **changes: Any) -> Callable[[], Any]:
    """Return a call of a backend's kernel that it refuses."""

    def provoke() -> None:
        arguments = build(case)
        for name, change in changes.items():
            arguments[name] = change(arguments[name])
        kernel_of(info, "merge_attention_states" if isinstance(case, MergeCase) else case.op, arguments)

    return provoke


def _many_blocks(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda cache: torch.empty(1, dtype=cache.dtype).expand(2, count, 2, 16, 128)


def _huge(op: str, info: backends.BackendInfo, rows: int) -> Callable[[], Any]:
    """Return a call on a cache of that many rows, without its memory."""

    def provoke() -> None:
        cache = torch.empty(2, rows // 64, 2, 16, 128, device="meta")
        ids = torch.empty(1, dtype=torch.int64, device="meta")
        kernel_of(info, op, {"kv_cache": cache, "src_blocks": ids, "dst_blocks": ids})

    return provoke


def _wide_table() -> None:
    arguments = build(AttentionCase("wide", head_dim=128))
    arguments["block_tables"] = arguments["block_tables"][:, :1].expand(-1, 2**17 + 1)
    kernel_of(tpu.BACKEND, "paged_attention", arguments)


def _write_through_xla() -> None:
    cache = SimpleNamespace(
        device=SimpleNamespace(type="xla"),
        shape=torch.Size((2, 1, 1, 8, 8)),
        size=lambda axis: 8,
        is_contiguous=lambda: True,
    )
    with patch("torch_paged.backends.python_kernels.validate.validate"):
        kernel_of(neuron.BACKEND, "copy_blocks", {"kv_cache": cache, "src_blocks": None, "dst_blocks": None})


def _block_beyond_vmem() -> None:
    from torch_paged.backends.tpu.export import program_of

    cache = torch.empty(2, 1, 128, 128, 1024, device="meta")
    call = SimpleNamespace(function="paged_attention", kv_cache=cache)
    program_of(call, "tpu", "v5e")  # type: ignore[arg-type]


def _many_tokens() -> None:
    import jax.numpy as jnp

    from torch_paged.backends.tpu.block_sizes import CHIPS
    from torch_paged.backends.tpu.varlen import _attend_tiles

    def array(*shape: int) -> Any:
        return SimpleNamespace(shape=shape, dtype=jnp.dtype("float32"))

    cache = [array(2, 1, 1, 16, 128), array(1, 4), array(1)]
    options: dict[str, Any] = {"max_seqlen_q": 2**25, "stats": False, "value_dim": 128, "chip": CHIPS["v5e"]}
    _attend_tiles(array(2**25, 1, 128), None, None, array(2), None, *cache, *[None] * 6, **options)


def _pjrt_device() -> None:
    with patch("importlib.import_module", lambda name: SimpleNamespace(device_type=lambda: "GPU")):
        tpu_support.xla_client()


def _off(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("ImportError", f"torch_paged: {_SERVED}{text}", cause, remedy, provoke)


def _refusal(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("NotImplementedError", text, cause, remedy, provoke)


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
            "torch_paged: <setting> and <setting> contradict each other: unset one of them",
            "Two settings ask for different backends of one device.",
            "Keep one of them.",
            (_two_settings,),
        ),
        Error(
            "ImportError",
            "torch_paged: the ops of torch.ops.paged are already defined in this process, by "
            "libtorch_paged_schema.so or "
            "another library; load that one or import torch_paged, not both",
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
            "it needs nki >= <version>, which is not installed, and neuronx-cc <version> has only "
            "neuronxcc.nki, an older "
            "language: <command>",
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
            "torch_paged: TORCH_PAGED_TPU_INTERPRET must be 0, 1 or a list of <words>, but not on_wait with "
            "eager, got "
            "<value>",
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
DEVICES = Group(
    "Devices and what a backend refuses",
    (
        _refusal(
            "<op>: no backend serves device <device> (available backends: <names>); move the tensors to a "
            "served device, or "
            "see `python -m torch_paged.collect_env`",
            "No backend is written for this device.",
            "Move the tensors, or [add a backend](../torch_paged/backends/README.md).",
            _device_without_backend,
        ),
        _refusal(
            "<op>: no backend serves device <device> (available backends: <names>); backend <name> is off "
            "because <reason>",
            "There is a backend for the device, but it cannot run here.",
            "Do what the reason says.",
            _off_device,
        ),
        _refusal(
            "<op>: no backend serves device <device> (available backends: <names>); backend <name> serves "
            "<devices> here",
            "A setting gave the backend to another device.",
            "Unset it, or move the tensors.",
            _out_of_reach,
        ),
        _refusal(
            "<op>: backend 'tpu' does not support <argument> of float16 (float32 or bfloat16); convert it to bfloat16",
            "TPUs have no float16.",
            "Load the model in bfloat16.",
            refused(tpu.BACKEND, MergeCase("half", dtype=torch.float16)),
        ),
        _refusal(
            "<op>: backend 'tpu' does not support latent caches (keys and values); expand the latent rows into "
            "keys and "
            "values",
            "There is no kernel for them.",
            "Use an expanded cache, or another backend.",
            refused(tpu.BACKEND, AttentionCase("latent", latent=True, value_dim=32)),
        ),
        _refusal(
            "<op>: backend 'tpu' does not support kv_cache with DS = <n> (a multiple of 128); <what to do>",
            "Rows are whole vector registers.",
            "`allocate_kv_cache(..., backend='tpu')` rounds up.",
            refused(tpu.BACKEND, AttentionCase("narrow")),
        ),
        _refusal(
            "<op>: backend 'tpu' does not support kv_cache with S = <n> (<sizes>); <what to do>",
            "Other block sizes do not tile.",
            "Take 16 or more.",
            refused(tpu.BACKEND, AttentionCase("blocks", head_dim=128, block_size=3)),
        ),
        _refusal(
            "<op>: backend <name> does not support kv_cache with strides <strides> (contiguous); pass "
            "kv_cache.contiguous()",
            "Accelerators copy whole blocks.",
            "Allocate the cache contiguous: a copy would not be written through.",
            refused(tpu.BACKEND, AttentionCase("strides", head_dim=128, layout="nhd")),
            refused(neuron.BACKEND, AttentionCase("strides", layout="nhd")),
        ),
        _refusal(
            "<op>: backend <name> does not support kv_cache with <factors> = <n> (less than <limit>); use fewer "
            "blocks, or a "
            "cache for each group of layers",
            "Rows are counted in 32 bits there.",
            "Cut the cache.",
            _huge("copy_blocks", tpu.BACKEND, 2**31),
            _huge("copy_blocks", neuron.BACKEND, 2**30),
        ),
        _refusal(
            "<op>: backend 'tpu' does not support block_tables with M = <n> (at most <n>); pass fewer columns, "
            "or use a larger "
            "block size",
            "A row of the table has to fit into scalar memory.",
            "Pass only the columns that the longest sequence needs.",
            _wide_table,
        ),
        _refusal(
            "<op>: backend 'tpu' does not support kv_cache with <n> bytes in a block on <chip> (at most <n>, as "
            "VMEM holds two "
            "blocks and what is computed of them); use a smaller block size",
            "A block of all heads is copied at once.",
            "Take a smaller block size.",
            _block_beyond_vmem,
        ),
        _refusal(
            "flash_attn_varlen: backend 'tpu' does not support <n> query tokens beside block tables of <n> columns "
            "(<n> words of scalar memory); pass fewer tokens at a time",
            "The plan of a call has to fit into scalar memory.",
            "Cut the prefill into chunks.",
            _many_tokens,
        ),
        _refusal(
            "torch_paged: backend 'tpu' does not support the chip <name> (<names>); run on one of these",
            "The tiling of this chip is unknown.",
            "Run on one that is named.",
            lambda: tpu_support.chip_of_kind("TPU v2"),
        ),
        _refusal(
            "torch_paged: backend 'tpu' does not support PJRT_DEVICE=<name> (TPU, or CPU to interpret); set either",
            "torch_xla was started for another device.",
            "Set PJRT_DEVICE before torch_xla is imported.",
            _pjrt_device,
        ),
        _refusal(
            "<op>: backend 'neuron' does not support head_dim <n> (at most <n>); run it on another backend",
            "A row has to fit into two halves of the partitions.",
            "Use another backend.",
            refused(neuron.BACKEND, AttentionCase("wide", head_dim=320)),
        ),
        _refusal(
            "<op>: backend 'neuron' does not support outs with D = <n> (at most <n>); merge its lanes in parts",
            "A row of every part has to fit into SBUF.",
            "Slice `outs` along D; the weights are the same for all lanes.",
            refused(neuron.BACKEND, MergeCase("wide", head_dim=8200, tokens=1, num_heads=1)),
        ),
        _refusal(
            "<op>: backend 'neuron' does not support kv_cache with S = <n> (a power of two from <n> on); "
            "allocate it with "
            "such a block size",
            "Other block sizes do not tile.",
            "Take 16 or more.",
            refused(neuron.BACKEND, AttentionCase("blocks", block_size=3)),
        ),
        _refusal(
            "<op>: backend 'neuron' does not support writes through torch_xla (what a kernel writes to its "
            "arguments is lost "
            "there); use TorchNeuron's device 'neuron', or write by torch ops",
            "torch_xla returns new tensors instead of writing in place.",
            "Use TorchNeuron.",
            _write_through_xla,
        ),
    ),
)


def _in_environment(call: Callable[[], Any], **settings: str) -> Any:
    with patch.dict(os.environ, settings):
        return call()
