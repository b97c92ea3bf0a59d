"""Random numbers.

The engines' sequences are not documented: numpy's generator stands in, seeded from what the kernel gives.
"""

import numpy as np

import nki._dtypes as dt
from nki._machine import machine
from nki._tensor import NkiTensor
from nki.isa._access import Array, broadcast_f32, demand, listed, unknown, values, write
from nki.isa._enums import engine as Engine
from nki.isa._instruction import instruction
from nki.isa._operands import FLOATS, SBUF_ONLY, Spec, result, scalar_or_vector, tile

_INTEGERS = (dt.int8, dt.int16, dt.int32, dt.uint8, dt.uint16, dt.uint32)
_UNIFORM = (dt.float8_e4m3, dt.float8_e5m2, dt.float16, dt.bfloat16, dt.float32, dt.tfloat32, *_INTEGERS)
_STATE_ELEMENTS = {Engine.gpsimd: 6, Engine.vector: 24}


def _generator(engine: Engine) -> np.random.Generator:
    core = machine()
    kept = core.lanes.setdefault(f"random {engine.name}", np.random.default_rng(core.core))
    assert isinstance(kept, np.random.Generator)
    return kept


def _seed(engine: Engine, seeds: Array) -> None:
    words = [int(word) for word in seeds.astype(np.int64).reshape(-1) & 0xFFFFFFFF]
    machine().lanes[f"random {engine.name}"] = np.random.default_rng(words)


def _check_engine(engine: Engine, allowed: tuple[Engine, ...]) -> None:
    demand(engine in allowed, "engine", "be " + listed(allowed) + f" on generation {machine().generation}", engine)


@instruction(Spec({"dst": result(dtypes=_INTEGERS)}, engines=(Engine.vector, Engine.gpsimd)))
def rng(dst: NkiTensor, engine: Engine = Engine.vector, name: str | None = None) -> None:
    """dst = the low bits of 32 random bits per element (nki.isa.rng, SDK 2.32 API reference)."""
    _check_engine(engine, (Engine.vector,) if machine().generation < 3 else (Engine.vector, Engine.gpsimd))
    drawn = _generator(engine).integers(0, 2**32, (dst.partitions, dst.free), np.uint32)
    write(dst, drawn.astype(f"uint{dst.dtype.itemsize * 8}").view(dst.dtype.numpy))


@instruction(
    Spec(
        {"dst": result(dtypes=_UNIFORM), "min": scalar_or_vector(), "max": scalar_or_vector()},
        partitions=("dst",),
        since=4,
    )
)
def rand2(dst: NkiTensor, min: float | NkiTensor, max: float | NkiTensor, name: str | None = None) -> None:
    """dst = uniform numbers in [min, max] (nki.isa.rand2, SDK 2.32 API reference)."""
    low, high = broadcast_f32("min", min), broadcast_f32("max", max)
    demand(bool((low < high).all()), "min", "be less than max", min)
    drawn = _generator(Engine.vector).random((dst.partitions, dst.free), np.float32)
    write(dst, low + drawn * (high - low))


@instruction(Spec({"src_seeds": tile(dtypes=(dt.int32, dt.uint32, dt.float32), free=(1, 1))}))
def set_rng_seed(src_seeds: NkiTensor, name: str | None = None) -> None:
    """Seed the Vector engine's generator with a (1, 1) tensor (nki.isa.set_rng_seed, SDK 2.32 API reference)."""
    demand(src_seeds.shape == (1, 1), "src_seeds", "have the shape (1, 1)", src_seeds.shape)
    _seed(Engine.vector, values("src_seeds", src_seeds).view(np.uint32))


def _check_state(operand: str, state: NkiTensor, engine: Engine) -> None:
    _check_engine(engine, (Engine.gpsimd,) if machine().generation < 4 else (Engine.gpsimd, Engine.vector))
    count = _STATE_ELEMENTS[engine]
    demand(state.free == count, operand, f"have {count} elements per partition on {engine}", state.shape)


@instruction(
    Spec(
        {"src_seeds": tile(dtypes=(dt.uint32,), memories=SBUF_ONLY, rank=2)},
        engines=(Engine.gpsimd, Engine.vector),
        since=3,
    )
)
def rand_set_state(src_seeds: NkiTensor, engine: Engine = Engine.gpsimd, name: str | None = None) -> None:
    """Seed an engine's generators, 6 (GpSimd) or 24 (Vector) words a lane (nki.isa.rand_set_state, SDK 2.32)."""
    _check_state("src_seeds", src_seeds, engine)
    _seed(engine, values("src_seeds", src_seeds))


@instruction(Spec({"dst": result(dtypes=(dt.uint32,), rank=2)}, engines=(Engine.gpsimd, Engine.vector), since=3))
def rand_get_state(dst: NkiTensor, engine: Engine = Engine.gpsimd, name: str | None = None) -> None:
    """dst = the state of an engine's generators (nki.isa.rand_get_state, SDK 2.32 API reference)."""
    _check_state("dst", dst, engine)
    unknown("the algorithm that advances the generators' states")


@instruction(
    Spec(
        {"dst": result(), "data": tile(), "prob": scalar_or_vector(dtypes=FLOATS)},
        equal=("dst", "data"),
        same_dtype=("data", "dst"),
    )
)
def dropout(dst: NkiTensor, data: NkiTensor, prob: float | NkiTensor, name: str | None = None) -> None:
    """dst = data, or 0 with probability prob; nothing is rescaled (nki.isa.dropout, SDK 2.32 API reference)."""
    if isinstance(prob, NkiTensor) and data.dtype.is_int:
        demand(prob.dtype is dt.float32, "prob", "be nl.float32 with integer data", prob.dtype)
    chance = broadcast_f32("prob", prob)
    demand(bool(((chance >= 0) & (chance <= 1)).all()), "prob", "be a probability", chance.ravel()[0])
    dropped = _generator(Engine.vector).random((data.partitions, data.free), np.float32) < chance
    kept = values("data", data)
    write(dst, np.where(dropped, np.zeros((), kept.dtype), kept))
