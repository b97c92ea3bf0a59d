"""Cache writes: ``reshape_and_cache`` beside what plain PyTorch has for it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import torch_paged
from benchmarks.machine import huge_copy, huge_empty, pools_for
from benchmarks.timing import Call
from benchmarks.work import DTYPES, OURS, Settings, Work
from torch_paged.testing import WriteCase, assert_same, build


def works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Yield every case of the benchmark, unbuilt."""
    tiny = settings.size == "tiny"
    for name, dtype in DTYPES.items():
        for tokens in (1, 16 if tiny else 512):
            case = WriteCase(
                f"write_{tokens}_{name}",
                num_tokens=tokens,
                num_kv_heads=8,
                head_dim=16 if tiny else 128,
                num_blocks=2 if tiny else 4096,
                dtype=dtype,
            )
            yield partial(work, case, settings)
            if tokens > 1:
                yield partial(work, replace(case, name=f"{case.name}_scattered"), settings, scattered=True)


def work(case: WriteCase, settings: Settings, *, scattered: bool = False) -> Work:
    """Build a write: one large cache, and for each turn other slots of it and other rows.

    The tokens of a prompt fill random blocks; ``scattered`` ones go to a random slot each, as those of a large batch.
    """
    arguments = build(case, settings.seed)
    size = case.block_size
    rows = 2 * case.num_tokens * case.num_kv_heads * case.head_dim * case.dtype.itemsize
    turns = 2 if settings.size == "tiny" else pools_for(2 * rows)
    generator = torch.Generator().manual_seed(settings.seed)
    slots = []
    for _ in range(turns):
        if scattered:
            drawn = torch.randperm(case.num_blocks * size, generator=generator)
        else:
            blocks = torch.randperm(case.num_blocks, generator=generator)
            drawn = (blocks[:, None] * size + torch.arange(size)).flatten()
        slots.append(drawn[: case.num_tokens].contiguous())
    key, value = (huge_empty((turns, *arguments[name].shape), case.dtype) for name in ("key", "value"))
    key.copy_(arguments["key"])
    value.copy_(arguments["value"])
    new = list(zip(key.unbind(), value.unbind(), strict=True))
    pages = [(turn // size, turn % size) for turn in slots]
    ours = huge_copy(arguments["kv_cache"])
    indexed = [side.transpose(1, 2) for side in huge_copy(ours)]  # (N, S, KH, D)
    by_token = [side.flatten(0, 1) for side in huge_copy(ours.transpose(2, 3))]  # (N * S, KH, D)
    dense = [tuple(pair) for pair in huge_empty((turns, 2, *arguments["key"].shape), case.dtype)]

    def write(turn: int) -> None:
        torch_paged.reshape_and_cache(*new[turn], ours, slots[turn])

    def index_put(turn: int) -> None:
        for side, rows in zip(indexed, new[turn], strict=True):
            side.index_put_(pages[turn], rows)

    def index_copy(turn: int) -> None:
        for side, rows in zip(by_token, new[turn], strict=True):
            side.index_copy_(0, slots[turn], rows)

    def copy(turn: int) -> None:
        for side, rows in zip(dense[turn], new[turn], strict=True):
            side.copy_(rows)

    calls: dict[str, Call] = {
        OURS: write,
        "index_put_": index_put,
        "index_copy_": index_copy,
        "dense copy_": copy,
    }
    blocks, offsets = pages[0]
    written: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        OURS: lambda: tuple(side[blocks, :, offsets] for side in ours),
        "index_put_": lambda: tuple(side[blocks, offsets] for side in indexed),
        "index_copy_": lambda: tuple(side[slots[0]] for side in by_token),
        "dense copy_": lambda: dense[0],
    }

    def check(name: str, _: Any) -> None:
        for side, rows in zip(written[name](), new[0], strict=True):
            assert_same(side, rows, "what was written")

    columns = {
        "dtype": str(case.dtype).removeprefix("torch."),
        "batch": case.num_tokens,
        "context": 0,
        "block_size": size,
        "heads": 0,
        "kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
    }
    variant = "scattered" if scattered else ""
    return Work("cache-write", "cache-write", case.name, columns, calls, turns, check, bytes=rows, variant=variant)
