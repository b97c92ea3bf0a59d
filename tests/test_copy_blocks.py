"""Block copies: the same bytes as the reference, sources read before the first write."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_paged.testing import CopyCase, assert_same, build
from torch_paged.testing.backends import REFERENCE, Backend, backends_here
from torch_paged.testing.named import COPY_CASES
from torch_paged.testing.tensors import storage_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _check(backend: Backend, case: CopyCase) -> None:
    case = backend.served(case)
    arguments, expected = build(case), build(case)
    backend("copy_blocks", arguments)
    REFERENCE("copy_blocks", expected)
    for name in ("kv_cache", "kv_scales"):
        if expected[name] is not None:
            assert_same(storage_of(arguments[name]), storage_of(expected[name]), name)


@pytest.mark.parametrize("case", COPY_CASES, ids=lambda case: case.name)
def test_case(backend: Backend, case: CopyCase) -> None:
    _check(backend, case)


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
    _check(backend, replace(case, cache_dtype=torch.int8, scales_rank=4) if quantised else case)
