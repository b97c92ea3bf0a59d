"""What the chips' compiler makes of the cache ops: the cache stays where it is, and no program copies it."""

from typing import Any

import jax
import numpy as np
import pytest
from jax import ShapeDtypeStruct as Array

from torch_paged.backends.tpu import aot, cache

NUM_BLOCKS, TOKENS, PAIRS = 1024, 32, 8
STORED = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
FEW_BYTES = 2**19
"""Temporaries that have nothing to do with the size of the cache."""


def call(op: str, stored: str, kv_heads: int, block_size: int) -> tuple[Any, list[Any], tuple[int, ...]]:
    """Return a function, its arguments, and the arguments that it writes."""
    quantised = stored not in ("float32", "bfloat16")
    kv_cache = Array((2, NUM_BLOCKS, kv_heads, block_size, 128), stored)
    scales = Array(kv_cache.shape[:-1], "float32")
    rows = Array((TOKENS, kv_heads, 80), "bfloat16" if quantised else stored)
    slots, pairs = Array((TOKENS,), "int32"), Array((PAIRS,), "int32")
    if op == "copy_blocks":
        arguments = [kv_cache, pairs, pairs, *([scales] if quantised else [])]
        return cache.copy_blocks, arguments, (0, 3) if quantised else (0,)
    if op == "quantize_and_cache":
        return cache.quantize_and_cache, [rows, rows, kv_cache, scales, slots], (2, 3)
    per_head = [Array((2, kv_heads), "float32")] if quantised else []
    return cache.reshape_and_cache, [rows, rows, kv_cache, slots, *per_head], (2,)


CALLS = [
    (op, stored)
    for op in ("reshape_and_cache", "quantize_and_cache", "copy_blocks")
    for stored in (STORED[2:] if op == "quantize_and_cache" else STORED)
]


@pytest.mark.parametrize("kv_heads", [1, 8])
@pytest.mark.parametrize(("op", "stored"), CALLS)
def test_nothing_of_the_caches_size_is_made(op: str, stored: str, kv_heads: int) -> None:
    function, arguments, written = call(op, stored, kv_heads, 16)
    program = aot.compile_for("v6e", aot.export_for("v6e", function, arguments, donate=written))
    sizes = [arguments[i].size * arguments[i].dtype.itemsize for i in written]
    assert program.alias_bytes == sum(sizes)
    assert program.temp_bytes < FEW_BYTES
    # A fusion that does not write in place has a temporary of the cache's size, or shares no memory with its argument.
    made = [operation for operation in program.whole(sizes[0]) if operation.opcode not in ("fusion", "scatter")]
    assert not made, made


def test_the_check_sees_a_program_that_copies_the_cache() -> None:
    """A scatter over all five dimensions: for one kv head the compiler turns the cache around, and back."""
    kv_cache, slots = Array((2, NUM_BLOCKS, 1, 16, 128), "bfloat16"), Array((TOKENS,), "int32")

    def write(kv_cache: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
        return kv_cache.at[:, slots // 16, :, slots % 16].set(rows, mode="drop")

    arguments = [kv_cache, Array((TOKENS, 2, 1, 128), "bfloat16"), slots]
    program = aot.compile_for("v6e", aot.export_for("v6e", write, arguments, donate=(0,)))
    assert {operation.opcode for operation in program.whole(kv_cache.size * 2)} >= {"copy"}


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 1e37])
def test_division_rounds_to_nearest(scale: float) -> None:
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((500, 80)) * scale * 3).astype(np.float32)
    y = (np.abs(generator.standard_normal((500, 1))) * scale).astype(np.float32)
    for divisor in (y, np.float32(127), np.float32(448)):
        quotient = np.asarray(jax.jit(cache.divide)(x, divisor))
        np.testing.assert_array_equal(quotient, x / divisor)


def test_division_of_what_is_not_finite_and_of_zeros() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3e38], np.float32)
    quotient = np.asarray(jax.jit(cache.divide)(x, np.full(6, 0.5, np.float32)))
    np.testing.assert_array_equal(quotient, np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, np.inf], np.float32))
    assert np.signbit(quotient[4])
