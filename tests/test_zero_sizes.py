"""Every size of every op as nothing, also two at a time: what the reference gives, or the sentence of a rule."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_paged.contract.bounds import check_values
from torch_paged.contract.validate import validate
from torch_paged.testing import assert_stats
from torch_paged.testing.backends import REFERENCE, Backend
from torch_paged.testing.every_op import tensors_of, written

SIZES = {"T": 3, "B": 2, "H": 4, "KH": 2, "D": 8, "DV": 4, "N": 5, "S": 2, "M": 3, "P": 2, "L": 4, "Tk": 3, "C": 7}
"""The letters of the contract; L is the length of each sequence in the cache."""
_CACHED = "H KH D DV N S M L C"
LETTERS = {
    "paged_attention": f"B {_CACHED}",
    "paged_attention int8": f"B {_CACHED}",
    "flash_attn_varlen": f"T B {_CACHED}",
    "flash_attn_varlen int8": f"T B {_CACHED}",
    "flash_attn_varlen new": "T Tk B H KH D DV C",
    "flash_attn_varlen int8 new": f"T Tk B {_CACHED}",
    "reshape_and_cache": "T KH D DV N S",
    "quantize_and_cache int8": "T KH D DV N S",
    "copy_blocks": "P KH D N S",
    "gather_cache": "B KH D N S M L",
    "merge_attention_states": "P T H D",
}
"""Call -> the letters that it has: its op, int8 where the cache is quantised, and new where keys lie beside it."""


def _arguments(call: str, n: dict[str, int]) -> dict[str, Any]:
    """Return the arguments of a call of those sizes; all its numbers are zero, and masks hide nothing."""
    op, *kinds = call.split()
    shape = (2, n["N"], n["KH"], n["S"], n["D"])
    quantised = "int8" in kinds
    cache = torch.zeros(shape, dtype=torch.int8 if quantised else torch.float32)
    scales = torch.ones(shape[:4]) if quantised else None
    length = min(n["L"], n["M"] * n["S"]) if n["N"] else 0
    lengths = torch.full((n["B"],), length, dtype=torch.int32)
    tables = torch.zeros((n["B"], n["M"]), dtype=torch.int32)
    if op == "merge_attention_states":
        outs = torch.zeros(n["P"], n["T"], n["H"], n["D"])
        return {"outs": outs, "lses": torch.zeros(outs.shape[:3]), "sinks": None}
    if op == "copy_blocks":
        source, target = torch.arange(n["P"]), torch.arange(n["P"]) + 2
        return {"kv_cache": cache, "src_blocks": source, "dst_blocks": target, "kv_scales": None}
    if op in ("reshape_and_cache", "quantize_and_cache"):
        rows = {"key": torch.zeros(n["T"], n["KH"], n["D"]), "value": torch.zeros(n["T"], n["KH"], n["DV"])}
        return {**rows, "kv_cache": cache, "kv_scales": scales, "slot_mapping": torch.arange(n["T"])}
    dense = {"kv_cache": cache, "block_tables": tables, "context_lens": lengths, "kv_scales": scales}
    if op == "gather_cache":
        return {**dense, "max_len": length, "starts": None}
    names = ("sinks", "alibi_slopes", "softmax_scale", "sliding_window", "attention_chunk")
    options: dict[str, Any] = {**dict.fromkeys(names), "logits_soft_cap": 0.0, "value_dim": n["DV"]}
    options["attn_mask"] = torch.ones(n["B"] if op == "paged_attention" else n["T"], n["C"], dtype=torch.bool)
    if op == "paged_attention":
        return {"query": torch.zeros(n["B"], n["H"], n["D"]), **dense, **options}
    new: dict[str, Any] = dict.fromkeys(("key", "value", "cu_seqlens_k"))
    longest = length
    if "new" in kinds:
        rows = {"key": torch.zeros(n["Tk"], n["KH"], n["D"]), "value": torch.zeros(n["Tk"], n["KH"], n["DV"])}
        new = {**rows, "cu_seqlens_k": _all_of_the_first(n["Tk"], n["B"])}
        if not quantised:
            dense, longest = dict.fromkeys(dense), 0
        longest += n["Tk"]
    return {
        "query": torch.zeros(n["T"], n["H"], n["D"]),
        "cu_seqlens_q": _all_of_the_first(n["T"], n["B"]),
        **new,
        "query_positions": None,
        "causal": True,
        **dense,
        "max_seqlen_q": n["T"],
        "max_seqlen_k": longest,
        **options,
    }


def _all_of_the_first(tokens: int, num_seqs: int) -> Tensor:
    """Return (B + 1,) prefix sums: all tokens are the first sequence's; without a sequence, padding."""
    return torch.tensor([0] + [tokens] * num_seqs, dtype=torch.int32)


@pytest.mark.parametrize("call", LETTERS)
def test_nothing_of_it(backend: Backend, call: str) -> None:
    op, letters = call.split()[0], LETTERS[call].split()
    attention = op in ("paged_attention", "flash_attn_varlen")
    taken = 0
    for absent in (*combinations(letters, 1), *combinations(letters, 2)):
        sizes = SIZES | dict.fromkeys(absent, 0)
        arguments, expected = _arguments(call, sizes), _arguments(call, sizes)
        sentence = _broken_rule(op, arguments)
        if sentence is not None:
            with pytest.raises(ValueError) as caught:
                backend(op, arguments)
            assert str(caught.value) == sentence
            continue
        taken += 1
        results = tensors_of(backend(op, arguments, stats=attention))
        for actual, wanted in zip(results, tensors_of(REFERENCE(op, expected, stats=attention)), strict=True):
            _assert_equal(actual, wanted)
        for actual, wanted in zip(written(op, arguments), written(op, expected), strict=True):
            _assert_equal(actual.float(), wanted.float())
    assert taken, "every call was refused"


def _broken_rule(op: str, arguments: dict[str, Any]) -> str | None:
    try:
        validate(op, arguments)
        check_values(op, arguments)
    except ValueError as error:
        return str(error)
    return None


def _assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert_stats(actual, expected.double())
