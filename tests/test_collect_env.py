"""The report for bug reports names versions and backends, and why one is off."""

import platform

import torch

import torch_paged
from torch_paged.testing.processes import run_python

CODE = "import runpy; runpy.run_module('torch_paged.collect_env', run_name='__main__')"


def backends_of(report: str) -> dict[str, str]:
    lines = report.partition("backends\n")[2].splitlines()[::2]
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


def test_versions_and_backends() -> None:
    report = run_python(CODE).stdout
    for version in (torch_paged.__version__, torch.__version__, platform.python_version()):
        assert version in report
    assert backends_of(report) == {
        "cpu": "on for cpu",
        "reference": "off: chosen only by TORCH_PAGED_BACKEND=reference",
    }


def test_a_backend_that_was_not_chosen() -> None:
    report = run_python(CODE, TORCH_PAGED_BACKEND="reference").stdout
    assert "TORCH_PAGED_BACKEND=reference" in report
    assert backends_of(report) == {"cpu": "off: TORCH_PAGED_BACKEND names another backend", "reference": "on for cpu"}
