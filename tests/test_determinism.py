"""The same bits from every op: in any number of runs, on any number of threads, eager and compiled.

That a sequence's bits do not depend on its batch is tested for each attention op (``check_batch_invariance``), and for
rows of ``merge_attention_states``.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torch_paged import dispatch
from torch_paged.testing import assert_same, build
from torch_paged.testing.backends import Backend
from torch_paged.testing.every_op import EVERY_OP, call, outcome, tensors_of, written

cpu_kernels = pytest.mark.skipif(
    dispatch.served().get("cpu") != "cpu", reason="the CPU kernels are not what serves this process"
)


@pytest.mark.parametrize("name", EVERY_OP)
def test_any_number_of_runs(backend: Backend, name: str) -> None:
    op, case = EVERY_OP[name]
    case = backend.served(case)  # type: ignore[type-var]
    expected = outcome(backend, op, build(case))
    for _ in range(3):
        for actual, wanted in zip(outcome(backend, op, build(case)), expected, strict=True):
            assert_same(actual, wanted)


@cpu_kernels
@pytest.mark.parametrize("name", EVERY_OP)
def test_any_number_of_threads(name: str) -> None:
    """Also where some threads get no work, and where there are more than cores."""
    op, case = EVERY_OP[name]
    expected = outcome(call, op, build(case))
    for threads in (2, 3, 7, 32):
        torch.set_num_threads(threads)
        for _ in range(3):
            for actual, wanted in zip(outcome(call, op, build(case)), expected, strict=True):
                assert_same(actual, wanted, f"a tensor on {threads} threads")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


@cpu_kernels
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")
def test_eager_and_compiled() -> None:
    """Every op in one graph of inductor's, which fuses and reorders what lies between them."""

    def step(given: dict[str, dict[str, Any]]) -> list[Any]:
        return [call(op, given[name]) for name, (op, _) in EVERY_OP.items()]

    eager, compiled = ({name: build(case) for name, (_, case) in EVERY_OP.items()} for _ in range(2))
    expected = step(eager)
    results = torch.compile(step, fullgraph=True)(compiled)
    for (name, (op, _)), result, wanted in zip(EVERY_OP.items(), results, expected, strict=True):
        pairs = zip(
            (*tensors_of(result), *written(op, compiled[name])),
            (*tensors_of(wanted), *written(op, eager[name])),
            strict=True,
        )
        for actual, right in pairs:
            assert_same(actual, right, name)
