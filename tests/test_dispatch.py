"""Which backend serves a device, and what is said when none does."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

import torch_paged
from torch_paged import backends, dispatch
from torch_paged.contract.schema import NAMESPACE, SCHEMAS
from torch_paged.testing.processes import run_python

needs_jax = pytest.mark.skipif(find_spec("jax") is None, reason="the TPU's kernels need jax")

DECODE = """
import torch, torch_paged
kv_cache = torch.zeros(2, 4, 1, 2, 8)
query, table = torch.ones(1, 1, 8), torch.tensor([[{block}]], dtype=torch.int32)
out = torch_paged.paged_attention(query, kv_cache, table, torch.tensor([1], dtype=torch.int32))
"""
OTHER_DEVICE = """
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
import torch
_setup_privateuseone_for_python_backend("abacus")
import torch_paged
x = torch._C._acc.create_empty_tensor((2, 4, 1, 2, 8), torch.float32)
for op, arguments in (("copy_blocks", (torch.zeros(2, 4, 1, 2, 8), x, x)), ("merge_attention_states", (x, x))):
    try:
        getattr(torch_paged, op)(*arguments)
    except NotImplementedError as error:
        print(error)
print(torch_paged.explain("copy_blocks", kv_cache=x, src_blocks=x, dst_blocks=x).refusal)
"""


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot make up a device in Python",
)
def test_a_device_without_a_backend_gets_one_sentence() -> None:
    lines = run_python(OTHER_DEVICE).stdout.splitlines()
    available = ", ".join(sorted(set(dispatch.served().values())))
    rest = (
        f"no backend serves device 'abacus' (available backends: {available}); move the tensors to a served device, "
        "or see `python -m torch_paged.collect_env`"
    )
    assert lines == [f"copy_blocks: {rest}", f"merge_attention_states: {rest}", f"copy_blocks: {rest}"]


def test_a_sparse_tensor_gets_one_sentence() -> None:
    sparse = torch.zeros(2, 4, 1, 2, 8).to_sparse()
    with pytest.raises(ValueError, match=r"^copy_blocks: every tensor must be dense .*, got layout torch.sparse_coo$"):
        torch_paged.copy_blocks(sparse, torch.tensor([0]), torch.tensor([1]))


def test_every_op_has_a_kernel_for_every_served_device() -> None:
    for device in dispatch.served():
        key = torch._C._dispatch_key_for_device(device)
        for name in SCHEMAS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key), (name, key)


def test_discovery_finds_the_folders() -> None:
    folders = {path.parent.name for path in Path(backends.__file__).parent.glob("*/__init__.py")}
    assert set(backends.discover()) == folders >= {"cpu", "reference"}
    assert list(backends.availability()) == list(backends.discover())
    assert backends.availability()["cpu"] is None
    assert backends.availability()["reference"] is None
    for name, info in backends.discover().items():
        assert info.name == name


@pytest.mark.parametrize("variable", ["TORCH_PAGED_DEBUG", "TORCH_PAGED_LOG"])
def test_a_switch_is_0_or_1(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "0", "1"):
        monkeypatch.setenv(variable, value)
        assert dispatch._chosen_backends()
    for value in ("true", "yes", "2", " 1", "on"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ImportError, match=f"^torch_paged: {variable} must be 0 or 1, got '{value}'$"):
            dispatch._chosen_backends()


def test_the_reference_is_chosen_by_name() -> None:
    code = DECODE.format(block=0) + "from torch_paged import dispatch; print(dispatch.served(), out.shape)"
    assert run_python(code, TORCH_PAGED_BACKEND="reference").stdout.strip() == (
        "{'cpu': 'reference'} torch.Size([1, 1, 8])"
    )


def test_the_reference_checks_values() -> None:
    for backend in ("cpu", "reference"):
        failed = run_python(DECODE.format(block=4), TORCH_PAGED_BACKEND=backend, check=False)
        assert "ValueError: paged_attention: block_tables must" in failed.stderr


@pytest.mark.parametrize("value", ["auto", "", "cpu"])
def test_the_cpu_backend_is_the_default_and_has_a_name(value: str) -> None:
    code = "from torch_paged import dispatch; print(dispatch.served()['cpu'])"
    assert run_python(code, TORCH_PAGED_BACKEND=value).stdout.strip() == "cpu"


def test_an_unknown_backend_is_refused_at_import() -> None:
    known = ", ".join(backends.discover())
    failed = run_python("import torch_paged", TORCH_PAGED_BACKEND="gpu", check=False)
    assert failed.stderr.splitlines()[-1] == (
        f"ImportError: torch_paged: TORCH_PAGED_BACKEND must be one of auto, {known}, got 'gpu'"
    )


def test_an_unknown_instruction_set_is_refused_at_the_first_call() -> None:
    failed = run_python(DECODE.format(block=0), TORCH_PAGED_CPU_ISA="sse9", check=False)
    assert failed.stderr.splitlines()[-1].startswith("ValueError: torch_paged: TORCH_PAGED_CPU_ISA must name")
    assert failed.stderr.splitlines()[-1].endswith("got 'sse9'")


@pytest.mark.parametrize("value", ["cpu", "reference"])
def test_settings_that_ask_for_two_backends_are_refused_at_import(value: str) -> None:
    code = "import torch_paged"
    failed = run_python(code, check=False, TORCH_PAGED_BACKEND=value, TORCH_PAGED_TPU_INTERPRET="eager")
    assert failed.stderr.splitlines()[-1] == (
        f"ImportError: torch_paged: TORCH_PAGED_TPU_INTERPRET=eager and TORCH_PAGED_BACKEND={value} contradict each "
        "other: unset one of them"
    )


@needs_jax
@pytest.mark.parametrize("value", ["auto", "tpu"])
def test_a_backend_that_a_setting_asks_for_serves_the_device(value: str) -> None:
    code = "import torch_paged; from torch_paged import dispatch; print(dispatch.served()['cpu'])"
    printed = run_python(code, TORCH_PAGED_BACKEND=value, TORCH_PAGED_TPU_INTERPRET="1").stdout
    assert printed.strip() == "tpu"


@needs_jax
def test_a_device_out_of_reach_of_a_backend_that_is_on_gets_one_sentence() -> None:
    code = "import torch_paged; from torch_paged import dispatch; print(dispatch.no_backend('copy_blocks', 'tpu'))"
    printed = run_python(code, TORCH_PAGED_TPU_INTERPRET="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout
    served = "xla, cpu" if find_spec("torch_xla") else "cpu"
    assert printed.strip() == (
        f"copy_blocks: no backend serves device 'tpu' (available backends: tpu); backend 'tpu' serves {served} here"
    )


def test_a_backend_that_a_setting_asks_for_and_that_is_off_makes_the_import_fail() -> None:
    code = """
import importlib.metadata
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = missing
import torch_paged
"""
    last = run_python(code, check=False, TORCH_PAGED_TPU_INTERPRET="1").stderr.splitlines()[-1]
    assert last == (
        "ImportError: torch_paged: TORCH_PAGED_TPU_INTERPRET=1 cannot be served: it needs jax >= 0.7.1, which is not "
        "installed: `pip install 'torch_paged[tpu]'`, or `pip install 'torch_paged[tpu-xla]'` beside torch_xla"
    )


def test_ops_that_are_defined_already_are_reported_at_import() -> None:
    code = """
import torch
library = torch.library.Library("paged", "DEF")
library.define("copy_blocks(Tensor x) -> ()")
import torch_paged
"""
    last = run_python(code, check=False).stderr.splitlines()[-1]
    assert last.startswith("ImportError: torch_paged: the ops of torch.ops.paged are already defined in this process")
