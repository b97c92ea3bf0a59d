"""Every instruction set that this machine has, forced by name in a process of its own; the others are refused."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torch_paged import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.served().get("cpu") != "cpu", reason="the CPU kernels are not what serves this process"
)

NEEDED_FLAGS = {
    "avx512": {f"avx512{name}" for name in ("f", "bw", "dq", "vl", "_bf16", "_vnni", "vbmi")} | {"fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "generic": set(),
}
CHECK = """
import sys
import torch
from torch_paged.backends.cpu.support import isa
from torch_paged.testing import AttentionCase, assert_merged, assert_same, build, option_pairs, random_case
from torch_paged.testing.backends import REFERENCE, backends_here
from torch_paged.testing.named import ATTENTION_CASES, GATHER_CASES, MERGE_CASES, WRITE_CASES
from torch_paged.testing.semantics import CHECKS

torch.set_num_threads(1)
assert isa() == sys.argv[1], isa()
backend, = backends_here()
for case in (*ATTENTION_CASES, *option_pairs()):
    backend.check(case)
for seed in range(1000, 1040):
    backend.check(random_case(seed))
for dtype, cache_dtype, rank in (
    (torch.float32, None, None), (torch.bfloat16, None, None), (torch.float16, None, None),
    (torch.bfloat16, torch.int8, 4), (torch.float16, torch.float8_e4m3fn, 2), (torch.float32, torch.float8_e5m2, 1),
):
    kind = dict(dtype=dtype, cache_dtype=cache_dtype, scales_rank=rank, num_kv_heads=1, head_dim=40)
    backend.check_batch_invariance(AttentionCase("decode", (1100, 5, 600, 64), **kind))
    backend.check_batch_invariance(AttentionCase("varlen", (100, 0, 2100, 9), (40, 3, 5, 9), group=2, **kind))
torch.set_num_threads(1)
for case in (*GATHER_CASES, *WRITE_CASES, *MERGE_CASES):
    backend.check(case)
for check in CHECKS:
    if check.line == 10:
        for dtype in check.dtypes:
            check.run(backend, dtype)
print("checked", isa())
"""
ONE_CALL = """
import torch, torch_paged
cache = torch.zeros(2, 1, 1, 1, 8)
ones = torch.ones(1, dtype=torch.int32)
try:
    torch_paged.paged_attention(torch.zeros(1, 1, 8), cache, torch.zeros(1, 1, dtype=torch.int32), ones)
except ValueError as error:
    print(error)
"""


def available(isa: str) -> bool:
    if isa == "generic":
        return True
    if platform.machine() != "x86_64":
        return False
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert flags is not None
    return NEEDED_FLAGS[isa] <= set(flags[1].split())


def _run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, TORCH_PAGED_CPU_ISA=isa, OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("isa", NEEDED_FLAGS)
def test_forced(isa: str) -> None:
    if available(isa):
        done = _run(isa, "-c", CHECK, isa)
        assert done.stdout.strip() == f"checked {isa}", done.stderr
    else:
        _assert_refused(isa)


@pytest.mark.parametrize("isa", [isa for isa in NEEDED_FLAGS if available(isa)])
def test_values_at_the_ends_of_a_dtype(isa: str) -> None:
    tests = Path(__file__).with_name("test_faults_values.py")
    done = _run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests))
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_unknown_name_is_refused() -> None:
    _assert_refused("sse9")


def _assert_refused(isa: str) -> None:
    done = _run(isa, "-c", ONE_CALL)
    assert done.returncode == 0, done.stderr
    sentence = done.stdout.strip()
    assert "TORCH_PAGED_CPU_ISA" in sentence
    assert isa in sentence
    assert "\n" not in sentence
