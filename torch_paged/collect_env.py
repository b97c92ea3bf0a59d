"""Print what a bug report needs, by ``python -m torch_paged.collect_env``: versions, backends, why one is off."""

import importlib.metadata
import os
import platform
import sys

import torch

import torch_paged
from torch_paged import backends, dispatch

_PACKAGES = ("transformers", "torch_xla", "torch_tpu", "jax", "libtpu", "torch-neuronx", "neuronx-cc", "nki")
_SETTINGS = ("TORCH_PAGED_", "OMP_", "KMP_", "NEURON_", "PJRT_DEVICE")


def report() -> str:
    """Return the report: versions, settings, one line per backend."""
    lines = [
        f"torch_paged   {torch_paged.__version__}",
        f"torch         {torch.__version__}",
        f"python        {platform.python_version()} ({sys.executable})",
        f"platform      {platform.platform()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads",
        "packages      " + ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "settings      " + (_settings() or "none"),
        "backends",
    ]
    if dispatch.failure() is not None:
        lines.insert(0, f"import        fails: {dispatch.failure()}")
    served = dispatch.served()
    for name, info in backends.discover().items():
        reason = info.why_off()
        taken = [
            f"{setting} gives {device} to backend '{other.name}'"
            for other in backends.discover().values()
            for device, setting in other.asked_for.items()
            if device in info.device_types
        ]
        devices = [device for device, backend in served.items() if backend == name]
        if devices:
            wrong = info.wrong_setting()
            state = f"on for {', '.join(devices)}" + ("" if wrong is None else f", but each call raises: {wrong}")
        elif reason is not None:
            state = f"off: {reason}"
        elif not info.automatic:
            state = f"off: chosen only by {dispatch.VARIABLE}={name}"
        elif taken:
            state = f"off: {taken[0]}"
        else:
            state = f"off: {dispatch.VARIABLE} names another backend"
        details = ", ".join(f"{key} {value}" for key, value in info.versions().items())
        lines += [f"  {name:<11} {state}", f"  {'':<11} {info.summary} ({details})"]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _settings() -> str:
    names = sorted(name for name in os.environ if name.startswith(_SETTINGS))
    return ", ".join(f"{name}={os.environ[name]}" for name in names)


if __name__ == "__main__":
    print(report())
    raise SystemExit(0 if dispatch.failure() is None else 1)
