"""Random numbers: ranges, dtypes and seeds, which is all that the documents say of them (SDK 2.32)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Result, random, rejected, rejects, run, same, strict_only

SEED = np.array([[1234]], np.uint32)
SEEDED = "nisa.set_rng_seed(src_seeds=s)\n"
BITS = SEEDED + "nisa.rng(dst=dst, engine=nisa.engine.vector)"
DROPOUT = SEEDED + "nisa.dropout(dst=dst, data=a, prob={prob})"
UNIFORM = SEEDED + "nisa.rand2(dst=dst, min={low}, max={high})"


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32"])
def test_bits(dtype: str) -> None:
    """All bits of the dtype are used, and a seed repeats them."""
    first = run(BITS, s=SEED, dst=Result((16, 200), dtype))
    same(run(BITS, s=SEED, dst=Result((16, 200), dtype)), first)
    ones = np.unpackbits(first.view(np.uint8)).mean()
    assert 0.47 < ones < 0.53
    assert (run(BITS, s=SEED + np.uint32(1), dst=Result((16, 200), dtype)) != first).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("low", "high"), [("-2.0", "3.0"), ("lo", "hi")])
def test_uniform(dtype: str, low: str, high: str) -> None:
    column = np.linspace(0, 10, 16, dtype=np.float32)[:, None]
    tiles: dict[str, Any] = {"s": SEED, "lo": column, "hi": column + 2, "dst": Result((16, 400), dtype)}
    got = run(UNIFORM.format(low=low, high=high), generation="trn3", **tiles).astype(np.float32)
    least, most = (column, column + 2) if low == "lo" else (-2.0, 3.0)
    assert (got >= np.float32(least)).all() if low != "lo" else (got >= least * 0.99).all()
    assert (got <= np.asarray(most) * 1.01).all()
    middle = (got - least).mean() / np.mean(np.asarray(most) - least)
    assert 0.45 < middle < 0.55


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("prob", ["0.0", "0.25", "1.0", "p"])
def test_dropout(dtype: str, prob: str) -> None:
    """What is kept is not scaled."""
    a = random(16, 400, dtype=dtype)
    a[a == 0] = 1
    chance = np.linspace(0, 1, 16, dtype=np.float32)[:, None]
    got = run(DROPOUT.format(prob=prob), a=a, p=chance, s=SEED, dst=Result(a.shape, dtype))
    kept = got != 0
    same(np.where(kept, got, a), a)
    wanted = 1 - (chance if prob == "p" else np.full((16, 1), float(prob), np.float32))
    assert (np.abs(kept.mean(1, keepdims=True) - wanted) < 0.12).all()


A = random(4, 8)
BASE: dict[str, Any] = {"a": A, "s": SEED, "dst": Result((4, 8))}
INT: dict[str, Any] = {"s": SEED, "dst": Result((4, 8), "uint32")}
STATE = "nisa.rand_set_state(src_seeds=t, engine=nisa.engine.gpsimd)\nnisa.tensor_copy(dst=dst, src=a)"
SIX = {**BASE, "t": np.ones((4, 6), np.uint32)}
UP_TO_1 = UNIFORM.format(low=0.0, high=1.0)
BY_GPSIMD = BITS.replace("vector", "gpsimd")
TRN3 = {**BASE, "generation": "trn3"}
IN_PSUM = {"dst": Result((4, 8), "uint32", "psum")}
STRICT = [
    rejected("rng", "dst", "int|dtype", {"dst": Result((4, 8))}, BITS, **INT),
    rejected("rng", "engine", "", ("engine.vector", "engine.scalar"), BITS, **INT),
    rejected("rng", "engine|dst", "", {"generation": "trn1"}, BY_GPSIMD, **INT),
    rejected("rng", "engine|dst", "PSUM|SBUF", IN_PSUM, BY_GPSIMD, **INT),
    rejected("set_rng_seed", "src_seeds", "1", {"s": np.ones((1, 2), np.uint32)}, BITS, **INT),
    rejected("rand2", ".*", "trn3|v4|generation", {"generation": "trn2"}, UP_TO_1, **TRN3),
    rejected("rand2", "min|max", "", ("max=1.0", "max=0.0"), UP_TO_1, **TRN3),
    rejected("dropout", "prob", "", ("prob=0.5", "prob=1.5"), DROPOUT.format(prob=0.5), **BASE),
    rejected("dropout", "dst|data", "dtype", {"dst": Result((4, 8), "bfloat16")}, DROPOUT.format(prob=0.5), **BASE),
    rejected("dropout", "dst|data", "", {"dst": Result((4, 7))}, DROPOUT.format(prob=0.5), **BASE),
    rejected("rand_set_state", "src_seeds", "6", {"t": np.ones((4, 24), np.uint32)}, STATE, **SIX),
    rejected("rand_set_state", "src_seeds", "uint32", {"t": np.ones((4, 6), np.int32)}, STATE, **SIX),
    rejected("rand_set_state", "engine|src_seeds", "", ("engine.gpsimd", "engine.vector"), STATE, **SIX),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT)
def test_strict(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body, instruction, operand, rule, but, **setup)


@strict_only
def test_the_state_cannot_be_read() -> None:
    """No document gives the algorithm, so a state that was read would be made up."""
    body = "nisa.rand_get_state(dst=dst, engine=nisa.engine.gpsimd)"
    with pytest.raises(NotImplementedError, match="rand_get_state"):
        run(body, dst=Result((4, 6), "uint32"))
