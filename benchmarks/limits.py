"""The limits of the machine, measured beside the kernels: reading the same bytes, and multiply-adds in registers."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.native import compiled
from benchmarks.timing import Call

PIECE_BYTES = 4096
AHEAD = (0, 1, 2, 4, 8, 16)
"""How many pieces ahead the paged read prefetches; the best is taken."""
PEAK_STEPS = 400_000


@cache
def library() -> ctypes.CDLL:
    """Return ``limits.cpp``, compiled for this machine when that has not been done."""
    loaded = compiled("limits")
    address, count = ctypes.c_void_p, ctypes.c_int64
    loaded.read_runs.argtypes = [address, address, address, count, count, ctypes.c_int]
    loaded.multiply_add.argtypes = [count, ctypes.c_int, ctypes.c_int]
    loaded.read_runs.restype = loaded.multiply_add.restype = None
    loaded.flops_per_step.restype = count
    return loaded


def read_limits(pools: list[dict[str, Any]]) -> dict[str, Call]:
    """Return calls that read what attention over these caches has to read: in order of the memory, and by the tables.

    Args:
        pools: arguments of an attention call whose keys are all in the cache, one for each pool.
    """
    paged, total = _pieces(pools[0])
    straight = torch.stack([torch.arange(0, total, PIECE_BYTES), torch.full((-(-total // PIECE_BYTES),), PIECE_BYTES)])
    straight[1, -1] = total - straight[0, -1]
    calls = {f"sequential read @{ahead}": _reader(pools, straight, ahead) for ahead in (0, 2)}
    return calls | {f"paged read @{ahead}": _reader(pools, paged, ahead) for ahead in AHEAD}


def peak_call(dtype: torch.dtype) -> Call:
    """Return a call that keeps the units for multiply-adds busy; ``peak_flops`` says how much it does."""
    loaded, half = library(), dtype == torch.bfloat16
    return lambda _: loaded.multiply_add(PEAK_STEPS, half, torch.get_num_threads())


def peak_flops(dtype: torch.dtype) -> int:
    """Return the operations of one ``peak_call`` on one thread; float16 is computed in float32."""
    return PEAK_STEPS * int(library().flops_per_step(dtype == torch.bfloat16))


def _reader(pools: list[dict[str, Any]], pieces: Tensor, ahead: int) -> Call:
    loaded, count = library(), pieces.size(1)

    def read(pool: int) -> None:
        cache = pools[pool]["kv_cache"].data_ptr()
        loaded.read_runs(cache, pieces[0].data_ptr(), pieces[1].data_ptr(), count, ahead, torch.get_num_threads())

    return read


def _pieces(arguments: dict[str, Any]) -> tuple[Tensor, int]:
    """Return (2, pieces) int64 offsets and sizes in bytes, and the sum of the sizes.

    A full block is one run of all heads, first of the keys and then of the values; runs are cut into pieces.
    """
    kv_cache = arguments["kv_cache"]
    sides, _, kv_heads, block_size, _ = kv_cache.shape
    side, block, head, token = (stride * kv_cache.element_size() for stride in kv_cache.stride()[:4])
    assert kv_cache.is_contiguous(), "a block is one run only in a contiguous cache"
    both = side * torch.arange(sides)
    pieces = [torch.zeros((2, 0), dtype=torch.int64)]
    for table, length in zip(arguments["block_tables"].long(), arguments["context_lens"].tolist(), strict=True):
        full, rest = divmod(length, block_size)
        pieces.append(_cut((block * table[:full, None] + both).flatten(), block))
        if rest:
            heads = block * table[full] + both[:, None] + head * torch.arange(kv_heads)
            pieces.append(_cut(heads.flatten(), rest * token))
    joined = torch.cat(pieces, 1)
    return joined.contiguous(), int(joined[1].sum())


def _cut(starts: Tensor, run_bytes: int) -> Tensor:
    within = torch.arange(0, run_bytes, PIECE_BYTES)
    sizes = (run_bytes - within).clamp(max=PIECE_BYTES)
    return torch.stack([(starts[:, None] + within).flatten(), sizes.repeat(starts.numel())])
