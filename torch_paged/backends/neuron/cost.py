"""What a kernel's instructions take on a core of trn2 or trn3, by the documents alone: a model, never run on hardware.

A model of throughput: an engine takes the sum of what its instructions take, the engines and DMA run beside each other,
and what overlaps with nothing is added: ``time = max(engines, DMA) + turns of loops + barriers + start``.

Left out: waits of one engine for another within a turn, the order that the compiler chooses, conflicts on PSUM banks
and on the bus that the vector engine and GpSimd share, HBM traffic of other cores. What GpSimd takes to make a gather's
descriptors is in no document of the vendor: ``Cost.gather_us`` has it apart, by one user's measurement.

Sources, of aws-neuron-sdk: A1, A2, A3: nki/guides/architecture/trainium_inferentia2_arch.rst, trainium2_arch.rst,
trainium3_arch.rst. S26: cost formulas of the API reference of SDK 2.26, which later ones leave out. LOOPS:
nki/deep-dives/nki-dynamic-loops.rst. DGE: nki/deep-dives/nki-dge.rst. DMAO: nki/get-started/about/nki-dma-overview.rst.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

ACCESS_CYCLES = 60
"""Of each instruction's access to SBUF or PSUM (A1; engines hide some of it)."""
GPSIMD_CYCLES = 150
"""Of each instruction of GpSimd (S26)."""
RESULT_CYCLES = 64
"""A sum or maximum that comes beside an instruction's result is written by one of its own (A1)."""
PRODUCT_CYCLES = 64
"""Least cycles from one product to the next (A1)."""
FAST_LOAD = 4
"""A stationary matrix is loaded so many times faster than a moving one of its width streams (A1)."""
FLOAT32_PASSES, FLOAT32_TRANSPOSES = 4, 2
"""Products of float32 take so many times the cycles (A1), transposes half of that (A2)."""
GATHER_GROUP = 512
"""Elements of a group in which ``nc_n_gather`` works (its reference names no time: a start for each is assumed)."""
START_OF_DMA_US, STARTERS = 0.6, 2
"""Of a DMA instruction, on one of the blocks that make descriptors (A2, DGE)."""
TURN_US = 10.4
"""Of a turn of a dynamic loop: 17.9 us where an unrolled one takes 7.5; of four tiles, 4 * (10.2 - 7.5) (LOOPS)."""
START_US = 2.0
"""Latency of the first DMA of a kernel, or of an operation of torch that was not fused; another one for its last."""
BARRIER_US = 2.0
"""Of a wait for the other core: no document names it; assumed to be the latency of a DMA."""
GATHERED_ROW_NS = 26.5
"""Of a gathered row's descriptor on GpSimd: measured by a user on trn2, in no document of the vendor."""
EFFICIENCY = ((0, 0.0), (256, 0.10), (1024, 0.42), (2048, 0.81), (4096, 0.97))
"""Bytes of a descriptor -> share of the bandwidth, read off the figure in DMAO; more bytes count as no better."""
ENGINES = ("tensor", "vector", "scalar", "gpsimd")


@dataclass(frozen=True)
class Chip:
    """A generation, one physical core of it.

    Attributes:
        hbm_bytes: per second, of a device's bandwidth what is one core's of eight.
        clocks: Hz of each engine (A2, A3).
        fast_bits: bits of floating-point numbers that fast modes take (A2, A3).
        fast_scalar: the scalar engine has them too (A3).
    """

    hbm_bytes: float
    clocks: Mapping[str, float]
    fast_bits: tuple[int, ...]
    fast_scalar: bool

    @property
    def flops(self) -> float:
        """Operations per second of 16-bit products: 128 x 128 multiply-adds a cycle."""
        return 2 * 128 * 128 * self.clocks["tensor"]


CHIPS = {
    # 2.9 TB/s (about-neuron/arch/neuron-hardware/trainium2; A2 rounds it), 4.7 TB/s (A3), each shared by 8 cores.
    "trn2": Chip(2.9e12 / 8, {"tensor": 2.4e9, "vector": 0.96e9, "scalar": 1.2e9, "gpsimd": 1.2e9}, (16,), False),
    "trn3": Chip(4.7e12 / 8, {"tensor": 2.4e9, "vector": 1.2e9, "scalar": 1.2e9, "gpsimd": 1.2e9}, (8, 16), True),
}


@dataclass(frozen=True)
class Instruction:
    """An instruction as far as its cost depends on it.

    Attributes:
        name: in ``nki.isa``.
        engine: that ran it: one of ``ENGINES``, ``"dma"`` or ``"sync"``.
        elements: per partition, of the widest operand; of a product or transpose: columns that move.
        columns: of a product's or transpose's stationary matrix.
        inputs: tensors that it reads, those with one element per partition left out.
        bits: of an element, where result and inputs are floating-point numbers of 16 bits or of 8 and 16; else 32.
        in_psum: how many of result and inputs lie in PSUM.
        contiguous: neighbours of each operand follow each other in memory.
        results: tensors that it writes.
        bytes, descriptors: that a DMA moves.
        gathered: its rows are found by index.
    """

    name: str
    engine: str
    elements: int = 0
    columns: int = 0
    inputs: int = 1
    bits: int = 32
    in_psum: int = 0
    contiguous: bool = True
    results: int = 1
    bytes: int = 0
    descriptors: int = 0
    gathered: bool = False


@dataclass
class Counts:
    """What a core runs: how often each instruction, and turns of dynamic loops; averages have shares of them."""

    instructions: dict[Instruction, float] = field(default_factory=dict)
    turns: float = 0
    barriers: float = 0

    def plus(self, other: "Counts", factor: float = 1) -> "Counts":
        """Return these and the other ones, so many times."""
        found = dict(self.instructions)
        for key, number in other.instructions.items():
            found[key] = found.get(key, 0) + number * factor
        found = {key: number for key, number in found.items() if number}
        return Counts(found, self.turns + other.turns * factor, self.barriers + other.barriers * factor)

    def number(self, *engines: str) -> float:
        """Return the instructions of some engines."""
        return sum(number for key, number in self.instructions.items() if key.engine in engines)


@dataclass(frozen=True)
class Cost:
    """Microseconds of a core.

    Attributes:
        engines: of each of ``ENGINES``, and ``"dma"``.
        turns_us, barriers_us, start_us: of loops, of waits for the other core, of the kernel.
        gather_us: what GpSimd takes to make descriptors of gathers, which no document names and ``engines`` leave out.
    """

    engines: Mapping[str, float]
    turns_us: float
    barriers_us: float
    start_us: float
    gather_us: float

    @property
    def bound(self) -> str:
        """What takes the longest: an engine, or ``"dma"``."""
        return max(self.engines, key=lambda name: self.engines[name])

    @property
    def fixed_us(self) -> float:
        """What overlaps with nothing."""
        return self.turns_us + self.barriers_us + self.start_us

    @property
    def us(self) -> float:
        """All of it."""
        return self.engines[self.bound] + self.fixed_us

    @property
    def us_with_descriptors(self) -> float:
        """All of it where GpSimd makes the descriptors of gathers, at the measured rate."""
        return max(self.engines[self.bound], self.engines["gpsimd"] + self.gather_us) + self.fixed_us


def cost(counts: Counts, chip: Chip) -> Cost:
    """Return what a kernel takes."""
    engines = dict.fromkeys((*ENGINES, "dma"), 0.0)
    starts = gathered = 0.0
    for key, number in counts.instructions.items():
        if key.engine in ENGINES:
            engines[key.engine] += number * cycles(key, chip) / chip.clocks[key.engine] * 1e6
        elif key.engine == "dma":
            engines["dma"] += number * moving_us(key, chip)
            starts += 0 if key.gathered else number * START_OF_DMA_US / STARTERS
            gathered += number * key.descriptors * GATHERED_ROW_NS / 1e3 if key.gathered else 0
    engines["dma"] = max(engines["dma"], starts)
    return Cost(engines, counts.turns * TURN_US, counts.barriers * BARRIER_US, 2 * START_US, gathered)


def torch_us(sizes: Iterable[int], chip: Chip) -> float:
    """Return what operations of torch take, one after the other.

    Args:
        sizes: bytes that each operation reads and writes.
        chip: that runs them.
    """
    return sum(2 * START_US + size / chip.hbm_bytes * 1e6 for size in sizes)


def efficiency(size: float) -> float:
    """Return the share of the bandwidth that descriptors of so many bytes reach."""
    for (low, least), (high, most) in pairwise(EFFICIENCY):
        if size <= high:
            return least + (most - least) * (size - low) / (high - low)
    return EFFICIENCY[-1][1]


def moving_us(key: Instruction, chip: Chip) -> float:
    """Return what the DMA engines take for one instruction's bytes."""
    if not key.bytes:
        return 0.0
    return key.bytes / (chip.hbm_bytes * efficiency(key.bytes / key.descriptors)) * 1e6


def cycles(key: Instruction, chip: Chip) -> float:
    """Return the cycles of its engine that one instruction takes."""
    if key.engine == "tensor":
        return _tensor_cycles(key)
    results = RESULT_CYCLES * (key.results - 1)
    if key.engine == "vector":
        return ACCESS_CYCLES + _vector_share(key, chip) * key.elements + results
    if key.engine == "scalar":
        fast = chip.fast_scalar and key.bits in chip.fast_bits and key.name in ("tensor_copy", "tensor_scalar")
        return ACCESS_CYCLES + key.elements * (0.5 if fast else 1) + results
    groups = -(-key.elements // GATHER_GROUP) if key.name == "nc_n_gather" else 1
    return GPSIMD_CYCLES * groups + key.elements * max(key.inputs, 1)


def _tensor_cycles(key: Instruction) -> float:
    passes = 1
    if key.bits == 32:
        passes = FLOAT32_TRANSPOSES if key.name == "nc_transpose" else FLOAT32_PASSES
    return passes * max(PRODUCT_CYCLES, key.elements, key.columns / FAST_LOAD)


def _vector_share(key: Instruction, chip: Chip) -> float:
    """Return the cycles for an element of a partition (A1, A2, S26)."""
    fast = key.bits in chip.fast_bits
    if key.name in ("tensor_copy", "tensor_scalar") and fast:
        if not key.in_psum:
            return 0.25 if key.contiguous else 0.5
        return 0.5 if key.contiguous and key.in_psum == 1 else 1
    if key.name == "reciprocal":
        return 8
    if key.name == "memset":
        return 0.5 if fast else 1
    if key.name == "tensor_tensor_scan":
        return 2
    if key.inputs > 1:
        return 1 if key.in_psum or (fast and key.name == "tensor_tensor") else 2
    return 1
