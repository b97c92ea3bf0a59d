"""What the NKI kernels do, what they refuse, which stack and chip they need, and their settings. Imports no nki."""

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

from torch_paged.backends import Arguments, Variant

LIMITS = {
    "query dtypes": "float32, bfloat16, float16",
    "cache dtypes": "the query's, int8, float8_e4m3fn, float8_e5m2",
    "scales": "per tensor, per head, per token and head",
    "head_dim, block size, H / KH": "head_dim up to 256; blocks of a power of two of tokens from 8 on; any H / KH",
    "cache strides": "contiguous",
    "latent caches": "yes",
    "windows, chunks, soft caps, sinks, ALiBi": "yes",
    "masks, query positions, statistics": "yes",
    "batch-invariant results": "as simulated",
    "bad values": "do no harm; raise with TORCH_PAGED_DEBUG=1",
    "run on hardware": "never: simulated for Trainium 2 and 3",
}
"""Feature -> what of it this backend does, for the table in the README."""

OLDEST = {"nki": (0, 6), "neuronx-cc": (2, 27), "torch-neuronx": (2, 9)}
"""Distribution -> the oldest version whose documents the kernels and bridges are written from."""
SIMULATION_VARIABLE = "TORCH_PAGED_NKI_SIM"
_asked = os.environ.get(SIMULATION_VARIABLE, "") or "0"
SIMULATED = _asked != "0"
"""Serve CPU tensors by kernels on NKI's simulator."""
SIMULATION_SETTING = f"{SIMULATION_VARIABLE}={_asked}"
TARGET_VARIABLE, CORES_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE", "NEURON_LOGICAL_NC_CONFIG"
"""NKI's own: the generation to compile for, and the cores that share a kernel."""
SIMULATED_GENERATION = "trn3"
"""What NKI's simulator takes where ``TARGET_VARIABLE`` is unset."""

_GENERATIONS = {"trn2": "trn2", "gen3": "trn2", "trn3": "trn3", "gen4": "trn3"}
_INSTANCE = Path("/sys/devices/virtual/dmi/id/product_name")
"""Where an EC2 instance says its type, such as ``trn2.48xlarge``."""
_MAX_HEAD_DIM = 256
_MAX_MERGED_DIM = 8192
_SMALLEST_BLOCK = 8
_MAX_ROWS = 2**30
"""Rows of a cache: the kernels count them in int32, with room for marks."""
_WRITING = ("reshape_and_cache", "quantize_and_cache", "copy_blocks")


def install_line() -> str:
    """Return how the stack is installed."""
    return "`pip install 'torch_paged[neuron]' --extra-index-url https://pip.repos.neuron.amazonaws.com`"


def missing(*packages: str) -> str | None:
    """Return why distributions of ``OLDEST`` do not do, with the install line, or None.

    A module ``nki`` that no distribution brought, such as a simulator, counts as new enough.
    """
    for package in packages:
        needed = f"it needs {package} >= {'.'.join(map(str, OLDEST[package]))}"
        found = _version(package)
        if found is None and package == "nki" and importlib.util.find_spec("nki") is not None:
            continue
        if found is None and package == "neuronx-cc":  # what brings it, and in which form, is torch-neuronx's affair
            continue
        if found is None:
            compiler = _version("neuronx-cc") if package == "nki" else None
            older = f", and neuronx-cc {compiler} has only neuronxcc.nki, an older language" if compiler else ""
            return f"{needed}, which is not installed{older}: {install_line()}"
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST[package]:
            return f"{needed}, got {found}: {install_line()}"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of the Neuron stack that are installed."""
    return {package: _version(package) or "not installed" for package in OLDEST}


def wrong_generation(simulated: bool) -> str | None:
    """Return why the kernels do not run on the generation of this machine, or of the simulation, or None."""
    found = _named_generation(simulated)
    if found in _GENERATIONS:
        return None
    return f"it needs Trainium 2 or 3 (trn2, trn3), got {found or 'a machine of unknown type'}: set {TARGET_VARIABLE}"


def generation(simulated: bool) -> str:
    """Return the generation that kernels run on, ``"trn2"`` or ``"trn3"``."""
    found = _named_generation(simulated)
    if found not in _GENERATIONS:
        raise NotImplementedError(f"torch_paged: backend 'neuron' is off because {wrong_generation(simulated)}")
    return _GENERATIONS[found]


def _named_generation(simulated: bool) -> str:
    named = os.environ.get(TARGET_VARIABLE, "")
    if named or simulated:
        return named or SIMULATED_GENERATION
    instance = _INSTANCE.read_text().strip() if _INSTANCE.exists() else ""
    family = re.match(r"(trn|inf)\d+", instance)
    return family.group() if family else ""


def cores(simulated: bool) -> int:
    """Return the physical cores that share a kernel; unset, a simulation has one and a chip its runtime's two."""
    return int(os.environ.get(CORES_VARIABLE) or (1 if simulated else 2))


def wrong_setting() -> str | None:
    """Return why each call raises, where a setting says nothing that makes sense, or None."""
    if _asked not in ("0", "1"):
        return f"{SIMULATION_VARIABLE} must be 0 or 1, got {_asked!r}"
    asked_cores = os.environ.get(CORES_VARIABLE, "")
    if asked_cores not in ("", "1", "2"):
        return f"{CORES_VARIABLE} must be 1 or 2, got {asked_cores!r}"
    return None


def refusal(op: str, arguments: Arguments) -> str | None:
    """Return why a valid call cannot be done, from shapes, dtypes and devices alone, or None."""
    found = _unsupported(op, arguments)
    if found is None:
        return None
    thing, limits, remedy = found
    return f"{op}: backend 'neuron' does not support {thing} ({limits}); {remedy}"


def _unsupported(op: str, arguments: Arguments) -> tuple[str, str, str] | None:
    """Return what is not supported, what is, and what to do; None where the call can be done."""
    rows = arguments.get("query", arguments.get("key"))
    if rows is not None and rows.size(-1) > _MAX_HEAD_DIM:
        limit = f"at most {_MAX_HEAD_DIM}"
        return f"head_dim {rows.size(-1)}", limit, "run it on another backend"
    outs = arguments.get("outs")
    if outs is not None and outs.size(-1) > _MAX_MERGED_DIM:
        return f"outs with D = {outs.size(-1)}", f"at most {_MAX_MERGED_DIM}", "merge its lanes in parts"
    kv_cache = arguments.get("kv_cache")
    if kv_cache is None:
        return None
    block_size = kv_cache.size(3)
    if block_size < _SMALLEST_BLOCK or block_size & (block_size - 1):
        sizes = f"a power of two from {_SMALLEST_BLOCK} on"
        return f"kv_cache with S = {block_size}", sizes, "allocate it with such a block size"
    if not kv_cache.is_contiguous():
        return f"kv_cache with strides {tuple(kv_cache.stride())}", "contiguous", "pass kv_cache.contiguous()"
    rows_of_cache = kv_cache.shape[:-1].numel()
    if rows_of_cache >= _MAX_ROWS:
        thing = f"kv_cache with C * N * KH * S = {rows_of_cache}"
        return thing, "less than 2^30", "use fewer blocks, or a cache for each group of layers"
    if op in _WRITING and kv_cache.device.type == "xla":
        lost = "what a kernel writes to its arguments is lost there"
        return "writes through torch_xla", lost, "use TorchNeuron's device 'neuron', or write by torch ops"
    return None


def variant(op: str, arguments: Arguments, device_type: str) -> Variant:
    """Return the kernel that a valid call runs."""
    simulated = device_type == "cpu"
    name = _attention(op, arguments) if op in ("paged_attention", "flash_attn_varlen") else op
    return Variant(name=name, isa=generation(simulated), compiled=not simulated)


def _attention(op: str, arguments: Arguments) -> str:
    """Return the variant as the shapes tell it: one query per sequence, equally many, or both kinds in a batch."""
    if op == "paged_attention" or arguments["max_seqlen_q"] == 1:
        return "decode"
    sequences = arguments["cu_seqlens_q"].shape[0] - 1
    return "prefill" if arguments["query"].shape[0] >= sequences * arguments["max_seqlen_q"] else "mixed"
