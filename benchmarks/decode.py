"""Decode: ``paged_attention`` beside the peers and the limits, over sizes, cache dtypes and options."""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import torch_paged
from benchmarks.inputs import attention_pools, ragged
from benchmarks.limits import read_limits
from benchmarks.peers import PEERS
from benchmarks.timing import Call
from benchmarks.work import DTYPES, OURS, Settings, Work, attention_check, attention_columns, kv_bytes
from torch_paged.testing import AttentionCase

HEADS, KV_HEADS = 32, 8
FULL_GRID = (
    # batch, context, block size, head_dim
    (1, 512, 16, 128),
    (1, 4096, 16, 128),
    (1, 16384, 16, 128),
    (2, 16384, 32, 64),
    (4, 4096, 32, 128),
    (8, 1024, 16, 128),
    (8, 4096, 16, 128),
    (8, 4096, 128, 128),
    (8, 4096, 16, 64),
    (32, 512, 16, 128),
    (32, 1024, 64, 64),
    (32, 2048, 32, 128),
)
QUICK_GRID = ((1, 16384, 16, 128), (8, 2048, 32, 64), (8, 4096, 16, 128))
TINY_GRID = ((2, 40, 16, 32),)
RANDOM_CELLS = {"full": 20, "quick": 3, "tiny": 1}
RANDOM_BYTES = (16 * 1024**2, 192 * 1024**2)
SLOW_TOKENS = 16_000
"""Peers that gather first are left out beyond this many, but for one cell."""
ALL_PEERS_CELL = (8, 4096, 16, 128)
BASE = {"full": (8, 4096), "quick": (4, 4096), "tiny": (2, 40)}
"""Batch and context of the questions that are not about sizes."""


def works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Yield every case of the benchmark, unbuilt."""
    yield from grid_works(settings)
    if not settings.grid:
        yield from random_works(settings)
        yield from quantised_works(settings)
        yield from option_works(settings)
        yield from shape_works(settings)


def grid_works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Sizes x dtypes, with every peer that bears the size."""
    default = {"full": FULL_GRID, "quick": QUICK_GRID, "tiny": TINY_GRID}[settings.size]
    names = settings.grid.get("dtypes", tuple(DTYPES))
    chosen = [settings.grid.get(name) for name in ("batch", "context", "block_size", "head_dim")]
    cells = default
    if any(chosen):
        fallbacks = zip(chosen, ((8,), (4096,), (16,), (128,)), strict=True)
        cells = tuple(itertools.product(*(given or fallback for given, fallback in fallbacks)))
    for name, (batch, context, block_size, head_dim) in itertools.product(names, cells):
        case = sized(settings, batch, context, block_size, head_dim, DTYPES[name])
        all_peers = (batch, context, block_size, head_dim) == ALL_PEERS_CELL
        peers = ["contiguous SDPA"]
        if all_peers or sum(case.context_lens or ()) <= SLOW_TOKENS:
            peers += ["gather + SDPA", "transformers paged"]
        if all_peers and settings.size == "full":
            peers += ["flex_attention"]
        yield partial(work, "grid", case, settings, peers)


def random_works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Shapes drawn from the seed, beyond the size that is judged."""
    draw = random.Random(settings.seed)
    left = RANDOM_CELLS[settings.size]
    while left:
        name = draw.choice(list(DTYPES))
        batch, context = draw.randint(1, 32), int(2 ** draw.uniform(9, 14))
        block_size, head_dim = draw.choice((16, 32, 64, 128)), draw.choice((64, 128))
        case = sized(settings, batch, context, block_size, head_dim, DTYPES[name])
        if settings.size == "tiny":
            case = sized(settings, 1, 30, 16, 32, torch.float32)
        elif not RANDOM_BYTES[0] <= kv_bytes(case) <= RANDOM_BYTES[1]:
            continue
        left -= 1
        yield partial(work, "random", case, settings, ["contiguous SDPA"])


def quantised_works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Each cache dtype with scales of each rank, a bfloat16 query, and bfloat16 itself."""
    batch, context = BASE[settings.size]
    base = sized(settings, batch // 2, 2 * context, 16, 32 if settings.size == "tiny" else 128, torch.bfloat16)
    yield partial(work, "quantised", base, settings)
    for cache_dtype, rank in (
        (torch.int8, 2),
        (torch.int8, 4),
        (torch.float8_e4m3fn, 2),
        (torch.float8_e5m2, 2),
    ):
        variant = f"{str(cache_dtype).removeprefix('torch.')}_scales_{rank}"
        case = replace(base, name=f"{base.name}_{variant}", cache_dtype=cache_dtype, scales_rank=rank)
        yield partial(work, "quantised", case, settings, variant=variant)


def option_works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Options, and what a window costs: keys behind it must cost nothing."""
    window = {"full": 512, "quick": 512, "tiny": 16}[settings.size]
    for dtype in variant_dtypes(settings):
        base = base_case(settings, dtype)
        batch, context = BASE[settings.size]
        assert base.context_lens is not None
        yield partial(work, "options", base, settings)
        for name, changes in (
            ("window", {"sliding_window": context}),
            ("cap", {"logits_soft_cap": 30.0}),
            ("sinks", {"sinks": True}),
            ("stats", {}),
        ):
            case = replace(base, name=f"{base.name}_{name}", **changes)
            yield partial(work, "options", case, settings, variant=name, stats=name == "stats")
        even = replace(base, context_lens=(window,) * (batch // 2))
        far = replace(base, context_lens=(32 * window,) * (batch // 2), sliding_window=window)
        yield partial(work, "window", replace(even, name=f"{base.name}_context_{window}"), settings)
        yield partial(
            work, "window", replace(far, name=f"{base.name}_window_{window}"), settings, variant="window", limits=False
        )


def shape_works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Groups and head sizes other than the usual ones, about the same bytes each."""
    batch, context = BASE[settings.size]
    for dtype in variant_dtypes(settings):
        for variant, group, kv_heads, head_dim in (
            ("", 4, 8, 128),
            ("G = 1", 1, 8, 128),
            ("G = 8", 8, 8, 128),
            ("D = 80", 4, 8, 80),
            ("D = 96", 4, 8, 96),
            ("D = 256", 4, 4, 256),
        ):
            case = sized(settings, batch, context, 16, head_dim, dtype)
            case = replace(case, name=f"{case.name}_g{group}", group=group, num_kv_heads=kv_heads)
            yield partial(work, "shapes", case, settings, variant=variant)


def variant_dtypes(settings: Settings) -> tuple[torch.dtype, ...]:
    """Return the dtypes in which options and shapes are compared with the plain case."""
    return (torch.bfloat16,) if settings.size == "quick" else (torch.bfloat16, torch.float32)


def sized(
    settings: Settings, batch: int, context: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> AttentionCase:
    """Return a decode case with ragged contexts."""
    return AttentionCase(
        f"b{batch}_c{context}_s{block_size}_d{head_dim}_{str(dtype).removeprefix('torch.')}",
        context_lens=ragged(batch, context, settings.seed),
        num_kv_heads=KV_HEADS,
        group=HEADS // KV_HEADS,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )


def base_case(settings: Settings, dtype: torch.dtype) -> AttentionCase:
    """Return the case that questions other than sizes start from."""
    return sized(settings, *BASE[settings.size], 16, 32 if settings.size == "tiny" else 128, dtype)


def work(
    group: str,
    case: AttentionCase,
    settings: Settings,
    peers: list[str] | None = None,
    *,
    variant: str = "",
    stats: bool = False,
    limits: bool = True,
) -> Work:
    """Build a decode case and the calls that do it."""
    pools = attention_pools(case, settings.seed)

    def ours(pool: int) -> Any:
        return torch_paged.paged_attention(**pools[pool])

    def ours_with_stats(pool: int) -> Any:
        return torch_paged.paged_attention(**pools[pool], return_stats=True)

    calls: dict[str, Call] = {OURS: ours_with_stats if stats else ours} | (read_limits(pools) if limits else {})
    calls |= {name: PEERS[name](pools) for name in peers or ()}
    return Work(
        "decode",
        group,
        case.name,
        attention_columns(case),
        calls,
        len(pools),
        attention_check("paged_attention", pools[0]),
        bytes=kv_bytes(case),
        variant=variant,
    )
