"""The errors of devices without a backend, and what single backends refuse."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from backend_provocations import kernel_of
from error_table import Error, Group

from torch_paged import backends, dispatch
from torch_paged.backends import neuron, tpu
from torch_paged.backends.tpu import support as tpu_support
from torch_paged.testing import AttentionCase, MergeCase, build


def _device_without_backend() -> None:
    dispatch._no_backend_kernel("copy_blocks")(torch.ones(1, device="meta"))


def _off_device() -> None:
    tensor = SimpleNamespace(device=SimpleNamespace(type="tpu"))
    with patch("torch_paged.dispatch.torch.Tensor", SimpleNamespace):
        dispatch._no_backend_kernel("copy_blocks")(tensor)


def _out_of_reach() -> None:
    with patch.dict(dispatch._served, {"cpu": "tpu"}):
        _off_device()


def refused(info: backends.BackendInfo, case: AttentionCase | MergeCase, **changes: Any) -> Callable[[], Any]:
    """Return a call of a backend's kernel that it refuses."""

    def provoke() -> None:
        arguments = build(case)
        for name, change in changes.items():
            arguments[name] = change(arguments[name])
        kernel_of(info, "merge_attention_states" if isinstance(case, MergeCase) else case.op, arguments)

    return provoke


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


def _refusal(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("NotImplementedError", text, cause, remedy, provoke)


DEVICES = Group(
    "Devices and what a backend refuses",
    (
        _refusal(
            "<op>: no backend serves device <device> (available backends: <names>); move the tensors to a served "
            "device, or see `python -m torch_paged.collect_env`",
            "No backend is written for this device.",
            "Move the tensors, or [add a backend](../torch_paged/backends/README.md).",
            _device_without_backend,
        ),
        _refusal(
            "<op>: no backend serves device <device> (available backends: <names>); backend <name> is off because "
            "<reason>",
            "There is a backend for the device, but it cannot run here.",
            "Do what the reason says.",
            _off_device,
        ),
        _refusal(
            "<op>: no backend serves device <device> (available backends: <names>); backend <name> serves <devices> "
            "here",
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
            "<op>: backend 'tpu' does not support latent caches (keys and values); expand the latent rows into keys "
            "and values",
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
            "blocks, or a cache for each group of layers",
            "Rows are counted in 32 bits there.",
            "Cut the cache.",
            _huge("copy_blocks", tpu.BACKEND, 2**31),
            _huge("copy_blocks", neuron.BACKEND, 2**30),
        ),
        _refusal(
            "<op>: backend 'tpu' does not support block_tables with M = <n> (at most <n>); pass fewer columns, or use "
            "a larger block size",
            "A row of the table has to fit into scalar memory.",
            "Pass only the columns that the longest sequence needs.",
            _wide_table,
        ),
        _refusal(
            "<op>: backend 'tpu' does not support kv_cache with <n> bytes in a block on <chip> (at most <n>, as VMEM "
            "holds two blocks and what is computed of them); use a smaller block size",
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
            "<op>: backend 'neuron' does not support kv_cache with S = <n> (a power of two from <n> on); allocate it "
            "with such a block size",
            "Other block sizes do not tile.",
            "Take 16 or more.",
            refused(neuron.BACKEND, AttentionCase("blocks", block_size=3)),
        ),
        _refusal(
            "<op>: backend 'neuron' does not support writes through torch_xla (what a kernel writes to its arguments "
            "is lost there); use TorchNeuron's device 'neuron', or write by torch ops",
            "torch_xla returns new tensors instead of writing in place.",
            "Use TorchNeuron.",
            _write_through_xla,
        ),
    ),
)
