"""Compile the C++ files of this folder on demand, for the machine that runs them."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.timing import Call

ROOT = Path(__file__).parents[1]
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC", "-shared")
ISA_VARIABLE = "TORCH_PAGED_CPU_ISA"
ISAS = ("avx512", "avx2", "generic")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of DType in params.h


def built(name: str, *flags: str, objects: Sequence[Path] = ()) -> Path:
    """Return the library of ``name.cpp`` under ``build/benchmarks``, compiled when that is out of date."""
    source, library = Path(__file__).with_name(f"{name}.cpp"), ROOT / "build" / "benchmarks" / f"{name}.so"
    newest = max(path.stat().st_mtime for path in (source, *objects))
    if not library.exists() or library.stat().st_mtime <= newest:
        library.parent.mkdir(parents=True, exist_ok=True)
        command = [os.environ.get("CXX", "g++"), *FLAGS, *flags, str(source), *map(str, objects)]
        subprocess.run([*command, "-o", str(library)], check=True)
    return library


def compiled(name: str) -> ctypes.CDLL:
    """Return ``name.cpp``, compiled and loaded."""
    return ctypes.CDLL(str(built(name)))


@cache
def kernels(isa: str = "") -> ctypes.CDLL | None:
    """Return the kernels without PyTorch (``native.cpp``), or None where no build left their objects.

    Args:
        isa: the instruction set, by the name that the variable takes; None is returned where it does not run here.
            Empty: what the process uses. Each has its own copy of the library, so that all run in one process.
    """
    objects = _kernel_objects()
    if not objects:
        return None
    library = built("native", f"-I{ROOT}/csrc_shims/cpu", objects=objects)
    with tempfile.TemporaryDirectory() as folder:
        loaded = ctypes.CDLL(shutil.copy(library, folder))
    loaded.instruction_set.restype = ctypes.c_char_p
    loaded.decode_loop.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 8]
    loaded.decode_loop.restype = None
    with patch.dict(os.environ, {ISA_VARIABLE: isa} if isa else {}):
        return loaded if loaded.instruction_set() else None


def decode_call(library: ctypes.CDLL, pools: list[dict[str, Any]], repeats: int = 1) -> Call:
    """Return a call that decodes without PyTorch, ``repeats`` times in a loop, on plain arguments of the op."""
    out = torch.empty_like(pools[0]["query"])

    def call(pool: int) -> torch.Tensor:
        query, kv_cache, tables, lengths = (
            pools[pool][name] for name in ("query", "kv_cache", "block_tables", "context_lens")
        )
        pointers = (tensor.data_ptr() for tensor in (query, out, kv_cache, tables, lengths))
        sizes = (*query.shape[:2], *kv_cache.shape[1:], tables.size(1), repeats)
        library.decode_loop(KERNEL_DTYPES.index(query.dtype), *pointers, *sizes)
        return out

    return call


def _kernel_objects() -> list[Path]:
    """Return the object files of the kernels that the build of the extension left, or nothing."""
    folders = [path.parent for path in ROOT.glob("build/temp.*/csrc_shims/cpu/attention.o")]
    newest = max(folders, key=lambda folder: (folder / "attention.o").stat().st_mtime, default=None)
    sources = sorted((ROOT / "csrc_shims" / "cpu").glob("*.cpp"))
    return [] if newest is None else [path for s in sources if (path := newest / f"{s.stem}.o").exists()]
