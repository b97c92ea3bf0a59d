"""How the cost grows: against batch, context, block size, head_dim and the length of a prompt, odd sizes included."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

import torch_paged
from benchmarks import decode
from benchmarks.inputs import attention_pools
from benchmarks.limits import peak_call
from benchmarks.prefill import visible_flops
from benchmarks.work import OURS, PEAK, Settings, Work, attention_check, attention_columns
from torch_paged.testing import AttentionCase

SWEEPS: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32),
    "context": (512, 1024, 2048, 4096, 8192, 16384),
    "odd context": (*range(1000, 1101, 10), 4095, 4096, 4097),
    "block_size": (1, 4, 8, 16, 24, 32, 64, 128),
    "head_dim": (64, 72, 80, 96, 112, 128, 160, 192, 256),
    "prompt": (64, 100, 128, 256, 500, 512, 1000, 1024, 2048),
}


def works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Yield every case of the benchmark, unbuilt."""
    base = AttentionCase(
        "scaling", context_lens=(2048,) * 4, num_kv_heads=8, group=4, head_dim=128, dtype=torch.bfloat16
    )
    for sweep, sizes in SWEEPS.items():
        for size in {"full": sizes, "quick": sizes[1::3], "tiny": sizes[:1]}[settings.size]:
            case = replace(base, name=f"{sweep.replace(' ', '_')}_{size}")
            if sweep == "batch":
                case = replace(case, context_lens=(2048,) * size)
            elif sweep in ("context", "odd context"):
                case = replace(case, context_lens=(size,) * 4)
            elif sweep == "block_size":
                case = replace(case, block_size=size)
            elif sweep == "head_dim":
                case = replace(case, head_dim=size)
            else:
                case = replace(case, context_lens=None, query_lens=(size,), new_lens=(size,))
            if sweep == "prompt":
                yield partial(prompt_work, case, settings)
            else:
                yield partial(decode_work, sweep, case, settings)


def decode_work(sweep: str, case: AttentionCase, settings: Settings) -> Work:
    """Build one point of a decode sweep."""
    return replace(decode.work(sweep, case, settings), benchmark="scaling")


def prompt_work(case: AttentionCase, settings: Settings) -> Work:
    """Build one point of the prompt sweep."""
    pools = attention_pools(case, settings.seed)
    return Work(
        "scaling",
        "prompt",
        case.name,
        attention_columns(case),
        {OURS: lambda pool: torch_paged.flash_attn_varlen(**pools[pool]), PEAK: peak_call(case.dtype)},
        len(pools),
        attention_check("flash_attn_varlen", pools[0]),
        flops=visible_flops(case),
    )
