"""The errors of building the C++ library, which pip shows when an install fails."""

import os
import platform
import runpy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from error_table import SETUP, Error, Group


def _call(function: str, *arguments: Any, under: AbstractContextManager[Any]) -> Callable[[], Any]:
    """Return a call of a function of setup.py under a change of its surroundings."""

    def provoke() -> None:
        called = runpy.run_path(str(SETUP))[function]
        with under:
            called(*arguments)

    return provoke


def _error(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("DistutilsSetupError", f"torch_paged: {text}", cause, remedy, provoke)


_WITHOUT = "or set TORCH_PAGED_NO_EXT=1"

BUILDING = Group(
    "Building",
    (
        _error(
            f"torch cannot be imported by this build (<error>); install torch >= <version> and build with `pip install "
            f"--no-build-isolation`, {_WITHOUT} to leave out the CPU kernels.",
            "The build has an environment of its own, or torch is not installed.",
            "`pip install --no-build-isolation torch_paged`, after torch.",
            _call("torch_paths", under=patch.dict(sys.modules, {"torch": None})),
        ),
        _error(
            "torch must be >= <version> to build, got <version>; upgrade torch first.",
            "The stable interface that the kernels are built on is newer than this torch.",
            "`pip install 'torch>=2.9'`.",
            _call("torch_paths", under=patch.object(torch, "__version__", "2.8.0")),
        ),
        _error(
            "the CPU kernels build on 64-bit Linux (<machines>), got <platform>; set TORCH_PAGED_NO_EXT=1 for an "
            "install without them.",
            "The machine is another one.",
            "Set the variable, and `TORCH_PAGED_BACKEND=reference` for slow kernels in plain PyTorch.",
            _call("check_platform", under=patch.object(platform, "machine", lambda: "riscv64")),
        ),
        _error(
            f"the build needs <what>, and `<command>` does not provide it; install it or set CXX, {_WITHOUT} for an "
            "install without CPU kernels.",
            "There is no C++17 compiler, or it has no OpenMP.",
            "`apt install g++`.",
            _call("check_compiler", ["false"], under=patch.dict(os.environ)),
        ),
        _error(
            "TORCH_PAGED_NO_EXT must be 0 or 1, got <value>.",
            "The variable has another value, such as `true`.",
            "Set it to 1 for an install without kernels; otherwise unset it.",
            _call("no_extension", under=patch.dict(os.environ, {"TORCH_PAGED_NO_EXT": "true"})),
        ),
    ),
)
