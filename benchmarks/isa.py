"""The instruction sets beside each other and beside contiguous SDPA: the kernels that TORCH_PAGED_CPU_ISA chooses.

The variable is read once in a process. To take turns on the same memory, each instruction set gets a copy of the
kernels' library of its own (``native.py``), for which the variable is set when it is loaded.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch_paged
from benchmarks.decode import sized
from benchmarks.inputs import attention_pools
from benchmarks.native import ISAS, decode_call, kernels
from benchmarks.peers import PEERS
from benchmarks.timing import Call
from benchmarks.work import DTYPES, OURS, Settings, Work, attention_check, attention_columns, kv_bytes
from torch_paged.testing import AttentionCase

GRID = {
    # batch, context, block size, head_dim
    "full": ((4, 2048, 16, 128), (8, 4096, 16, 128), (8, 4096, 32, 64)),
    "quick": ((4, 2048, 16, 128),),
    "tiny": ((2, 40, 16, 32),),
}


def works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Yield every case of the benchmark, unbuilt."""
    for dtype in DTYPES.values():
        for sizes in GRID[settings.size]:
            yield partial(work, sized(settings, *sizes, dtype), settings)


def work(case: AttentionCase, settings: Settings) -> Work:
    """Build a decode case for every instruction set that runs here."""
    pools = attention_pools(case, settings.seed)
    calls: dict[str, Call] = {OURS: lambda pool: torch_paged.paged_attention(**pools[pool])}
    for name in ISAS:
        library = kernels(name)
        if library is not None:
            calls[name] = decode_call(library, pools)
    calls["contiguous SDPA"] = PEERS["contiguous SDPA"](pools)
    return Work(
        "isa",
        "isa",
        case.name,
        attention_columns(case),
        calls,
        len(pools),
        attention_check("paged_attention", pools[0]),
        bytes=kv_bytes(case),
        threads=(1,),
    )
