"""Calls from several Python threads, on disjoint and on shared caches, and calls in a forked child."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import torch_paged
from torch_paged import dispatch
from torch_paged.testing import assert_same
from torch_paged.testing.every_op import digests
from torch_paged.testing.processes import run_python

pytestmark = pytest.mark.skipif(
    dispatch.served().get("cpu") != "cpu", reason="the CPU kernels are not what serves this process"
)


def test_each_thread_on_its_own_caches() -> None:
    """With another number of threads below each call."""
    expected = digests()

    def work(worker: int) -> list[dict[str, str]]:
        found = []
        for turn in range(4):
            torch.set_num_threads(1 + (worker + turn) % 3)
            found.append(digests())
        return found

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(4)):
            assert found == [expected] * 4


def test_writers_and_readers_share_a_cache() -> None:
    """Writers fill blocks of their own, while readers attend to blocks that nobody writes."""
    writers, rounds, tokens, block_size, kv_heads, head_dim = 3, 30, 64, 16, 2, 64
    blocks = tokens // block_size
    generator = torch.Generator().manual_seed(0)
    kv_cache = torch.full((2, (1 + writers) * blocks, kv_heads, block_size, head_dim), float("nan"))
    rows = torch.randn((1 + writers, tokens, kv_heads, head_dim), generator=generator)
    slots = torch.arange((1 + writers) * tokens).view(1 + writers, tokens)
    query = torch.randn((1, 8, head_dim), generator=generator)
    tables = torch.arange((1 + writers) * blocks, dtype=torch.int32).view(1 + writers, blocks)
    length = torch.tensor([tokens], dtype=torch.int32)

    def write(owner: int) -> None:
        for _ in range(rounds):
            torch_paged.reshape_and_cache(rows[owner], -rows[owner], kv_cache, slots[owner])

    def read(_: int) -> list[torch.Tensor]:
        torch.set_num_threads(2)
        return [torch_paged.paged_attention(query, kv_cache, tables[:1], length) for _ in range(rounds)]

    write(0)
    expected = torch_paged.paged_attention(query, kv_cache, tables[:1], length)
    with ThreadPoolExecutor(writers + 2) as pool:
        written = [pool.submit(write, owner) for owner in range(1, 1 + writers)]
        for outs in pool.map(read, range(2)):
            for out in outs:
                assert_same(out, expected)
        for future in written:
            future.result()
    keys = torch_paged.gather_cache(kv_cache, tables, length.expand(1 + writers), tokens)[0]
    assert_same(keys, rows.transpose(1, 2).contiguous())


def test_slots_within_the_cache_are_read_before_it_is_written() -> None:
    memory = torch.zeros(2 * 6 * 2 * 4 * 8)
    slots = memory.view(torch.int64)[:40]
    slots.copy_(torch.arange(40) % 24)
    key = torch.full((40, 2, 8), 1e30)  # as slots these are far outside the cache
    torch_paged.reshape_and_cache(key, key, memory.view(2, 6, 2, 4, 8), slots)
    assert (memory == 1e30).all()


def test_all_threads_treat_subnormal_numbers_as_the_caller_does() -> None:
    assert run_python(FLUSH, OMP_NUM_THREADS="2").stdout.split() == ["True"]


FLUSH = """
import torch, torch_paged
from torch_paged.testing import AttentionCase, build
torch.set_num_threads(2)
arguments = build(AttentionCase("subnormal", (300,) * 64, num_kv_heads=4, group=4))
arguments["kv_cache"][1] *= 1e-39
out = torch_paged.paged_attention(**arguments)  # by threads that know no other mode
assert 0 < out.abs().max() < 1e-37
assert torch.set_flush_denormal(True)
largest = []
for threads in (1, 2, 2, 2, 2, 2):
    torch.set_num_threads(threads)
    bits = torch_paged.paged_attention(**arguments).view(torch.int32)
    largest.append(int((bits & 0x7FFFFFFF).max()))
print(set(largest) == {0})
"""


def test_other_python_threads_run_meanwhile() -> None:
    tokens = 3072
    query, rows = torch.ones(tokens, 8, 128), torch.ones(tokens, 2, 128)
    cu, done, ticks = torch.tensor([0, tokens], dtype=torch.int32), threading.Event(), 0

    def work() -> None:
        torch_paged.flash_attn_varlen(
            query, rows, rows, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=tokens, max_seqlen_k=tokens, causal=True
        )
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    worker.join()
    assert ticks > 10


FORK = """
import os, signal, threading
import torch, torch_paged
from torch_paged.testing.every_op import build_every_op, digests

torch.set_num_threads(2)
WRITTEN = ("kv_cache", "kv_scales")

def strided():  # whatever may be is copied by the call, and is large enough for threads to share
    calls = build_every_op()
    for arguments in calls.values():
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor) and name not in WRITTEN:
                arguments[name] = torch.stack([x, x], -1)[..., 0]
    return calls

first, second = build_every_op(), strided()  # by torch, whose own threads the child lacks too
expected = digests()
busy = threading.Event()

def go_on():  # a call is under way when this process forks
    query, rows, cu = torch.ones(8192, 8, 128), torch.ones(8192, 2, 128), torch.tensor([0, 8192], dtype=torch.int32)
    busy.set()
    torch_paged.flash_attn_varlen(query, rows, rows, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=8192,
                                  max_seqlen_k=8192, causal=True)

def child():
    signal.alarm(100)
    same = digests(first) == expected
    tasks = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(3)
    same = same and digests(second) == expected
    print(same, tasks, flush=True)
    os._exit(0)

def fork():
    pid = os.fork()
    if pid == 0:
        child()
    _, status = os.waitpid(pid, 0)
    assert status == 0, status

fork()
other = threading.Thread(target=go_on)
other.start()
busy.wait()
fork()
other.join()
assert digests() == expected
"""


def test_a_forked_child_runs_on_one_thread_with_the_same_bits() -> None:
    assert run_python(FORK, OMP_NUM_THREADS="2").stdout.split() == ["True", "1"] * 2
