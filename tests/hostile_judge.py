"""What a hostile call must do by the contract's rules, and whether it did: the reference's results, or the sentence."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hostile import GUARD_BYTES, POISON, HostileCall
from hostile_results import assert_read
from torch import Tensor
from torch._dynamo.exc import TorchRuntimeError
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_paged
from torch_paged.contract import fake, reference
from torch_paged.contract.bounds import check_values
from torch_paged.contract.validate import validate

_LARGEST_RESULT = 2**38  # elements: no machine of the tests has room for them
_UNNAMED_DTYPES = ("float8_e8m0fnu", "float4_e2m1fn_x2")  # the stable ABI of torch 2.9 has no names for them
ATTENTION = ("paged_attention", "flash_attn_varlen")


@dataclass(frozen=True)
class Expected:
    """How a call must end: with results, or with one of these exceptions, whose text matches."""

    raises: tuple[type[BaseException], ...] = ()
    text: str = ""


def run(call: HostileCall, way: str) -> Any:
    """Make the call through a public function or the raw op, with statistics or without, or on fake tensors."""
    op, arguments = call.op, call.arguments
    if way == "public":
        return getattr(torch_paged, op)(**arguments)
    if way == "public, statistics":
        return getattr(torch_paged, op)(**arguments, return_stats=True)
    packet = getattr(torch.ops.paged, op)
    if way == "op, statistics":
        return packet.with_stats(**arguments)
    if way == "op":
        return packet.default(**arguments)
    with FakeTensorMode() as mode:
        return packet.default(**{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()})


def ways(call: HostileCall) -> list[str]:
    """Return the ways to make a call."""
    fakable = all(_is_plain(call.arguments[name]) for name in call.tensors())
    fakable &= _wrong_type(call.op, call.arguments) is None and (call.arguments.get("max_len") or 0) < _LARGEST_RESULT
    stats = ["public, statistics", "op, statistics"] if call.op in ATTENTION else []
    return ["public", "op", "op", *stats, *(["fake"] if fakable else [])]


def judge(call: HostileCall, way: str, invoke: Callable[[HostileCall, str], Any] = run) -> str:
    """Make a call and assert that it did what the contract says.

    Args:
        call: the call, not made yet; what it writes is written.
        way: how it is made, one of ``ways``.
        invoke: makes it.

    Returns:
        "matched", "refused", or "safe" where the contract leaves the values open and only memory was compared.

    Raises:
        AssertionError: it did something else.
    """
    before = [buffer.clone() for buffer in call.buffers]
    expected = verdict(call, data=way != "fake")
    written = [] if expected.raises or call.overlapping or way == "fake" else _written_by_the_reference(call)
    raised: Exception | None = None
    results = None
    try:
        results = invoke(call, way)
    except Exception as error:
        raised = error
    if raised is not None:
        text = str(raised).partition("\n")[0]
        _assert_untouched(call, before, f"raised {text}")
        assert expected.raises, f"{way}: raised {type(raised).__name__}: {text}; the contract accepts the call"
        kinds = (*expected.raises, TorchRuntimeError) if way.startswith("compiled") else expected.raises
        assert isinstance(raised, kinds), f"{way}: raised {type(raised)} ({text}), expected {expected}"
        assert re.search(expected.text, str(raised)), f"{way}: said {text!r}, expected {expected.text!r}"
        return "refused"
    assert not expected.raises, f"{way}: accepted, expected {expected}"
    computed_nothing = way == "fake" or any(call.arguments[name].is_meta for name in call.tensors())
    if computed_nothing or not call.written:
        _assert_untouched(call, before, "is not to write")
        _assert_shapes(call, way, results)
        return "matched" if computed_nothing else assert_read(call.op, _copy(call).arguments, _tuple(results))
    if call.overlapping:
        _assert_guards(call)
        return "safe"
    _assert_written(call, written)
    return "matched"


def verdict(call: HostileCall, data: bool = True) -> Expected:
    """Return how a call must end, by the schema's types and the contract's rules."""
    op, arguments = call.op, call.arguments
    wrong_type = _wrong_type(op, arguments)
    if wrong_type:
        return wrong_type
    tensors = [arguments[name] for name in call.tensors()]
    if call.written and any(tensor.requires_grad for tensor in tensors):
        return Expected((NotImplementedError,), f"^{op}: the op has no backward and writes in place")
    negated = any(name in call.written and call.arguments[name].is_neg() for name in call.tensors())
    if negated or not all(map(_is_plain, tensors)):
        return Expected((ValueError,), rf"^{op}: every tensor must be dense \(torch.strided\) and plain, got ")
    # Of what else has the negative bit the op gets a copy, which is dense.
    arguments = {name: x.resolve_neg() if isinstance(x, Tensor) and x.is_neg() else x for name, x in arguments.items()}
    try:
        validate(op, arguments)
        if data and not any(tensor.is_meta for tensor in tensors):
            check_values(op, arguments)
    except ValueError as error:
        text = re.escape(str(error))
        for name in _UNNAMED_DTYPES:
            text = text.replace(name, rf"({name}|dtype number \d+)")
        return Expected((ValueError,), text)
    if op == "gather_cache" and _gathered(arguments) > _LARGEST_RESULT:
        return Expected((RuntimeError,), "")
    return Expected()


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized


def _wrong_type(op: str, arguments: dict[str, Any]) -> Expected | None:
    """Return torch's own refusal of what the schema does not take."""
    truth = (bool, int, float, type(None))  # torch takes any number for a bool
    takes: dict[str, tuple[type, ...]] = {"Tensor": (Tensor,), "int": (int,), "float": (float, int), "bool": truth}
    for argument in getattr(torch.ops.paged, op).default._schema.arguments:
        value, kind = arguments[argument.name], str(argument.real_type)
        optional = kind.startswith("Optional[")
        kind = kind.removeprefix("Optional[").removesuffix("]")
        if value is None and (optional or kind == "Tensor"):  # torch lets None pass for any tensor, the rules do not
            continue
        kind = {"SymInt": "int"}.get(kind, kind)
        if not isinstance(value, takes[kind]):
            return Expected((RuntimeError, TypeError), "")
        if isinstance(value, int) and kind == "int" and not -(2**63) <= value < 2**63:
            return Expected((RuntimeError, TypeError, OverflowError), "")
    return None


def _gathered(arguments: dict[str, Any]) -> int:
    cache = arguments["kv_cache"]
    return int(arguments["block_tables"].size(0) * cache.size(2) * arguments["max_len"] * cache.size(4))


def _copy(call: HostileCall) -> HostileCall:
    """Return the call in memory of its own, with the same strides and aliases, but without gradients."""
    moved = {buffer.untyped_storage()._cdata: buffer.clone() for buffer in call.buffers}
    copied = dict(call.arguments)
    for name in call.tensors():
        tensor = call.arguments[name].detach()
        buffer = moved.get(tensor.untyped_storage()._cdata)
        if buffer is not None:
            view = torch.empty(0, dtype=tensor.dtype)
            view.set_(buffer.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
            tensor = torch._neg_view(view) if tensor.is_neg() else view
        copied[name] = tensor
    return HostileCall(call.op, copied, buffers=list(moved.values()))


def _assert_untouched(call: HostileCall, before: list[Tensor], why: str) -> None:
    for buffer, old in zip(call.buffers, before, strict=True):
        assert torch.equal(buffer, old), f"wrote {int((buffer != old).sum())} bytes, but {why}"


def _assert_guards(call: HostileCall) -> None:
    for buffer in call.buffers:
        edges = torch.cat([buffer[:GUARD_BYTES], buffer[-GUARD_BYTES:]])
        assert (edges == POISON).all(), "wrote outside the tensor's memory"


def _assert_shapes(call: HostileCall, way: str, results: Any) -> None:
    name = call.op + (".with_stats" if "statistics" in way else "")
    wanted = fake.results(name, {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in call.arguments.items()})
    assert (results is None) == (wanted is None), f"returned {results}"
    for actual, expected in zip(_tuple(results), _tuple(wanted), strict=True):
        assert actual.shape == expected.shape, f"shape {actual.shape}, the fake has {expected.shape}"
        assert actual.dtype == expected.dtype, f"{actual.dtype}, the fake has {expected.dtype}"


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else () if results is None else (results,)


def _written_by_the_reference(call: HostileCall) -> list[HostileCall]:
    """Return what memory may be after a write: of tokens that share a slot any one may be the last."""
    if not call.written or any(call.arguments[name].is_meta for name in call.tensors()):
        return []
    possible = []
    for slots in _writers(call.arguments["slot_mapping"]) if "slot_mapping" in call.arguments else [None]:
        twin = _copy(call)
        if slots is not None:
            twin.arguments["slot_mapping"] = slots
        getattr(reference, call.op)(**twin.arguments)
        possible.append(twin)
    return possible


def _writers(slots: Tensor) -> list[Tensor]:
    """Return mappings in which no slot repeats: the first has each slot's first token, the next its second or last."""
    tokens: dict[int, list[int]] = {}
    for token, slot in enumerate(slots.tolist()):
        tokens.setdefault(slot, []).append(token)
    tokens.pop(-1, None)
    mappings = []
    for turn in range(max(map(len, tokens.values()), default=1)):
        mapping = torch.full(slots.shape, -1, dtype=slots.dtype)
        for slot, mine in tokens.items():
            mapping[mine[min(turn, len(mine) - 1)]] = slot
        mappings.append(mapping)
    return mappings


def _assert_written(call: HostileCall, possible: list[HostileCall]) -> None:
    """Assert that every row of the cache, with its scale, is one of the possible ones, and all other memory is too."""
    for index, buffer in enumerate(call.buffers):
        same = torch.stack([buffer == twin.buffers[index] for twin in possible]).any(0)
        assert same.all(), f"{int((~same).sum())} bytes of a buffer are not what the reference writes"
    if len(possible) > 1:
        rows = _rows(call)
        same = torch.stack([(rows == _rows(twin)).all(-1) for twin in possible]).any(0)
        assert same.all(), f"row {tuple((~same).nonzero()[0].tolist())} is none of those that were written to its slot"


def _rows(call: HostileCall) -> Tensor:
    """Return the bytes of every row of the cache, with those of its scale where each row has one."""
    rows = _bytes(call.arguments["kv_cache"])
    return (
        torch.cat([rows, _bytes(call.arguments["kv_scales"][..., None])], -1) if "kv_scales" in call.written else rows
    )


def _bytes(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # contiguous() keeps odd strides of size 1
