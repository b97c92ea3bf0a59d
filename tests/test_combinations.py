"""Every pair of options, and random full combinations of options, key sources, cache dtypes and lengths."""

import pytest
import torch

from torch_paged.testing import AttentionCase, option_pairs, random_case
from torch_paged.testing.backends import Backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", list(option_pairs()), ids=lambda case: case.name)
def test_pair(backend: Backend, case: AttentionCase) -> None:
    backend.check(case)


@pytest.mark.parametrize("seed", range(200))
def test_random_combination(backend: Backend, seed: int) -> None:
    torch.set_num_threads(2 if seed % 5 == 0 else 1)
    backend.check(random_case(seed), seed)
