"""What the Neuron backend refuses and needs, in whose words, and that it refuses nothing else."""

import importlib.metadata
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_packages import install

from torch_paged.backends import neuron, xla_runtime
from torch_paged.backends.neuron import BACKEND, support
from torch_paged.contract.validate import validate
from torch_paged.testing import AttentionCase, build
from torch_paged.testing.processes import SOURCE, run_python

SERVED = AttentionCase("served", head_dim=80, query_lens=(3, 0, 5, 1), new_lens=(3, 0, 5, 1))
SIMULATOR = f"{SOURCE}{os.pathsep}{SOURCE / 'tests' / 'nki_sim'}"
REPORT = "from torch_paged import backends, dispatch; import torch_paged; print(dispatch.served()); "


def refusal(case: AttentionCase, **changes: Any) -> str | None:
    arguments = build(case) | changes
    validate(case.op, arguments)
    return support.refusal(case.op, arguments)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"head_dim": 257},
            "head_dim 257 (at most 256); run it on another backend",
        ),
        *(
            (
                {"block_size": size},
                f"kv_cache with S = {size} (a power of two from 8 on); allocate it with such a block size",
            )
            for size in (1, 4, 12, 48)
        ),
    ],
)
def test_refusals(changes: dict[str, Any], says: str) -> None:
    assert refusal(replace(SERVED, **changes)) == f"flash_attn_varlen: backend 'neuron' does not support {says}"


def test_a_latent_cache_is_refused_only_for_its_width() -> None:
    latent = replace(SERVED, latent=True, value_dim=64, num_kv_heads=1)
    assert refusal(latent) is None
    assert "head_dim 576 (at most 256)" in str(refusal(replace(latent, head_dim=576)))


def test_parts_too_wide_for_a_partition_are_refused() -> None:
    outs = torch.empty((2, 1, 1, 8193), device="meta")
    says = "does not support outs with D = 8193 (at most 8192); merge its lanes in parts"
    assert str(support.refusal("merge_attention_states", {"outs": outs})).endswith(says)
    assert support.refusal("merge_attention_states", {"outs": outs[..., 1:]}) is None


def test_a_cache_in_another_layout_is_refused() -> None:
    said = refusal(replace(SERVED, layout="nhd"))
    assert said is not None
    assert said.startswith("flash_attn_varlen: backend 'neuron' does not support kv_cache with strides (")
    assert said.endswith(") (contiguous); pass kv_cache.contiguous()")


def test_a_cache_of_too_many_rows_is_refused() -> None:
    kv_cache = torch.empty((2, 2**21, 8, 32, 128), dtype=torch.int8, device="meta")
    said = support.refusal("copy_blocks", {"kv_cache": kv_cache})
    assert said is not None
    assert f"kv_cache with C * N * KH * S = {2**30} (less than 2^30)" in said
    assert support.refusal("copy_blocks", {"kv_cache": kv_cache[:, 1:]}) is not None  # not contiguous
    fewer = torch.empty((2, 2**21 - 1, 8, 32, 128), dtype=torch.int8, device="meta")
    assert support.refusal("copy_blocks", {"kv_cache": fewer}) is None


@pytest.mark.parametrize("op", ["reshape_and_cache", "quantize_and_cache", "copy_blocks"])
def test_writes_through_torch_xla_are_refused(op: str) -> None:
    with torch._subclasses.FakeTensorMode():
        kv_cache = torch.empty((2, 4, 2, 16, 64), device="xla")
        said = support.refusal(op, {"kv_cache": kv_cache})
        assert support.refusal("gather_cache", {"kv_cache": kv_cache}) is None
    assert said == (
        f"{op}: backend 'neuron' does not support writes through torch_xla (what a kernel writes to its arguments is "
        "lost there); use TorchNeuron's device 'neuron', or write by torch ops"
    )


@pytest.mark.parametrize("head_dim", [1, 17, 64, 80, 96, 128, 192, 256])
def test_what_is_not_refused(head_dim: int) -> None:
    for block_size, group, (dtype, stored, rank), lens in itertools.product(
        (8, 16, 32, 64, 128, 256),
        (1, 3, 8),
        (
            (torch.float32, None, None),
            (torch.bfloat16, None, None),
            (torch.bfloat16, torch.int8, 1),
            (torch.float32, torch.float8_e4m3fn, 2),
            (torch.float16, torch.float8_e5m2, 4),
        ),
        (None, (2,)),
    ):
        case = AttentionCase(
            "served",
            context_lens=(3,),
            query_lens=lens,
            head_dim=head_dim,
            stored_dim=head_dim + head_dim % 2,
            block_size=block_size,
            group=group,
            dtype=dtype,
            cache_dtype=stored,
            scales_rank=rank,
            sinks=True,
            alibi=True,
            mask="heads",
            sliding_window=2,
            attention_chunk=16,
            logits_soft_cap=5.0,
        )
        assert refusal(case) is None


INSTALL = support.install_line()


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({}, f"it needs nki >= 0.6, which is not installed: {INSTALL}"),
        ({"nki": "0.5.1", "torch-neuronx": "2.13.3.0"}, f"it needs nki >= 0.6, got 0.5.1: {INSTALL}"),
        (
            {"neuronx-cc": "2.21.18209.0+043b1bf7", "torch-neuronx": "2.8.0.2.10"},
            "it needs nki >= 0.6, which is not installed, and neuronx-cc 2.21.18209.0+043b1bf7 has only neuronxcc.nki, "
            f"an older language: {INSTALL}",
        ),
        ({"nki": "0.7.0"}, f"it needs torch-neuronx >= 2.9, which is not installed: {INSTALL}"),
        (
            {"nki": "0.6.0+25407465723.g29063adb", "torch-neuronx": "2.8.1"},
            f"it needs torch-neuronx >= 2.9, got 2.8.1: {INSTALL}",
        ),
        (
            {"nki": "0.6.0", "neuronx-cc": "2.26.5038.0", "torch-neuronx": "2.13.3.0"},
            f"it needs neuronx-cc >= 2.27, got 2.26.5038.0: {INSTALL}",
        ),
        ({"nki": "0.10", "torch-neuronx": "2.9.0.2.15.32035"}, None),
        ({"nki": "1.0", "torch-neuronx": "2.14.3.0"}, None),
    ],
)
def test_a_stack_that_is_missing_or_old(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str], says: str | None
) -> None:
    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(neuron, "SIMULATED", False)
    monkeypatch.setattr(neuron, "_in_reach", lambda device_type: True)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    assert BACKEND.why_off() == says
    assert set(support.versions()) == set(support.OLDEST)


def test_the_extra_asks_for_the_same_versions() -> None:
    text = (SOURCE / "pyproject.toml").read_text()
    [extra] = re.findall(r"^neuron = \[(.*)\]$", text, re.MULTILINE)
    wanted = {f"{name}>={'.'.join(map(str, version))}" for name, version in support.OLDEST.items()}
    assert set(re.findall(r'"([^"]+)"', extra)) == wanted


def test_a_simulator_counts_as_nki() -> None:
    assert support.missing("nki") is None


@pytest.mark.parametrize(
    ("named", "instance", "simulated", "found"),
    [
        ("", "trn2.48xlarge\n", False, "trn2"),
        ("", "trn2u.48xlarge", False, "trn2"),
        ("", "trn3.48xlarge", False, "trn3"),
        ("gen3", "trn3.48xlarge", False, "trn2"),
        ("gen4", None, True, "trn3"),
        ("trn2", "Z790 board", True, "trn2"),
        ("", "trn1.2xlarge", True, "trn3"),
    ],
)
def test_generations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str, instance: str | None, simulated: bool, found: str
) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", named)
    monkeypatch.setattr(support, "_INSTANCE", tmp_path / "product_name")
    if instance is not None:
        (tmp_path / "product_name").write_text(instance)
    assert support.wrong_generation(simulated) is None
    assert support.generation(simulated) == found


@pytest.mark.parametrize(
    ("named", "instance", "found"),
    [
        ("", "trn1.32xlarge", "trn1"),
        ("", "trn1n.32xlarge", "trn1"),
        ("", "inf2.xlarge", "inf2"),
        ("inf2", "trn2.48xlarge", "inf2"),
        ("trn9", None, "trn9"),
        ("", "m7i.large", "a machine of unknown type"),
        ("", None, "a machine of unknown type"),
    ],
)
def test_a_generation_that_is_older_or_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str, instance: str | None, found: str
) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", named)
    monkeypatch.setattr(support, "_INSTANCE", tmp_path / "product_name")
    if instance is not None:
        (tmp_path / "product_name").write_text(instance)
    says = f"it needs Trainium 2 or 3 (trn2, trn3), got {found}: set NEURON_PLATFORM_TARGET_OVERRIDE"
    assert support.wrong_generation(simulated=False) == says
    with pytest.raises(NotImplementedError) as raised:
        support.generation(simulated=False)
    assert str(raised.value) == f"torch_paged: backend 'neuron' is off because {says}"


@pytest.mark.parametrize(("value", "cores"), [("", (2, 1)), ("1", (1, 1)), ("2", (2, 2))])
def test_cores(monkeypatch: pytest.MonkeyPatch, value: str, cores: tuple[int, int]) -> None:
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", value)
    assert (support.cores(simulated=False), support.cores(simulated=True)) == cores
    assert BACKEND.wrong_setting() is None


def test_a_wrong_number_of_cores_makes_each_call_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "4")
    assert BACKEND.wrong_setting() == "NEURON_LOGICAL_NC_CONFIG must be 1 or 2, got '4'"


@pytest.mark.parametrize(
    ("named", "packages", "found"),
    [
        (None, {"torch_xla", "torch_neuronx"}, True),
        (None, {"torch_xla"}, False),
        (None, {"torch_neuronx"}, False),
        ("NEURON", {"torch_xla"}, True),
        ("NEURON", {"torch_neuronx"}, False),
        ("TPU", {"torch_xla", "torch_neuronx"}, False),
        ("CPU", {"torch_xla", "torch_neuronx"}, False),
    ],
)
def test_whose_the_xla_devices_are(
    monkeypatch: pytest.MonkeyPatch, named: str | None, packages: set[str], found: bool
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    if named is not None:
        monkeypatch.setenv("PJRT_DEVICE", named)
    assert xla_runtime.on_neuron() is found


def xla_stack(folder: Path) -> str:
    install(folder, "torch_xla", "2.9.0", module="torch_xla")
    install(folder, "torch-neuronx", "2.9.0.2.15.32035", module="torch_neuronx")
    return f"{SIMULATOR}{os.pathsep}{folder}"


def test_torch_xla_on_neuron_is_this_backends_and_not_the_tpus(tmp_path: Path) -> None:
    code = REPORT + (
        'known = backends.discover(); print(known["neuron"].serves(), known["tpu"].serves()); '
        'print(known["tpu"].why_off()); import sys; print("torch_xla" in sys.modules, "nki" in sys.modules)'
    )
    path = xla_stack(tmp_path)
    for runtime in ("", "NEURON"):
        settings = {"PYTHONPATH": path, "NEURON_PLATFORM_TARGET_OVERRIDE": "trn2"}
        printed = run_python(code, PJRT_DEVICE=runtime, **settings).stdout  # type: ignore[arg-type]
        served, serves, tpu, imported = printed.splitlines()
        assert served == "{'xla': 'neuron', 'cpu': 'cpu'}"
        assert serves == "('neuron', 'xla') ('tpu',)"
        assert tpu.startswith("no tensor here is on a TPU, as torch_xla's are on NeuronCores: ")
        assert imported == "False False"
    serves = run_python(code, PYTHONPATH=path, PJRT_DEVICE="TPU").stdout.splitlines()[1]
    assert serves == "('neuron',) ('xla', 'tpu')"


@pytest.mark.parametrize(
    ("target", "distributions", "says"),
    [
        (
            "trn1",
            {"nki": "0.7.0"},
            "it needs Trainium 2 or 3 (trn2, trn3), got trn1: set NEURON_PLATFORM_TARGET_OVERRIDE",
        ),
        ("trn2", {"nki": "0.4.0"}, f"it needs nki >= 0.6, got 0.4.0: {INSTALL}"),
        (
            "trn2",
            {"neuronx-cc": "2.21.1"},
            "it needs nki >= 0.6, which is not installed, and neuronx-cc 2.21.1 has only neuronxcc.nki, an older "
            f"language: {INSTALL}",
        ),
    ],
)
def test_a_stack_that_does_not_do_is_one_sentence(
    tmp_path: Path, target: str, distributions: dict[str, str], says: str
) -> None:
    xla_stack(tmp_path)
    for name, version in distributions.items():
        install(tmp_path, name, version, module="neuronxcc.nki" if name == "neuronx-cc" else "")
    code = "from torch_paged import dispatch; import torch_paged; print(dispatch.no_backend('copy_blocks', 'xla'))"
    path = f"{SOURCE}{os.pathsep}{tmp_path}"
    printed = run_python(code, PYTHONPATH=path, NEURON_PLATFORM_TARGET_OVERRIDE=target).stdout.strip()
    off = "copy_blocks: no backend serves device 'xla' (available backends: cpu); backend 'neuron' is off because "
    assert printed == off + says


def test_nothing_of_neuron_here_is_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron, "SIMULATED", False)
    monkeypatch.setattr(neuron, "_in_reach", lambda device_type: False)
    assert BACKEND.why_off() == (
        f"no tensor here is on a NeuronCore: {INSTALL}, or set TORCH_PAGED_NKI_SIM=1 to simulate kernels"
    )


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            ["tests/neuron_device.py"],
            "test-neuron-device: no NeuronCore is in reach of TorchNeuron here; docs/neuron.md ",
        ),
        (
            ["-m", "benchmarks", "neuron", "--device"],
            "benchmarks neuron: no NeuronCore is in reach of TorchNeuron here; docs/neuron.md ",
        ),
        (["examples/10_neuron.py"], "no NeuronCore is in reach: reshape_and_cache: no backend serves device 'neuron' "),
    ],
    ids=["tests", "benchmark", "example"],
)
def test_without_a_neuron_core_it_ends_with_one_sentence(command: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=SOURCE,
        env={name: x for name, x in os.environ.items() if not name.startswith("TORCH_PAGED_")}
        | {"PYTHONPATH": str(SOURCE)},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    [sentence] = done.stderr.splitlines()
    assert sentence.startswith(says)
