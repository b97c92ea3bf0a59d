"""Calls keep no memory: some thousands of each kind, as ``make leaks`` does with a million."""

import pytest
import torch
from leaks import growth, kinds

from torch_paged import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.served().get("cpu") != "cpu", reason="the CPU kernels are not what serves this process"
)

CALLS, ALLOWED_BYTES = 2000, 2**17  # 64 bytes a call: less than a tensor


@pytest.mark.parametrize("name", kinds())
def test_the_process_does_not_grow(name: str) -> None:
    function = kinds()[name]
    with torch.inference_mode():
        growth(function, CALLS)
        assert growth(function, CALLS) < ALLOWED_BYTES
