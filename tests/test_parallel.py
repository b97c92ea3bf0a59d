"""Attention over two processes gives what it gives in one: kv heads, keys or query rows on each of them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_ranks import PARTS_OF_KEYS, Ranks

from torch_paged import dispatch
from torch_paged.testing import AttentionCase

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch was built without gloo"
    ),
    pytest.mark.skipif(dispatch.served().get("cpu") != "cpu", reason="another backend serves CPU tensors here"),
]

RAGGED: dict[str, Any] = {"context_lens": (100, 0, 17, 63, 1), "num_kv_heads": 4, "group": 3}
PREFILL: dict[str, Any] = {**RAGGED, "query_lens": (40, 0, 17, 5, 1)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8, a scale": {"cache_dtype": torch.int8, "scales_rank": 1},
    "int8, per head": {"cache_dtype": torch.int8, "scales_rank": 2, "dtype": torch.bfloat16},
    "e4m3, per token": {"cache_dtype": torch.float8_e4m3fn, "scales_rank": 4, "stored_dim": 128},
    "e5m2, per token": {"cache_dtype": torch.float8_e5m2, "scales_rank": 4, "dtype": torch.float16},
    "sinks, ALiBi, cap": {"sinks": True, "alibi": True, "logits_soft_cap": 3.0},
    "window, a mask for each head": {"sliding_window": 20, "mask": "heads", "alibi": True},
    "chunks, a mask for each kv head": {"attention_chunk": 32, "mask": "kv_heads"},
    "one mask": {"mask": "shared", "value_dim": 40},
    "one kv head": {"num_kv_heads": 1, "group": 6, "sinks": True, "mask": "kv_heads"},
    "latent": {"num_kv_heads": 1, "group": 6, "latent": True, "value_dim": 32},
}
LONG = AttentionCase("long", (2000, 700, 5), num_kv_heads=2, group=4, alibi=True, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


def case(shape: dict[str, Any], options: str) -> AttentionCase:
    return AttentionCase(options, **{**shape, **OPTIONS[options]})


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [RAGGED, PREFILL], ids=["decode", "prefill"])
def test_kv_heads(ranks: Ranks, shape: dict[str, Any], options: str) -> None:
    ranks.check("heads", case(shape, options))


@pytest.mark.parametrize("options", ["plain", "bfloat16", "sinks, ALiBi, cap", "e4m3, per token"])
def test_kv_heads_beside_new_keys(ranks: Ranks, options: str) -> None:
    new = {**PREFILL, "new_lens": PREFILL["query_lens"], "padding_rows": 3}
    ranks.check("heads", case(new, options))
    if "per token" not in options:
        ranks.check("heads", case({**new, "context_lens": None}, options))


@pytest.mark.parametrize("parts", PARTS_OF_KEYS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [RAGGED, PREFILL], ids=["decode", "prefill"])
def test_keys(ranks: Ranks, shape: dict[str, Any], options: str, parts: str) -> None:
    ranks.check("keys", case(shape, options), parts)


@pytest.mark.parametrize(
    "fields", [{"causal": False}, {"padding_rows": 3}, {"positions": "shuffled"}], ids=lambda fields: next(iter(fields))
)
def test_keys_of_other_rows(ranks: Ranks, fields: dict[str, Any]) -> None:
    ranks.check("keys", replace(case(PREFILL, "window, a mask for each head"), **fields), "two parts")


@pytest.mark.parametrize("check", [("heads",), ("keys", "one part"), ("keys", "two parts")], ids=" ".join)
def test_many_keys(ranks: Ranks, check: tuple[str, ...]) -> None:
    ranks.check(check[0], LONG, *check[1:])
    ranks.check(check[0], replace(LONG, query_lens=(70, 0, 5)), *check[1:])


@pytest.mark.parametrize(
    "options", ["plain", "bfloat16", "int8, per head", "e4m3, per token", "sinks, ALiBi, cap", "latent"]
)
def test_query_rows(ranks: Ranks, options: str) -> None:
    ranks.check("rows", case(PREFILL, options))
    ranks.check("rows", replace(case(PREFILL, options), sliding_window=20, padding_rows=3))


def test_a_fault_is_seen(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="rank 0:"):
        ranks.check("rows", "no case")
