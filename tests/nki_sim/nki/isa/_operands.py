"""What the documents say of an instruction's operands, as a table: memories, dtypes, sizes, engines, generations.

Common rules: SDK 2.32 API reference, architecture guides of trn1 / trn2 / trn3; rank limits: SDK 2.33 API reference.
Where no rank limit is documented: 5 dimensions with one tensor input, 4 with two or with accumulator registers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import nki._dtypes as dt
from nki._dtypes import DType
from nki._machine import machine
from nki._memory import Buffer, psum, sbuf
from nki._tensor import NkiTensor
from nki.isa._access import (
    check_pattern,
    check_start_partition,
    demand,
    in_psum,
    index_of,
    is_number,
    listed,
    reject,
)
from nki.isa._enums import engine

ON_CHIP = (sbuf, psum)
SBUF_ONLY = (sbuf,)
PSUM_ONLY = (psum,)

FLOAT8 = (dt.float8_e4m3, dt.float8_e4m3fn, dt.float8_e5m2)
FLOATS = (dt.float32, dt.tfloat32, dt.bfloat16, dt.float16, *FLOAT8)
INTS = (dt.uint8, dt.int8, dt.uint16, dt.int16, dt.uint32, dt.int32, dt.bool_)
NUMBERS = (*FLOATS, *INTS)
INT32 = (dt.int32, dt.uint32)
MX_PACKED = (dt.float8_e5m2_x4, dt.float8_e4m3fn_x4, dt.float4_e2m1fn_x4)
MX_SCALES = (dt.float8_e8m0fnu, dt.uint8)
ANY = (*NUMBERS, dt.float8_e8m0fnu, *MX_PACKED)
F32_ONLY = (dt.float32,)

MAX_RANK = 5
MAX_RANK_TWO_INPUTS = 4


@dataclass(frozen=True)
class Tile:
    """The rules of one tensor operand.

    dtypes: which it may have. free: least and most elements per partition. rank: most dimensions, partition included
    (None: by the number of inputs). vector: one element per partition, with the partitions of the instruction.
    scalar: a Python number may stand in its place. optional: None may. written: the instruction writes it. indirect: a
    gather or scatter view may be passed (generation 4). any_start: the start partition has rules of its own.
    """

    dtypes: tuple[DType, ...] = NUMBERS
    memories: tuple[Buffer, ...] = ON_CHIP
    free: tuple[int, int] = (1, 2**16)
    rank: int | None = None
    vector: bool = False
    scalar: bool = False
    optional: bool = False
    written: bool = False
    indirect: bool = False
    any_start: bool = False

    def check(self, operand: str, value: Any, most_dimensions: int) -> None:
        """Fail where the value breaks a rule of this operand alone."""
        if value is None and self.optional:
            return
        if not isinstance(value, NkiTensor):
            kinds = (
                "be a tensor" + (" or a Python number" if self.scalar else "") + (" or None" if self.optional else "")
            )
            demand(self.scalar and is_number(value), operand, kinds, repr(value))
            return
        if value.buffer not in self.memories:
            reject(operand, "be in " + listed(self.memories), value.buffer)
        if value.dtype not in self.dtypes:
            reject(operand, "have a dtype among " + listed(self.dtypes), value.dtype)
        demand(value.ndim <= most_dimensions, operand, f"have at most {most_dimensions} dimensions", value.shape)
        least, most = (1, 1) if self.vector else self.free
        span = f"{least}" if least == most else f"{least} to {most}"
        demand(least <= value.free <= most, operand, f"have {span} element(s) per partition", value.free)
        check_pattern(operand, value)
        if not self.any_start:
            check_start_partition(operand, value, value.partitions)
        demand(self.indirect or not value.is_indirect(), operand, "not be an indirect view", "one")


def tile(*, dtypes: tuple[DType, ...] = NUMBERS, memories: tuple[Buffer, ...] = ON_CHIP, **rules: Any) -> Tile:
    """A tensor that the instruction reads."""
    return Tile(dtypes, memories, **rules)


def result(*, dtypes: tuple[DType, ...] = NUMBERS, memories: tuple[Buffer, ...] = ON_CHIP, **rules: Any) -> Tile:
    """A tensor that the instruction writes."""
    return Tile(dtypes, memories, written=True, **rules)


def vector(*, dtypes: tuple[DType, ...] = F32_ONLY, memories: tuple[Buffer, ...] = ON_CHIP, **rules: Any) -> Tile:
    """A tensor of one element per partition that the instruction broadcasts along the free dimensions."""
    return Tile(dtypes, memories, vector=True, **rules)


def scalar_or_vector(*, dtypes: tuple[DType, ...] = F32_ONLY, **rules: Any) -> Tile:
    """A Python number, or a tensor of one element per partition."""
    return vector(dtypes=dtypes, scalar=True, **rules)


Choice = Callable[[Mapping[str, Any]], engine]


@dataclass(frozen=True)
class Spec:
    """The table of one instruction.

    operands: rules of each tensor operand. engines: those that can run it, the compiler's choice first (`choose`
    decides where that depends on the operands). equal: operands with equal partitions and elements per partition.
    partitions: operands with equal partitions. one_in_psum: inputs of which only one may be in PSUM. same_dtype:
    operands of one dtype. since: first generation. accumulates: folds into accumulator registers. work: elements per
    partition that the engine streams, where it is not the largest operand's.
    """

    operands: Mapping[str, Tile]
    engines: tuple[engine, ...] = (engine.vector,)
    choose: Choice | None = None
    equal: tuple[str, ...] = ()
    partitions: tuple[str, ...] = ()
    one_in_psum: tuple[str, ...] = ()
    same_dtype: tuple[str, ...] = ()
    since: int = 2
    accumulates: bool = False
    work: Callable[[Mapping[str, Any]], int] | None = None
    most_dimensions: int = field(init=False)

    def __post_init__(self) -> None:
        inputs = [rules for rules in self.operands.values() if not (rules.written or rules.vector)]
        most = MAX_RANK_TWO_INPUTS if len(inputs) > 1 or self.accumulates else MAX_RANK
        object.__setattr__(self, "most_dimensions", most)

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Fail where the arguments break the table."""
        generation = machine().generation
        demand(generation >= self.since, "instruction", f"run on generation {self.since} or later", generation)
        for operand, rules in self.operands.items():
            rules.check(operand, arguments[operand], rules.rank or self.most_dimensions)
        self._check_counts(arguments)
        self._check_indices(arguments)
        if len([name for name in self.one_in_psum if in_psum(arguments[name])]) > 1:
            reject(" and ".join(self.one_in_psum), "not both be in PSUM", "both")
        for name in self.same_dtype[1:]:
            first, value = arguments[self.same_dtype[0]], arguments[name]
            if isinstance(value, NkiTensor) and value.dtype is not first.dtype:
                reject(name, f"have the dtype of {self.same_dtype[0]} ({first.dtype})", value.dtype)

    def _check_counts(self, arguments: Mapping[str, Any]) -> None:
        vectors = [name for name, rules in self.operands.items() if rules.vector]
        lanes = (*self.equal, *self.partitions, *(vectors if self.equal or self.partitions else ()))
        for name in lanes[1:]:
            value, first = arguments[name], arguments[lanes[0]]
            if isinstance(value, NkiTensor) and value.partitions != first.partitions:
                reject(name, f"have the {first.partitions} partitions of {lanes[0]}", value.shape)
        for name in self.equal[1:]:
            value, first = arguments[name], arguments[self.equal[0]]
            if isinstance(value, NkiTensor) and value.free != first.free:
                reject(name, f"have the {first.free} elements per partition of {self.equal[0]}", value.shape)

    def _check_indices(self, arguments: Mapping[str, Any]) -> None:
        """Where indices of indirect views start: in a quadrant, with their operand or with the input of the result."""
        names = [name for name, rules in self.operands.items() if rules.indirect]
        inputs = [arguments[name] for name in names if not self.operands[name].written]
        for name in names:
            value = arguments[name]
            index = index_of(value)
            if index is None:
                continue
            start = index.start_partition
            demand(start % 32 == 0, f"index of {name}", "start at a multiple of 32 partitions", start)
            if not self.operands[name].written:
                expected = value.start_partition
            else:
                first = index_of(inputs[0]) if in_psum(inputs[0]) else inputs[0]
                expected = start if first is None else first.start_partition
            demand(start == expected, f"index of {name}", f"start at partition {expected}", start)

    def pick_engine(self, arguments: Mapping[str, Any]) -> engine:
        """The engine that runs the instruction: the one asked for, or the compiler's choice."""
        asked = arguments.get("engine", engine.unknown)
        tensors = {name: arguments[name] for name in self.operands if isinstance(arguments[name], NkiTensor)}
        psum_names = [name for name, value in tensors.items() if in_psum(value)]
        if asked is engine.unknown:
            if self.choose:
                return self.choose(arguments)
            return next(e for e in self.engines if not (psum_names and e is engine.gpsimd and len(self.engines) > 1))
        if asked not in self.engines:
            reject("engine", "be " + " or ".join(f"engine.{e.name}" for e in self.engines), asked)
        if asked is engine.gpsimd and psum_names:
            reject(psum_names[0], "be in nl.sbuf on the GpSimd engine", "nl.psum")
        return asked
