"""Whole kernels of the usual kinds on trn2 and trn3: products in tiles, softmax, attention, pages, two cores."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from nki_sim_kernels import Array, call, random, same, whole

pytestmark = pytest.mark.parametrize("generation", ["trn2", "trn3"])

MATMUL = """
def load_tiles(x, columns):
    tiles = []
    for row in range(0, x.shape[0], 128):
        tile = nl.ndarray((128, columns), x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=x[row:row + 128])
        tiles.append(tile)
    return tiles


@nki.jit
def kernel(a, b):
    K, M = a.shape
    N = b.shape[1]
    out = nl.ndarray((M, N), a.dtype, buffer=nl.shared_hbm)
    left = load_tiles(a, M)
    right = load_tiles(b, N)
    for m in range(0, M, 128):
        for n in range(0, N, 512):
            width = min(512, N - n)
            sums = nl.ndarray((128, width), nl.float32, buffer=nl.psum)
            for k in range(K // 128):
                nisa.nc_matmul(sums, left[k][:, m:m + 128], right[k][:, n:n + width])
            tile = nl.ndarray((128, width), a.dtype, buffer=nl.sbuf)
            nisa.tensor_copy(dst=tile, src=sums)
            nisa.dma_copy(dst=out[m:m + 128, n:n + width], src=tile)
    return out
"""


def test_products_in_tiles(generation: str) -> None:
    a, b = whole(384, 256, dtype="bfloat16", limit=1), whole(384, 700, dtype="bfloat16", limit=1, seed=1)
    wanted = a.astype(np.float32).T @ b.astype(np.float32)
    same(call(MATMUL, a, b, generation=generation), wanted.astype(ml_dtypes.bfloat16))


SOFTMAX = """
@nki.jit
def kernel(x):
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    N = x.shape[1]
    for row in range(0, x.shape[0], 128):
        rows = min(128, x.shape[0] - row)
        tile = nl.ndarray((rows, N), nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=x[row:row + rows])
        top = nl.ndarray((rows, 1), nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(dst=top, op=nl.maximum, data=tile, axis=1, negate=True)
        total = nl.ndarray((rows, 1), nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=tile, op=nl.exp, data=tile, bias=top, reduce_op=nl.add, reduce_res=total,
                        reduce_cmd=nisa.reduce_cmd.reset_reduce)
        nisa.reciprocal(dst=total, data=total)
        nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=total)
        nisa.dma_copy(dst=out[row:row + rows], src=tile)
    return out
"""


def softmax(x: Array) -> Array:
    weights = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def test_softmax(generation: str) -> None:
    x = random(200, 333) * 3
    np.testing.assert_allclose(call(SOFTMAX, x, generation=generation), softmax(x), rtol=1e-5, atol=1e-7)


PAGED = """
ROWS = 8
BLOCK = 16


@nki.jit
def kernel(query, keys, values, table, length, bound, scale):
    D = query.shape[1]
    out = nl.ndarray((2, ROWS, D), nl.float32, buffer=nl.shared_hbm)
    me = nl.program_id(0)
    cores = nl.num_programs(0)
    q = nl.ndarray((ROWS, D), query.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=q, src=query)
    turned = nl.ndarray((D, ROWS), query.dtype, buffer=nl.psum)
    nisa.nc_transpose(dst=turned, data=q, engine=nisa.engine.tensor)
    qT = nl.ndarray((D, ROWS), query.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=qT, src=turned)
    top = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
    total = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
    sums = nl.ndarray((ROWS, D), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=top, value=-1e30)
    nisa.memset(dst=total, value=0.0)
    nisa.memset(dst=sums, value=0.0)
    low = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=low, value=0.0)
    high = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=high, src=length)
    first = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=first, value=0.0)
    trips = nl.ndarray((1, 1), nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=trips, src=bound)
    end = nisa.register_alloc()
    nisa.register_load(end, trips)

    def body(i):
        k = nl.ndarray((BLOCK, D), keys.dtype, buffer=nl.sbuf)
        v = nl.ndarray((BLOCK, D), values.dtype, buffer=nl.sbuf)
        block = nl.ndarray((1, 1), nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=block, src=table.ap(pattern=[[1, 1], [1, 1]], offset=0, scalar_offset=i, indirect_dim=0))
        at = nisa.register_alloc()
        nisa.register_load(at, block)
        nisa.dma_copy(dst=k, src=keys.ap(pattern=[[D, BLOCK], [1, D]], offset=0, scalar_offset=at, indirect_dim=0))
        nisa.dma_copy(dst=v, src=values.ap(pattern=[[D, BLOCK], [1, D]], offset=0, scalar_offset=at, indirect_dim=0))
        k_psum = nl.ndarray((D, BLOCK), keys.dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=k_psum, data=k, engine=nisa.engine.tensor)
        kT = nl.ndarray((D, BLOCK), keys.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=kT, src=k_psum)
        logits = nl.ndarray((ROWS, BLOCK), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=logits, stationary=qT, moving=kT, accumulate=False)
        hi = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=hi, data1=high, data2=first, op=nl.subtract)
        seen = nl.ndarray((ROWS, BLOCK), nl.float32, buffer=nl.sbuf)
        peak = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
        nisa.range_select(dst=seen, on_true_tile=logits, comp_op0=nl.greater_equal, comp_op1=nl.less, bound0=low,
                          bound1=hi, reduce_cmd=nisa.reduce_cmd.reset_reduce, reduce_res=peak, reduce_op=nl.maximum)
        nisa.tensor_scalar(dst=peak, data=peak, op0=nl.maximum, operand0=-1e30)
        new = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=new, data1=top, data2=peak, op=nl.maximum)
        negative = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=negative, data=new, op0=nl.multiply, operand0=-scale)
        alpha = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=alpha, op=nl.exp, data=top, bias=negative, scale=scale)
        nisa.tensor_copy(dst=top, src=new)
        weights = nl.ndarray((ROWS, BLOCK), nl.float32, buffer=nl.sbuf)
        part = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=weights, op=nl.exp, data=seen, bias=negative, scale=scale, reduce_op=nl.add,
                        reduce_res=part, reduce_cmd=nisa.reduce_cmd.reset_reduce)
        nisa.scalar_tensor_tensor(dst=total, data=total, op0=nl.multiply, operand0=alpha, op1=nl.add, operand1=part)
        w_psum = nl.ndarray((BLOCK, ROWS), nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=w_psum, data=weights, engine=nisa.engine.tensor)
        wT = nl.ndarray((BLOCK, ROWS), nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=wT, src=w_psum)
        more = nl.ndarray((ROWS, D), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=more, stationary=wT, moving=v, accumulate=False)
        nisa.scalar_tensor_tensor(dst=sums, data=sums, op0=nl.multiply, operand0=alpha, op1=nl.add, operand1=more)
        nisa.tensor_scalar(dst=first, data=first, op0=nl.add, operand0=16.0)

    nl.fori_loop(0, end, body)
    nisa.tensor_scalar(dst=total, data=total, op0=nl.maximum, operand0=1e-18)
    nisa.reciprocal(dst=total, data=total)
    nisa.tensor_scalar(dst=sums, data=sums, op0=nl.multiply, operand0=total)
    nisa.dma_copy(dst=out[me], src=sums)
    return out
"""


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 63, 100])
def test_pages(generation: str, length: int) -> None:
    """Blocks of a cache by a table, as many as there are: dead slots hold NaN, and the table ends with no block."""
    D, block, blocks = 64, 16, 20
    rng = np.random.default_rng(length)
    query = random(8, D)
    order = rng.permutation(blocks)[: -(-length // block)]
    keys, values = (np.full((blocks, block, D), np.nan, np.float32) for _ in range(2))
    live = [(order[i // block], i % block) for i in range(length)]
    for number, (at, slot) in enumerate(live):
        keys[at, slot] = random(D, seed=number)
        values[at, slot] = random(D, seed=number + 1000)
    table = np.full((8, 1), -1, np.int32)
    table[: len(order), 0] = order
    for at in order:  # a product with a weight of zero is NaN where a value is
        values[at] = np.nan_to_num(values[at])
    scale = D**-0.5
    bounds: list[Any] = [np.full((8, 1), length, np.float32), np.array([[len(order)]], np.int32), scale]
    got = call(PAGED, query, keys, values, table, *bounds, generation=generation, lnc=2)
    wanted = np.zeros((8, D))
    if live:
        k = np.stack([keys[at, slot] for at, slot in live])
        v = np.stack([values[at, slot] for at, slot in live])
        wanted = softmax(query @ k.T * scale) @ v
    for core in range(2):
        np.testing.assert_allclose(got[core], wanted, rtol=2e-5, atol=2e-6)
