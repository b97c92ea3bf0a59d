"""Every rule of the contract, broken once: the public function, the raw op and the fake say the same sentence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_paged
from torch_paged.contract.bounds import VALUE_RULES, check_values
from torch_paged.contract.schema import SCHEMAS
from torch_paged.contract.validate import RULES, validate
from torch_paged.testing.bad_input import BASE_OPS, BASES, STATIC, VALUES, Break
from torch_paged.testing.cases import AttentionCase, build


def message(call: Callable[[], Any]) -> str:
    """Return what a call says when it raises ValueError."""
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def raw(op: str, arguments: dict[str, Any]) -> Any:
    """Call the op itself."""
    return getattr(torch.ops.paged, op).default(**arguments)


def fake(op: str, arguments: dict[str, Any]) -> Any:
    """Call the op on tensors without data."""
    with FakeTensorMode() as mode:
        faked = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in arguments.items()
        }
        return raw(op, faked)


def stored(arguments: dict[str, Any]) -> list[Tensor]:
    """Return the bytes of what an op may write."""
    names = ("kv_cache", "kv_scales")
    tensors = [arguments[name] for name in names if isinstance(arguments.get(name), Tensor)]
    return [tensor.clone().contiguous().view(torch.uint8) for tensor in tensors if tensor.device.type == "cpu"]


def describe(broken: Break) -> str:
    return f"{broken.op}-{broken.rule}-{broken.base}"


@pytest.mark.parametrize("base", BASES)
def test_the_unbroken_call_is_accepted(base: str) -> None:
    op = BASE_OPS[base]
    raw(op, build(BASES[base], 0))
    fake(op, build(BASES[base], 0))


@pytest.mark.parametrize("broken", STATIC, ids=describe)
def test_wrapper_op_and_fake_say_the_same(broken: Break) -> None:
    arguments = broken.arguments()
    before = stored(arguments)
    said = message(lambda: raw(broken.op, arguments))
    assert said.startswith(f"{broken.op}: {broken.says}")
    assert message(lambda: getattr(torch_paged, broken.op)(**arguments)) == said
    assert message(lambda: validate(broken.op, arguments)) == said
    assert message(lambda: fake(broken.op, arguments)) == said
    assert all(map(torch.equal, before, stored(arguments)))


@pytest.mark.parametrize("broken", VALUES, ids=describe)
def test_wrapper_and_op_check_values_before_they_write(broken: Break) -> None:
    arguments = broken.arguments()
    before = stored(arguments)
    said = message(lambda: raw(broken.op, arguments))
    assert said == f"{broken.op}: {broken.says}"
    assert message(lambda: getattr(torch_paged, broken.op)(**arguments)) == said
    assert message(lambda: check_values(broken.op, arguments)) == said
    assert all(map(torch.equal, before, stored(arguments)))
    fake(broken.op, arguments)


@pytest.mark.parametrize("broken", [b for b in STATIC + VALUES if "attn" in b.op or "attention" in b.op], ids=describe)
def test_statistics_change_no_rule(broken: Break) -> None:
    if broken.op == "merge_attention_states":
        return
    arguments = broken.arguments()
    with_stats = message(lambda: getattr(torch.ops.paged, broken.op).with_stats(**arguments))
    assert with_stats == message(lambda: raw(broken.op, arguments))


def test_every_rule_is_broken_once() -> None:
    broken = {(case.op, case.rule) for case in [*STATIC, *VALUES]}
    rules = {(op, rule.name) for table in (RULES, VALUE_RULES) for op, rules in table.items() for rule in rules}
    assert rules - broken == set()
    assert broken - rules == set()
    assert set(RULES) == set(VALUE_RULES) == {name.partition(".")[0] for name in SCHEMAS}


def test_entries_that_no_query_needs_may_hold_anything() -> None:
    for base, entry in (("decode, window", (2, 0)), ("varlen, chunk", (2, 1)), ("decode", (1, 0))):
        arguments = build(BASES[base], 0)
        op = BASE_OPS[base]
        expected = raw(op, arguments)
        for wild in (-1, 10, 2**31 - 1, -(2**31)):
            arguments["block_tables"][entry] = wild
            assert torch.equal(raw(op, arguments), expected)
            check_values(op, arguments)


def test_positions_may_leave_gaps_between_used_entries() -> None:
    case = AttentionCase("gap", context_lens=(96,), query_lens=(2,), sliding_window=16, causal=True)
    arguments = build(case, 0)
    arguments["query_positions"] = torch.tensor([15, 95], dtype=torch.int32)
    arguments["block_tables"] = torch.tensor([[0, -1, 99, -7, 2**31 - 1, 3]], dtype=torch.int32)
    arguments["kv_cache"] = torch.randn(2, 4, 2, 16, 64)
    assert raw("flash_attn_varlen", arguments).isfinite().all()
    arguments["query_positions"][0] = 16
    assert message(lambda: raw("flash_attn_varlen", arguments)).endswith("got -1 at index (0, 1)")
    assert message(lambda: check_values("flash_attn_varlen", arguments)).endswith("got -1 at index (0, 1)")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("broken", STATIC[6::30], ids=describe)
def test_compile_rejects_what_eager_rejects(broken: Break, dynamic: bool) -> None:
    torch.compiler.reset()
    arguments = broken.arguments()
    said = message(lambda: raw(broken.op, arguments))
    compiled = torch.compile(lambda **kwargs: raw(broken.op, kwargs), fullgraph=True, backend="eager", dynamic=dynamic)
    with pytest.raises(Exception, match="must") as caught:
        compiled(**arguments)
    assert said in str(caught.value)
