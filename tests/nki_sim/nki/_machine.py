"""The running core: its generation, counters, dynamic loops, allocations and what it shares with the other core.

Interface for instructions: `machine()` gives the `Core` on which the calling kernel runs; instructions read
`.generation` (2 trn1, 3 trn2, 4 trn3), `.core`, `.num_cores`, and report work with
`.count(engine, elements=, bytes=, descriptors=)`, engine one of "tensor", "vector", "scalar", "gpsimd", "dma", "sync".
`Core.tally` counts instructions that are alike, for models of their cost. `Core.lanes` keeps what an engine remembers
between instructions (accumulator registers), by a name of its own.
"""

import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nki._errors import NkiValidationError, kernel_line
from nki._memory import Storage

if TYPE_CHECKING:
    from nki._launch import Launch

ENGINES = ("tensor", "vector", "scalar", "gpsimd", "dma", "sync")


@dataclass
class Work:
    """What an engine was asked to do."""

    instructions: int = 0
    elements: int = 0
    bytes: int = 0
    descriptors: int = 0

    def add(self, elements: int, bytes: int, descriptors: int) -> None:
        """Add one instruction."""
        self.instructions += 1
        self.elements += elements
        self.bytes += bytes
        self.descriptors += descriptors


@dataclass(eq=False)
class Loop:
    """A dynamic loop that runs.

    first, turn: what the first and the present turn did; a body is traced once, so that all turns do the same.
    """

    turns: int = 0
    first: list[Any] | None = None
    turn: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Core:
    """One core while it runs a kernel.

    tally: how often each (engine, instruction, elements, bytes, descriptors) ran.
    turns: a token for the present turn of each dynamic loop, outermost first; loops: those loops.
    """

    generation: int
    core: int = 0
    num_cores: int = 1
    launched_with_grid: bool = False
    launch: "Launch | None" = None
    counters: dict[str, Work] = field(default_factory=lambda: {engine: Work() for engine in ENGINES})
    by_instruction: dict[tuple[str, str], Work] = field(default_factory=dict)
    tally: Counter[tuple[str, str, int, int, int]] = field(default_factory=Counter)
    lanes: dict[str, Any] = field(default_factory=dict)
    instruction: str = ""
    turns: tuple[Any, ...] = ()
    loops: tuple[Loop, ...] = ()
    no_reorder: int = 0
    names: set[str] = field(default_factory=set)
    live: "weakref.WeakSet[Storage]" = field(default_factory=weakref.WeakSet)
    shared: int = 0  # shared tensors made so far

    def count(self, engine: str, elements: int = 0, bytes: int = 0, descriptors: int = 0) -> None:
        """Count one instruction of an engine."""
        self.counters[engine].add(elements, bytes, descriptors)
        self.by_instruction.setdefault((engine, self.instruction), Work()).add(elements, bytes, descriptors)
        self.tally[engine, self.instruction, elements, bytes, descriptors] += 1


class _Current(threading.local):
    core: Core | None = None


_current = _Current()


def machine() -> Core:
    """Give the core on which the calling kernel runs."""
    if _current.core is None:
        raise NkiValidationError(f"nki: kernels must run through nki.jit or nki.simulate ({kernel_line()})")
    return _current.core


def running() -> bool:
    """Whether the calling thread runs a kernel."""
    return _current.core is not None


def enter(core: Core | None) -> None:
    """Make a core the calling thread's, or none."""
    _current.core = core
