"""The program that torch_xla hands to XLA, as StableHLO that another compiler of XLA takes, donations included."""

import re
from pathlib import Path

from torch_paged.testing.processes import run_python

_DUMP = "--xla_dump_hlo_as_text --xla_dump_hlo_as_proto"


def lowered_for_tpu(code: str, chip: str, folder: Path) -> str:
    """Return the one program with kernels for a TPU that code makes torch_xla compile.

    torch_xla runs on its CPU client, which writes the program down and then fails, or crashes, over the kernels.

    Args:
        code: makes torch_xla compile; runs with torch_paged and torch_xla imported.
        chip: what the kernels are lowered for.
        folder: an empty folder.
    """
    setup = f"""
import torch, torch_paged, torch_xla
from torch_paged.backends.tpu import bridge_torch_xla
bridge_torch_xla.target = lambda device: ("tpu", "{chip}")
"""
    flags = f"--xla_dump_to={folder} {_DUMP}"
    done = run_python(setup + code, check=False, PJRT_DEVICE="CPU", JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    texts = [path for path in folder.glob("*before_optimizations.txt") if "tpu_custom_call" in path.read_text()]
    assert len(texts) == 1, f"{len(texts)} programs with kernels\n{done.stdout}{done.stderr}"
    donated = re.search(r"buffer_donor=\{([^=]*)\}, entry", texts[0].read_text().partition("\n")[0])
    program = _stablehlo(texts[0].with_suffix(".hlo.pb").read_bytes())
    for number in re.findall(r"\((\d+), \{\}\)", "" if donated is None else donated[1]):
        argument = rf"(func\.func @main\(.*?%arg{number}: tensor<[^>]*>)"
        program, found = re.subn(argument, r"\1 {jax.buffer_donor = true}", program, count=1)
        assert found == 1, f"there is no argument {number}"
    return program


def _stablehlo(proto: bytes) -> str:
    from jaxlib import _jax

    computation = _jax.XlaComputation(_first_field(proto))
    module = _jax.mlir.xla_computation_to_mlir_module(computation)
    return module if isinstance(module, str) else module.decode()


def _first_field(message: bytes) -> bytes:
    """Return field 1 of a protocol buffer: of an HloProto, the module."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        size, at = _varint(message, at)
        if tag == 1 << 3 | 2:
            return message[at : at + size]
        at += size
    raise AssertionError("there is no module in the dump")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (message[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if not message[at - 1] & 128:
            return value, at
