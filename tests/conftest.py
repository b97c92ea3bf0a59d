"""What the tests share: the backends that run here, and memory that is never clean by luck."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import torch_paged
from torch_paged import dispatch
from torch_paged.contract.schema import NAMESPACE


@dataclass(frozen=True)
class Backend:
    """A way to call the ops by schema name: through the dispatcher, or the reference functions directly."""

    name: str
    device: torch.device
    direct: bool = False

    def __call__(self, op: str, arguments: dict[str, Any], stats: bool = False) -> Any:
        """Run an op; with ``stats`` its ``with_stats`` overload."""
        if self.direct:
            return getattr(torch_paged.reference, op + ("_with_stats" if stats else ""))(**arguments)
        packet = getattr(getattr(torch.ops, NAMESPACE), op)
        on_device = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        return (packet.with_stats if stats else packet.default)(**on_device)


# Without a backend the CPU ops raise, so the tests fail instead of collecting nothing.
BACKENDS = [Backend(name, torch.device(device)) for device, name in (dispatch.served() or {"cpu": "cpu"}).items()]
REFERENCE = Backend("direct", torch.device("cpu"), direct=True)


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend that runs here."""
    return request.param


@pytest.fixture(params=[REFERENCE, *BACKENDS], ids=lambda backend: backend.name)
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
