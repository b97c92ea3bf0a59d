"""What the CPU kernels do with a call: which variant on which instruction set. They do everything that is valid."""

import ctypes
from functools import cache
from pathlib import Path

from torch_paged.backends import Arguments, Variant

_ATTENTION = ("paged_attention", "flash_attn_varlen")


@cache
def isa() -> str:
    """Return the instruction set that the kernels use: ``"avx512"``, ``"avx2"`` or ``"generic"``."""
    library = ctypes.CDLL(str(Path(__file__).parents[2] / "_C.abi3.so"))
    library.torch_paged_isa.restype = ctypes.c_char_p
    return str(library.torch_paged_isa().decode())


def refusal(op: str, arguments: Arguments) -> str | None:
    """Return None: every valid call is supported."""
    return None


def variant(op: str, arguments: Arguments) -> Variant:
    """Return the kernel that a valid call would run.

    One query per sequence is ``"decode"``; more than one in every sequence that has a full share of the rows is
    ``"prefill"``; a ragged batch is ``"mixed"``.
    """
    name = attention_variant(op, arguments) if op in _ATTENTION else op
    return Variant(name=name, isa=isa(), compiled=True)


def attention_variant(op: str, arguments: Arguments) -> str:
    """Return ``"decode"``, ``"prefill"`` or ``"mixed"`` from the shapes alone."""
    if op == "paged_attention" or arguments["max_seqlen_q"] <= 1:
        return "decode"
    sequences = arguments["cu_seqlens_q"].shape[0] - 1
    full = arguments["query"].shape[0] >= sequences * arguments["max_seqlen_q"]
    return "prefill" if full else "mixed"
