"""Fakes and meta tensors give what the kernels give, but for the data; and PyTorch's own checks of an op pass."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from torch_paged.testing.backends import Backend
from torch_paged.testing.bad_input import BASE_OPS, BASES
from torch_paged.testing.cases import build
from torch_paged.testing.named import ATTENTION_CASES, COPY_CASES, GATHER_CASES, MERGE_CASES, WRITE_CASES

OPS: dict[Any, str] = {
    **dict.fromkeys(COPY_CASES, "copy_blocks"),
    **dict.fromkeys(GATHER_CASES, "gather_cache"),
    **dict.fromkeys(MERGE_CASES, "merge_attention_states"),
    **{case: case.op for case in ATTENTION_CASES},
    **{case: case.op for case in WRITE_CASES},
}
CALLS = [
    (op, overload, case)
    for case, op in OPS.items()
    for overload in ("default", "with_stats")
    if overload == "default" or op in ("paged_attention", "flash_attn_varlen")
]
CALL_IDS = [f"{op}-{overload}-{case.name}" for op, overload, case in CALLS]


def results(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def facts(value: Any, device: bool = True) -> list[tuple[Any, ...]]:
    """Return shape, dtype, strides and device of each result."""
    found = [(tuple(t.shape), t.dtype, t.stride()) for t in results(value)]
    return [(*fact, t.device) for fact, t in zip(found, results(value), strict=True)] if device else found


def overloaded(op: str, overload: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops.paged, op), overload)


def as_meta(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments.items()}


def call_backend(backend: Backend, op: str, overload: str, arguments: dict[str, Any]) -> Any:
    return backend(op, arguments, stats=overload == "with_stats")


@pytest.mark.parametrize(("op", "overload", "case"), CALLS, ids=CALL_IDS)
def test_fakes_match_what_runs(backend: Backend, op: str, overload: str, case: Any) -> None:
    arguments = build(case, 0)
    real = call_backend(backend, op, overload, arguments)
    with FakeTensorMode() as mode:
        faked = {
            n: mode.from_tensor(v.to(backend.device)) if isinstance(v, Tensor) else v for n, v in arguments.items()
        }
        assert facts(overloaded(op, overload)(**faked)) == facts(real)
    assert facts(overloaded(op, overload)(**as_meta(arguments)), device=False) == facts(real, device=False)


@pytest.mark.parametrize("base", BASES)
def test_sizes_that_grow_stay_symbolic(base: str) -> None:
    arguments = build(BASES[base], 0)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in arguments.items() if name not in tensors}

    def call(given: dict[str, Tensor]) -> Any:
        return overloaded(BASE_OPS[base], "default")(**given, **others)

    traced = make_fx(call, tracing_mode="symbolic")(tensors)
    inputs = [node.meta["val"] for node in traced.graph.nodes if node.op == "placeholder"]
    growing = {"query": (0,), "key": (0,), "kv_cache": (1,), "block_tables": (0, 1), "slot_mapping": (0,), "outs": (1,)}
    for name, value in zip(tensors, inputs, strict=True):
        assert all(isinstance(value.size(axis), torch.SymInt) for axis in growing.get(name, ())), name
    output = next(node for node in traced.graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        assert isinstance(node.meta["val"].size(0), torch.SymInt)


def family(base: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of a base call in another dtype of queries and rows."""
    case = BASES[base]
    if hasattr(case, "dtype"):
        case = replace(case, dtype=dtype)
    elif case.cache_dtype != torch.int8:
        case = replace(case, cache_dtype=dtype)
    return build(case, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_opcheck(base: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(overloaded(BASE_OPS[base], "default"), (), family(base, dtype))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("base", [base for base in BASES if base.endswith("int8") or base in ("varlen", "quantize")])
def test_opcheck_of_quantised_caches(base: str, cache_dtype: torch.dtype) -> None:
    arguments = build(replace(BASES[base], cache_dtype=cache_dtype), 0)
    op = overloaded(BASE_OPS[base], "default")
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if cache_dtype == torch.int8:  # it compares what an op read with torch.isclose, which torch has not for fp8
        checks.append("test_schema")
    before = arguments["kv_cache"].clone()
    torch.library.opcheck(op, (), arguments, test_utils=checks)
    if not op._schema.is_mutable:
        assert torch.equal(before.view(torch.uint8), arguments["kv_cache"].view(torch.uint8))


@pytest.mark.parametrize("base", ["decode", "decode, latent", "varlen", "varlen, new"])
def test_opcheck_with_statistics(base: str) -> None:
    torch.library.opcheck(overloaded(BASE_OPS[base], "with_stats"), (), build(BASES[base], 0))
