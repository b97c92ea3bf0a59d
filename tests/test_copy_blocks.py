"""Block copies: the same bytes as the reference, sources read before the first write."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_paged.testing import CopyCase
from torch_paged.testing.backends import Backend, backends_here
from torch_paged.testing.named import COPY_CASES

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", COPY_CASES, ids=lambda case: case.name)
def test_case(backend: Backend, case: CopyCase) -> None:
    backend.check(case)


@pytest.mark.parametrize("backend", backends_here(), ids=lambda backend: backend.name)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sources=st.lists(st.integers(-1, 8), max_size=9),
    destinations=st.permutations(range(9)),
    quantised=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_any_pairs(
    backend: Backend, sources: list[int], destinations: list[int], quantised: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    pairs = tuple(zip(sources, destinations, strict=False))
    case = CopyCase("any", pairs=pairs, num_blocks=9)
    backend.check(replace(case, cache_dtype=torch.int8, scales_rank=4) if quantised else case)
