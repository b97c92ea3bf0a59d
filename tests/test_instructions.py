"""The gate on instruction counts: it counts the same twice, and tells what left the tolerance."""

import platform

import pytest

from benchmarks import instructions

FIGURES = {"generic": {"case": 1000, "other": 1000}}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="single steps are implemented for x86_64")
def test_counts_are_repeatable() -> None:
    library = instructions.stepper()
    counts = [instructions.steps(library, lambda: None) for _ in range(instructions.WARM_UP)]
    if counts[0] == 0:
        pytest.skip("this machine does not trap single steps")
    assert counts[-2] == counts[-1]
    assert instructions.steps(library, lambda: sum(range(100))) > counts[-1] + 100


@pytest.mark.parametrize(("now", "status"), [(1000, 0), (1030, 0), (970, 0), (1031, 1), (969, 1)])
def test_tolerance(now: int, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert instructions.compare({"generic": {"case": now, "other": 1000}}, FIGURES) == status
    assert ("--update" in capsys.readouterr().out) == bool(status)


def test_a_case_without_figure_fails() -> None:
    assert instructions.compare({"generic": {"new": 1}}, FIGURES) == 1
