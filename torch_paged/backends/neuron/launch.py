"""How an op of this backend runs a kernel, whatever holds the tensors. Imports no nki."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """Runs kernels on the tensors of one kind of device.

    Attributes:
        generation: ``"trn2"`` or ``"trn3"``.
        cores: physical cores that share a kernel's work (the LNC degree), 1 or 2.
        run: takes a kernel (``nki.jit``), the cores and the kernel's arguments: tensors, numbers and None. Returns what
            the kernel does, as tensors. Arguments that the kernel writes are written.
    """

    generation: str
    cores: int
    run: Callable[..., Any]

    def __call__(self, kernel: Any, *arguments: Any) -> Any:
        """Run a kernel."""
        return self.run(kernel, self.cores, *arguments)
