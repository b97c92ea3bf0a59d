"""torch_tpu as far as it goes without a TPU: registration, fake tensors, one graph, the kernels on placeholders.

Each test is a process of its own: importing torch_tpu changes torch, and a tensor with data would abort the process.
Run by ``make test-tpu``.
"""

import importlib.util

import pytest

from torch_paged.testing.processes import run_python

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch_tpu") is None, reason="torch_tpu is not installed")

SETUP = """
import torch
from torch_tpu import _loader
_loader._init_device("tpu")  # torch_tpu does it itself where it finds a TPU
import torch_paged
from torch_paged import dispatch
from torch_paged.backends.tpu import bridge_torch_tpu
bridge_torch_tpu._chip = lambda: "v5e"

def step(query, key, kv_cache, slots, block_tables, context_lens):
    torch_paged.reshape_and_cache(key, key * 2, kv_cache, slots)
    return torch_paged.paged_attention(query, kv_cache, block_tables, context_lens)

def arguments(make):
    return (make(3, 8, 128), make(3, 2, 128), make(2, 12, 2, 16, 128), make(3, dtype=torch.int64),
            make(3, 4, dtype=torch.int32), make(3, dtype=torch.int32))
"""
FAKE = (
    SETUP
    + """
from torch._subclasses.fake_tensor import FakeTensorMode
mode = FakeTensorMode()
with mode:
    inputs = arguments(lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="tpu"))
"""
)


def run(code: str, *, check: bool = True) -> tuple[list[str], str, int]:
    """Run code; return the lines that it printed itself, its errors, and its status."""
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    done = run_python(code, check=check, **settings)  # type: ignore[arg-type]
    return done.stdout.splitlines(), done.stderr, done.returncode


def test_the_backend_serves_the_device_once_torch_tpu_has_named_it() -> None:
    lines, _, _ = run(SETUP + "print(sorted(dispatch.served().items()))")
    assert lines[-1] == "[('cpu', 'cpu'), ('tpu', 'tpu')]"


def test_without_a_tpu_torch_tpu_changes_nothing_here() -> None:
    code = "import torch, sys, torch_paged; print('jax' in sys.modules, torch_paged.dispatch.served())"
    lines, _, _ = run(code)
    assert lines[-1] == "False {'cpu': 'cpu'}"


def test_fake_tensors_and_one_graph() -> None:
    code = """
with mode:
    print(step(*inputs).device, tuple(step(*inputs).shape), step(*inputs).dtype)
    graphs = []
    def compiler(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward
    torch.compile(step, backend=compiler, fullgraph=True)(*inputs)
    print(len(graphs), *graphs[0][1:])
    try:
        step(inputs[0][:, :3], *inputs[1:])
    except ValueError as error:
        print(error)
"""
    lines, _, _ = run(FAKE + code)
    assert lines[-3:] == [
        "tpu:0 (3, 8, 128) torch.bfloat16",
        "1 paged.reshape_and_cache.default paged.paged_attention.default",
        "paged_attention: query must have H a multiple of KH = 2, got H = 3",
    ]


def test_kernels_lower_to_programs_of_the_tpu_with_the_results_of_the_fakes() -> None:
    code = """
from torch_paged import backends
from torch_paged.contract.fake import results
kernels = bridge_torch_tpu.kernels(backends.discover()["tpu"])
query, key, kv_cache, slots, block_tables, context_lens = inputs
with mode:
    decode = (query, kv_cache, block_tables, context_lens)
    wanted = torch.ops.paged.paged_attention.with_stats(*decode)
    for out, expected in zip(kernels["paged_attention.with_stats"](*decode), wanted, strict=True):
        assert (out.shape, out.dtype, out.device) == (expected.shape, expected.dtype, expected.device)
    print(kernels["reshape_and_cache"](key, key, kv_cache, slots))
"""
    lines, _, _ = run(FAKE + code)
    assert lines[-1] == "None"


PLACEHOLDERS = (
    SETUP
    + """
from torch_tpu._internal.compile import tpu_torch_compile
from torch_tpu._internal.execution_mode import EagerMode, set_eager_mode
inputs = arguments(lambda *shape, dtype=torch.bfloat16:
    tpu_torch_compile.placeholder_like(torch.empty(*shape, dtype=dtype, device="meta"), False))
with torch.no_grad(), set_eager_mode(EagerMode._INTERNAL_COMPILE_FX_GRAPH):
    kv_cache = inputs[2].clone()
    out = step(*inputs[:2], kv_cache, *inputs[3:])
    print(out.device, tuple(out.shape), out.dtype, flush=True)
"""
)


def test_torch_tpu_records_the_kernels_into_its_graph() -> None:
    lines, _, _ = run(PLACEHOLDERS)
    assert lines[-1] == "tpu:0 (3, 8, 128) torch.bfloat16"


def test_compiling_that_graph_wants_a_tpu() -> None:
    code = """
    tpu_torch_compile.traverse_and_compile(
        result_tensors=[kv_cache, out], argument_tensors=list(inputs), build_mlir_module=True,
        use_stablehlo_bounds=False, argument_layouts=[], donated_inputs=[2], module_name="step")
"""
    lines, errors, status = run(PLACEHOLDERS + code, check=False)
    assert lines[-1] == "tpu:0 (3, 8, 128) torch.bfloat16"
    assert status < 0, "it compiled: assert more of it here"
    assert "failed to retrieve the PjRt client" in errors
