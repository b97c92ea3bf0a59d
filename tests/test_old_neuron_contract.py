"""The old kernels' contract, restated, against attention written out a row at a time and against this project's op."""

import math

import numpy as np
import pytest
import torch
from old_neuron_contract import MASKED, PUBLISHED, Array, Case, attention, draw, padded, plan, reorder, write_new_tokens

from torch_paged.contract import reference

QUERY_LENS, CONTEXT_LENS = (3, 1, 5, 2), (37, 16, 0, 5)
BLOCK, HEADS, KEY_HEADS, DIM = 16, 4, 2, 8
ROWS = sum(QUERY_LENS)
PADDED = 128


def batch() -> tuple[Array, Array, Array, Array, Array]:
    """Return query, key, value of padded tokens, the cache and the block tables; the first block belongs to nobody."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, HEADS, DIM, PADDED))
    key = rng.standard_normal((1, KEY_HEADS, DIM, PADDED))
    value = rng.standard_normal((1, KEY_HEADS, PADDED, DIM))
    cache = rng.standard_normal((2, 20, KEY_HEADS, BLOCK, DIM))
    tables = rng.permutation(np.arange(1, 20))[:16].reshape(4, 4).astype(np.int32)
    return query, key, value, cache, tables


def row_at_a_time(seq: int, row: int, head: int) -> tuple[Array, float]:
    query, key, value, cache, tables = batch()
    first = sum(QUERY_LENS[:seq])
    group = HEADS // KEY_HEADS
    keys, values = [], []
    for position in range(CONTEXT_LENS[seq]):
        block = tables[seq, position // BLOCK]
        keys.append(cache[0, block, head // group, position % BLOCK])
        values.append(cache[1, block, head // group, position % BLOCK])
    for token in range(first, first + row + 1):
        keys.append(key[0, head // group, :, token])
        values.append(value[0, head // group, token])
    logits = np.array(keys) @ query[0, head, :, first + row] / math.sqrt(DIM)
    lse = float(np.log(np.exp(logits).sum()))
    return np.exp(logits - lse) @ np.array(values), lse


@pytest.mark.parametrize("tile", [512, 2048])
def test_against_rows_written_out(tile: int) -> None:
    query, key, value, cache, tables = batch()
    call = plan(QUERY_LENS, CONTEXT_LENS, tables, BLOCK, tile, PADDED)
    assert len(call.block_table) * BLOCK % tile == 0
    out, lse = attention(query, key, value, cache, call)
    for seq, query_len in enumerate(QUERY_LENS):
        for row in range(query_len):
            for head in range(HEADS):
                wanted, sums = row_at_a_time(seq, row, head)
                at = sum(QUERY_LENS[:seq]) + row
                np.testing.assert_allclose(out[0, head, at], wanted, rtol=1e-12)
                np.testing.assert_allclose(lse[0, head, at], sums, rtol=1e-12)


def test_against_the_op() -> None:
    """The same batch with the new tokens in the cache is one call of flash_attn_varlen."""
    query, key, value, cache, tables = batch()
    out, _ = attention(query, key, value, cache, plan(QUERY_LENS, CONTEXT_LENS, tables, BLOCK, 512, PADDED))
    rows = [(s, c + i) for s, (q, c) in enumerate(zip(QUERY_LENS, CONTEXT_LENS, strict=True)) for i in range(q)]
    slots = np.array([tables[seq, position // BLOCK] * BLOCK + position % BLOCK for seq, position in rows])
    write_new_tokens(key[0, :, :, :ROWS].transpose(2, 0, 1), value[0, :, :ROWS].transpose(1, 0, 2), cache, slots)
    starts = torch.tensor(np.cumsum((0, *QUERY_LENS)), dtype=torch.int32)
    lengths = torch.tensor(np.add(QUERY_LENS, CONTEXT_LENS), dtype=torch.int32)
    got = reference.flash_attn_varlen(
        torch.from_numpy(query[0, :, :, :ROWS].transpose(2, 0, 1).copy()),
        None,
        None,
        starts,
        None,
        torch.from_numpy(cache),
        torch.from_numpy(tables),
        lengths,
        max(QUERY_LENS),
        int(lengths.max()),
        causal=True,
        compute_dtype=torch.float64,
    )
    np.testing.assert_allclose(got.numpy(), out[0, :, :ROWS].transpose(1, 0, 2), rtol=1e-9)


def test_padding() -> None:
    """A row of padding sees nothing and gets the mean of all values, dead blocks included."""
    query, key, value, cache, tables = batch()
    call = plan(QUERY_LENS, CONTEXT_LENS, tables, BLOCK, 512, PADDED)
    out, lse = attention(query, key, value, cache, call)
    columns = call.mask.shape[1]
    assert not call.mask[ROWS:].any()
    values = np.concatenate([cache[1, call.block_table].transpose(1, 0, 2, 3).reshape(KEY_HEADS, -1, DIM), value[0]], 1)
    np.testing.assert_allclose(out[0, :, -1], values.mean(1).repeat(HEADS // KEY_HEADS, 0))
    np.testing.assert_allclose(lse[0, :, -1], MASKED + np.log(columns))


def test_without_context() -> None:
    """A table of nobody's blocks takes the place of an empty one."""
    call = plan((4,), (0,), np.zeros((1, 0), np.int32), BLOCK, 512)
    assert call.block_table.tolist() == [0] * (512 // BLOCK)
    assert not call.mask[:, :512].any()
    np.testing.assert_array_equal(call.mask[:, 512:], np.tri(4, dtype=bool))


@pytest.mark.parametrize(("tile", "block"), [(2048, 32), (2048, 16), (512, 4), (2048, 8), (512, 1)])
def test_order_of_columns(tile: int, block: int) -> None:
    """Column (tile, load, slot, partition) is token (load * 128 + partition) * slots + slot of its tile."""
    rng = np.random.default_rng(0)
    mask = rng.random((3, 2 * tile + 3)) < 0.5
    got = reorder(mask, tile, block)
    loads = max(128, tile // block) // 128
    slots = tile // (loads * 128)
    at = 0
    for first in (0, tile):
        for load in range(loads):
            for slot in range(slots):
                for partition in range(128):
                    token = first + (load * 128 + partition) * slots + slot
                    assert (got[:, at] == mask[:, token]).all()
                    at += 1
    np.testing.assert_array_equal(got[:, at:], mask[:, at:])


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_published_cases_are_what_the_old_kernels_take(case: Case) -> None:
    blocks = case.tile_tokens // case.block_size
    assert case.tile_tokens % 512 == 0
    assert blocks & (blocks - 1) == 0
    assert blocks >= 128 or case.block_size % (128 // blocks) == 0
    assert case.heads % case.group == 0
    assert case.head_dim <= 128
    batch = draw(case, most_context=64, most_queries=17)
    query, key, value = padded(batch, 384)
    call = plan(batch.query_lens, batch.context_lens, batch.block_tables, case.block_size, case.tile_tokens, 384)
    assert call.mask.sum(1)[: sum(batch.query_lens)].min() > 32
    out, lse = attention(query[:, :1], key[:, :1], value[:, :1], batch.kv_cache[:, :, :1], call)
    rows = sum(batch.query_lens)
    assert np.isfinite(out).all()
    assert (lse[0, :, :rows] > MASKED / 2).all()
    assert np.abs(out[0, :, :rows]).max() <= max(np.abs(batch.kv_cache[1]).max(), np.abs(batch.value).max())
