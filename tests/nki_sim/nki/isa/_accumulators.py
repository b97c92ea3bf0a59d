"""Accumulator registers: one fp32 value per lane, kept between instructions (SDK 2.32 API reference).

The Scalar engine has one file (activation, activation_reduce, activate2), the Vector engine another (exponential,
range_select, scalar_tensor_tensor, select_reduce, tensor_scalar_reduce, tensor_scalar_cumulative). A lane is a physical
partition. No document fixes whether results are folded before or after the cast to dst, nor the order of the sum: they
are folded in fp32, before the cast, pairwise.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nki._machine import machine
from nki._tensor import NkiTensor
from nki.isa._access import F32, broadcast_f32, demand, listed, reject, write
from nki.isa._alu import IDENTITIES, Operator
from nki.isa._arithmetic import combine, reduce_free
from nki.isa._enums import reduce_cmd

LANES = 128


@dataclass
class Accumulators:
    """The registers of one engine. known: lanes whose value the documents define."""

    values: F32 = field(default_factory=lambda: np.zeros(LANES, np.float32))
    known: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(LANES, np.bool_))


def registers(engine_name: str) -> Accumulators:
    """The registers of an engine of the running core."""
    kept = machine().lanes.setdefault(engine_name, Accumulators())
    assert isinstance(kept, Accumulators)
    return kept


def forget(engine_name: str) -> None:
    """Make the registers undefined."""
    registers(engine_name).known[:] = False


def check_command(command: reduce_cmd, allowed: tuple[reduce_cmd, ...]) -> None:
    """Fail unless the instruction takes the command."""
    demand(command in allowed, "reduce_cmd", "be " + listed(allowed), command)


def start(file: Accumulators, lanes: slice, command: reduce_cmd, op: Operator | None, init: Any = None) -> None:
    """Give the lanes the value from which the command folds."""
    if command in (reduce_cmd.reset, reduce_cmd.reset_reduce):
        file.values[lanes] = IDENTITIES[op.name if op else "add"]
        file.known[lanes] = True
    elif command is reduce_cmd.load_reduce:
        file.values[lanes] = np.broadcast_to(broadcast_f32("reduce_init", init)[:, 0], file.values[lanes].shape)
        file.known[lanes] = True
    elif command is reduce_cmd.reduce and not file.known[lanes].all():
        reject("reduce_cmd", "follow reset_reduce or load_reduce: these lanes' accumulators are undefined", command)


def accumulate(
    engine_name: str,
    command: reduce_cmd,
    data: NkiTensor,
    results: F32,
    op: Operator | None,
    reduce_res: NkiTensor | None,
    init: Any = None,
    negate: bool = False,
) -> None:
    """Fold the results (P, F) of an instruction into its engine's registers and hand them out.

    Args:
        engine_name: "vector", where an idle instruction leaves the registers undefined, or "scalar".
        command: what to do with the registers.
        data: the input, whose partitions are the lanes.
        results: fp32 results before the cast to dst.
        op: the reduction; None means addition.
        reduce_res: (P, 1) tensor that receives the registers, or None.
        init: value to load, number or (P, 1) tensor.
        negate: hand out the negated registers.
    """
    file = registers(engine_name)
    lanes = slice(data.start_partition, data.start_partition + data.partitions)
    if command is reduce_cmd.idle and engine_name == "vector":
        demand(reduce_res is None, "reduce_res", "be None with reduce_cmd.idle", "a tensor")
        forget(engine_name)
        return
    start(file, lanes, command, op, init)
    if command not in (reduce_cmd.idle, reduce_cmd.reset) and op is not None:
        file.values[lanes] = combine(op, file.values[lanes], reduce_free(op, results))
    if reduce_res is not None:
        demand(bool(file.known[lanes].all()), "reduce_res", "read accumulators that are defined", "undefined ones")
        handed = file.values[lanes][:, None]
        write(reduce_res, -handed if negate else handed)
        machine().count(engine_name, elements=1, bytes=reduce_res.size * reduce_res.dtype.itemsize)
