"""Signals that arrive in a long attention call: handlers run meanwhile, and what one raises ends the call."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_paged
from torch_paged import dispatch
from torch_paged.testing import assert_same
from torch_paged.testing.processes import run_python

pytestmark = pytest.mark.skipif(
    dispatch.served().get("cpu") != "cpu", reason="the CPU kernels are not what serves this process"
)

LONGEST_WAIT_S = 0.5
CTRL_C = """
import os, signal, threading, time
import torch, torch_paged

T = 65536  # one sequence: a prefill of many seconds
query, rows = torch.ones(T, 16, 128), torch.ones(T, 4, 128)
signal.signal(signal.SIGINT, signal.default_int_handler)

def public(tokens):
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    return torch_paged.flash_attn_varlen(query[:tokens], rows[:tokens], rows[:tokens], cu_seqlens_q=cu, cu_seqlens_k=cu,
                                         max_seqlen_q=tokens, max_seqlen_k=tokens, causal=True)

def raw(tokens):
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    return torch.ops.paged.flash_attn_varlen(query[:tokens], rows[:tokens], rows[:tokens], cu, cu, None, None, None,
                                             tokens, tokens, causal=True)

compiled = torch.compile(public, backend="aot_eager", dynamic=True)

def press():
    global sent
    time.sleep(0.3)
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

for call, threads in ((raw, 1), (raw, 2), (raw, 5), (public, 1), (compiled, 2)):
    torch.set_num_threads(threads)
    expected = call(100)
    presser = threading.Thread(target=press)
    presser.start()
    try:
        call(T)
        print("the prefill ended first")
    except KeyboardInterrupt:
        print(time.monotonic() - sent)
    presser.join()
    assert torch.equal(call(100), expected)
"""


def test_ctrl_c_ends_a_prefill() -> None:
    """Raw, public and compiled calls, on one thread, on several and on more than there are cores."""
    waits = [float(line) for line in run_python(CTRL_C).stdout.splitlines()]
    assert len(waits) == 5
    assert max(waits) < LONGEST_WAIT_S


@contextmanager
def handled(handler: Callable[[], None], first_s: float = 0.05, then_s: float = 0.0) -> Iterator[None]:
    """Let an alarm call the handler once, or again so long after each time."""

    def handle(number: int, frame: FrameType | None) -> None:
        handler()
        signal.setitimer(signal.ITIMER_REAL, then_s)

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, first_s)
    try:
        yield
    finally:
        then_s = 0.0  # off, also for a handler that is about to run
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def prefill(tokens: int = 3072) -> Callable[[], Tensor]:
    """Return a call that takes some tenths of a second."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn((tokens, heads, 128), generator=generator) for heads in (8, 2, 2))
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    arguments: dict[str, Any] = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), cu)
    arguments |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), tokens)
    return lambda: torch_paged.flash_attn_varlen(query, key, value, causal=True, **arguments)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_handler_that_returns_changes_nothing(threads: int) -> None:
    """Also when it calls the same op, which keeps its memory from call to call."""
    torch.set_num_threads(threads)
    long, short = prefill(), prefill(300)
    expected, expected_within = long(), short()
    within: list[Tensor] = []
    with handled(lambda: within.append(short()), then_s=0.1):
        result = long()
    assert within, "no handler ran"
    assert_same(result, expected)
    for seen in within:
        assert_same(seen, expected_within)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_handler_raises_arrives_as_it_is(threads: int) -> None:
    torch.set_num_threads(threads)
    long, short = prefill(12288), prefill(300)
    expected, raised, began = short(), TimeoutError("enough", 7), time.monotonic()

    def handler() -> None:
        raise raised

    with handled(handler), pytest.raises(TimeoutError) as caught:
        long()
    assert time.monotonic() - began < 0.05 + LONGEST_WAIT_S
    assert caught.value is raised
    assert caught.traceback[-1].name == "handler"
    assert_same(short(), expected)


def test_a_call_of_another_thread_goes_on() -> None:
    """Python gives signals to its main thread alone, which waits here."""
    long = prefill()
    expected, results, done = long(), [], threading.Event()

    def work() -> None:
        results.append(long())
        done.set()

    worker = threading.Thread(target=work)

    def handler() -> None:
        raise TimeoutError

    worker.start()
    with handled(handler), pytest.raises(TimeoutError):
        done.wait()
    done.wait()
    worker.join()
    assert_same(results[0], expected)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_write_is_finished_first(quantised: bool) -> None:
    tokens, kv_heads, head_dim, block_size = 32768, 4, 128, 16
    key = torch.randn((tokens, kv_heads, head_dim), generator=torch.Generator().manual_seed(0))
    shape = (2, tokens // block_size, kv_heads, block_size)
    dtype = torch.int8 if quantised else torch.float32
    kv_cache, kv_scales = torch.zeros((*shape, head_dim), dtype=dtype), torch.zeros(shape)
    expected, expected_scales = kv_cache.clone(), kv_scales.clone()
    slots = torch.arange(tokens).flip(0)

    def write(cache: Tensor, scales: Tensor) -> None:
        if quantised:
            torch_paged.quantize_and_cache(key, key, cache, scales, slots)
        else:
            torch_paged.reshape_and_cache(key, key, cache, slots)

    def handler() -> None:
        raise TimeoutError

    lasted = math.inf
    for _ in range(5):
        began = time.monotonic()
        write(expected, expected_scales)
        lasted = min(lasted, time.monotonic() - began)

    def write_and_wait() -> None:
        write(kv_cache, kv_scales)
        ended.append(True)
        signal.pause()

    ended: list[bool] = []
    hits = 0
    for attempt in range(50):
        kv_cache.zero_()
        kv_scales.zero_()
        ended.clear()
        with handled(handler, first_s=lasted * (attempt % 9 + 1) / 10), pytest.raises(TimeoutError):
            write_and_wait()
        if kv_cache.any() and not ended:  # else the signal came before the write or behind it
            hits += 1
            assert_same(kv_cache, expected)
            assert_same(kv_scales, expected_scales)
        if hits == 5:
            return
    pytest.fail(f"a signal came within a write {hits} times of 50")
