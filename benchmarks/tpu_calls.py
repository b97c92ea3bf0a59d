"""The calls whose programs are counted: ours, and those of the kernels that jax ships, on equal work.

All keys are in the cache, queries and cache are bfloat16, and every call starts from what its
users hold: queries without padding, lengths and a table of block ids.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tpu_known import know

Call = tuple[Callable[..., Any], tuple[Any, ...]]
VMEM_LIMIT = 64 * 2**20


def build(point: Mapping[str, Any]) -> Call:
    """Return the function of a point and its arguments, of which only shape and dtype matter to the compiler."""
    return _BUILDERS[point["way"]](point)


def tokens_and_tiles(point: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many keys a turn of the kernel's loop over blocks takes, and in how many tiles."""
    from torch_paged.backends.tpu.block_sizes import CHIPS, SUBLANES, Page, decode_blocks

    if point["way"] != "torch_paged" or point["queries"] > 1:
        return point["tokens_per_block"], 1
    width = -(-point["context"] // point["block_size"])
    rows = point["kv_heads"] * -(-point["group"] // SUBLANES) * SUBLANES
    page = Page(*_pages(point)[1:], itemsize=2)
    blocks = decode_blocks(CHIPS[point["chip"]], page, width, rows, 0, point["batch"])
    return blocks.pages * point["block_size"], blocks.pages // blocks.tile_pages


def _ours(point: Mapping[str, Any]) -> Call:
    from torch_paged.backends.tpu import decode, varlen
    from torch_paged.backends.tpu.block_sizes import CHIPS
    from torch_paged.backends.tpu.tiles import SOURCE_FIELDS, TILE_FIELDS

    lengths, table = _lengths_and_table(point)
    cache = _array(2, *_pages(point))
    options = {"softmax_scale": point["head_dim"] ** -0.5, "chip": CHIPS[point["chip"]]}
    if point["queries"] == 1:
        function = partial(decode.paged_attention, **options)
        arguments: tuple[Any, ...] = (_query(point), cache, table, lengths)
    else:
        longest = {"max_seqlen_q": point["queries"], "max_seqlen_k": point["context"]}
        function = partial(varlen.flash_attn_varlen, **options, **longest, causal=True)
        arguments = (_query(point), None, None, _cumulative(point), None, cache, table, lengths)
    rows = {} if point["queries"] == 1 else {(0, 1): (0, TILE_FIELDS + SOURCE_FIELDS)}
    return know(function, arguments, rows=rows) if point["known"] else function, arguments


def _jax_paged(point: Mapping[str, Any]) -> Call:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    lengths, table = _lengths_and_table(point)
    side = _array(point["kv_heads"], table.size, point["block_size"], point["head_dim"])
    function = partial(
        paged_attention, pages_per_compute_block=point["tokens_per_block"] // point["block_size"], megacore_mode=None
    )
    arguments = (_query(point), side, side, lengths, table)
    return know(function, arguments, state=(2, 3)) if point["known"] else function, arguments


def _jax_ragged(point: Mapping[str, Any]) -> Call:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    lengths, table = _lengths_and_table(point)
    function = partial(
        ragged_paged_attention,
        sm_scale=point["head_dim"] ** -0.5,
        num_kv_pages_per_block=point["tokens_per_block"] // point["block_size"],
        num_queries_per_block=point["queries_per_block"],
        vmem_limit_bytes=VMEM_LIMIT,
    )
    cache = _array(table.size, point["block_size"], 2 * point["kv_heads"], point["head_dim"])
    arguments = (_query(point), cache, lengths, table, _cumulative(point), np.array([point["batch"]], np.int32))
    return know(function, arguments, state=(3,)) if point["known"] else function, arguments


_BUILDERS = {"torch_paged": _ours, "jax paged_attention": _jax_paged, "jax ragged_paged_attention": _jax_ragged}


def _lengths_and_table(point: Mapping[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    width = -(-point["context"] // point["block_size"])
    table = np.arange(point["batch"] * width, dtype=np.int32).reshape(point["batch"], width)
    return np.full(point["batch"], point["context"], np.int32), table


def _cumulative(point: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    return np.arange(point["batch"] + 1, dtype=np.int32) * np.int32(point["queries"])


def _query(point: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    tokens = point["batch"] * point["queries"]
    return _array(tokens, point["kv_heads"] * point["group"], point["head_dim"])


def _pages(point: Mapping[str, Any]) -> tuple[int, int, int, int]:
    num_blocks = point["batch"] * -(-point["context"] // point["block_size"])
    return num_blocks, point["kv_heads"], point["block_size"], -(-point["head_dim"] // 128) * 128


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
