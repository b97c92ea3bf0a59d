"""Calls of kernels that are written in Python, up to the point where they would compute."""

from typing import Any

from torch_paged import backends
from torch_paged.backends.python_kernels import python_kernels


def kernel_of(info: backends.BackendInfo, op: str, arguments: dict[str, Any]) -> None:
    """Call the kernel of a backend in Python up to the point where it would compute."""
    python_kernels(info, lambda name, values: None)[op](**arguments)
