"""Per-token-and-head quantisation: the same bytes and scales as the reference."""

import pytest
import torch

from torch_paged.contract.reference_cache import QMAX
from torch_paged.testing import WriteCase
from torch_paged.testing.backends import Backend
from torch_paged.testing.named import HALF_DTYPES, QUANTIZED_DTYPES, WRITE_CASES

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    "case", [case for case in WRITE_CASES if case.op == "quantize_and_cache"], ids=lambda case: case.name
)
def test_case(backend: Backend, case: WriteCase) -> None:
    backend.check(case)


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_many_tokens(backend: Backend, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    case = WriteCase("many", num_tokens=700, skipped_tokens=40, num_blocks=50, cache_dtype=dtype, scales_rank=4)
    backend.check(case)


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
@pytest.mark.parametrize("source", [torch.float32, *HALF_DTYPES])
def test_zero_rows_get_scale_one(backend: Backend, dtype: torch.dtype, source: torch.dtype) -> None:
    arguments = _arguments(backend, torch.zeros((2, 1, 4), dtype=source), dtype)
    backend("quantize_and_cache", arguments)
    cache, scales = _written(arguments)
    assert (scales == 1).all()
    assert (cache.float() == 0).all()


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_the_largest_lane_reaches_qmax(backend: Backend, dtype: torch.dtype) -> None:
    rows = torch.tensor([[[0.5, -2.0, 1.0, 0.0]], [[3.0, 0.0, 0.0, -1.5]]])
    arguments = _arguments(backend, rows, dtype)
    backend("quantize_and_cache", arguments)
    cache, scales = _written(arguments)
    assert scales.flatten().tolist() == [float(torch.tensor(x) / QMAX[dtype]) for x in (2.0, 3.0)] * 2
    assert cache[0].float().abs().amax(-1).flatten().tolist() == [QMAX[dtype]] * 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_nan_lane_spoils_only_itself(backend: Backend, dtype: torch.dtype) -> None:
    arguments = _arguments(backend, torch.tensor([[[0.5, float("nan"), -2.0, 0.0]]]), dtype)
    backend("quantize_and_cache", arguments)
    stored = _written(arguments)[0][0].float().flatten()
    assert stored.isnan().tolist() == [False, True, False, False]
    assert stored[2] == -QMAX[dtype]


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
@pytest.mark.parametrize("lane", [float("nan"), float("inf"), 1e-44, 3.4e38])
def test_scales_are_finite_and_positive(backend: Backend, dtype: torch.dtype, lane: float) -> None:
    arguments = _arguments(backend, torch.tensor([[[lane, 0.0, -0.0, lane]]]), dtype)
    backend("quantize_and_cache", arguments)
    scales = _written(arguments)[1]
    assert scales.isfinite().all()
    assert (scales > 0).all()


def _arguments(backend: Backend, rows: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the write of each row into the first slot of its own block."""
    tokens, size = rows.size(0), backend.block_size(1)
    return {
        "key": rows,
        "value": rows,
        "kv_cache": torch.zeros((2, tokens, 1, size, rows.size(2))).to(dtype),
        "kv_scales": torch.full((2, tokens, 1, size), float("nan")),
        "slot_mapping": torch.arange(tokens) * size,
    }


def _written(arguments: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return arguments["kv_cache"][..., 0, :], arguments["kv_scales"][..., 0]
