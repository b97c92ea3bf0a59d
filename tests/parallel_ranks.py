"""Two processes that talk over gloo on this machine, and what each of them runs: the code of docs/parallel.md."""

import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import torch_paged
from torch_paged.testing import AttentionCase, assert_attention, assert_same, build
from torch_paged.testing.processes import SOURCE

RANKS = 2
SECONDS = 300
"""After which a rank that does not answer is given up."""
OPS: dict[str, Any] = {
    "paged_attention": torch_paged.paged_attention,
    "flash_attn_varlen": torch_paged.flash_attn_varlen,
}
PARTS_OF_KEYS = {"one part": 1, "two parts": 2}


def code_of_the_page() -> dict[str, Any]:
    """Return what the code of the page defines."""
    page = (SOURCE / "docs" / "parallel.md").read_text()
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    return names


def check_heads(case: AttentionCase, page: dict[str, Any]) -> None:
    """Check that kv heads on two ranks give the bits of one process; query heads of one kv head give its results."""
    arguments = build(case)
    expected = OPS[case.op](**arguments, return_stats=True)
    results = page["tensor_parallel"](OPS[case.op], arguments)
    if case.num_kv_heads > 1:
        for name, actual, wanted in zip(("out", "lse", "max_logits"), results, expected, strict=True):
            assert_same(actual, wanted, name)
    assert_attention(case.op, arguments, *results)
    own = page["heads_of_rank"](arguments, dist.get_rank(), RANKS)
    assert own["query"].size(1) == case.num_heads // RANKS


def check_keys(case: AttentionCase, page: dict[str, Any], parts: str) -> None:
    """Check that keys on two ranks, one or two pieces of each sequence on each, give what one process gives."""
    arguments = build(replace(case, sinks=True))
    cu_seqlens_q, positions = rows_of(arguments)
    pieces = [pieces_of_keys(case, length, page, parts) for length in case.kv_lens]
    own = [part(arguments, [bounds[number] for bounds in pieces]) for number in range(PARTS_OF_KEYS[parts])]
    options = {"causal": True} if case.op == "paged_attention" else {"causal": arguments["causal"]}
    names = ("alibi_slopes", "attn_mask", "softmax_scale", "logits_soft_cap", "sliding_window", "attention_chunk")
    options |= {name: arguments[name] for name in (*names, "value_dim")}
    out, lse = page["context_parallel"](
        arguments["query"], cu_seqlens_q, positions, own, sinks=arguments["sinks"], **options
    )
    live = int(cu_seqlens_q[-1])
    assert_attention(case.op, arguments, *OPS[case.op](**arguments, return_stats=True))
    out[live:], lse[live:] = 0, float("-inf")  # the sink was merged into rows of padding
    assert_attention(case.op, arguments, out, lse)


def check_rows(case: AttentionCase, page: dict[str, Any]) -> None:
    """Check that query rows on two ranks, front and back pieces of each sequence, give what one process gives."""
    arguments = build(case)
    given = {name: value for name, value in arguments.items() if name not in ("query", "cu_seqlens_q", "attn_mask")}
    cu_seqlens_q, positions = rows_of(arguments)
    del given["query_positions"]
    assert_attention(case.op, arguments, page["balanced_prefill"](arguments["query"], cu_seqlens_q, positions, **given))


def rows_of(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cu_seqlens_q and the positions of all rows, of a call of either op."""
    contexts = arguments["context_lens"]
    if "cu_seqlens_q" not in arguments:
        return torch.arange(len(contexts) + 1, dtype=torch.int32), contexts - 1
    cu_seqlens_q = arguments["cu_seqlens_q"]
    if arguments["query_positions"] is not None:
        return cu_seqlens_q, arguments["query_positions"]
    ends = contexts if arguments["cu_seqlens_k"] is None else contexts + arguments["cu_seqlens_k"].diff()
    lens = cu_seqlens_q.diff()
    rows = torch.arange(arguments["query"].size(0), dtype=torch.int32)
    live = int(cu_seqlens_q[-1])
    rows[:live] += (ends - lens - cu_seqlens_q[:-1]).repeat_interleave(lens)
    return cu_seqlens_q, rows


def pieces_of_keys(case: AttentionCase, length: int, page: dict[str, Any], parts: str) -> list[tuple[int, int]]:
    """Return begin and end of each of this rank's parts of a sequence."""
    unit = max(case.block_size, case.attention_chunk or 1)  # one divides the other
    if parts == "two parts":
        return list(page["pieces_of_rank"](length, dist.get_rank(), RANKS, unit))
    middle = length // 2 // unit * unit
    return [(0, middle), (middle, length)][dist.get_rank() :][:1]


def part(arguments: dict[str, Any], bounds: list[tuple[int, int]]) -> dict[str, Any]:
    """Return a cache of its own with the keys of each sequence from a block's begin to an end."""
    cache, scales, tables = arguments["kv_cache"], arguments["kv_scales"], arguments["block_tables"]
    size = cache.size(3)
    widest = max(-(-(end - begin) // size) for begin, end in bounds) + 1
    own = torch.full((len(bounds), widest), -1, dtype=torch.int32)
    kept: list[int] = []
    for seq, (begin, end) in enumerate(bounds):
        assert begin % size == 0
        for column, block in enumerate(tables[seq, begin // size : -(-end // size)].tolist()):
            if 0 <= block < cache.size(1):  # else no query needs it
                own[seq, column] = len(kept)
                kept.append(block)
    kept = kept or [0]
    return {
        "kv_cache": cache[:, kept],
        "kv_scales": scales[:, kept] if scales is not None and scales.dim() == 4 else scales,
        "block_tables": own,
        "context_lens": torch.tensor([end - begin for begin, end in bounds], dtype=torch.int32),
        "starts": torch.tensor([begin for begin, _ in bounds], dtype=torch.int32),
    }


CHECKS: dict[str, Callable[..., None]] = {"heads": check_heads, "keys": check_keys, "rows": check_rows}


class Ranks:
    """Processes that run one check after the other, all the same one at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = f"file://{Path(self._folder.name) / 'store'}"
        self._connections = []
        self._processes = []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, store, there), daemon=True)
            process.start()
            self._connections.append(here)
            self._processes.append(process)

    def check(self, name: str, *arguments: Any) -> None:
        """Run a check on all ranks.

        Raises:
            AssertionError: it failed on one of them, or one did not answer in time.
        """
        for connection in self._connections:
            connection.send((name, arguments))
        said = []
        for rank, connection in enumerate(self._connections):
            assert connection.poll(SECONDS), f"rank {rank} did not answer in {SECONDS} s"
            said.append(connection.recv())
        for rank, failure in enumerate(said):
            assert failure is None, f"rank {rank}:\n{failure}"

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def serve(rank: int, store: str, connection: Connection) -> None:
    """Be one rank: run what is asked for and say what went wrong, until the process is killed."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=SECONDS))
    page = code_of_the_page()
    while True:
        name, arguments = connection.recv()
        try:
            CHECKS[name](arguments[0], page, *arguments[1:])
            connection.send(None)
        except Exception:
            connection.send(traceback.format_exc())
