"""What the tests share: the backends that run here, and memory that is never clean by luck."""

from collections.abc import Iterator

import pytest
import torch

import torch_paged  # noqa: F401  (defines the ops)
from torch_paged.testing.backends import REFERENCE, Backend, backends_here


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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the matrix of models write the table that it is compared with."""
    parser.addoption("--write-support-table", action="store_true", help="write docs/huggingface_support.md")
