"""Writes with given scales or none: the same bytes as the reference, and no byte besides."""

import pytest
import torch

from torch_paged.testing import WriteCase, assert_same, build
from torch_paged.testing.backends import REFERENCE, Backend
from torch_paged.testing.named import HALF_DTYPES, QUANTIZED_DTYPES, WRITE_CASES
from torch_paged.testing.tensors import storage_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    "case", [case for case in WRITE_CASES if case.op == "reshape_and_cache"], ids=lambda case: case.name
)
def test_case(backend: Backend, case: WriteCase) -> None:
    backend.check(case)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_tokens(backend: Backend, threads: int) -> None:
    torch.set_num_threads(threads)
    backend.check(WriteCase("many", num_tokens=700, skipped_tokens=40, num_blocks=50, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "case",
    [
        WriteCase("rows", num_tokens=20),
        WriteCase("quantised", num_tokens=20, cache_dtype=torch.int8, scales_rank=4),
    ],
    ids=lambda case: case.name,
)
def test_a_slot_given_more_than_once_holds_one_of_its_tokens(backend: Backend, case: WriteCase) -> None:
    case = backend.served(case)
    arguments, twins = build(case), (2, 3, 17)
    arguments["slot_mapping"][list(twins)] = arguments["slot_mapping"][2].clone()
    possible = []
    for kept in twins:
        expected = build(case)
        expected["slot_mapping"][:] = arguments["slot_mapping"]
        expected["slot_mapping"][[token for token in twins if token != kept]] = -1
        REFERENCE(case.op, expected)
        possible.append(expected["kv_cache"])
    backend(case.op, arguments)
    assert any(arguments["kv_cache"].view(torch.uint8).equal(cache.view(torch.uint8)) for cache in possible)


@pytest.mark.parametrize(
    "case",
    [
        WriteCase("lines", num_tokens=300, skipped_tokens=20, num_kv_heads=8, head_dim=128, num_blocks=40),
        WriteCase("no_lines", num_tokens=500, num_kv_heads=8, head_dim=72, num_blocks=40),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_write_larger_than_a_cores_cache(backend: Backend, case: WriteCase, threads: int) -> None:
    torch.set_num_threads(threads)
    case = backend.served(case)
    arguments, expected = build(case), build(case)
    backend(case.op, arguments)
    REFERENCE(case.op, expected)
    assert_same(storage_of(arguments["kv_cache"]), storage_of(expected["kv_cache"]), "kv_cache")


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
@pytest.mark.parametrize("source", [torch.float32, *HALF_DTYPES])
def test_quantisation_saturates(backend: Backend, dtype: torch.dtype, source: torch.dtype) -> None:
    qmax = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}[dtype]
    rows = torch.tensor([[[65000.0, -65000.0, float("inf"), 0.0]]], dtype=source)
    cache = torch.zeros((2, 1, 1, backend.block_size(1), 4)).to(dtype)
    scales = torch.tensor([0.5, 0.25])
    backend(
        "reshape_and_cache",
        {"key": rows, "value": rows, "kv_cache": cache, "slot_mapping": torch.tensor([0]), "kv_scales": scales},
    )
    assert cache[..., 0, :].float().flatten().tolist() == [qmax, -qmax, qmax, 0.0] * 2


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_quantisation_rounds_half_to_even(backend: Backend, dtype: torch.dtype) -> None:
    halfway, even = {
        torch.int8: ([0.5, 1.5, 2.5, -3.5], [0.0, 2.0, 2.0, -4.0]),
        torch.float8_e4m3fn: ([17.0, 19.0, 21.0, -23.0], [16.0, 20.0, 20.0, -24.0]),
        torch.float8_e5m2: ([9.0, 11.0, 13.0, -15.0], [8.0, 12.0, 12.0, -16.0]),
    }[dtype]
    rows = torch.tensor([[halfway]]) * 0.5
    cache = torch.zeros((2, 1, 1, backend.block_size(1), 4)).to(dtype)
    backend(
        "reshape_and_cache",
        {
            "key": rows,
            "value": rows,
            "kv_cache": cache,
            "slot_mapping": torch.tensor([0]),
            "kv_scales": torch.tensor([0.5, 0.5]),
        },
    )
    assert cache[..., 0, :].float().flatten().tolist() == even * 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_stays_nan_in_fp8(backend: Backend, dtype: torch.dtype) -> None:
    rows = torch.tensor([[[1.0, float("nan")]]])
    cache = torch.zeros((2, 1, 1, backend.block_size(1), 2)).to(dtype)
    backend(
        "reshape_and_cache",
        {
            "key": rows,
            "value": rows,
            "kv_cache": cache,
            "slot_mapping": torch.tensor([0]),
            "kv_scales": torch.tensor([1.0, 1.0]),
        },
    )
    assert cache[..., 0, :].float().isnan().flatten().tolist() == [False, True] * 2


@pytest.mark.parametrize("source", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_every_half_precision_value_quantises_like_torch(
    backend: Backend, source: torch.dtype, dtype: torch.dtype
) -> None:
    """All finite bit patterns of the half formats, so that no rounding case is left to chance."""
    pattern = torch.bfloat16 if source == torch.float32 else source
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(pattern)
    values = values[values.isfinite()]
    rows = values[: values.numel() // 64 * 64].reshape(-1, 1, 64).to(source)
    size = backend.block_size(1)
    cache = torch.zeros((2, rows.size(0), 1, size, 64)).to(dtype)
    arguments = {
        "key": rows,
        "value": rows,
        "kv_cache": cache,
        "slot_mapping": torch.arange(rows.size(0)) * size,
        "kv_scales": torch.tensor([0.037, 1.0]),
    }
    expected = dict(arguments, kv_cache=cache.clone())
    backend("reshape_and_cache", arguments)
    REFERENCE("reshape_and_cache", expected)
    assert_same(cache, expected["kv_cache"])
