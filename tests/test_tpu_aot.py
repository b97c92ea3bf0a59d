"""The gate on compiled programs: it tells a kernel from dense attention, a shared buffer from a copy, and a refusal."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

from torch_paged.backends.tpu import aot, decode, varlen
from torch_paged.backends.tpu.block_sizes import CHIPS

B, KH, G, D, S, M = 4, 2, 4, 128, 16, 8
CACHE_BYTES = 2 * B * M * KH * S * D * 2


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


SIDE = shape(KH, B * M, S, D)
ATTENTION = (shape(B, KH * G, D), SIDE, SIDE, shape(B, dtype=jnp.int32), shape(B, M, dtype=jnp.int32))


def dense(query: Any, keys: Any, values: Any, lengths: Any, table: Any) -> Any:
    keys, values = (x[:, table].reshape(KH, B, M * S, D) for x in (keys, values))
    logits = jnp.einsum("bkgd,kbtd->bkgt", query.reshape(B, KH, G, D), keys)
    logits = jnp.where(jnp.arange(M * S) < lengths[:, None, None, None], logits, -1e9)
    return jnp.einsum("bkgt,kbtd->bkgd", jax.nn.softmax(logits), values)


def program(chip: str, function: Any, arguments: Any, **options: Any) -> aot.Program:
    return aot.compile_for(chip, aot.export_for(chip, function, arguments, **options))


@pytest.mark.parametrize("chip", aot.chips())
def test_a_kernel_is_seen_as_one(chip: str) -> None:
    found = program(chip, partial(paged_attention, pages_per_compute_block=4), ATTENTION)
    assert len(found.kernels) == 1
    assert all(operation.opcode in ("copy-start", "copy-done") for operation in found.whole(CACHE_BYTES // 2))
    assert found.argument_bytes >= CACHE_BYTES


def test_dense_attention_is_told_apart() -> None:
    found = program("v5e", dense, ATTENTION)
    assert found.kernels == ()
    assert "gather" in {operation.opcode for operation in found.whole(CACHE_BYTES // 2)}
    assert {"convolution", "dot"} & {operation.opcode for operation in found.operations()}


def test_a_donated_cache_is_updated_in_place_and_another_is_copied() -> None:
    def write(cache: Any, row: Any) -> Any:
        return cache.at[3].set(row)

    arguments = (shape(2 * B * M * KH * S, D), shape(D))
    donated = program("v6e", write, arguments, donate=(0,))
    kept = program("v6e", write, arguments)
    assert donated.alias_bytes == CACHE_BYTES
    assert kept.alias_bytes == 0
    copies = {"copy", "copy-start", "copy-done"}
    assert copies & {operation.opcode for operation in kept.whole(CACHE_BYTES)}
    assert not copies & {operation.opcode for operation in donated.whole(CACHE_BYTES)}


def test_what_the_compiler_refuses_raises_its_words() -> None:
    def kernel(x: Any, out: Any) -> None:
        out[...] = jnp.zeros_like(out) + x[0, 0]

    def too_big(x: Any) -> Any:
        return pl.pallas_call(kernel, out_shape=shape(2**16, 2**10, dtype=jnp.float32))(x)

    with pytest.raises(aot.Refused, match="vmem"):
        program("v5e", too_big, (shape(8, 128, dtype=jnp.float32),))


def test_sides_of_a_cache_that_are_far_apart() -> None:
    cache = shape(2, 2**11, 8, 128, 256, dtype=jnp.float32)
    arguments = (shape(4, 8, 256, dtype=jnp.float32), cache, shape(4, 2, dtype=jnp.int32), shape(4, dtype=jnp.int32))
    attend = partial(decode.paged_attention, softmax_scale=0.1, chip=CHIPS["v5e"])
    assert len(program("v5e", attend, arguments).kernels) == 1


def test_statistics_of_three_kv_heads() -> None:
    cache = shape(2, 64, 3, 16, 128)
    integers = [shape(*sizes, dtype=jnp.int32) for sizes in ((3,), (2, 8), (2,))]
    attend = partial(
        varlen.flash_attn_varlen, key=None, value=None, cu_seqlens_k=None, max_seqlen_q=64, max_seqlen_k=64
    )
    attend = partial(attend, softmax_scale=0.1, stats=True, chip=CHIPS["v5e"])

    def call(query: Any, lengths: Any, cache: Any, tables: Any, context_lens: Any) -> Any:
        return attend(query, cu_seqlens_q=lengths, kv_cache=cache, block_tables=tables, context_lens=context_lens)

    assert len(program("v5e", call, (shape(70, 12, 128), integers[0], cache, *integers[1:])).kernels) == 2
