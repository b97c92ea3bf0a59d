"""Enumerations of nki.isa (members and values: SDK 2.32 API reference)."""

from enum import Enum


class engine(Enum):
    """An engine of a NeuronCore; `unknown` leaves the choice to the compiler."""

    unknown = 0
    tensor = 1
    scalar = 2
    gpsimd = 3
    dma = 4
    vector = 5
    sync = 6


class reduce_cmd(Enum):
    """What an instruction does with the accumulator registers of its engine."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3
    load_reduce = 4


class dge_mode(Enum):
    """Who generates the descriptors of a DMA."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3


class oob_mode(Enum):
    """What a DMA does with an index out of bounds."""

    error = 0
    skip = 1


class matmul_perf_mode(Enum):
    """Performance modes of nc_matmul."""

    none = "none"
    double_row = "double_row"


class nc_version(Enum):
    """Generations: gen2 is trn1 and inf2, gen3 is trn2, gen4 is trn3."""

    gen2 = 2
    gen3 = 3
    gen4 = 4


class dma_engine(Enum):
    """Who moves the bytes of sendrecv."""

    dma = 1
    gpsimd_dma = 2


# Deprecated names of the members, still documented.
tensor_engine = engine.tensor
vector_engine = engine.vector
scalar_engine = engine.scalar
gpsimd_engine = engine.gpsimd
unknown_engine = engine.unknown
