"""The TPU's kernel of packed ragged queries against the reference, interpreted on the CPU."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax_arrays import to_jax, to_torch

from torch_paged.backends.tpu import pages, tiles, varlen
from torch_paged.backends.tpu.block_sizes import CHIPS, MIB, Chip
from torch_paged.backends.tpu.bridge_interpret import COMPILER_OPTIONS, no_races
from torch_paged.backends.tpu.calls import jax_call
from torch_paged.backends.tpu.varlen import flash_attn_varlen
from torch_paged.testing import AttentionCase, assert_attention, assert_same, build
from torch_paged.testing.batches import take_sequences

OP = "flash_attn_varlen"


def case(name: str, **fields: Any) -> AttentionCase:
    """Return a case of four sequences, one without queries, one longer than a block of keys."""
    shape: dict[str, Any] = {"context_lens": (37, 63, 9, 600), "query_lens": (17, 0, 1, 40), "stored_dim": 128}
    return AttentionCase(name, **{**shape, "block_size": 64, "group": 2, **fields})


def jitted(
    arguments: dict[str, Any], interpret: Any = True, chip: Chip = CHIPS["v5p"]
) -> Callable[[dict[str, Any]], tuple[torch.Tensor, ...]]:
    """Return the kernel for the options of a call, which runs it on the tensors of such a call."""
    options = jax_call(f"{OP}.with_stats", arguments).options
    function = jax.jit(
        lambda *arrays: flash_attn_varlen(*arrays, **options, chip=chip, interpret=interpret),
        compiler_options=COMPILER_OPTIONS,
    )

    def run(arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        arrays = jax_call(f"{OP}.with_stats", arguments).arrays
        with no_races(OP):
            return tuple(map(to_torch, function(*(None if array is None else to_jax(array) for array in arrays))))

    return run


@pytest.mark.parametrize(
    ("case", "copies"),
    [
        (case("both", new_lens=(17, 0, 1, 40), padding_rows=5), "on_wait"),
        (
            case(
                "everything",
                cache_dtype=torch.int8,
                scales_rank=4,
                mask="kv_heads",
                positions="shuffled",
                attention_chunk=40,
                sinks=True,
            ),
            "on_wait",
        ),
        (case("new", context_lens=None, new_lens=(37, 0, 0, 140), group=3, dtype=torch.bfloat16), "eager"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_copies_and_races(case: AttentionCase, copies: Any) -> None:
    arguments = build(case)
    simulated = pltpu.InterpretParams(dma_execution_mode=copies, detect_races=True, uninitialized_memory="nan")
    assert_attention(OP, arguments, *jitted(arguments, simulated)(arguments))


@pytest.mark.parametrize(
    "case",
    [
        case("everything", positions="anywhere", sinks=True, alibi=True, mask="heads", logits_soft_cap=5.0),
        case(
            "int8_per_token",
            cache_dtype=torch.int8,
            scales_rank=4,
            new_lens=(17, 0, 1, 40),
            mask="shared",
            sliding_window=20,
            causal=False,
            value_dim=40,
            block_size=32,
        ),
        case(
            "fp8_per_head",
            cache_dtype=torch.float8_e4m3fn,
            scales_rank=2,
            dtype=torch.bfloat16,
            attention_chunk=16,
            positions="shuffled",
        ),
    ],
    ids=lambda case: case.name,
)
def test_options_and_order(case: AttentionCase) -> None:
    arguments = build(case)
    run = jitted(arguments)
    results = run(arguments)
    assert_attention(OP, arguments, *results)
    other, rows = take_sequences(arguments, [3, 2, 1, 0])
    for name, actual, expected in zip(("out", "lse", "max_logits"), run(other), results, strict=True):
        assert_same(actual, expected[rows], name)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"query_lens": (1, 0, 1, 1)}, ["paged_attention"]),
        ({"query_lens": (1, 0, 1, 1), "positions": "shuffled"}, [OP]),
        ({"new_lens": (17, 0, 1, 40)}, [OP]),
        ({}, [OP, "paged_attention"]),
    ],
    ids=("decode", "positions", "prefill", "mixed"),
)
def test_kernels_of_a_call(fields: dict[str, Any], names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def pallas_call(*args: Any, name: str, real: Any = pl.pallas_call, **options: Any) -> Any:
        called.append(name)
        return real(*args, name=name, **options)

    monkeypatch.setattr(pl, "pallas_call", pallas_call)
    call = jax_call(OP, build(case("kinds", **fields)) | {"max_seqlen_q": max(fields.get("query_lens", (40,)))})
    arrays = [None if array is None else to_jax(array) for array in call.arrays]
    jax.eval_shape(lambda *arrays: flash_attn_varlen(*arrays, **call.options, chip=CHIPS["v5e"]), *arrays)
    assert called == names


def tiles_of(
    query_lens: tuple[int, ...], kv_lens: tuple[int, ...], *, size: int, window: int | None = None
) -> tuple[Any, list[int]]:
    """Return the fields of the tiles of causal sequences, by tile, and where the tiles of each of two cores end."""
    ends = list(itertools.accumulate(query_lens, initial=0))
    options: dict[str, Any] = {"num_tokens": ends[-1] + 3, "size": size, "causal": True, "window": window}

    def cut(begins: jax.Array, lens: jax.Array) -> tuple[jax.Array, jax.Array]:
        source = tiles.KeySource(jnp.arange(lens.size), lens, jnp.zeros_like(lens))
        found = tiles.cut(begins, [source], None, None, **options, chunk=None)
        return found.fields.reshape(-1, found.width), tiles.shares(found, 1, 2)

    fields, shares = jax.jit(cut)(jnp.array(ends), jnp.array(kv_lens))
    return np.asarray(fields)[:, tiles.TILE_FIELDS :], shares.tolist()


@pytest.mark.parametrize("window", [None, 20])
def test_tiles_read_what_their_rows_see(window: int | None) -> None:
    size, query_lens, kv_lens = 16, (40, 0, 1, 17, 3), (100, 5, 33, 17, 2)
    expected = []
    for seq, (rows, keys) in enumerate(zip(query_lens, kv_lens, strict=True)):
        for start in range(0, rows, size):
            end = keys - rows + min(start + size, rows)
            begin = 0 if window is None else max(0, keys - rows + start - (window - 1))
            expected.append([seq, begin, end])
    fields, (_, count) = tiles_of(query_lens, kv_lens, size=size, window=window)
    assert fields[: len(expected), [tiles.PAGE_ROW, tiles.BEGIN, tiles.END]].tolist() == expected
    assert count == len(expected) + 1, "and one of rows behind the last sequence"


def test_cores_share_the_work() -> None:
    tokens, size = 2048, 64
    fields, (half, end) = tiles_of((tokens,), (tokens,), size=size)
    keys = fields[:, tiles.END]
    assert keys[:half].sum() + keys[half:end].sum() == sum(range(size, tokens + 1, size))
    assert abs(keys[:half].sum() - keys[half:end].sum()) <= 4 * tokens


def test_lost_blocks_and_hidden_values() -> None:
    arguments = build(case("lost", causal=False, mask="shared", head_dim=128))
    run = jitted(arguments)
    tables, mask, cache = (arguments[name].clone() for name in ("block_tables", "attn_mask", "kv_cache"))
    expected = arguments | {"attn_mask": mask.clone()}
    expected["attn_mask"][:, 64:128] = False
    tables[3, 1] = cache.size(1)
    assert_attention(OP, expected, *run(arguments | {"block_tables": tables}))

    cache[1, tables[3, 2], :, 7, 3] = math.inf
    sees = (torch.arange(mask.size(0)) % 2 == 0) & (torch.arange(mask.size(0)) >= 18)
    mask[:, 128 + 7] = sees
    out, _, _ = run(arguments | {"kv_cache": cache, "attn_mask": mask})
    infinite = torch.zeros_like(out, dtype=torch.bool)
    infinite[sees, :, 3] = True
    assert ((out == math.inf) == infinite).all()
    assert out[~infinite].isfinite().all()

    cache[:, tables[3, 2], :, 7] = 0
    cache[0, tables[3, 2], :, 7, 3] = math.nan
    for result in run(arguments | {"kv_cache": cache, "attn_mask": mask})[:2]:
        assert result[sees].isnan().all()
        assert not result[~sees].isnan().any()


def test_long_tables_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = build(
        case(
            *("long",),
            context_lens=(37, 63, 9, 200),
            new_lens=(17, 0, 1, 40),
            cache_dtype=torch.int8,
            scales_rank=4,
            head_dim=128,
            sinks=True,
            alibi=True,
            mask="heads",
            padding_rows=5,
        )
    )
    chip = replace(CHIPS["v5p"], vmem_bytes=3 * MIB)
    words_of_tile = 16
    words = 2 * words_of_tile + 2 * (arguments["block_tables"].size(1) + words_of_tile)  # of two sequences
    monkeypatch.setattr(varlen, "SMEM_WORDS", words)
    monkeypatch.setattr(pages, "STRIDE_BYTES", 0)
    assert_attention(OP, arguments, *jitted(arguments, chip=chip)(arguments))

    monkeypatch.setattr(varlen, "SMEM_WORDS", words // 4)
    with pytest.raises(
        NotImplementedError, match=r"^flash_attn_varlen: backend 'tpu' does not support 63 query tokens"
    ):
        jitted(arguments, chip=chip)(arguments)


def test_each_of_four_kv_heads_takes_its_own_logits() -> None:
    arguments = build(case("four", num_kv_heads=4, head_dim=128))
    assert_attention(OP, arguments, *jitted(arguments)(arguments))


@pytest.mark.parametrize("scale", [1e-46, 1e-40])
def test_a_scale_below_the_range_of_float32_weighs_all_keys_alike(scale: float) -> None:
    arguments = build(case("tiny scale", softmax_scale=scale))
    assert_attention(OP, arguments, *jitted(arguments)(arguments))


def test_no_sequences_and_a_mask_without_columns() -> None:
    arguments = build(case("nobody", mask="shared", sinks=True))
    lengths = arguments["cu_seqlens_q"]
    for changed in (
        {"attn_mask": arguments["attn_mask"][:, :0]},
        {"cu_seqlens_q": lengths[:1], "context_lens": lengths[:0], "block_tables": arguments["block_tables"][:0]},
    ):
        changed = arguments | changed
        out, lse, max_logits = jitted(changed)(changed)
        assert not out.any()
        real = torch.arange(out.size(0)) < changed["cu_seqlens_q"][-1]
        assert torch.equal(lse, torch.where(real[:, None], arguments["sinks"], -torch.inf))
        assert (max_logits == -torch.inf).all()


def test_keys_behind_the_columns_of_a_mask_are_not_seen() -> None:
    arguments = build(
        case("long", context_lens=(4200,), query_lens=(2,), block_size=128, mask="shared", num_kv_heads=1)
    )
    arguments["attn_mask"] = arguments["attn_mask"][:, :200].contiguous()
    assert_attention(OP, arguments, *jitted(arguments)(arguments))
