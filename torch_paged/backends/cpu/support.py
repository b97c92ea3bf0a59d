"""What the CPU kernels do, and which of them a call runs. They do everything that the contract calls valid."""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

from torch_paged.backends import Arguments, Variant

LIBRARY = Path(__file__).parents[2] / "_C.abi3.so"

LIMITS = {
    "query dtypes": "float32, bfloat16, float16",
    "cache dtypes": "the query's, int8, float8_e4m3fn, float8_e5m2",
    "scales": "per tensor, per head, per token and head",
    "head_dim, block size, H / KH": "any",
    "cache strides": "any with a unit last stride",
    "latent caches": "yes",
    "windows, chunks, soft caps, sinks, ALiBi": "yes",
    "masks, query positions, statistics": "yes",
    "batch-invariant results": "yes",
    "bad values": "raise before the first write",
    "run on hardware": "x86_64 with AVX-512 (AVX2 and generic kernels there too); aarch64 in an emulator only",
}
"""Feature -> what of it this backend does, for the table in the README."""

MAX_DIRECT_ROWS = 16
"""Query rows per kv head up to which keys are used in place (``kMaxDirectRows`` of csrc_shims/cpu/plan.h)."""


def isa() -> str | None:
    """Return the kernels in use (``"avx512"`` ...), or None where the wanted ones do not run here.

    ``"not loaded"`` where another backend serves the CPU: opening the library would bind its kernels instead.
    """
    return _isa() if str(LIBRARY.resolve()) in torch.ops.loaded_libraries else "not loaded"


@cache
def _isa() -> str | None:
    library = ctypes.CDLL(str(LIBRARY))
    library.torch_paged_isa.restype = ctypes.c_char_p
    name = library.torch_paged_isa()
    return None if name is None else str(name.decode())


def wrong_setting() -> str | None:
    """Return why each call raises, where the kernels that the environment asks for do not run here, or None."""
    if isa() is not None:
        return None
    asked = os.environ.get("TORCH_PAGED_CPU_ISA")
    return f"TORCH_PAGED_CPU_ISA must name kernels that this machine runs, got {asked!r}"


def refusal(op: str, arguments: Arguments) -> str | None:
    """Return None for every valid call, unless the kernels that the environment asks for do not run here."""
    reason = wrong_setting()
    return None if reason is None else f"torch_paged: {reason}"


def variant(op: str, arguments: Arguments, device_type: str) -> Variant:
    """Return the kernel that a valid call runs."""
    name = _attention(op, arguments) if op in ("paged_attention", "flash_attn_varlen") else op
    return Variant(name=name, isa=isa() or "none", compiled=True)


def _attention(op: str, arguments: Arguments) -> str:
    """Return the variant as the shapes tell it.

    A sequence with few query rows per kv head is attended to in place (``"decode"``), any other in packed tiles
    (``"prefill"``, also for one token of many heads); a batch that may hold both is ``"mixed"``.
    """
    query, kv_cache = arguments["query"], arguments["kv_cache"]
    kv_heads = kv_cache.shape[2] if kv_cache is not None else arguments["key"].shape[1]
    group = query.shape[1] // kv_heads
    if group > MAX_DIRECT_ROWS:
        return "prefill"
    if op == "paged_attention" or arguments["max_seqlen_q"] * group <= MAX_DIRECT_ROWS:
        return "decode"
    sequences = arguments["cu_seqlens_q"].shape[0] - 1
    return "prefill" if query.shape[0] >= sequences * arguments["max_seqlen_q"] else "mixed"
