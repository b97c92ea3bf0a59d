"""Compile programs for a named chip with libtpu, without a TPU, and look at what the compiler made of them.

The compiler of the real chip runs; the program does not. It tells what is refused, what is copied, which buffers are
shared and how many kernels are left, and nothing of speed.
"""

import importlib.metadata
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""Chip -> the smallest slice of it that libtpu describes."""
_SINCE = {"tpu7x": (0, 0, 51)}
"""Chip -> a version of libtpu that knows it, where not all that we run with do."""
KERNEL = "tpu_custom_call"
DENSE = ("dot", "convolution", "gather", "broadcast")
"""What attention outside a kernel is made of."""
_NO_DATA = ("parameter", "bitcast", "get-tuple-element", "tuple", "custom-call", "constant")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")


class Refused(Exception):
    """The compiler refused a program; the message is its own."""


class Unreadable(Exception):
    """The compiler took a program, and what it made of it cannot be looked at."""


@dataclass(frozen=True)
class Operation:
    """One instruction of a compiled program.

    Attributes:
        opcode: such as ``"copy"`` or ``"fusion"``.
        name: as the program calls it.
        num_bytes: of the largest array that it yields.
        fused: it is inside a fusion, so that what it yields need not exist in memory.
    """

    opcode: str
    name: str
    num_bytes: int
    fused: bool


@dataclass(frozen=True)
class Program:
    """What the compiler made of a module.

    Attributes:
        chip: a key of ``TOPOLOGIES``.
        text: the optimised program; None where jaxlib cannot read it.
        alias_bytes: outputs that share an argument's memory.
        temp_bytes: memory beyond arguments and outputs.
        argument_bytes: memory of the arguments.
        accessed_bytes: what the operations outside kernels read and write, by the compiler's count.
    """

    chip: str
    text: str | None
    alias_bytes: int
    temp_bytes: int
    argument_bytes: int
    accessed_bytes: float

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the kernel calls, in the program's order."""
        lines = (line for line in self._lines() if f'custom_call_target="{KERNEL}"' in line)
        return tuple(found[1] for line in lines if (found := _INSTRUCTION.match(line)))

    def operations(self) -> Iterator[Operation]:
        """Yield every instruction that makes data, those inside fusions included."""
        fused = False
        for line in self._lines():
            if header := _COMPUTATION.match(line):
                fused = "fused" in header[2]
            elif (found := _INSTRUCTION.match(line)) and found[3] not in _NO_DATA:
                num_bytes = max((_num_bytes(*shape) for shape in _SHAPE.findall(found[2])), default=0)
                yield Operation(found[3], found[1], num_bytes, fused)

    def _lines(self) -> list[str]:
        if self.text is None:
            raise Unreadable("libtpu made asynchronous operations that this jaxlib cannot read")
        return self.text.splitlines()

    def whole(self, num_bytes: int) -> list[Operation]:
        """Return what yields at least ``num_bytes`` in memory, or is ``DENSE`` at that size inside a fusion."""
        return [
            operation
            for operation in self.operations()
            if operation.num_bytes >= num_bytes and (not operation.fused or operation.opcode in DENSE)
        ]


def chips() -> tuple[str, ...]:
    """Return the chips that the installed libtpu knows."""
    version = tuple(map(int, importlib.metadata.version("libtpu").split(".")[:3]))
    return tuple(chip for chip in TOPOLOGIES if version >= _SINCE.get(chip, version))


def compile_for(chip: str, module: str) -> Program:
    """Compile a StableHLO module (text) for a chip.

    Args:
        chip: A key of ``TOPOLOGIES``.
        module: ``jax.export.Exported.mlir_module()``, or what torch_xla lowers to.

    Raises:
        Refused: With the compiler's message.
    """
    import numpy as np
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jaxlib import _jax
    from jaxlib.mlir import ir

    device = _device(chip)
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]]))
    devices = _jax.DeviceList((device,))
    with mlir.make_ir_context():
        parsed = ir.Module.parse(module)
        try:
            executable = _compile(device.client, parsed, executable_devices=devices, compile_options=options)
        except Exception as error:
            raise Refused(_first_words(str(error))) from error
    try:
        text = executable.hlo_modules()[0].to_string()
    except RuntimeError:
        text = None
    memory = executable.get_compiled_memory_stats()
    return Program(
        chip,
        text,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        executable.cost_analysis().get("bytes accessed", 0.0),
    )


def export_for(chip: str, function: Callable[..., Any], arguments: Sequence[Any], *, donate: Sequence[int] = ()) -> str:
    """Return the StableHLO module (text) of a call, as it is lowered for a chip.

    Args:
        chip: A key of ``TOPOLOGIES``.
        function: Takes arrays.
        arguments: What has a shape and a dtype, or None.
        donate: The arguments whose memory the results get.
    """
    import jax
    import jax.export

    avals = [None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments]
    with lowering_for(chip):
        jitted = jax.jit(function, donate_argnums=tuple(donate), keep_unused=True)
        return jax.export.export(jitted, platforms=("tpu",))(*avals).mlir_module()


@contextmanager
def lowering_for(chip: str) -> Iterator[None]:
    """Lower for the chip as the device, and without the lines of our files, so that equal programs are equal texts."""
    import jax
    import numpy as np
    from jax._src import config, mesh

    use = getattr(jax.sharding, "use_abstract_mesh", None) or mesh.use_abstract_mesh  # jax 0.7 has only the latter
    with (
        use(jax.sharding.Mesh(np.array([_device(chip)]), ("x",)).abstract_mesh),
        config.traceback_in_locations_limit(0),
    ):
        yield


def _compile(client: Any, module: Any, **options: Any) -> Any:
    from jax._src.interpreters import mlir

    try:
        return client.compile(module, **options)
    except TypeError:  # jaxlib 0.7 wants bytes
        return client.compile(mlir.module_to_bytecode(module), **options)


@cache
def _device(chip: str) -> Any:
    # Without a TPU libtpu would ask a metadata server about this machine, and two processes would exclude each other.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]


def _num_bytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" else int(re.match(r"[a-z]+(\d+)", dtype)[1])  # type: ignore[index]
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def _first_words(message: str) -> str:
    """Return the sentence of a compiler's message, without the program that it quotes."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines)[:600]
