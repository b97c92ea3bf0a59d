"""The kernels on torch_xla's tensors, interpreted by its CPU client: lazy, compiled, in place. Run by
``make test-tpu-xla``.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

torch_xla = pytest.importorskip("torch_xla")

from torch_xla import runtime  # noqa: E402
from torch_xla.debug import metrics  # noqa: E402

import torch_paged  # noqa: E402
from torch_paged import dispatch  # noqa: E402
from torch_paged.backends.tpu import bridge_torch_xla  # noqa: E402
from torch_paged.testing import AttentionCase, assert_attention, assert_same, build  # noqa: E402
from torch_paged.testing.processes import SOURCE, run_python  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

LAYERS, BATCH, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, WIDTH = 3, 3, 8, 2, 128, 8, 4
STEPS = range(WIDTH * BLOCK_SIZE - 3, WIDTH * BLOCK_SIZE)
DEVICE = torch.device("xla")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


def step(
    query: Tensor, key: Tensor, caches: list[Tensor], slots: Tensor, block_tables: Tensor, context_lens: Tensor
) -> Tensor:
    """Write and attend in several layers, each from what the one before returned."""
    for factor, kv_cache in enumerate(caches, 1):
        torch_paged.reshape_and_cache(query[:, :KV_HEADS] * factor, key, kv_cache, slots)
        query = query + torch_paged.paged_attention(query, kv_cache, block_tables, context_lens)
    return query


def run_steps(
    function: Callable[..., Tensor], device: torch.device | str, steps: range = STEPS
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    block_tables = torch.randperm(BATCH * WIDTH, generator=generator).to(torch.int32).reshape(BATCH, WIDTH)
    shape = (2, BATCH * WIDTH, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    caches = [torch.randn(shape, generator=generator).to(device) for _ in range(LAYERS)]
    outs = []
    for position in steps:
        query = torch.randn(BATCH, HEADS, HEAD_DIM, generator=generator)
        key = torch.randn(BATCH, KV_HEADS, HEAD_DIM, generator=generator)
        slots = block_tables[:, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
        context_lens = torch.full((BATCH,), position + 1, dtype=torch.int32)
        query, key, slots, tables, context_lens = (
            x.to(device) for x in (query, key, slots, block_tables, context_lens)
        )
        outs.append(function(query, key, caches, slots, tables, context_lens))
        if device != "cpu":
            torch_xla.sync()
    return [out.cpu() for out in outs], [kv_cache.cpu() for kv_cache in caches]


def test_this_torch_serves_the_cpu_by_the_same_library() -> None:
    assert torch.__version__.startswith("2.9.")
    assert dispatch.served() == {"cpu": "cpu", "xla": "tpu"}
    case = AttentionCase("torch 2.9", head_dim=80, sinks=True)
    arguments = build(case)
    assert_attention(case.op, arguments, *torch.ops.paged.paged_attention.with_stats(**arguments))


@pytest.mark.parametrize("way", ["lazy", "openxla"])
def test_steps_write_in_place_and_compile_once_as_contexts_grow(way: str) -> None:
    expected, expected_caches = run_steps(step, "cpu")
    function = step if way == "lazy" else torch.compile(step, backend="openxla", fullgraph=True)
    run_steps(function, DEVICE, STEPS[:2])  # the first finds the caches as they were made
    metrics.clear_all()
    outs, caches = run_steps(function, DEVICE)
    assert metrics.counter_value("UncachedCompile") is None
    if way == "lazy":
        assert metrics.counter_value("CachedCompile") == len(STEPS)
    assert metrics.counter_value("aten::copy_") is None
    for out, wanted in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    for kv_cache, wanted in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(kv_cache, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_writes(mode: Callable[[], torch.autograd.grad_mode.no_grad]) -> None:
    kv_cache, key = torch.zeros(2, 2, 1, 8, 128), torch.randn(3, 1, 100)
    slots = torch.tensor([9, -1, 3])
    with mode():
        on_device = kv_cache.to(DEVICE)
        torch_paged.reshape_and_cache(key.to(DEVICE), -key.to(DEVICE), on_device, slots.to(DEVICE))
        torch_paged.reshape_and_cache(key, -key, kv_cache, slots)
        assert_same(on_device.cpu(), kv_cache)


def test_a_copy_that_is_still_lazy_keeps_what_was_there_before() -> None:
    kv_cache = torch.ones(2, 2, 1, 8, 128, device=DEVICE)
    torch_xla.sync()
    before = kv_cache.clone()
    key = torch.full((1, 1, 128), 5.0, device=DEVICE)
    torch_paged.reshape_and_cache(key, key, kv_cache, torch.tensor([0], device=DEVICE))
    assert kv_cache.cpu().max() == 5
    torch_xla.sync()
    assert before.cpu().max() == 1


def test_a_view_sees_what_was_written() -> None:
    pool = torch.zeros(2, 2, 3, 1, 8, 128, device=DEVICE)
    key = torch.ones(1, 1, 128, device=DEVICE)
    torch_paged.reshape_and_cache(key, key, pool[1], torch.tensor([8], device=DEVICE))
    assert pool.sum().item() == 2 * 128
    assert pool[1, 0, 1, 0, 0].sum().item() == 128


def test_scales_are_written_with_the_cache() -> None:
    kv_cache, kv_scales = torch.zeros(2, 4, 1, 8, 128, dtype=torch.int8), torch.ones(2, 4, 1, 8)
    key, slots = torch.randn(3, 1, 128), torch.tensor([9, -1, 31])
    on_device = kv_cache.to(DEVICE), kv_scales.to(DEVICE)
    torch_paged.quantize_and_cache(key.to(DEVICE), key.to(DEVICE), *on_device, slots.to(DEVICE))
    torch_paged.quantize_and_cache(key, key, kv_cache, kv_scales, slots)
    blocks = torch.tensor([1, 3]), torch.tensor([0, 2])
    torch_paged.copy_blocks(on_device[0], *(x.to(DEVICE) for x in blocks), kv_scales=on_device[1])
    torch_paged.copy_blocks(kv_cache, *blocks, kv_scales=kv_scales)
    assert_same(on_device[0].cpu(), kv_cache)
    assert_same(on_device[1].cpu(), kv_scales)


def test_programs_of_the_cpu_still_compile_beside_torch_xla() -> None:
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected, expected_caches = run_steps(step, "cpu")
    outs, caches = run_steps(compiled, "cpu")
    assert all(map(torch.equal, outs, expected))
    assert all(map(torch.equal, caches, expected_caches))


def test_wrong_input_and_refusals_have_the_sentences_of_the_cpu() -> None:
    arguments = build(AttentionCase("wrong", head_dim=128))
    wrong = arguments | {"query": arguments["query"][:, :3]}
    for call, error in ((wrong, ValueError), (arguments | {"query": arguments["query"].half()}, ValueError)):
        with pytest.raises(error) as on_cpu:
            torch.ops.paged.paged_attention(**call)
        with pytest.raises(error, match=re.escape(str(on_cpu.value))):
            torch.ops.paged.paged_attention(**{k: to_device(v) for k, v in call.items()})
    half = {name: x.half() if name in ("query", "kv_cache") else x for name, x in arguments.items()}
    with pytest.raises(NotImplementedError, match=r"^paged_attention: backend 'tpu' does not support query of float16"):
        torch.ops.paged.paged_attention(**{k: to_device(v) for k, v in half.items()})


@pytest.mark.parametrize(("client", "says"), [("CPU", "decode, v5e, interpreted"), ("TPU", "decode, tpu, compiled")])
def test_explain_says_whether_the_client_interprets(client: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = build(AttentionCase("explained", head_dim=128))
    monkeypatch.setenv("PJRT_DEVICE", client)
    for choice in (
        torch_paged.explain("paged_attention", **{k: to_device(v) for k, v in arguments.items()}),
        torch_paged.explain("paged_attention", backend="tpu", **arguments),
    ):
        assert str(choice) == f"paged_attention on xla: tpu, {says}, cache: float32"


def to_device(value: object) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


BAD_SLOT = """
import torch, torch_xla, torch_paged
key, kv_cache = torch.ones(1, 1, 128, device="xla"), torch.zeros(2, 2, 1, 8, 128, device="xla")
try:
    torch_paged.reshape_and_cache(key, key, kv_cache, torch.tensor([16], device="xla"))
except ValueError as error:
    print(error)
print(kv_cache.sum().item())
"""


@pytest.mark.parametrize("debug", ["0", "1"])
def test_a_slot_outside_the_cache_is_dropped_and_found_when_debugging(debug: str) -> None:
    lines = run_python(BAD_SLOT, PJRT_DEVICE="CPU", TORCH_PAGED_DEBUG=debug).stdout.splitlines()
    sentence = "reshape_and_cache: slot_mapping must lie in [-1, N * S = 16), got 16 at index 0"
    assert lines == ([sentence, "0.0"] if debug == "1" else ["0.0"])


TWINS = """
import sys, torch, {first}
def state():
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key("paged::reshape_and_cache", "Functionalize")
    return "torch_xla" in sys.modules, kernel, hasattr(torch.ops.paged_functional, "reshape_and_cache")
print(*(state() if "torch_paged" in sys.modules else ()))
import {second}
print(*state())
"""


@pytest.mark.parametrize(
    ("first", "second", "before"),
    [("torch_paged", "torch_xla", "False False False"), ("torch_xla", "torch_paged", "")],
)
def test_twins_exist_only_where_torch_xla_is_imported(first: str, second: str, before: str) -> None:
    code = TWINS.format(first=first, second=second)
    assert run_python(code, PJRT_DEVICE="CPU").stdout.splitlines()[-2:] == [before, "True True True"]


def test_a_client_that_is_no_tpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "device_type", lambda: "CUDA")
    with pytest.raises(NotImplementedError, match=r"does not support PJRT_DEVICE=CUDA \(TPU, or CPU to interpret\)"):
        bridge_torch_xla.target.__wrapped__("xla:0")
    choice = torch_paged.explain("paged_attention", backend="tpu", **build(AttentionCase("refused", head_dim=128)))
    assert choice.refusal is not None
    assert "PJRT_DEVICE=CUDA" in choice.refusal


def test_the_example_runs_interpreted() -> None:
    done = subprocess.run(
        [sys.executable, "examples/08_tpu_torch_xla.py", "--steps", "9"],
        capture_output=True,
        text=True,
        cwd=SOURCE,
        env={**os.environ, "PJRT_DEVICE": "CPU", "PYTHONPATH": str(SOURCE)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 steps on cpu: 2 compilations" in done.stdout


def test_the_benchmark_of_a_device_times_decode_and_prefill() -> None:
    pytest.importorskip("rich")
    from benchmarks.tpu_device import Size, table

    sizes = [Size(2, 64, 2, 16), Size(1, 32, 2, 16, queries=16)]
    decode, prefill = table(sizes, "xla", {sizes[0]: 1e-5}, calls=1).lines
    assert decode[:5] == ("2", "64", "2", "16", "1")
    assert decode[6] == "10.0"
    assert prefill[4] == "16"
    assert prefill[6] == ""
    assert all(float(line[5]) > 0 for line in (decode, prefill))
