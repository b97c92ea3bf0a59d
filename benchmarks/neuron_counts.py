"""What NKI kernels do on the simulator, instruction by instruction, for the model of their cost.

The instructions of ``nki.isa`` and the loops of ``nki.language`` are wrapped while a kernel runs; neither kernels nor
simulator know. The simulator's counters say which engine ran an instruction and what a DMA moved.

Every turn of a loop runs the same instructions, which the simulator checks. So a long loop need not turn: one turn of
each innermost loop may run, and count as often as the loop would turn, in this run of the kernel and in others that
differ in the number of turns alone.
"""

import functools
import importlib.util
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

if importlib.util.find_spec("nki") is None:
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "nki_sim"))
import nki.isa as nisa
import nki.language as nl
from nki import _handed
from nki._machine import Core, machine
from nki._register import VirtualRegister
from nki.language import NkiTensor
from nki.language._control import _bound

from torch_paged.backends.neuron.bridge_simulator import run
from torch_paged.backends.neuron.cost import ENGINES, Counts, Instruction
from torch_paged.backends.neuron.launch import Launch

VARIABLES = ("NEURON_PLATFORM_TARGET_OVERRIDE", "NEURON_LOGICAL_NC_CONFIG")
SIZES = ("elements", "bytes", "descriptors")
Place = tuple[Any, ...]
"""Of a loop and its parents: the body, numbers that it closes over, and how many alike came before it."""


class _Loops:
    """The loops of one core of a kernel.

    Attributes:
        place: of the loop that turns.
        begun: how many loops that are alike have begun in the present turn of each of them.
        parents: loops with a loop in them.
    """

    def __init__(self) -> None:
        self.place: Place = ()
        self.begun: list[Counter[Any]] = [Counter()]
        self.parents: set[Place] = set()

    def enter(self, body: Callable[[Any], None]) -> Place:
        """Return where the loop is that begins."""
        cells = [cell.cell_contents for cell in body.__closure__ or ()]
        name = (body.__name__, *(value for value in cells if isinstance(value, int)))
        index = self.begun[-1][name]
        self.begun[-1][name] += 1
        if self.place:
            self.parents.add(self.place)
        self.place = (*self.place, (*name, index))
        return self.place


class Recorder:
    """Counts of each core of the kernels that run in its scope.

    Attributes:
        bodies: what a turn of an innermost loop does, by core and place. A loop that is known does not turn, one that
            is not turns once. None: every loop turns.
        continued: where bodies differ in one number, as tiles of a turn, what a turn does is continued from two of
            them: for kernels whose counts grow evenly with it.
        counts: of each core.
    """

    def __init__(self, bodies: dict[Any, Counts] | None, continued: bool) -> None:
        self.bodies, self.continued = bodies, continued
        self.counts: dict[int, Counts] = {}
        self._loops: dict[int, _Loops] = {}

    @property
    def busiest(self) -> Counts:
        """The counts of the core with the most instructions."""
        return max(self.counts.values(), key=lambda counts: sum(counts.instructions.values()))

    def _alike(self, core: int, place: Place) -> Counts | None:
        """Return what a turn does by two known bodies that differ from it in the same number."""
        *parents, mine = place
        if not self.continued:
            return None
        for i in range(1, len(mine) - 1):
            found: dict[int, Counts] = {}
            for (of_core, (*others, body)), counts in (self.bodies or {}).items():
                if (of_core, others, body[:i], body[i + 1 :]) == (core, parents, mine[:i], mine[i + 1 :]):
                    found[body[i]] = counts
            if len(found) > 1:
                (low, fewer), (high, more) = sorted(found.items())[:2]
                return _continued(fewer, more, (mine[i] - low) / (high - low))
        return None

    def instruction(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return an instruction that is recorded when it runs."""
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            core = machine()
            before = {name: _work(core, name) for name in (*ENGINES, "dma")}
            result = function(*args, **kwargs)
            mine = self.counts.setdefault(core.core, Counts())
            mine.barriers += function.__name__ == "core_barrier"
            operands = {**dict(zip(names, args, strict=False)), **kwargs}
            tensors = {name: value for name, value in operands.items() if isinstance(value, NkiTensor)}
            for name, old in before.items():
                new = _work(core, name)
                if new != old:
                    work = [after - former for after, former in zip(new, old, strict=True)]
                    key = _described(function.__name__, name, tensors, *work)
                    mine.instructions[key] = mine.instructions.get(key, 0) + 1
            return result

        return run

    def loop(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a dynamic loop whose turns are recorded."""

        @functools.wraps(function)
        def run(lower: Any, upper: Any, body_fun: Callable[[Any], None], step: int = 1) -> None:
            core = machine().core
            loops = self._loops.setdefault(core, _Loops())
            outside, here = loops.place, loops.enter(body_fun)
            values = range(_bound("fori_loop", "lower", lower), _bound("fori_loop", "upper", upper), step)

            def body(i: Any) -> None:
                mine, self.counts[core] = self.counts.setdefault(core, Counts()), Counts(turns=1)
                loops.place = here
                loops.begun.append(Counter())
                body_fun(i)
                loops.begun.pop()
                if self.bodies is not None and here not in loops.parents:
                    self.bodies[core, here] = self.counts[core]
                self.counts[core] = mine.plus(self.counts[core])

            if self.bodies is None:
                function(lower, upper, body, step)
            else:
                if (core, here) not in self.bodies and (alike := self._alike(core, here)) is not None:
                    self.bodies[core, here] = alike
                shown = 0 if (core, here) in self.bodies else min(len(values), 1)
                registers = isinstance(lower, VirtualRegister) or isinstance(upper, VirtualRegister)
                bound = VirtualRegister if registers else int  # what the index is depends on it
                function(bound(values.start), bound(values.start + shown * step), body, step)
                if here in loops.parents:
                    end = values.start + max(len(values), 1) * step
                    function(bound(values.start + step), bound(end), body, step)
                else:
                    rest = self.bodies.get((core, here), Counts())
                    self.counts[core] = self.counts.setdefault(core, Counts()).plus(rest, len(values) - shown)
            loops.place = outside

        return run


@contextmanager
def recorded(bodies: dict[Any, Counts] | None = None, continued: bool = False) -> Iterator[Recorder]:
    """Record the kernels that run within; of loops whose turns are known, see ``Recorder``, no turn runs."""
    recorder = Recorder(bodies, continued)
    originals: list[tuple[Any, str, Any]] = [(nl, "fori_loop", nl.fori_loop)]
    for name in nisa.__all__:
        function = getattr(nisa, name)
        if inspect.isfunction(function) and hasattr(function, "__wrapped__"):
            originals.append((nisa, name, function))
    written = _handed.may_hand_on
    try:
        for module, name, function in originals:
            setattr(module, name, (recorder.loop if module is nl else recorder.instruction)(function))
        if bodies is not None:  # turns that do not run write no results
            _handed.may_hand_on = lambda function: True
        yield recorder
    finally:
        _handed.may_hand_on = written
        for module, name, function in originals:
            setattr(module, name, function)


class Counted(TorchDispatchMode):
    """A launch that keeps the counts of the kernels it runs; as a context, also the operations of torch around them.

    Attributes:
        sizes: bytes that each operation of torch reads and writes, views left out.
        results: of each kernel.
        bodies: what is known of the loops of each kernel, and what is learnt; None: every loop turns.
        continued: see ``Recorder``.
        kernels: name and counts of each kernel, the busiest core's, in the order in which they ran.
        launch: hand it to an op of the backend.
    """

    def __init__(
        self, generation: str, cores: int, bodies: dict[str, dict[Any, Counts]] | None, continued: bool = False
    ) -> None:
        super().__init__()
        self.kernels: list[tuple[str, Counts]] = []
        self.sizes: list[int] = []
        self.results: list[Any] = []
        self.bodies, self.continued = bodies, continued
        self.launch = Launch(generation, cores, self._run)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch, and keep its bytes."""
        result = func(*args, **(kwargs or {}))
        read, written = _storages((args, kwargs)), _storages(result)
        if not written.keys() <= read.keys() or func._schema.is_mutable:
            self.sizes.append(sum(read.values()) + sum(written.values()))
        return result

    def _run(self, kernel: Any, cores: int, *arguments: Any) -> Any:
        before = {name: os.environ.get(name) for name in VARIABLES}
        os.environ.update(dict(zip(VARIABLES, (self.launch.generation, str(cores)), strict=True)))
        try:
            bodies = None if self.bodies is None else self.bodies.setdefault(kernel.__name__, {})
            with recorded(bodies, self.continued) as recorder, _disable_current_modes():
                results = run(kernel, cores, *arguments)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.kernels.append((kernel.__name__, recorder.busiest))
        self.results.append(results if self.bodies is None else _defined(results))
        return self.results[-1]


class Replayed(Counted):
    """A launch that hands back what kernels returned before, and counts the operations of torch around them."""

    def __init__(self, before: Counted) -> None:
        super().__init__(before.launch.generation, before.launch.cores, {})
        self._before = iter(before.results)

    def _run(self, kernel: Any, cores: int, *arguments: Any) -> Any:
        return next(self._before)


def _continued(fewer: Counts, more: Counts, steps: float) -> Counts | None:
    """Return the counts so many steps from ``fewer`` on, one of which leads to ``more``; None where they tell no step.

    Instructions become more, or one of them moves more: it is then another one of its kind.
    """
    change = {key: more.instructions.get(key, 0) - fewer.instructions.get(key, 0) for key in more.instructions}
    ended = sorted(fewer.instructions.keys() - more.instructions.keys(), key=_order)
    begun = sorted(more.instructions.keys() - fewer.instructions.keys(), key=_order)
    found = {key: fewer.instructions[key] + steps * change[key] for key in fewer.instructions if key in change}
    for old, new in zip_longest(ended, begun):
        if old is None or new is None or fewer.instructions[old] != more.instructions[new]:
            return None
        sizes = {name: getattr(old, name) + steps * (getattr(new, name) - getattr(old, name)) for name in SIZES}
        key = replace(new, **{name: int(size) for name, size in sizes.items()})
        if _kind(old) != _kind(new):
            return None
        found[key] = found.get(key, 0) + fewer.instructions[old]
    turns, barriers = (a + steps * (b - a) for a, b in ((fewer.turns, more.turns), (fewer.barriers, more.barriers)))
    return None if min(found.values()) < 0 else Counts(found, turns, barriers)


def _kind(key: Instruction) -> Instruction:
    nothing: dict[str, Any] = dict.fromkeys(SIZES, 0)
    return replace(key, **nothing)


def _order(key: Instruction) -> tuple[str, tuple[int, ...]]:
    return repr(_kind(key)), tuple(getattr(key, name) for name in SIZES)


def _storages(values: Any) -> dict[int, int]:
    """Return the bytes of the tensors among some values, by where they are."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    return {x.untyped_storage().data_ptr(): x.numel() * x.element_size() for x in tensors}


def _defined(results: Any) -> Any:
    """Return zeros in place of results that some turns did not write."""
    if isinstance(results, tuple):
        return tuple(_defined(one) for one in results)
    if isinstance(results, np.ndarray):
        return np.zeros_like(results)
    return torch.zeros_like(results) if isinstance(results, torch.Tensor) else results


def _work(core: Core, engine: str) -> tuple[int, int, int]:
    work = core.counters[engine]
    return work.instructions, work.bytes, work.descriptors


def _described(
    name: str, engine: str, tensors: dict[str, NkiTensor], times: int, size: int, descriptors: int
) -> Instruction:
    """Return an instruction by its operands and by what the simulator counted of it."""
    if engine == "dma":
        by_index = any(
            x.dynamic is not None and isinstance(x.dynamic.index, NkiTensor) and x.dynamic.index.size > 1
            for x in tensors.values()
        )
        return Instruction(name, engine, bytes=size, descriptors=descriptors, gathered=by_index)
    if engine == "tensor":
        if "data" in tensors:  # a transpose, by a product with an identity matrix
            data = tensors["data"]
            return Instruction(name, engine, data.partitions, data.free, bits=_bits([data]))
        moving, stationary = tensors["moving"], tensors["stationary"]
        return Instruction(name, engine, moving.free, stationary.free, inputs=2, bits=_bits([moving, stationary]))
    widest = max(x.free for x in tensors.values())
    wide = {operand: x for operand, x in tensors.items() if x.free > 1 or widest == 1}
    return Instruction(
        name,
        engine,
        widest,
        inputs=len(wide.keys() - {"dst", "reduce_res"}),
        bits=_bits(list(wide.values())),
        in_psum=sum(x.buffer is nl.psum for x in wide.values()),
        contiguous=all(x.shape[-1] == 1 or x.strides[-1] == 1 for x in wide.values()),
        results=times,
    )


def _bits(tensors: list[NkiTensor]) -> int:
    sizes = {x.dtype.itemsize * 8 for x in tensors}
    if max(sizes) > 16 or any(x.dtype.is_int for x in tensors):
        return 32
    return min(sizes)
