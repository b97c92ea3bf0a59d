"""Say which kernel a call would run, or why it would be refused, without running it."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from torch_paged import backends, dispatch
from torch_paged.contract.schema import NAMESPACE, SCHEMAS
from torch_paged.contract.validate import validate

LOG = os.environ.get("TORCH_PAGED_LOG", "0") == "1"

_logger = logging.getLogger("torch_paged")
_logged: set["Explanation"] = set()
_ATTENTION = ("paged_attention", "flash_attn_varlen")
_OPS = tuple(name for name in SCHEMAS if "." not in name)


@dataclass(frozen=True)
class Explanation:
    """What would happen to one call.

    Attributes:
        op: the op's name.
        device_type: the device that it is explained for.
        backend: the backend that would run it, or None where none serves the device.
        variant: ``"decode"``, ``"prefill"`` or ``"mixed"`` for attention, the op's name for the others, None when
            refused.
        isa: the instruction set or chip, such as ``"avx512"``, None when refused.
        compiled: True for a compiled kernel, False for an interpreted one, None when refused.
        cache: the kind of cache, such as ``"bfloat16"``, ``"int8 per head"``, ``"latent float32"`` or ``"no cache"``.
        refusal: the reason for a refusal, as the call would raise it, or None.
    """

    op: str
    device_type: str
    backend: str | None
    variant: str | None
    isa: str | None
    compiled: bool | None
    cache: str
    refusal: str | None

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.op} on {self.device_type}: refused: {self.refusal}"
        how = "compiled" if self.compiled else "interpreted"
        return (
            f"{self.op} on {self.device_type}: {self.backend}, {self.variant}, {self.isa}, {how}, cache: {self.cache}"
        )


def explain(
    op: str, /, *, device: str | torch.device | None = None, backend: str | None = None, **arguments: Any
) -> Explanation:
    """Say which backend and kernel a call would run, or why it would be refused, without running it.

    The arguments are those of the public function or of the op, by name; meta tensors do. Rules that need the data
    (block ids, lengths) are not looked at.

    Args:
        op: name of the op, such as ``"paged_attention"``.
        device: the device to explain for. None: the tensors' own device.
        backend: the backend to explain for. None: the one that serves the device.
        arguments: tensors and options of the call, by the op's argument names; the others have their defaults.

    Returns:
        An ``Explanation``; ``refusal`` holds the reason when the call would raise.

    Raises:
        ValueError: the op, the backend or an argument name does not exist, a required argument is missing, or there is
            no device to explain for.

    Example:
        >>> import torch, torch_paged
        >>> cache = torch.empty(2, 64, 8, 16, 128, dtype=torch.bfloat16, device="meta")
        >>> query = torch.empty(4, 32, 128, dtype=torch.bfloat16, device="meta")
        >>> tables = torch.empty(4, 16, dtype=torch.int32, device="meta")
        >>> lengths = torch.empty(4, dtype=torch.int32, device="meta")
        >>> choice = torch_paged.explain("paged_attention", backend="cpu", query=query, kv_cache=cache,
        ...                              block_tables=tables, context_lens=lengths)
        >>> choice.backend, choice.variant, choice.compiled, choice.cache
        ('cpu', 'decode', True, 'bfloat16')
    """
    arguments.pop("return_stats", None)
    full = _complete(op, arguments)
    device_type = _device_type(op, full, device, backend)
    kind = _cache_kind(full)

    def refused(reason: str, name: str | None) -> Explanation:
        return Explanation(op, device_type, name, None, None, None, kind, reason)

    name = backend if backend is not None else dispatch.served().get(device_type)
    if name is None:
        return refused(dispatch.no_backend(op, device_type), None)
    info = backends.discover()[name]
    if device_type not in info.serves():
        limits = f"it serves {', '.join(info.serves())}"
        todo = "move the tensors, or name another backend"
        return refused(f"{op}: backend '{name}' does not support device '{device_type}' ({limits}); {todo}", name)
    reason = info.why_off()
    if reason is not None:
        return refused(f"{op}: backend '{name}' is off because {reason}", name)
    try:
        validate(op, full)
    except ValueError as error:
        return refused(str(error), name)
    reason = info.refusal(op, full)
    if reason is not None:
        return refused(reason, name)
    try:
        variant = info.variant(op, full, device_type)
    except NotImplementedError as error:
        return refused(str(error), name)
    return Explanation(op, device_type, name, variant.name, variant.isa, variant.compiled, kind, None)


def log_choice(op: str, *arguments: Any) -> None:
    """Log, once, what a call with these arguments (in the op's order) runs."""
    if torch.compiler.is_compiling():
        return
    choice = explain(op, **dict(zip(_defaults(op), arguments, strict=True)))
    if choice not in _logged:
        _prepare_logger()
        _logged.add(choice)
        _logger.info("%s", choice)


@cache
def _prepare_logger() -> None:
    """Let the log be seen: by the program's own handlers, or on stderr where it has none."""
    if not _logger.isEnabledFor(logging.INFO):
        _logger.setLevel(logging.INFO)
    if not _logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        _logger.addHandler(handler)


@cache
def _defaults(op: str) -> dict[str, Any]:
    """Return the default of each argument of an op, ``...`` where it is required."""
    if op not in _OPS:
        raise ValueError(f"explain: op must be one of {', '.join(_OPS)}, got {op!r}")
    schema = getattr(getattr(torch.ops, NAMESPACE), op).default._schema
    return {a.name: a.default_value if a.has_default_value() else ... for a in schema.arguments}


def _complete(op: str, given: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _defaults(op)
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise ValueError(f"explain: {op} has no argument {unknown[0]!r}; it has {', '.join(defaults)}")
    # An optional tensor without a default in the schema is None in the public function.
    optional = {a.name for a in getattr(getattr(torch.ops, NAMESPACE), op).default._schema.arguments if _is_optional(a)}
    full = {name: None if value is ... and name in optional else value for name, value in defaults.items()} | dict(
        given
    )
    missing = [name for name, value in full.items() if value is ...]
    if missing:
        raise ValueError(f"explain: {op} needs the argument {missing[0]!r}")
    return full


def _is_optional(argument: Any) -> bool:
    return isinstance(argument.type, torch.OptionalType)


def _device_type(op: str, arguments: Mapping[str, Any], device: str | torch.device | None, backend: str | None) -> str:
    known = backends.discover()
    if backend is not None and backend not in known:
        raise ValueError(f"explain: backend must be one of {', '.join(known)}, got {backend!r}")
    if device is not None:
        return torch.device(device).type
    if backend is not None:
        served = [kind for kind in known[backend].serves() if dispatch.served().get(kind) == backend]
        return (served or known[backend].serves())[0]
    types = [value.device.type for value in arguments.values() if isinstance(value, torch.Tensor)]
    if not types or types[0] == "meta":
        raise ValueError(f"explain: {op} on meta tensors needs `device=` or `backend=` to be explained for")
    return types[0]


def _cache_kind(arguments: Mapping[str, Any]) -> str:
    kv_cache = arguments.get("kv_cache")
    if not isinstance(kv_cache, torch.Tensor):
        return "no cache"
    kind = str(kv_cache.dtype).removeprefix("torch.")
    scales = arguments.get("kv_scales")
    if isinstance(scales, torch.Tensor):
        granularity = {1: "per tensor", 2: "per head", 4: "per token and head"}.get(scales.dim(), "?")
        kind = f"{kind} {granularity}"
    return f"latent {kind}" if kv_cache.dim() == 5 and kv_cache.shape[0] == 1 else kind
