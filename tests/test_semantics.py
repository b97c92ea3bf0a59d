"""The numbered lines of the contract, one check or more for each, with results small enough to work out by hand."""

import pytest
import torch

from torch_paged.testing.backends import Backend
from torch_paged.testing.semantics import CHECKS, LINES, Check

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _id(value: Check | torch.dtype) -> str:
    return f"{value.line}_{value.name}" if isinstance(value, Check) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("check", "dtype"), [(check, dtype) for check in CHECKS for dtype in check.dtypes], ids=_id)
def test_line(implementation: Backend, check: Check, dtype: torch.dtype) -> None:
    if implementation.direct and check.of_ops:
        pytest.skip("it is about the ops, not about what they compute")
    check.run(implementation, dtype)


def test_every_line_has_checks() -> None:
    assert {check.line for check in CHECKS} == set(LINES)
