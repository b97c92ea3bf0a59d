"""Every rule of the contract, broken once: the public function, the raw op and the fake say the same sentence."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_paged
from torch_paged.contract.bounds import VALUE_RULES, check_values
from torch_paged.contract.schema import SCHEMAS
from torch_paged.contract.validate import RULES, validate
from torch_paged.testing.backends import Backend
from torch_paged.testing.bad_input import BASE_OPS, BASES, STATIC, VALUES, Break
from torch_paged.testing.cases import AttentionCase, build
from torch_paged.testing.combinations import random_case


def message(call: Callable[[], Any]) -> str:
    """Return what a call says when it raises ValueError."""
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def said_or_none(call: Callable[[], Any]) -> str | None:
    """Return what a call says when it raises ValueError, or None."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


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
def test_the_unbroken_call_is_accepted(base: str, backend: Backend) -> None:
    op = BASE_OPS[base]
    fake(op, build(BASES[base], 0))
    backend(op, build(BASES[base], 0))


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


def test_entries_that_no_query_needs_may_hold_anything(backend: Backend) -> None:
    for base, entry in (("decode, window", (2, 0)), ("varlen, chunk", (2, 1)), ("decode", (1, 0))):
        arguments = build(BASES[base], 0)
        op = BASE_OPS[base]
        expected = backend(op, arguments)
        for wild in (-1, 10, 2**31 - 1, -(2**31)):
            arguments["block_tables"][entry] = wild
            assert torch.equal(backend(op, arguments), expected)
            check_values(op, arguments)


@pytest.mark.parametrize("seed", range(40))
def test_op_and_bounds_agree_on_used_entries(seed: int, backend: Backend) -> None:
    case = backend.served(random_case(seed))
    arguments = build(case, seed)
    if case.context_lens is None:
        return
    tables = arguments["block_tables"]
    for entry in product(range(tables.size(0)), range(tables.size(1))):
        kept = int(tables[entry])
        tables[entry] = arguments["kv_cache"].size(1)
        assert said_or_none(lambda: backend(case.op, arguments)) == said_or_none(
            lambda: check_values(case.op, arguments)
        )
        tables[entry] = kept


EMPTY = {
    "decode": {"query": 0, "block_tables": 0, "context_lens": 0, "attn_mask": 0},
    "varlen": {"query": 0, "key": 0, "value": 0, "attn_mask": 1, "query_positions": 0},
    "write": {"key": 0, "value": 0, "slot_mapping": 0},
    "quantize": {"key": 0, "value": 0, "slot_mapping": 0},
    "merge": {"outs": 1, "lses": 1},
    "copy": {"src_blocks": 0, "dst_blocks": 0},
    "gather": {"block_tables": 0, "context_lens": 0, "starts": 0},
}


@pytest.mark.parametrize("num_blocks", [0, 2])
@pytest.mark.parametrize("base", EMPTY)
def test_empty_calls_are_legal(base: str, num_blocks: int, backend: Backend) -> None:
    arguments = build(BASES[base], 0)
    arguments |= {name: arguments[name].narrow(axis, 0, 0) for name, axis in EMPTY[base].items()}
    for name in ("kv_cache", "kv_scales"):
        if arguments.get(name) is not None and (name == "kv_cache" or arguments[name].dim() == 4):
            arguments[name] = arguments[name][:, :num_blocks]
    if base == "varlen":
        arguments |= {name: torch.zeros(1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        arguments |= {name: arguments[name][:0] for name in ("block_tables", "context_lens")}
    results = backend(BASE_OPS[base], arguments)
    check_values(BASE_OPS[base], arguments)
    for result in results if isinstance(results, tuple) else [results] if results is not None else []:
        assert result.numel() == 0


@pytest.mark.parametrize(
    "base", ["decode", "decode, int8", "varlen", "varlen, new", "write", "quantize", "gather", "merge"]
)
def test_strides_of_what_is_only_read_change_nothing(base: str, backend: Backend) -> None:
    written = {"write": ("kv_cache",), "quantize": ("kv_cache", "kv_scales")}.get(base, ())
    arguments, strided = build(BASES[base], 0), build(BASES[base], 0)
    for name, value in strided.items():
        if isinstance(value, Tensor) and name not in ("kv_cache", *written):
            strided[name] = torch.stack([value, value], -1)[..., 0]
    results, expected = backend(BASE_OPS[base], strided), backend(BASE_OPS[base], arguments)
    for name in written:
        assert torch.equal(strided[name].view(torch.uint8), arguments[name].view(torch.uint8))
    if isinstance(expected, Tensor):
        results, expected = (results,), (expected,)
    for result, one in zip(results or (), expected or (), strict=True):
        assert torch.equal(result.nan_to_num(), one.nan_to_num())


def test_positions_may_leave_gaps_between_used_entries(backend: Backend) -> None:
    case = AttentionCase("gap", context_lens=(96,), query_lens=(2,), sliding_window=16, causal=True)
    arguments = build(case, 0)
    arguments["query_positions"] = torch.tensor([15, 95], dtype=torch.int32)
    arguments["block_tables"] = torch.tensor([[0, -1, 99, -7, 2**31 - 1, 3]], dtype=torch.int32)
    arguments["kv_cache"] = torch.randn(2, 4, 2, 16, 64)
    assert backend("flash_attn_varlen", arguments).isfinite().all()
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


@pytest.mark.parametrize(
    ("base", "name"),
    [("write", "kv_cache"), ("quantize", "kv_cache"), ("quantize", "kv_scales"), ("copy, int8", "kv_scales")],
)
def test_what_is_written_has_no_negative_bit(base: str, name: str) -> None:
    """Torch itself would refuse such a call once the op has run, when the other tensor that it writes is written."""
    op, arguments = BASE_OPS[base], build(BASES[base], 0)
    before = stored(arguments)
    negated = arguments | {name: torch._neg_view(arguments[name])}
    said = message(lambda: raw(op, negated))
    assert said == f"{op}: every tensor must be dense (torch.strided) and plain, got {name} with the negative bit"
    assert message(lambda: getattr(torch_paged, op)(**negated)) == said
    assert message(lambda: fake(op, negated)) == said
    with torch.inference_mode():
        assert message(lambda: raw(op, negated)) == said
    assert all(map(torch.equal, stored(arguments), before))


def test_what_is_read_may_have_the_negative_bit(backend: Backend) -> None:
    arguments, negated = build(BASES["write"], 0), build(BASES["write"], 0)
    negated["key"] = torch._neg_view(-negated["key"])
    backend("reshape_and_cache", arguments)
    backend("reshape_and_cache", negated)
    assert torch.equal(stored(arguments)[0], stored(negated)[0])
