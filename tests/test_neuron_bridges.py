"""The ways to the NKI kernels: the simulator on CPU tensors, TorchNeuron on a stand-in device, torch_xla's call.

Each process has the settings and packages of its own; kernels run on the simulator in all of them.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_packages import install

from torch_paged.backends.neuron import bridge_torch_xla
from torch_paged.testing.processes import SOURCE, run_python

TESTS = SOURCE / "tests"
PATH = os.pathsep.join(map(str, (SOURCE, TESTS, TESTS / "nki_sim")))
INPUTS = """
import sys, torch, torch_paged
from torch_paged import dispatch, reference
imported = "nki" in sys.modules
torch.manual_seed(0)
kv_cache = torch.full((2, 4, 1, 8, 16), float("nan"))
tables = torch.tensor([[2, 1], [-1, -1]], dtype=torch.int32)
lengths = torch.tensor([9, 0], dtype=torch.int32)
key, query = torch.randn(9, 1, 16), torch.randn(2, 2, 16)
slots = torch.tensor([*range(16, 24), 8])

def step(query, key, kv_cache, slots, tables, lengths):
    torch_paged.reshape_and_cache(key, -key, kv_cache, slots)
    return torch_paged.paged_attention(query, kv_cache, tables, lengths)

expected_cache = kv_cache.clone()
reference.reshape_and_cache(key, -key, expected_cache, slots)
expected = reference.paged_attention(query, expected_cache, tables, lengths)
"""
SIMULATED = (
    INPUTS
    + """
print(dispatch.served(), imported, torch_paged.explain("paged_attention", query=query, kv_cache=kv_cache,
    block_tables=tables, context_lens=lengths))
for run in (step, torch.compile(step, fullgraph=True)) if sys.argv[1:] else (step,):
    cache = kv_cache.clone()
    torch.testing.assert_close(run(query, key, cache, slots, tables, lengths), expected)
    torch.testing.assert_close(cache, expected_cache, equal_nan=True)
"""
)
OF_ITS_OWN = (
    INPUTS
    + """
def layers(query, key, kv_cache, slots, tables, lengths):
    for i in range(3):
        torch_paged.reshape_and_cache(key + i, -key - i, kv_cache, (slots + 3 * i) % 32)
        mask = (torch.arange(16) + i * query[:, :1, 0].round()) % 4 > 0
        fewer = lengths - i * (query[:, 0, 0] > 9).int() - i
        query = query + torch_paged.paged_attention(query, kv_cache, tables, fewer, attn_mask=mask)
    return query

kv_cache, tables = kv_cache.nan_to_num(1.0), torch.tensor([[2, 1], [0, 3]], dtype=torch.int32)
lengths = torch.tensor([9, 12], dtype=torch.int32)
caches = [kv_cache.clone(), kv_cache.clone()]
found = [run(query, key, cache, slots, tables, lengths) for run, cache in zip((layers, torch.compile(layers)), caches)]
torch.testing.assert_close(*found)
torch.testing.assert_close(*caches)
print("equal")
"""
)
STAND_IN = (
    """
import neuron_stand_in
"""
    + INPUTS
)
ON_DEVICE = """
tensors = [x.to("neuron") for x in (query, key, kv_cache, slots, tables, lengths)]
"""


def simulated(code: str, *arguments: str, check: bool = True, **given: str) -> tuple[list[str], str]:
    """Run code with the simulator on its path; return the lines of its output, and the last one of its errors."""
    settings: dict[str, Any] = {"PYTHONPATH": PATH, "TORCH_PAGED_NKI_SIM": "1"} | given
    done = run_python(code, *arguments, check=check, **settings)
    return done.stdout.splitlines(), (done.stderr.splitlines() or [""])[-1]


@pytest.fixture
def torch_neuron(tmp_path: Path) -> dict[str, Any]:
    """Settings of a process with TorchNeuron, as far as the stand-in goes, on a machine with Trainium 2."""
    install(
        tmp_path, "torch-neuronx", "2.13.3.0", module="torch_neuronx", source="from neuron_stand_in import wrap_nki\n"
    )
    path = f"{PATH}{os.pathsep}{tmp_path}"
    return {"PYTHONPATH": path, "NEURON_PLATFORM_TARGET_OVERRIDE": "trn2", "TORCH_PAGED_NKI_SIM": "0"}


@pytest.mark.parametrize(("generation", "cores", "compiled"), [("trn2", "1", ("compiled",)), ("trn3", "2", ())])
def test_public_functions_and_compiled_ones_run_the_kernels(
    generation: str, cores: str, compiled: tuple[str, ...]
) -> None:
    settings: dict[str, Any] = {"NEURON_PLATFORM_TARGET_OVERRIDE": generation, "NEURON_LOGICAL_NC_CONFIG": cores}
    explained = f"paged_attention on cpu: neuron, decode, {generation}, interpreted, cache: float32"
    assert simulated(SIMULATED, *compiled, **settings)[0] == ["{'cpu': 'neuron'} False " + explained]


def test_a_compiled_graph_whose_layers_have_masks_slots_and_lengths_of_their_own() -> None:
    """Inductor gives one layer's memory to the next layer's masks."""
    assert simulated(OF_ITS_OWN, NEURON_PLATFORM_TARGET_OVERRIDE="trn2")[0] == ["equal"]


@pytest.mark.parametrize("value", ["0", ""])
def test_the_setting_can_say_no(value: str) -> None:
    code = "from torch_paged import dispatch; import torch_paged; print(dispatch.served()['cpu'])"
    assert simulated(code, TORCH_PAGED_NKI_SIM=value) == (["cpu"], "")


def test_a_wrong_setting_makes_each_call_raise() -> None:
    code = INPUTS.partition("expected_cache")[0] + "step(query, key, kv_cache, slots, tables, lengths)"
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"TORCH_PAGED_NKI_SIM": "yes"}, "TORCH_PAGED_NKI_SIM must be 0 or 1, got 'yes'"),
        ({"NEURON_LOGICAL_NC_CONFIG": "4"}, "NEURON_LOGICAL_NC_CONFIG must be 1 or 2, got '4'"),
    )
    for settings, says in wrong:
        assert simulated(code, check=False, **settings)[1] == f"ValueError: torch_paged: {says}"


def test_what_cannot_be_simulated_makes_the_import_fail() -> None:
    asked = "ImportError: torch_paged: TORCH_PAGED_NKI_SIM=1 cannot be served: "
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"NEURON_PLATFORM_TARGET_OVERRIDE": "trn1"}, "it needs Trainium 2 or 3 (trn2, trn3), got trn1: "),
        ({"PYTHONPATH": str(SOURCE)}, "it needs nki >= 0.6, which is not installed: "),
    )
    for settings, says in wrong:
        assert simulated("import torch_paged", check=False, **settings)[1].startswith(asked + says)
    both = simulated("import torch_paged", check=False, TORCH_PAGED_TPU_INTERPRET="1")[1]
    assert both.endswith(
        "TORCH_PAGED_TPU_INTERPRET=1 and TORCH_PAGED_NKI_SIM=1 contradict each other: unset one of them"
    )


def test_values_are_checked_when_debugging() -> None:
    code = INPUTS + "tables[0, 1] = 4\nstep(query, key, kv_cache, slots, tables, lengths)"
    rule = "block_tables must lie in [0, N = 4) where used, got 4 at index (0, 1)"
    assert simulated(code, check=False, TORCH_PAGED_DEBUG="1")[1] == f"ValueError: paged_attention: {rule}"


def test_ops_on_the_device_run_wrapped_kernels_on_the_cores_of_the_machine(torch_neuron: dict[str, Any]) -> None:
    code = (
        STAND_IN
        + ON_DEVICE
        + """
print(sorted(dispatch.served().items()), imported)
out = step(*tensors)
torch.testing.assert_close(out.cpu(), expected)
torch.testing.assert_close(tensors[2].cpu(), expected_cache, equal_nan=True)
print(out.device, {cores for _, cores in neuron_stand_in.ran}, len(neuron_stand_in.ran) >= 2)
print(torch_paged.explain("paged_attention", query=out, kv_cache=tensors[2], block_tables=tensors[4],
    context_lens=tensors[5]))
"""
    )
    served = "[('cpu', 'cpu'), ('neuron', 'neuron')] False"
    lines, _ = simulated(code, **torch_neuron)
    assert lines == [
        served,
        "neuron:0 {2} True",
        "paged_attention on neuron: neuron, decode, trn2, compiled, cache: float32",
    ]
    assert simulated(code, **torch_neuron, NEURON_LOGICAL_NC_CONFIG="1")[0][1] == "neuron:0 {1} True"


def test_a_graph_of_four_layers_has_their_kernels_and_one_plan(torch_neuron: dict[str, Any]) -> None:
    code = (
        STAND_IN
        + ON_DEVICE
        + """
from collections import Counter
from torch._dynamo.backends.common import aot_autograd
seen = []
def record(graph, inputs):
    seen.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
    return graph.forward

def layers(query, kv_cache, tables, lengths):
    for _ in range(4):
        query = query + torch_paged.paged_attention(query, kv_cache, tables, lengths)
    return query

on_host = (query, expected_cache, tables, lengths)
on_device = [x.to("neuron") for x in on_host]
with torch.no_grad():
    for arguments in (on_device, on_host):
        compiled = torch.compile(layers, backend=aot_autograd(fw_compiler=record), fullgraph=True)
        torch.testing.assert_close(compiled(*arguments).cpu(), layers(*on_host))
graph, of_cpu = seen
print(graph["stand_in.nki.default"], graph["aten.cumsum.default"], sum("paged" in name for name in graph))
print(of_cpu["paged.paged_attention.default"])
written = torch.compile(step, backend=aot_autograd(fw_compiler=record), fullgraph=True)
with torch.no_grad():
    torch.testing.assert_close(written(*tensors).cpu(), expected)
torch.testing.assert_close(tensors[2].cpu(), expected_cache, equal_nan=True)
print([name for name in seen[-1] if "paged" in name or "functionalized" in name])
"""
    )
    lines, _ = simulated(code, **torch_neuron)
    assert lines == ["8 1 0", "4", "['auto_functionalized_v2']"]


def test_four_layers_of_packed_queries_share_a_plan_and_a_mask(torch_neuron: dict[str, Any]) -> None:
    code = (
        STAND_IN
        + """
from collections import Counter
from torch._dynamo.backends.common import aot_autograd
starts = torch.tensor([0, 1, 2], dtype=torch.int32)
mask = torch.rand(2, 40) < 0.7
on_host = (query, expected_cache.nan_to_num(), tables, lengths, starts, mask)
on_device = [x.to("neuron") for x in on_host]
counts = []

def record(graph, inputs):
    counts.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
    return graph.forward

def layers(depth):
    def run(query, kv_cache, tables, lengths, starts, mask):
        key = query[:, :kv_cache.shape[2]]
        for _ in range(depth):
            query = query + torch_paged.flash_attn_varlen(query, key, key, cu_seqlens_q=starts, cu_seqlens_k=starts,
                kv_cache=kv_cache, block_tables=tables, context_lens=lengths, max_seqlen_q=2, max_seqlen_k=18,
                causal=True, attn_mask=mask)
        return query
    return run

with torch.no_grad():
    for depth in (1, 4):
        compiled = torch.compile(layers(depth), backend=aot_autograd(fw_compiler=record), fullgraph=True)
        torch.testing.assert_close(compiled(*on_device).cpu(), layers(depth)(*on_host), rtol=1e-4, atol=1e-4)
one, four = counts
print(sorted(name for name in four if four[name] != one[name] and "getitem" not in name))
print(four["aten.add.Tensor"] - one["aten.add.Tensor"], one["aten.cumsum.default"] > 0, one["aten.gather.default"] > 0)
"""
    )
    lines, _ = simulated(code, **torch_neuron)
    assert lines == ["['aten.add.Tensor', 'aten.view.default', 'stand_in.nki.default']", "3 True True"]


def test_what_one_graph_made_is_not_kept_for_the_next(torch_neuron: dict[str, Any]) -> None:
    code = (
        STAND_IN
        + """
from torch._dynamo.backends.common import aot_autograd
cache = (expected_cache.nan_to_num() * 100).to(torch.float8_e4m3fn)
scales = torch.tensor([0.01, 0.01])
starts = torch.tensor([0, 1, 2], dtype=torch.int32)

def decode(query, cache, tables, lengths, scales, starts):
    return torch_paged.paged_attention(query, cache, tables, lengths, kv_scales=scales)

def packed(query, cache, tables, lengths, scales, starts):
    return torch_paged.flash_attn_varlen(query, cu_seqlens_q=starts, kv_cache=cache, block_tables=tables,
        context_lens=lengths, max_seqlen_q=2, max_seqlen_k=16, kv_scales=scales)

on_host = (query, cache, tables, lengths, scales, starts)
on_device = [x.to("neuron") for x in on_host]
with torch.no_grad():
    for run in (decode, packed):
        wanted = run(*on_host)
        for _ in range(2):
            torch._dynamo.reset()
            backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward)
            compiled = torch.compile(run, backend=backend, fullgraph=True)
            torch.testing.assert_close(compiled(*on_device).cpu(), wanted)
        torch.testing.assert_close(run(*on_device).cpu(), wanted)
"""
    )
    assert simulated(code, **torch_neuron) == ([], "")


def test_the_benchmark_of_a_device_times_decode_and_prefill(torch_neuron: dict[str, Any]) -> None:
    code = """
import neuron_stand_in, torch
from dataclasses import replace
from torch._dynamo.backends.common import aot_autograd
from benchmarks import neuron, neuron_device

torch.accelerator.synchronize = lambda: None
row = replace(neuron.read_csv(neuron.RESULTS / "neuron.csv")[0], kv_heads=1, group=2, head_dim=64, block_size=8)
rows = [replace(row, batch=2, context=24, attention_us=7.0), replace(row, batch=1, context=8, queries=9)]
compiler = aot_autograd(fw_compiler=lambda graph, _: graph.forward)
decode, prefill = neuron_device.table(rows, compiler, calls=1).lines
print(decode[:7], float(decode[7]) > 0, decode[8], prefill[:3], float(prefill[7]) > 0)
"""
    lines, _ = simulated(code, **torch_neuron)
    assert lines == ["('2', '24', '1', '1', '2', '64', '8') True 7.0 ('1', '8', '9') True"]


def test_a_generation_without_these_kernels_is_one_sentence(torch_neuron: dict[str, Any]) -> None:
    settings = torch_neuron | {"NEURON_PLATFORM_TARGET_OVERRIDE": "inf2"}
    says = "it needs Trainium 2 or 3 (trn2, trn3), got inf2: set NEURON_PLATFORM_TARGET_OVERRIDE"
    assert simulated(STAND_IN + ON_DEVICE + "step(*tensors)", check=False, **settings)[1] == (
        "NotImplementedError: reshape_and_cache: no backend serves device 'neuron' (available backends: cpu); backend "
        f"'neuron' is off because {says}"
    )


def test_torch_xla_gets_the_kernel_with_its_tensors_and_numbers() -> None:
    class Kernel:
        def __getitem__(self, cores: int) -> object:
            return lambda *arguments: (cores, arguments)

    tensor = torch.zeros(2)
    assert bridge_torch_xla.run(Kernel(), 2, tensor, 3, None) == (2, (tensor, 3, None))


def test_the_example_runs_on_the_simulator() -> None:
    code = """
import runpy, sys
sys.argv = ["10_neuron.py", "--steps", "2"]
runpy.run_path("examples/10_neuron.py", run_name="__main__")
"""
    [line], _ = simulated(code, NEURON_PLATFORM_TARGET_OVERRIDE="trn2")
    assert line.startswith("2 steps on NKI's simulator; largest difference to the reference: ")
