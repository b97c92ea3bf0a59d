"""Memories of a NeuronCore: what each byte holds, who wrote it and when, and how long it is needed.

Sizes: NeuronCore architecture guides of trn1 / trn2 / trn3.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nki._dtypes import Array, DType

PARTITIONS = 128
SBUF_BYTES = {2: 192 * 1024, 3: 224 * 1024, 4: 256 * 1024}  # per partition
RESERVED_SBUF_BYTES = 16 * 1024  # the documents say "some"; taken from each partition
PSUM_BANKS = 8
BANK_BYTES = 2048  # per partition

UNWRITTEN, WRITTEN, ACCUMULATED = 0, 1, 2  # state of a byte; ACCUMULATED: last written by a matrix multiplication


@dataclass(frozen=True, eq=False)
class Buffer:
    """A memory of nki.language: nl.sbuf, nl.psum, nl.private_hbm or nl.shared_hbm."""

    name: str

    @property
    def on_chip(self) -> bool:
        """Whether dimension 0 is the partition."""
        return self.name in ("sbuf", "psum")

    def __repr__(self) -> str:
        return f"nl.{self.name}"


sbuf = Buffer("sbuf")
psum = Buffer("psum")
private_hbm = hbm = Buffer("private_hbm")
shared_hbm = Buffer("shared_hbm")


def usable_sbuf_bytes(generation: int) -> int:
    """Bytes of SBUF per partition that a kernel can have."""
    return SBUF_BYTES[generation] - RESERVED_SBUF_BYTES


@dataclass(eq=False)
class Storage:
    """One allocation: its bytes in row-major order of the shape with which it was made.

    state: per byte, UNWRITTEN, WRITTEN or ACCUMULATED.
    scope: the turns of the dynamic loops inside which it was made, outermost first.
    address: (partition, byte within the partition) where the kernel placed it, else None.
    bank: first PSUM bank.
    epochs: 1 and the barriers on it that each core has passed.
    write_epoch, read_epoch: (2, bytes) of shared HBM with two cores: the epoch of each core's last access, or 0.
    """

    buffer: Buffer
    dtype: DType
    shape: tuple[int, ...]
    data: Array
    state: Array
    name: str
    line: str
    core: int | None = None
    scope: tuple[Any, ...] = ()
    address: tuple[int, int] | None = None
    bank: int = 0
    argument: bool = False  # of the kernel
    constant: bool = False  # an argument that was handed over read-only
    epochs: list[int] = field(default_factory=lambda: [1, 1])
    write_epoch: Array | None = None
    read_epoch: Array | None = None

    @property
    def partitions(self) -> int:
        """Partitions that it takes on chip."""
        return self.shape[0]

    @property
    def start_partition(self) -> int:
        """First partition on chip: 0 unless the kernel placed it."""
        return self.address[0] if self.address else 0

    @property
    def free_bytes(self) -> int:
        """Bytes per partition on chip."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def share(self) -> None:
        """Begin to watch what two cores do to it."""
        self.write_epoch = np.zeros((2, self.data.size), np.int16)
        self.read_epoch = np.zeros((2, self.data.size), np.int16)


def make_storage(buffer: Buffer, dtype: DType, shape: tuple[int, ...], name: str, line: str) -> Storage:
    """Make an allocation whose contents are undefined: NaN, or 4 for integers, as nki.simulate fills them."""
    values = np.empty(math.prod(shape), dtype.numpy)
    values.fill(np.nan if dtype.is_float else 4 if dtype.is_int else 0)
    data = values.view(np.uint8)
    return Storage(buffer, dtype, shape, data, np.zeros(data.size, np.uint8), name, line)


def free_bank(size: int, live: Iterable[Storage]) -> int | None:
    """Give the first PSUM bank with room for `size` bytes per partition, or None.

    Small tensors share a bank; larger ones take whole banks that follow each other.
    """
    used = [0] * PSUM_BANKS
    for storage in live:
        if storage.buffer is psum:
            left, bank = storage.free_bytes, storage.bank
            start = storage.address[1] % BANK_BYTES if storage.address else 0
            while left > 0 and bank < PSUM_BANKS:
                part = min(left, BANK_BYTES - start)
                used[bank], left, bank, start = used[bank] + part, left - part, bank + 1, 0
    if size <= BANK_BYTES:
        return next((bank for bank in range(PSUM_BANKS) if used[bank] + size <= BANK_BYTES), None)
    wanted = -(-size // BANK_BYTES)
    firsts = range(PSUM_BANKS - wanted + 1)
    return next((first for first in firsts if not any(used[first : first + wanted])), None)
