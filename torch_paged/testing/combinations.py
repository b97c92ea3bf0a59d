"""Many cases at once: random full combinations of options, and a small set that covers every pair of options."""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from torch_paged.testing.cases import AttentionCase

FACTORS: dict[str, tuple[Any, ...]] = {
    "source": ("decode", "cache", "new", "both"),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "storage": (
        None,
        (torch.int8, 1),
        (torch.int8, 2),
        (torch.int8, 4),
        (torch.float8_e4m3fn, 1),
        (torch.float8_e4m3fn, 2),
        (torch.float8_e4m3fn, 4),
        (torch.float8_e5m2, 1),
        (torch.float8_e5m2, 2),
        (torch.float8_e5m2, 4),
    ),
    "contexts": ("short", "split"),
    "head_dim": (64, 1, 3, 17, 40, 80, 96, 128, 256, 576),
    "heads": ((2, 4), (2, 1), (1, 8), (3, 3), (2, 17), (1, 71), (1, 300)),
    "block_size": (16, 1, 3, 32, 128),
    "values": ("same", "cut", "latent"),
    "sinks": (False, True),
    "alibi": (False, True),
    "mask": (None, "shared", "kv_heads", "heads"),
    "positions": (None, "shuffled", "anywhere"),
    "softmax_scale": (None, 0.3),
    "logits_soft_cap": (0.0, 5.0),
    "causal": (True, False),
    "sliding_window": (None, 1, 7, 64),
    "attention_chunk": (None, 5, 16),
    "layout": ("contiguous", "nhd", "strided"),
    "fused_rows": (False, True),
    "padded_dim": (False, True),
    "shared_blocks": (False, True),
    "padding_rows": (0, 3),
}
"""Options of the attention ops and the values that combine; the first value is the neutral one."""

_Pair = tuple[tuple[str, Any], tuple[str, Any]]  # sorted by name
_PLAIN_FIELDS = (
    "dtype",
    "head_dim",
    "block_size",
    "sinks",
    "alibi",
    "mask",
    "positions",
    "softmax_scale",
    "logits_soft_cap",
    "causal",
    "sliding_window",
    "attention_chunk",
    "layout",
    "fused_rows",
    "shared_blocks",
    "padding_rows",
)
_MEANINGLESS: dict[str, tuple[str, ...]] = {
    "new": ("storage", "layout", "padded_dim", "shared_blocks"),
    "decode": ("positions", "causal", "padding_rows"),
}
_CONTEXT_LENS = (0, 1, 15, 16, 17, 33, 63, 100)
_SPLIT_LENS = (513, 700, 2100)  # beyond the keys of one partial result, of few rows and of tiles
_QUERY_LENS = (0, 1, 2, 15, 16, 17, 40)
_FEW_QUERY_LENS = (0, 1, 2, 3)


def random_case(seed: int) -> AttentionCase:
    """Draw a full combination of options, key source, cache dtype and lengths."""
    return draw_case(random.Random(seed), f"random_{seed}", FACTORS)


def draw_case(rng: random.Random, name: str, factors: Mapping[str, tuple[Any, ...]]) -> AttentionCase:
    """Draw a full combination of these values of all ``FACTORS``, and lengths."""
    choice = {name: rng.choice(values) for name, values in factors.items()}
    if choice["source"] == "new" and choice["values"] == "latent":
        choice["values"] = "same"
    return _case(name, choice | _neutral(_MEANINGLESS.get(choice["source"], ())), rng)


def option_pairs() -> Iterator[AttentionCase]:
    """Yield cases that together contain every pair of values of every two factors that can occur together."""
    rng = random.Random(0)
    missing = {
        ((a, x), (b, y))
        for a, b in combinations(sorted(FACTORS), 2)
        for x in FACTORS[a]
        for y in FACTORS[b]
        if _valid(_neutral(FACTORS) | {"source": "both", a: x, b: y})
    }
    number = 0
    while missing:
        choice = max((_draw(rng, missing) for _ in range(8)), key=lambda drawn: len(missing & _pairs(drawn)))
        missing -= _pairs(choice)
        yield _case(f"pairs_{number}", choice, rng)
        number += 1


def _draw(rng: random.Random, missing: set[_Pair]) -> dict[str, Any]:
    """Return a valid choice that contains at least one missing pair and greedily more."""
    choice: dict[str, Any] = dict(rng.choice(sorted(missing, key=repr)))
    neutral = _neutral(FACTORS) | {"source": "both"}
    for name in rng.sample(sorted(FACTORS.keys() - choice), len(FACTORS) - len(choice)):
        options = [value for value in FACTORS[name] if _valid(neutral | choice | {name: value})]
        gains = [len(missing & _pairs(choice | {name: value})) for value in options]
        choice[name] = rng.choice([value for value, gain in zip(options, gains, strict=True) if gain == max(gains)])
    return choice


def _pairs(choice: dict[str, Any]) -> set[_Pair]:
    return set(combinations(sorted(choice.items(), key=_name), 2))


def _name(item: tuple[str, Any]) -> str:
    return item[0]


def _neutral(names: Iterable[str]) -> dict[str, Any]:
    return {name: FACTORS[name][0] for name in names}


def _valid(choice: dict[str, Any]) -> bool:
    """Say whether the factors mean something together."""
    if choice["source"] == "new" and choice["values"] == "latent":
        return False
    return all(choice[name] == FACTORS[name][0] for name in _MEANINGLESS.get(choice["source"], ()))


def _case(name: str, choice: dict[str, Any], rng: random.Random) -> AttentionCase:
    """Turn a choice of factors into a case, with random lengths."""
    source = choice["source"]
    num_seqs = rng.choice((1, 2, 3, 4))
    contexts = tuple(rng.choice(_CONTEXT_LENS) for _ in range(num_seqs))
    kv_heads, group = choice["heads"]
    queries = tuple(rng.choice(_FEW_QUERY_LENS if group > 17 else _QUERY_LENS) for _ in range(num_seqs))
    if choice["contexts"] == "split":
        contexts = (rng.choice(_SPLIT_LENS), *contexts[1:])
        queries = (max(queries[0], 1), *queries[1:])
    head_dim = choice["head_dim"]
    cut = max(1, head_dim - rng.choice((1, 8, 16, 64)))
    case = AttentionCase(
        name,
        context_lens=None if source == "new" else contexts,
        query_lens=None if source == "decode" else queries,
        new_lens={"new": contexts, "both": queries}.get(source),
        num_kv_heads=kv_heads,
        group=group,
        stored_dim=-(-(head_dim + 1) // 16) * 16 if choice["padded_dim"] else None,
        value_dim=None if choice["values"] == "same" else cut,
        latent=choice["values"] == "latent",
        **{field: choice[field] for field in _PLAIN_FIELDS},
    )
    if choice["storage"] is not None:
        cache_dtype, scales_rank = choice["storage"]
        case = replace(case, cache_dtype=cache_dtype, scales_rank=scales_rank)
    return case
