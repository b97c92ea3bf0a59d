# mypy: ignore-errors
"""The scheme of the kernel that this project grew from, written for the simulator so that its work can be counted.

One flat list of context blocks for all sequences, new tokens beside the cache, and a mask of every new token against
every one of these keys, read from HBM (tests/old_neuron_contract.py). Rows are 128 new tokens of a query head, padded
with nothing; keys come in large tiles, transposed by the tensor engine. Every row is computed against every tile.

Left to the caller here, for nothing: rows of the cache, which the old kernel derived from its table. Its loops were the
old compiler's, at no cost between turns; here they are unrolled.
"""

import nki
import nki.isa as nisa
import nki.language as nl

P = 128
COLUMNS = 512  # of a product
MASKED = -9984.0


@nki.jit
def old_scheme(
    query,  # (H, D, T)
    key,  # (KH, D, T), new tokens
    value,  # (KH, T, D)
    cache,  # (rows, slots * D), a row: consecutive tokens of a block and head
    rows,  # (KH * tiles, 2 * P) int32: of keys, then of values, of a tile
    mask,  # (T, C + T) uint8, the context's columns in the order of a tile
    softmax_scale,
):
    """Return (H, T, D)."""
    num_heads, head_dim, num_tokens = query.shape
    kv_heads = key.shape[0]
    slots = cache.shape[1] // head_dim
    out = nl.ndarray((num_heads, num_tokens, head_dim), dtype=query.dtype, buffer=nl.shared_hbm)
    call = _Old(query, mask, softmax_scale)
    for head in range(kv_heads):
        group = num_heads // kv_heads
        states = []
        for _ in range(num_tokens // P * group):
            states.append(_State(head_dim))
        tiles = rows.shape[0] // kv_heads
        for tile in range(tiles):
            keys, values = call.context(cache, rows, head * tiles + tile, slots)
            for i in range(num_tokens // P):
                seen = call.mask_of(i, tile * slots * P, slots * P)
                for g in range(group):
                    states[i * group + g].attend(call.query_of(head * group + g, i), keys, values, seen)
        keys = nl.ndarray((head_dim, num_tokens), dtype=query.dtype)
        nisa.dma_copy(dst=keys, src=key[head])
        values = nl.ndarray((P, num_tokens // P, head_dim), dtype=query.dtype)
        for i in range(num_tokens // P):
            nisa.dma_copy(dst=values[:, i, :], src=value[head, i * P : (i + 1) * P, :])
        for i in range(num_tokens // P):
            width = min(num_tokens, ((i + 1) * P + COLUMNS - 1) // COLUMNS * COLUMNS)  # up to the diagonal's block
            seen = call.mask_of(i, tiles * slots * P, width)
            for g in range(group):
                state = states[i * group + g]
                state.attend(call.query_of(head * group + g, i), keys[:, 0:width], values[:, 0 : width // P, :], seen)
                nisa.dma_copy(dst=out[head * group + g, i * P : (i + 1) * P, :], src=state.result(query.dtype))
    return out


class _Old(nl.NKIObject):
    """What every tile reads."""

    def __init__(self, query, mask, softmax_scale):
        self.query, self.mask, self.softmax_scale = query, mask, softmax_scale

    def query_of(self, head, i):
        """Return scaled queries (D, P)."""
        found = nl.ndarray((self.query.shape[1], P), dtype=self.query.dtype)
        nisa.dma_copy(dst=found, src=self.query[head, :, i * P : (i + 1) * P])
        nisa.tensor_scalar(dst=found, data=found, op0=nl.multiply, operand0=self.softmax_scale)
        return found

    def mask_of(self, i, start, width):
        found = nl.ndarray((P, width), dtype=nl.uint8)
        nisa.dma_copy(dst=found, src=self.mask[i * P : (i + 1) * P, start : start + width])
        return found

    def context(self, cache, rows, tile, slots):
        """Return keys (D, slots * P) and values (P, slots, D) of a tile."""
        head_dim, dtype = self.query.shape[1], self.query.dtype
        loaded = []
        for side in range(2):
            places = nl.ndarray((P, 1), dtype=nl.int32)
            nisa.dma_copy(dst=places, src=rows.ap(pattern=[[1, P], [1, 1]], offset=(tile * 2 + side) * P))
            found = nl.ndarray((P, slots * head_dim), dtype=dtype)
            pattern = [[slots * head_dim, P], [1, slots * head_dim]]
            nisa.dma_copy(dst=found, src=cache.ap(pattern=pattern, offset=0, vector_offset=places, indirect_dim=0))
            loaded.append(found.reshape((P, slots, head_dim)))
        keys = nl.ndarray((head_dim, slots, P), dtype=dtype)
        at_a_time = min(slots, COLUMNS // P)
        for start in range(0, slots, at_a_time):
            turned = nl.ndarray((head_dim, at_a_time, P), dtype=dtype, buffer=nl.psum)
            for j in range(at_a_time):
                nisa.nc_transpose(dst=turned[:, j, :], data=loaded[0][:, start + j, :])
            nisa.tensor_copy(dst=keys[:, start : start + at_a_time, :], src=turned, engine=nisa.engine.scalar)
        return keys.reshape((head_dim, slots * P)), loaded[1]


class _State(nl.NKIObject):
    """Maximum, logarithm of the sum and weighted values of 128 rows so far."""

    def __init__(self, head_dim):
        self.begun = False
        self.maximum, self.lse = nl.ndarray((P, 1), dtype=nl.float32), nl.ndarray((P, 1), dtype=nl.float32)
        self.sums = nl.ndarray((P, head_dim), dtype=nl.float32)

    def attend(self, query, keys, values, seen):
        width = keys.shape[1]
        logits = nl.ndarray((P, width), dtype=nl.float32)
        blocks = (width + COLUMNS - 1) // COLUMNS
        largest = nl.ndarray((P, blocks), dtype=nl.float32)
        for k in range(blocks):
            part = slice(k * COLUMNS, min(width, (k + 1) * COLUMNS))
            products = nl.ndarray((P, part.stop - part.start), dtype=nl.float32, buffer=nl.psum)
            nisa.nc_matmul(dst=products, stationary=query, moving=keys[:, part], accumulate=False)
            nisa.select_reduce(dst=logits[:, part], predicate=seen[:, part], on_true=products, on_false=MASKED)
            nisa.tensor_reduce(dst=largest[:, k : k + 1], op=nl.maximum, data=logits[:, part], axis=1)
        before = nl.ndarray((P, 1), dtype=nl.float32)
        negative = nl.ndarray((P, 1), dtype=nl.float32)
        if self.begun:
            nisa.tensor_copy(dst=before, src=self.maximum)
        nisa.tensor_reduce(dst=self.maximum, op=nl.maximum, data=largest, axis=1)
        if self.begun:
            nisa.tensor_tensor(dst=self.maximum, data1=self.maximum, data2=before, op=nl.maximum)
        nisa.tensor_scalar(dst=negative, data=self.maximum, op0=nl.multiply, operand0=-1.0)
        weights = nl.ndarray((P, width), dtype=query.dtype)
        total = nl.ndarray((P, 1), dtype=nl.float32)
        nisa.activation_reduce(
            dst=weights, op=nl.exp, data=logits, reduce_op=nl.add, reduce_res=total, bias=negative, scale=1.0
        )
        turned = nl.ndarray((P, width // P, P), dtype=query.dtype)
        at_a_time = min(width, COLUMNS) // P
        for start in range(0, width // P, at_a_time):
            part = nl.ndarray((P, at_a_time, P), dtype=query.dtype, buffer=nl.psum)
            for j in range(at_a_time):
                column = (start + j) * P
                nisa.nc_transpose(dst=part[:, j, :], data=weights[:, column : column + P])
            nisa.tensor_copy(dst=turned[:, start : start + at_a_time, :], src=part)
        product = nl.ndarray(self.sums.shape, dtype=nl.float32, buffer=nl.psum)
        for j in range(width // P):
            nisa.nc_matmul(dst=product, stationary=turned[:, j, :], moving=values[:, j, :], accumulate=j > 0)
        if self.begun:
            factor = nl.ndarray((P, 1), dtype=nl.float32)
            nisa.activation(dst=factor, op=nl.exp, data=before, bias=negative)
            nisa.scalar_tensor_tensor(
                dst=self.sums, data=self.sums, op0=nl.multiply, operand0=factor, op1=nl.add, operand1=product
            )
            nisa.activation(dst=factor, op=nl.exp, data=self.lse, bias=negative)
            nisa.tensor_tensor(dst=total, data1=total, data2=factor, op=nl.add)
        else:
            nisa.tensor_copy(dst=self.sums, src=product)
        nisa.activation(dst=self.lse, op=nl.log, data=total)
        nisa.tensor_tensor(dst=self.lse, data1=self.lse, data2=self.maximum, op=nl.add)
        self.begun = True

    def result(self, dtype):
        factor, rows = nl.ndarray((P, 1), dtype=nl.float32), nl.ndarray(self.sums.shape, dtype=dtype)
        nisa.tensor_tensor(dst=factor, data1=self.maximum, data2=self.lse, op=nl.subtract)
        nisa.activation(dst=factor, op=nl.exp, data=factor)
        nisa.tensor_scalar(dst=rows, data=self.sums, op0=nl.multiply, operand0=factor)
        return rows
