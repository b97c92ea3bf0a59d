"""No gradient is dropped silently, and nobody who wants none pays for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_paged import dispatch
from torch_paged.testing.bad_input import BASE_OPS, BASES
from torch_paged.testing.cases import build

COMPUTING = {
    "decode": ("query", "kv_cache", "sinks", "alibi_slopes"),
    "decode, int8": ("query", "kv_scales"),
    "varlen": ("query", "key", "value", "kv_scales", "sinks", "alibi_slopes"),
    "varlen, latent": ("query", "key", "kv_cache"),
    "gather": ("kv_cache",),
    "gather, int8": ("kv_scales",),
    "merge": ("outs", "lses", "sinks"),
}
WRITING = {
    "write": ("key", "value", "kv_cache"),
    "write, int8": ("key", "kv_scales"),
    "quantize": ("key", "value", "kv_scales"),
    "copy": ("kv_cache",),
    "copy, int8": ("kv_scales",),
}
COMPUTES = [(base, name) for base, names in COMPUTING.items() for name in names]
WRITES = [(base, name) for base, names in WRITING.items() for name in names]
ATTENTION = [base for base in COMPUTING if "attn" in BASE_OPS[base] or BASE_OPS[base] == "paged_attention"]


def call(base: str, arguments: dict[str, Any], overload: str = "default") -> tuple[Tensor, ...]:
    """Run the op of a base call and return its results as a tuple."""
    result = getattr(getattr(torch.ops.paged, BASE_OPS[base]), overload)(**arguments)
    return result if isinstance(result, tuple) else (result,) if isinstance(result, Tensor) else ()


def requiring(base: str, name: str) -> dict[str, Any]:
    """Return the arguments of a base call, one of which requires a gradient."""
    arguments = build(BASES[base], 0)
    arguments[name] = arguments[name].detach().clone().requires_grad_()
    return arguments


def equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a.detach().nan_to_num(), b.nan_to_num()) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("base", "name"), COMPUTES)
def test_forward_works_and_backward_says_what_to_do(base: str, name: str) -> None:
    results = call(base, requiring(base, name))
    assert equal(results, call(base, build(BASES[base], 0)))
    assert all(result.requires_grad for result in results)
    with pytest.raises(
        NotImplementedError, match=rf"^{BASE_OPS[base]}: the op has no backward; .*no_grad\(\) or detach"
    ):
        results[0].sum().backward()


@pytest.mark.parametrize("base", ATTENTION)
def test_statistics_carry_the_refusal_too(base: str) -> None:
    for i in range(3):
        results = call(base, requiring(base, "query"), "with_stats")
        with pytest.raises(NotImplementedError, match=f"^{BASE_OPS[base]}: the op has no backward"):
            results[i].sum().backward()


@pytest.mark.parametrize(("base", "name"), WRITES)
def test_writing_raises_at_once_and_writes_nothing(base: str, name: str) -> None:
    arguments = requiring(base, name)
    before = arguments["kv_cache"].detach().clone()
    with pytest.raises(NotImplementedError, match=f"^{BASE_OPS[base]}: the op has no backward and writes in place"):
        call(base, arguments)
    assert torch.equal(before.view(torch.uint8), arguments["kv_cache"].detach().view(torch.uint8))


@pytest.mark.parametrize(("base", "name"), COMPUTES + WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_refused(base: str, name: str, mode: Callable[[], Any]) -> None:
    with mode():
        results = call(base, requiring(base, name))
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("base", [*COMPUTING, *WRITING])
def test_inputs_without_gradient_give_results_without(base: str) -> None:
    assert not any(result.requires_grad for result in call(base, build(BASES[base], 0)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of torch itself
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # the same from torch 2.15 on
@pytest.mark.parametrize(("base", "name"), [("decode", "query"), ("write", "key"), ("merge", "outs")])
def test_forward_mode_is_refused(base: str, name: str) -> None:
    arguments = build(BASES[base], 0)
    with forward_ad.dual_level():
        arguments[name] = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        with pytest.raises(NotImplementedError, match=f"^{BASE_OPS[base]}: the op has no forward-mode derivative"):
            call(base, arguments)


@pytest.mark.parametrize(("base", "name"), [("decode", "query"), ("varlen", "key"), ("write", "key")])
def test_function_transforms_are_refused(base: str, name: str) -> None:
    arguments = build(BASES[base], 0)

    def loss(value: Tensor) -> Tensor:
        results = call(base, {**arguments, name: value})
        return results[0].sum() if results else value.sum()

    with pytest.raises(NotImplementedError, match=f"^{BASE_OPS[base]}: the op has no backward"):
        torch.func.grad(loss)(arguments[name])


@pytest.mark.parametrize("base", WRITING)
def test_autograd_sees_that_a_saved_cache_was_overwritten(base: str) -> None:
    arguments = build(BASES[base], 0)
    versions = {name: arguments[name]._version for name in ("kv_cache", "kv_scales") if arguments[name] is not None}
    call(base, arguments)
    written = {"kv_cache", "kv_scales"} if base in ("quantize", "copy, int8") else {"kv_cache"}
    assert {name for name, version in versions.items() if arguments[name]._version > version} == written


def test_a_stale_cache_in_a_graph_is_an_error() -> None:
    arguments = build(BASES["write"], 0)
    weight = torch.ones((), requires_grad=True)
    loss = (weight * arguments["kv_cache"]).sum()
    call("write", arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_of_inference_mode_may_be_written_outside_it() -> None:
    arguments = build(BASES["write"], 0)
    with torch.inference_mode():
        arguments["kv_cache"] = arguments["kv_cache"].clone()
    if dispatch.served()["cpu"] == "reference":
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            call("write", arguments)
    else:
        call("write", arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_refuses_as_well(backend: str) -> None:
    torch.compiler.reset()
    arguments = requiring("decode", "query")
    compiled = torch.compile(lambda **kwargs: call("decode", kwargs)[0].sum(), backend=backend, fullgraph=True)
    with pytest.raises(Exception, match="paged_attention: the op has no backward"):
        compiled(**arguments).backward()
    with torch.no_grad():
        assert torch.equal(compiled(**arguments), call("decode", arguments)[0].sum())
