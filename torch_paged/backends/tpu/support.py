"""What the TPU kernels do, what they refuse, and the settings of their interpreter. Imports no jax."""

import importlib
import importlib.metadata
import importlib.util
import math
import os

import torch

from torch_paged.backends import Arguments, Variant
from torch_paged.backends.tpu.block_sizes import CHIPS, Page

LIMITS = {
    "query dtypes": "float32, bfloat16",
    "cache dtypes": "the query's, int8, float8_e4m3fn, float8_e5m2",
    "scales": "per tensor, per head, per token and head",
    "head_dim, block size, H / KH": "head_dim stored as a multiple of 128; blocks of 8, 16, 32, 64 or 128; any H / KH",
    "cache strides": "contiguous",
    "latent caches": "no",
    "windows, chunks, soft caps, sinks, ALiBi": "yes",
    "masks, query positions, statistics": "yes",
    "batch-invariant results": "as interpreted",
    "bad values": "do no harm; raise with TORCH_PAGED_DEBUG=1",
    "run on hardware": "never: interpreted, and compiled for five chips without a TPU",
}
"""Feature -> what of it this backend does, for the table in the README."""

HEAD_DIM_MULTIPLE = 128
"""Lanes of a vector register: rows of another width would be laid out anew, whole cache by whole cache."""
BLOCK_SIZES = (8, 16, 32, 64, 128)
OLDEST = {"jax": (0, 7, 1), "libtpu": (0, 0, 21), "torch_xla": (2, 9), "torch_tpu": (0, 2)}
"""Package -> the oldest version that the kernels and bridges are tested with."""

_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
"""What the runtime calls a chip -> its name."""
INTERPRETED_CHIP = "v5e"
"""Whose block sizes interpreted kernels use."""
INTERPRET_VARIABLE = "TORCH_PAGED_TPU_INTERPRET"
INTERPRET_WORDS = ("on_wait", "eager", "races")
"""What ``INTERPRET_VARIABLE`` may list beside 0 and 1: when copies of memory happen, and the search for races."""
_asked = os.environ.get(INTERPRET_VARIABLE, "") or "0"
INTERPRETED = _asked != "0"
"""Serve CPU tensors by interpreted kernels."""
INTERPRET_SETTING = f"{INTERPRET_VARIABLE}={_asked}"
SIMULATION = frozenset(_asked.split(",")) - {"0", "1"}
"""Words of ``INTERPRET_WORDS``; none of them: the plain interpreter, which copies at once and is fast."""

_MAX_ROWS = 2**31
_MAX_COLUMNS = 2**17
"""Of a page table that attention reads: a row has to fit into scalar memory, 1 MiB, beside what else is there."""
_FLOAT16_ARGUMENTS = ("query", "key", "outs", "kv_cache")


def install_line() -> str:
    """Return how jax and libtpu are installed."""
    return "`pip install 'torch_paged[tpu]'`, or `pip install 'torch_paged[tpu-xla]'` beside torch_xla"


def missing(*packages: str) -> str | None:
    """Return why packages of ``OLDEST`` do not do, with the install line, or None."""
    for package in packages:
        oldest = ".".join(map(str, OLDEST[package]))
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"it needs {package} >= {oldest}, which is not installed: {install_line()}"
        if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < OLDEST[package]:
            return f"it needs {package} >= {oldest}, got {found}: {install_line()}"
    return None


def chip_of_kind(kind: str) -> str:
    """Return the name of the chip that the runtime calls ``kind``."""
    if kind not in _KINDS:
        known = ", ".join(dict.fromkeys(_KINDS.values()))
        raise NotImplementedError(
            f"torch_paged: backend 'tpu' does not support the chip {kind!r} ({known}); run on one of these"
        )
    return _KINDS[kind]


def wrong_setting() -> str | None:
    """Return why each call raises, where ``INTERPRET_VARIABLE`` says nothing that makes sense, or None."""
    unknown = SIMULATION - set(INTERPRET_WORDS)
    if not unknown and not {"on_wait", "eager"} <= SIMULATION:
        return None
    words = ", ".join(INTERPRET_WORDS)
    return f"{INTERPRET_VARIABLE} must be 0, 1 or a list of {words}, but not on_wait with eager, got {_asked!r}"


def refusal(op: str, arguments: Arguments) -> str | None:
    """Return why a valid call cannot be done, from shapes and dtypes alone, or None."""
    found = _unsupported(arguments)
    if found is None:
        return None
    thing, limits, remedy = found
    return f"{op}: backend 'tpu' does not support {thing} ({limits}); {remedy}"


def _unsupported(arguments: Arguments) -> tuple[str, str, str] | None:
    """Return what is not supported, what is, and what to do; None where the call can be done."""
    for name in _FLOAT16_ARGUMENTS:
        if arguments.get(name) is not None and arguments[name].dtype == torch.float16:
            return f"{name} of float16", "float32 or bfloat16", "convert it to bfloat16"
    kv_cache = arguments.get("kv_cache")
    if kv_cache is None:
        return None
    sides, _, _, block_size, stored_dim = kv_cache.shape
    allocate = "allocate it by torch_paged.cache.allocate_kv_cache(..., backend='tpu')"
    if sides == 1:
        return "latent caches", "keys and values", "expand the latent rows into keys and values"
    if stored_dim % HEAD_DIM_MULTIPLE:
        return f"kv_cache with DS = {stored_dim}", f"a multiple of {HEAD_DIM_MULTIPLE}", allocate
    if block_size not in BLOCK_SIZES:
        sizes = f"{', '.join(map(str, BLOCK_SIZES[:-1]))} or {BLOCK_SIZES[-1]}"
        return f"kv_cache with S = {block_size}", sizes, f"{allocate} and such a block size"
    if not kv_cache.is_contiguous():
        return f"kv_cache with strides {tuple(kv_cache.stride())}", "contiguous", "pass kv_cache.contiguous()"
    rows = math.prod(kv_cache.shape[:-1])
    if rows >= _MAX_ROWS:
        shape = f"kv_cache with 2 * N * KH * S = {rows}"
        return shape, "less than 2^31", "use fewer blocks, or a cache for each group of layers"
    if "query" in arguments and arguments["block_tables"].shape[1] > _MAX_COLUMNS:
        columns = f"block_tables with M = {arguments['block_tables'].shape[1]}"
        return columns, f"at most {_MAX_COLUMNS}", "pass fewer columns, or use a larger block size"
    return None


def chip_refusal(op: str, kv_cache: torch.Tensor | None, chip: str) -> str | None:
    """Return why a call that ``refusal`` lets pass cannot be done on a chip, or None."""
    if kv_cache is None or op not in ("paged_attention", "flash_attn_varlen"):
        return None
    _, _, kv_heads, block_size, stored_dim = kv_cache.shape
    num_bytes = Page(kv_heads, block_size, stored_dim, kv_cache.dtype.itemsize).vmem_bytes
    most = CHIPS[chip].kernel_bytes * 3 // 8
    if num_bytes <= most:
        return None
    return (
        f"{op}: backend 'tpu' does not support kv_cache with {num_bytes} bytes in a block on {chip} (at most {most}, "
        "as VMEM holds two blocks and what is computed of them); use a smaller block size"
    )


def variant(op: str, arguments: Arguments, device_type: str) -> Variant:
    """Return the kernel that a valid call runs."""
    name = _attention(op, arguments) if op in ("paged_attention", "flash_attn_varlen") else op
    on_xla = device_type == "xla" and importlib.util.find_spec("torch_xla") is not None
    interpreted = device_type == "cpu" or (on_xla and xla_client() == "CPU")
    return Variant(name=name, isa=INTERPRETED_CHIP if interpreted else "tpu", compiled=not interpreted)


def xla_client() -> str:
    """Return what torch_xla, which chooses it when it is imported, runs on: TPU, or CPU, where kernels are interpreted.

    Raises:
        NotImplementedError: It is something else.
    """
    client = str(importlib.import_module("torch_xla.runtime").device_type())
    if client not in ("TPU", "CPU"):
        raise NotImplementedError(
            f"torch_paged: backend 'tpu' does not support PJRT_DEVICE={client} (TPU, or CPU to interpret); set either"
        )
    return client


def _attention(op: str, arguments: Arguments) -> str:
    """Return the variant as the shapes tell it: one query per sequence, equally many, or both kinds in a batch."""
    if op == "paged_attention" or arguments["max_seqlen_q"] == 1:
        return "decode"
    sequences = arguments["cu_seqlens_q"].shape[0] - 1
    return "prefill" if arguments["query"].shape[0] >= sequences * arguments["max_seqlen_q"] else "mixed"
