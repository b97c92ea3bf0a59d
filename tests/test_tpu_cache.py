"""What the chips' compiler makes of the cache ops: the cache stays where it is, and no program copies it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct as Array
from jax.experimental.pallas import tpu as pltpu

from torch_paged.backends.tpu import aot, cache, cache_tiles
from torch_paged.backends.tpu.bridge_interpret import no_races

NUM_BLOCKS, TOKENS, PAIRS = 1024, 32, 8
STORED = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
FEW_BYTES = 2**19
"""Temporaries that have nothing to do with the size of the cache."""


def call(
    op: str,
    stored: str,
    kv_heads: int,
    block_size: int,
    stored_dim: int = 128,
    tokens: int = TOKENS,
    num_blocks: int = NUM_BLOCKS,
    with_scales: bool = False,
) -> tuple[Any, list[Any], tuple[int, ...]]:
    """Return a function, its arguments, and the arguments that it writes.

    Blocks are copied with their scales on demand: of such programs for v6e jaxlib cannot read the text.
    """
    quantised = stored not in ("float32", "bfloat16")
    kv_cache = Array((2, num_blocks, kv_heads, block_size, stored_dim), stored)
    scales = Array(kv_cache.shape[:-1], "float32")
    rows = Array((tokens, kv_heads, stored_dim - 48), "bfloat16" if quantised else stored)
    slots, pairs = Array((tokens,), "int32"), Array((PAIRS,), "int32")
    if op == "copy_blocks":
        arguments = [kv_cache, pairs, pairs, *([scales] if with_scales else [])]
        return cache.copy_blocks, arguments, (0, 3) if with_scales else (0,)
    if op == "quantize_and_cache":
        return cache.quantize_and_cache, [rows, rows, kv_cache, scales, slots], (2, 3)
    per_head = [Array((2, kv_heads), "float32")] if quantised else []
    return cache.reshape_and_cache, [rows, rows, kv_cache, slots, *per_head], (2,)


CALLS = [
    (op, stored)
    for op in ("reshape_and_cache", "quantize_and_cache", "copy_blocks")
    for stored in (STORED[2:] if op == "quantize_and_cache" else STORED)
]


@pytest.mark.parametrize(
    ("op", "stored", "kv_heads"), [*((*each, 8) for each in CALLS), (*CALLS[1], 1), (*CALLS[2], 1)]
)
def test_nothing_of_the_caches_size_is_made(op: str, stored: str, kv_heads: int) -> None:
    function, arguments, written = call(op, stored, kv_heads, 16)
    program = aot.compile_for("v6e", aot.export_for("v6e", function, arguments, donate=written))
    sizes = [arguments[i].size * arguments[i].dtype.itemsize for i in written]
    assert program.alias_bytes == sum(sizes)
    assert program.temp_bytes < FEW_BYTES
    # A fusion that does not write in place has a temporary of the cache's size, or shares no memory with its argument.
    made = [operation for operation in program.whole(sizes[0]) if operation.opcode not in ("fusion", "scatter")]
    assert not made, made


@pytest.mark.parametrize(
    ("chip", "stored", "kv_heads", "block_size"),
    [("v6e", "int8", 2, 8), ("v6e", "float8_e4m3fn", 8, 16), ("v5p", "float8_e5m2", 2, 8)],
)
def test_scales_of_tokens_are_copied_where_they_are(chip: str, stored: str, kv_heads: int, block_size: int) -> None:
    """More of them than VMEM holds, which XLA would lay out anew to take whole blocks."""
    num_blocks = 2**24 // kv_heads // block_size
    function, arguments, written = call(
        "copy_blocks", stored, kv_heads, block_size, num_blocks=num_blocks, with_scales=True
    )
    program = aot.compile_for(chip, aot.export_for(chip, function, arguments, donate=written))
    sizes = [arguments[i].size * arguments[i].dtype.itemsize for i in written]
    assert program.alias_bytes == sum(sizes)
    assert program.temp_bytes < FEW_BYTES


@pytest.mark.parametrize(
    ("op", "stored", "block_size"),
    [(*CALLS[2], 32), (*CALLS[5], 128), (*CALLS[7], 64), (*CALLS[10], 64), (*CALLS[11], 32)],
)
@pytest.mark.parametrize("chip", ["v4", "v6e"])
def test_wide_rows_of_8_bits_are_written_by_a_kernel_that_leaves_the_cache(
    chip: str, op: str, stored: str, block_size: int
) -> None:
    function, arguments, written = call(op, stored, 8, block_size, stored_dim=256, num_blocks=2048)
    program = aot.compile_for(chip, aot.export_for(chip, function, arguments, donate=written))
    sizes = [arguments[i].size * arguments[i].dtype.itemsize for i in written]
    assert program.alias_bytes == sum(sizes)
    assert program.temp_bytes < sizes[0] // 16
    assert len(program.kernels) == 1
    assert not program.whole(sizes[0])


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_many_tokens_are_written_without_a_copy(stored: str) -> None:
    op = "reshape_and_cache" if stored == "bfloat16" else "quantize_and_cache"
    function, arguments, written = call(op, stored, 8, 16, tokens=300)
    program = aot.compile_for("v6e", aot.export_for("v6e", function, arguments, donate=written))
    sizes = [arguments[i].size * arguments[i].dtype.itemsize for i in written]
    assert program.alias_bytes == sum(sizes)
    copies = [x for x in program.whole(sizes[-1]) if x.opcode in ("copy", "reshape", "transpose")]
    assert not copies, copies


ORDERS = [
    (32, 2, [5, 37, -1, 96, 5, 95, 6, 33, 2**31 - 1, 4, 64, -7, 37, 5]),
    (128, 1, [127, 31, 32, 383, 31]),
    (8, 3, [0, 8, 7, 16, 23, 1, 24, 9, 0]),
]
"""S, KH and slots."""


@pytest.mark.parametrize(
    ("stored", "block_size", "kv_heads", "slots"),
    [*((stored, *ORDERS[0]) for stored in STORED), ("int8", *ORDERS[1]), ("bfloat16", *ORDERS[2])],
)
def test_the_kernel_writes_rows_in_their_order(stored: str, block_size: int, kv_heads: int, slots: list[int]) -> None:
    generator = np.random.default_rng(0)
    old = generator.standard_normal((2, 3, kv_heads, block_size, 256)) * 20
    new = generator.standard_normal((2, len(slots), kv_heads, 256)) * 20
    kv_cache, rows = jnp.asarray(old, stored), jnp.asarray(new, stored)
    expected = np.asarray(kv_cache).copy()
    for token, slot in enumerate(slots):
        if 0 <= slot < 3 * block_size:
            expected[:, slot // block_size, :, slot % block_size] = np.asarray(rows)[:, token]
    simulated = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True)
    for interpret in (True, simulated):
        with no_races("write_rows"):
            written = cache_tiles.write_rows(kv_cache, rows, jnp.asarray(slots, jnp.int32), interpret)
            jax.block_until_ready(written)
        np.testing.assert_array_equal(np.asarray(written).astype(np.float32), expected.astype(np.float32))


def test_the_kernel_copies_blocks_as_they_were() -> None:
    generator = np.random.default_rng(0)
    kv_cache = jnp.asarray(generator.integers(-128, 128, (2, 5, 2, 32, 256)), jnp.int8)
    src, dst = (jnp.asarray(ids, jnp.int32) for ids in ([0, 1, 2, 0, 9, 3], [1, 2, -1, 4, 0, 7]))
    expected = np.asarray(kv_cache)[:, [0, 0, 1, 3, 0]]
    simulated = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True)
    for interpret in (True, simulated):
        with no_races("copy_blocks"):
            copied = cache.copy_blocks(kv_cache, src, dst, interpret=interpret)
            jax.block_until_ready(copied)
        np.testing.assert_array_equal(np.asarray(copied), expected)


@pytest.mark.parametrize("tokens", [1, 31, 70])
def test_parts_of_a_write_are_the_whole_of_it(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    generator = np.random.default_rng(0)
    key, value = (jnp.asarray(generator.standard_normal((tokens, 2, 100)), jnp.float32) for _ in range(2))
    slots = jnp.asarray(generator.permutation(160)[:tokens] - 8, jnp.int32)
    kv_cache, scales = jnp.zeros((2, 10, 2, 16, 128), jnp.int8), jnp.zeros((2, 10, 2, 16))
    whole = cache.quantize_and_cache(key, value, kv_cache, scales, slots)
    monkeypatch.setattr(cache, "_SCATTERED_ROWS", 64)
    monkeypatch.setattr(cache, "_SCATTERED_SCALES", 20)
    parts = cache.quantize_and_cache(key, value, kv_cache, scales, slots)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


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
