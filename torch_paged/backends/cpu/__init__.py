"""The CPU backend: C++ kernels (``csrc_shims/cpu``) in one stable-ABI library."""

import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch_paged.backends import BackendInfo
from torch_paged.backends.cpu.support import LIBRARY, LIMITS, isa, refusal, variant, wrong_setting


def why_off() -> str | None:
    """Return why the kernels cannot run here, with the remedy, or None."""
    if torch.__version__ < (2, 9):  # type: ignore[operator]
        return f"it needs torch >= 2.9, got {torch.__version__}: upgrade torch"
    if not LIBRARY.exists():
        return (
            "this install has no C++ extension: reinstall with `pip install --no-build-isolation` and without "
            "TORCH_PAGED_NO_EXT, or set TORCH_PAGED_BACKEND=reference for slow kernels in plain PyTorch"
        )
    return None


def load(device_type: str) -> Mapping[str, Callable[..., Any]]:
    """Load the library, which binds its kernels itself."""
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(f"torch_paged: {LIBRARY.name} does not load ({error}); rebuild torch_paged here") from error
    return {}


def versions() -> Mapping[str, str]:
    """Return the machine and the instruction set in use."""
    return {"machine": platform.machine(), "isa": isa() or "none"}


BACKEND = BackendInfo(
    name="cpu",
    summary="C++ kernels for Linux x86_64 and aarch64",
    limits=LIMITS,
    device_types=("cpu",),
    automatic=True,
    why_off=why_off,
    load=load,
    refusal=refusal,
    variant=variant,
    versions=versions,
    wrong_setting=wrong_setting,
)
