"""What the tests share: the backends that run here, and memory that is never clean by luck."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("nki") is None:  # before torch_paged looks for it
    sys.path.append(str(Path(__file__).parent / "nki_sim"))

import torch_paged  # noqa: F401  (defines the ops)
from torch_paged.testing.backends import REFERENCE, Backend, Refused, backends_here

if importlib.util.find_spec("jax") is None:
    collect_ignore_glob = ["test_tpu_*.py"]
elif importlib.util.find_spec("libtpu") is None:  # no compiler of the real chips
    collect_ignore_glob = [f"test_tpu_{name}.py" for name in ("aot", "cache", "matrix", "static")]

_refused: set[str] = set()  # tests that a refusal ended


@pytest.fixture(params=backends_here(), ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend that runs here."""
    return request.param


@pytest.fixture(params=[REFERENCE, *backends_here()], ids=lambda backend: backend.name)
def implementation(request: pytest.FixtureRequest) -> Backend:
    """The reference functions, and every backend that runs here."""
    return request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread, so that a busy machine does not make tests slow; tests about threads set their own number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Make torch.empty return NaN (or the largest integer), so that an element that a kernel forgot is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Let a refusal, which was asserted to be as it should, end a test, or one example of a drawn test."""
    drawn = getattr(pyfuncitem.obj, "hypothesis", None)
    if drawn is not None:
        drawn.inner_test = _ended_by_a_refusal(drawn.inner_test, pyfuncitem.nodeid)
    try:
        return (yield)
    except Refused:
        _refused.add(pyfuncitem.nodeid)
        return True


def _ended_by_a_refusal(test: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return test(*args, **kwargs)
        except Refused:
            _refused.add(name)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests have only seen that a backend refuses what they ask for."""
    if _refused:
        terminalreporter.write_line(f"{len(_refused)} of the passed tests end in a refusal, in the backend's words")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let tests write the pages that they are compared with."""
    parser.addoption("--write-support-table", action="store_true", help="write docs/huggingface_support.md")
    parser.addoption("--write-errors", action="store_true", help="write docs/errors.md")
