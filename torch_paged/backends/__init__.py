"""The backends: one folder each, which exposes one frozen ``BACKEND``. Importing a folder imports no device library."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """How a backend would run one call.

    Attributes:
        name: ``"decode"``, ``"prefill"``, ``"mixed"`` for attention, else the op's own name.
        isa: instruction set or chip, such as ``"avx512"``.
        compiled: False where the kernel is interpreted.
    """

    name: str
    isa: str
    compiled: bool


@dataclass(frozen=True)
class BackendInfo:
    """What the dispatcher and the reports know of a backend.

    Attributes:
        name: the folder's name; also a value of ``TORCH_PAGED_BACKEND``.
        summary: one line for reports.
        limits: feature -> what of it the backend does, for the README's table.
        device_types: ``torch.device.type`` of the tensors it serves.
        automatic: False for a backend that only ``TORCH_PAGED_BACKEND`` can choose.
        why_off: the reason why it cannot run here, with the remedy, or None.
        load: makes its kernels for a device type ready. Returns a Python kernel per op, none where its library binds
            itself, or None where this device type is out of reach here.
        refusal: the reason why it cannot do a (valid) call, or None. Takes the op and all its arguments by name.
        variant: what it would run for a call. Takes the op, all its arguments by name and the device type; never reads
            data. Raises NotImplementedError where the device turns out to be one that it cannot use.
        versions: the versions it depends on, by name.
        wrong_setting: the reason why a setting that is read at the first call makes each call raise, or None.
        head_dim_multiple: its caches store head_dim rounded up to this multiple.
        contiguous_cache: True where it takes contiguous caches only.
        asked_for: device type -> the setting that asks that this backend serves it, in place of the device's own.
    """

    name: str
    summary: str
    limits: Mapping[str, str]
    device_types: tuple[str, ...]
    automatic: bool
    why_off: Callable[[], str | None]
    load: Callable[[str], Mapping[str, Callable[..., Any]] | None]
    refusal: Callable[[str, Arguments], str | None]
    variant: Callable[[str, Arguments, str], Variant]
    versions: Callable[[], Mapping[str, str]]
    wrong_setting: Callable[[], str | None] = lambda: None
    head_dim_multiple: int = 1
    contiguous_cache: bool = False
    asked_for: Mapping[str, str] = field(default_factory=dict)

    def serves(self) -> tuple[str, ...]:
        """Return its device types; those that a setting asks for come first."""
        return (*self.asked_for, *self.device_types)


@cache
def discover() -> dict[str, BackendInfo]:
    """Return every backend by name, usable here or not."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)
    return {name: importlib.import_module(f"{__name__}.{name}").BACKEND for name in names}


def availability() -> dict[str, str | None]:
    """Return, for each backend by name, why it is off here, or None where it can run."""
    return {name: info.why_off() for name, info in discover().items()}
