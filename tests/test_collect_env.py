"""The report for bug reports names versions and backends, and why one is off."""

import os
import platform
import subprocess
import sys

import torch

import torch_paged
from torch_paged import backends
from torch_paged.testing.processes import SOURCE


def collect(status: int = 0, **settings: str) -> str:
    """Run the tool as a user does and return its report."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_PAGED_")}
    command = [sys.executable, "-m", "torch_paged.collect_env"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=SOURCE, env={**environment, "OMP_NUM_THREADS": "1", **settings}
    )
    assert (done.returncode, done.stderr) == (status, ""), done.stderr
    return done.stdout


def backends_of(report: str) -> dict[str, str]:
    lines = report.partition("backends\n")[2].splitlines()[::2]
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


def test_versions_and_backends() -> None:
    report = collect()
    for version in (torch_paged.__version__, torch.__version__, platform.python_version()):
        assert version in report
    states = backends_of(report)
    assert list(states) == list(backends.discover())
    assert states["cpu"] == "on for cpu"
    assert states["reference"] == "off: chosen only by TORCH_PAGED_BACKEND=reference"


def test_a_backend_that_was_not_chosen() -> None:
    report = collect(TORCH_PAGED_BACKEND="reference")
    assert "TORCH_PAGED_BACKEND=reference" in report
    states = backends_of(report)
    assert states["cpu"] == "off: TORCH_PAGED_BACKEND names another backend"
    assert states["reference"] == "on for cpu"


def test_a_backend_whose_device_a_setting_gives_to_another() -> None:
    states = backends_of(collect(TORCH_PAGED_TPU_INTERPRET="on_wait"))
    assert states["cpu"] == "off: TORCH_PAGED_TPU_INTERPRET=on_wait gives cpu to backend 'tpu'"
    assert states["tpu"].startswith("on for cpu")


def test_a_setting_that_makes_each_call_raise() -> None:
    assert backends_of(collect(TORCH_PAGED_CPU_ISA="avx3"))["cpu"] == (
        "on for cpu, but each call raises: TORCH_PAGED_CPU_ISA must name kernels that this machine runs, got 'avx3'"
    )


def test_an_import_that_fails_is_a_line_of_the_report() -> None:
    report = collect(TORCH_PAGED_BACKEND="nope", status=1)
    [line] = [line for line in report.splitlines() if line.startswith("import ")]
    rule = f"TORCH_PAGED_BACKEND must be one of auto, {', '.join(backends.discover())}, got 'nope'"
    assert line == f"import        fails: torch_paged: {rule}"
    assert "on for" not in report
    assert set(backends_of(report)) == set(backends.discover())
