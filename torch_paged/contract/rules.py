"""How a rule of the contract is written: ``Rule``, the ``Call`` it looks at, and the rules that arguments share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Broken = tuple[str, str, object] | None
"""What a rule finds: the argument, what it must do, what it is; None when the rule holds."""

_MAY_BE_ZERO = frozenset({"T", "B", "N", "M", "C", "Tk", "P*"})


@dataclass
class Call:
    """One call under validation: its arguments, and what each letter of the contract was first seen to be."""

    op: str
    arguments: Mapping[str, Any]
    sizes: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def has(self, name: str) -> bool:
        """Return whether an optional argument was given."""
        return self.arguments.get(name) is not None

    @property
    def leader(self) -> str:
        """The first tensor, whose device is that of the call."""
        return next(name for name in ("query", "outs", "key", "kv_cache") if name in self.arguments)

    @property
    def latent(self) -> bool:
        """Whether values are lanes of the keys."""
        return not self.has("value") if not self.has("kv_cache") else holds(self.sizes["2"] == 1)


@dataclass(frozen=True)
class Rule:
    """A named rule; ``broken`` returns None, or ``(argument, what it must do, what it is)``."""

    name: str
    broken: Callable[[Call], Broken]


def check(rules: tuple[Rule, ...], call: Call) -> None:
    """Raise the sentence of the first broken rule."""
    for rule in rules:
        broken = rule.broken(call)
        if broken is not None:
            argument, must, got = broken
            raise ValueError(f"{call.op}: {argument} must {must}, got {got}")


def holds(condition: "bool | torch.SymBool") -> bool:
    """Decide a condition on sizes: backed symbols guard, unbacked ones are taken as true and asserted at run time."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if not guard_or_true(condition):
        return False
    torch._check(condition)
    return True


def dtype_name(tensor: Tensor) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def given(value: Tensor | None) -> str:
    """Return how an argument that should be there, or should not, is shown."""
    return "None" if value is None else f"a tensor of shape {shape_text(value)}"


def shape_text(tensor: Tensor) -> str:
    """Return ``(4, 8)``."""
    return str(tuple(map(plain, tensor.shape)))


def plain(size: Any) -> Any:
    """Return the number that a symbol stands for in this trace, where it stands for one: sentences show numbers."""
    hint = size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat) else size
    return size if hint is None else hint


def _letters(call: Call, shape: str) -> str:
    """Return ``(B, M)`` for ``"B M"``; the leading 2 of a cache is shown as what it is."""
    if shape.startswith("2") and "2" not in call.sizes:
        return f"{_tuple(shape)} or {_tuple('1' + shape[1:])}"
    return _tuple(str(plain(call.sizes["2"])) + shape[1:] if shape.startswith("2") else shape)


def _tuple(shape: str) -> str:
    letters = [letter.replace("+1", " + 1").removesuffix("*") for letter in shape.split()]
    return f"({letters[0]},)" if len(letters) == 1 else f"({', '.join(letters)})"


def tensor(name: str, dtypes: tuple[str, ...], *shapes: str, like: str | None = None) -> tuple[Rule, ...]:
    """Return the device, dtype and shape rules of one tensor; the rank picks the shape where there are several."""

    def device(call: Call) -> Broken:
        found = call[name]
        if found is None or found.device == call[call.leader].device:
            return None
        return name, f"be on {call[call.leader].device} as {call.leader} is", found.device

    def dtype(call: Call) -> Broken:
        tensor = call[name]
        if tensor is None or dtype_name(tensor) in dtypes or (like and tensor.dtype == call[like].dtype):
            return None
        texts = [f"{dtype_name(call[like])} as {like} is", *dtypes] if like else list(dtypes)
        either = f"{', '.join(texts[:-1])} or {texts[-1]}" if len(texts) > 1 else texts[0]
        return name, f"be {either}", dtype_name(tensor)

    def shape(call: Call) -> Broken:
        tensor = call[name]
        if tensor is None:
            return None
        fitting = next((shape for shape in shapes if len(shape.split()) == tensor.dim()), None)
        if fitting is None:
            texts = [_letters(call, shape) for shape in shapes]
            either = f"{', '.join(texts[:-1])} or {texts[-1]}" if len(texts) > 1 else texts[0]
            return name, f"have shape {either}", shape_text(tensor)
        for letter, size in zip(fitting.split(), tensor.shape, strict=True):
            wrong = _bind(call, name, letter, size)
            if wrong is not None:
                return name, f"have shape {_letters(call, fitting)}{wrong}", shape_text(tensor)
        return None

    return Rule(f"{name}.device", device), Rule(f"{name}.dtype", dtype), Rule(f"{name}.shape", shape)


def _bind(call: Call, name: str, letter: str, size: Any) -> str | None:
    """Give a letter its value, or return how this size contradicts it."""
    if letter.endswith("+1"):
        letter, size = letter[:-2], size - 1
    if letter not in call.sizes:
        smallest = 0 if letter in _MAY_BE_ZERO else 1
        if letter == "2" and not (holds(size >= 1) and holds(size <= 2)):
            return ""
        if not holds(size >= smallest):
            return f" with {letter} >= {smallest}"
        call.sizes[letter], call.sources[letter] = size, name
    elif not holds(size == call.sizes[letter]):
        shown = f" with {letter.removesuffix('*')} = {plain(call.sizes[letter])} as in {call.sources[letter]}"
        return "" if letter == "2" else shown
    return None


def required(*names: str) -> Rule:
    """Return the rule that these tensors are given: torch passes None on for any tensor."""

    def broken(call: Call) -> Broken:
        missing = next((name for name in names if not call.has(name)), None)
        return None if missing is None else (missing, "be given", "None")

    return Rule("tensors.given", broken)


def together(name: str, leader: str) -> Rule:
    def broken(call: Call) -> Broken:
        if call.has(name) == call.has(leader):
            return None
        return name, f"be {'given with' if call.has(leader) else 'None without'} {leader}", given(call[name])

    return Rule(f"{name}.given", broken)


def only_with(name: str, leader: str) -> Rule:
    def broken(call: Call) -> Broken:
        if not call.has(name) or call.has(leader):
            return None
        return name, f"be None without {leader}", given(call[name])

    return Rule(f"{name}.only_with_{leader}", broken)


def not_expanded(name: str, *, per_token_only: bool = False) -> Rule:
    def broken(call: Call) -> Broken:
        tensor = call[name]
        if tensor is None or (per_token_only and tensor.dim() != 4):
            return None
        strides = tensor.stride()
        if any(isinstance(st, int) and st == 0 and holds(sz > 1) for st, sz in zip(strides, tensor.shape, strict=True)):
            return name, "not be an expanded view, it is written", f"strides {tuple(map(plain, strides))}"
        return None

    return Rule(f"{name}.not_expanded", broken)


def at_least(name: str, low: int) -> Rule:
    must = f"be >= {low}" if low == 0 else f"be None or >= {low}"

    def broken(call: Call) -> Broken:
        return None if not call.has(name) or holds(call[name] >= low) else (name, must, plain(call[name]))

    return Rule(f"{name}.range", broken)
