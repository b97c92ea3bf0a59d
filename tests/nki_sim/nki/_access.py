"""What every access to a storage obeys: the loop that made it, the core that owns it, what the other core does."""

from typing import TYPE_CHECKING, Union

import numpy as np

from nki._dtypes import Array
from nki._errors import fail, require
from nki._machine import machine
from nki._memory import UNWRITTEN, Storage

if TYPE_CHECKING:
    from nki._layout import Layout
    from nki._tensor import NkiTensor

Place = Union["Layout", Array]  # a layout, or element numbers of the storage


def touch(storage: Storage, instruction: str, operand: str) -> None:
    """Fail where the running code may not use the storage.

    Dynamic loops, SDK 2.32: what a body allocates stays inside it; PSUM is allocated in the body that uses it (the
    guide shows nothing else).
    """
    core = machine()
    where = f"{storage.name or 'a tensor'} of {storage.line}"
    own = storage.core is None or storage.core == core.core
    require(own, instruction, operand, "be in the memory of its own core", where)
    inside = core.turns[: len(storage.scope)] == storage.scope
    require(inside, instruction, operand, "be used in the turn of the loop body that allocated it only", where)
    if storage.buffer.name == "psum" and len(core.turns) > len(storage.scope):
        fail(instruction, operand, "be PSUM that the loop body itself allocated", where)


def check_hazards(view: "NkiTensor", place: Place, instruction: str, operand: str, writes: bool) -> None:
    """Fail where both cores reach the same bytes of shared HBM, one of them writing, without a barrier between."""
    storage = view.storage
    if storage.write_epoch is None or storage.read_epoch is None:
        return
    core, other = machine().core, 1 - machine().core
    epoch = storage.epochs[core]
    rule = "be separated by nisa.core_barrier on this tensor from what the other core does there"
    if (view.pick(storage.write_epoch[other], place) == epoch).any():
        fail(instruction, operand, rule, f"{view}, which core {other} wrote")
    if writes and (view.pick(storage.read_epoch[other], place) == epoch).any():
        fail(instruction, operand, rule, f"{view}, which core {other} read")
    mine = storage.write_epoch if writes else storage.read_epoch
    view.put(mine[core], place, epoch)


def forget_neighbours(view: "NkiTensor", place: Place) -> None:
    """Undefine what the write covers of other tensors that the kernel placed at the same addresses."""
    storage = view.storage
    if storage.address is None:
        return
    covered: Array | None = None
    for other in list(machine().live):
        if other is storage or other.buffer is not storage.buffer or other.address is None:
            continue
        rows = slice(*_overlap(storage.address[0], storage.partitions, other.address[0], other.partitions))
        columns = slice(*_overlap(storage.address[1], storage.free_bytes, other.address[1], other.free_bytes))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        if covered is None:
            flat = np.zeros(storage.data.size, bool)
            view.put(flat, place, True)
            covered = flat.reshape(storage.partitions, storage.free_bytes)
        own = covered[_shift(rows, storage.address[0]), _shift(columns, storage.address[1])]
        state = other.state.reshape(other.partitions, other.free_bytes)
        state[_shift(rows, other.address[0]), _shift(columns, other.address[1])][own] = UNWRITTEN


def _overlap(start: int, size: int, other_start: int, other_size: int) -> tuple[int, int]:
    return max(start, other_start), min(start + size, other_start + other_size)


def _shift(part: slice, by: int) -> slice:
    return slice(part.start - by, part.stop - by)
