"""Compile the C++ files of this folder on demand, for the machine that runs them."""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import ROOT

FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC", "-shared")


def compiled(name: str, *flags: str, objects: Sequence[Path] = ()) -> ctypes.CDLL:
    """Return ``name.cpp`` as a library under ``build/benchmarks``, compiled when that is out of date."""
    source, built = Path(__file__).with_name(f"{name}.cpp"), ROOT / "build" / "benchmarks" / f"{name}.so"
    newest = max(path.stat().st_mtime for path in (source, *objects))
    if not built.exists() or built.stat().st_mtime <= newest:
        built.parent.mkdir(parents=True, exist_ok=True)
        command = [os.environ.get("CXX", "g++"), *FLAGS, *flags, str(source), *map(str, objects)]
        subprocess.run([*command, "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


def kernel_objects() -> list[Path]:
    """Return the object files of the kernels that the build of the extension left, or nothing."""
    folders = [path.parent for path in ROOT.glob("build/temp.*/csrc_shims/cpu/attention.o")]
    newest = max(folders, key=lambda folder: (folder / "attention.o").stat().st_mtime, default=None)
    sources = sorted((ROOT / "csrc_shims" / "cpu").glob("*.cpp"))
    return [] if newest is None else [built for path in sources if (built := newest / f"{path.stem}.o").exists()]
