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

SIZES = {"T": 3, "B": 2, "H": 4, "KH": 2, "D": 8, "N": 5, "S": 2, "M": 3, "P": 2, "L": 4}
"""The letters of the contract; L is the length of each sequence."""
LETTERS = {
    "paged_attention": "B H KH D N S M L",
    "flash_attn_varlen": "T B H KH D N S M L",
    "reshape_and_cache": "T KH D N S",
    "quantize_and_cache": "T KH D N S",
    "copy_blocks": "P KH D N S",
    "gather_cache": "B KH D N S M L",
    "merge_attention_states": "P T H D",
}


def _arguments(op: str, n: dict[str, int]) -> dict[str, Any]:
    """Return a call of those sizes; all its numbers are zero."""
    shape = (2, n["N"], n["KH"], n["S"], n["D"])
    quantised = op == "quantize_and_cache"
    cache = torch.zeros(shape, dtype=torch.int8 if quantised else torch.float32)
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
        rows, slots = torch.zeros(n["T"], n["KH"], n["D"]), torch.arange(n["T"])
        scales = torch.ones(shape[:4]) if quantised else None
        return {"key": rows, "value": rows, "kv_cache": cache, "kv_scales": scales, "slot_mapping": slots}
    dense = {"kv_cache": cache, "block_tables": tables, "context_lens": lengths, "kv_scales": None}
    if op == "gather_cache":
        return {**dense, "max_len": length, "starts": None}
    names = ("sinks", "alibi_slopes", "attn_mask", "softmax_scale", "sliding_window", "attention_chunk", "value_dim")
    options: dict[str, Any] = {**dict.fromkeys(names), "logits_soft_cap": 0.0}
    if op == "paged_attention":
        return {"query": torch.zeros(n["B"], n["H"], n["D"]), **dense, **options}
    cu_seqlens = torch.zeros(n["B"] + 1, dtype=torch.int32)
    cu_seqlens[1:] = n["T"]  # all tokens are the first sequence's; without a sequence, padding
    new = {"key": None, "value": None, "cu_seqlens_k": None, "query_positions": None, "causal": True}
    longest = {"max_seqlen_q": n["T"], "max_seqlen_k": length}
    return {
        "query": torch.zeros(n["T"], n["H"], n["D"]),
        "cu_seqlens_q": cu_seqlens,
        **new,
        **dense,
        **longest,
        **options,
    }


@pytest.mark.parametrize("op", LETTERS)
def test_nothing_of_it(backend: Backend, op: str) -> None:
    letters = LETTERS[op].split()
    attention = op in ("paged_attention", "flash_attn_varlen")
    taken = 0
    for absent in (*combinations(letters, 1), *combinations(letters, 2)):
        sizes = SIZES | dict.fromkeys(absent, 0)
        arguments, expected = _arguments(op, sizes), _arguments(op, sizes)
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
