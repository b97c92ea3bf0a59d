"""The points that ``benchmarks neuron`` models, and what each of them runs."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.neuron_counts import Counted, Replayed
from benchmarks.neuron_old import P, old_scheme
from torch_paged.backends.neuron import cache, decode, varlen
from torch_paged.backends.neuron.cost import Counts
from torch_paged.backends.neuron.plan import PARTITIONS, unit_tokens
from torch_paged.testing.cases import cumulative

DTYPE = torch.bfloat16
GENERATION = "trn2"
"""For which kernels are counted: for bfloat16 they run the same on both."""
ITEM = DTYPE.itemsize
BLOCKS = 8
"""Of the cache that is counted with: tables name the same blocks again and again, which costs the same."""
OLD_TILE = 2048
"""Tokens of a tile of the old kernel, as its callers chose."""

BATCHES, CONTEXTS = (1, 4, 16, 64), (1024, 4096, 8192, 32768)
HEAD_DIMS, GROUPS, BLOCK_SIZES = (64, 128, 256), (1, 4, 8), (16, 32, 64, 128)
PREFILLS, PREFILL_CONTEXTS = (512, 1024, 2048, 4096), (0, 16384)


@dataclass(frozen=True)
class Point:
    """One call of an op, in bfloat16.

    Attributes:
        batch: sequences.
        context: tokens of each in the cache.
        queries: tokens of each that attend; in a prefill their keys lie beside the cache.
        cores: physical cores that share the work.
    """

    batch: int
    context: int
    queries: int = 1
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    block_size: int = 32
    cores: int = 1

    @property
    def is_decode(self) -> bool:
        """Whether it calls ``paged_attention``, else ``flash_attn_varlen``."""
        return self.queries == 1

    @property
    def cache_bytes(self) -> int:
        """Keys and values that have to be read."""
        new = 0 if self.is_decode else self.queries
        return self.batch * (self.context + new) * 2 * self.kv_heads * self.head_dim * ITEM

    @property
    def bytes(self) -> int:
        """All that has to be read or written."""
        return self.cache_bytes + 2 * self.batch * self.queries * self.kv_heads * self.group * self.head_dim * ITEM

    @property
    def flops(self) -> int:
        """Of products of visible pairs."""
        triangle = 0 if self.is_decode else self.queries * (self.queries + 1) // 2
        pairs = self.batch * (self.queries * self.context + triangle)
        return 4 * pairs * self.kv_heads * self.group * self.head_dim


@dataclass
class Work:
    """What a call of an op runs.

    Attributes:
        kernels: names and counts, of the busiest core.
        plan: bytes of each operation of torch that only the first layer of a step runs.
        around: bytes of each that every layer runs.
    """

    kernels: list[tuple[str, Counts]]
    plan: list[int]
    around: list[int]


Known = dict[Any, dict[str, dict[Any, Counts]]]


def points() -> Iterator[Point]:
    """Yield every point."""
    for base in (Point(0, 0), Point(0, 0, kv_heads=1, group=8), Point(0, 0, cores=2)):
        for batch, context in itertools.product(BATCHES, CONTEXTS):
            yield replace(base, batch=batch, context=context)
    for head_dim, group, size in itertools.product(HEAD_DIMS, GROUPS, BLOCK_SIZES):
        point = Point(16, 8192, group=group, head_dim=head_dim, block_size=size)
        if point != Point(16, 8192):
            yield point
    for queries, context in itertools.product(PREFILLS, PREFILL_CONTEXTS):
        yield Point(1, context, queries)
    for other in ({"group": 1}, {"group": 8}, {"head_dim": 64}, {"head_dim": 256}, {"kv_heads": 1, "group": 8}):
        yield replace(Point(1, 0, 2048), **other)


def attention(point: Point, known: Known) -> Work:
    """Return what a call of the point's op runs, on either generation.

    Args:
        point: of which.
        known: what turns of loops over tiles of decode do, of points that differ in batch and context alone; more is
            learnt, from a call of three tiles.
    """
    arguments = _decode(point) if point.is_decode else _prefill(point)
    op = decode.paged_attention if point.is_decode else varlen.flash_attn_varlen
    bodies: dict[str, dict[Any, Counts]] | None = {}
    if point.is_decode:
        tile = PARTITIONS * _unit(point) * point.cores
        if point.batch * point.context <= 2 * tile:
            bodies = None  # the only turn may be a part of one
        else:
            alike = replace(point, batch=0, context=0, block_size=_unit(point))
            if alike not in known:
                learnt = Counted(GENERATION, point.cores, {}, continued=True)
                op(learnt.launch, _decode(replace(point, batch=1, context=3 * tile)))
                name, _ = learnt.kernels[0]
                known[alike] = {name: (learnt.bodies or {})[name]}
            bodies = {name: dict(found) for name, found in known[alike].items()}
    first = Counted(GENERATION, point.cores, bodies, continued=point.is_decode)
    with first:
        op(first.launch, arguments)
    second = Replayed(first)
    with second:
        op(second.launch, arguments)
    return Work(first.kernels, first.sizes[: len(first.sizes) - len(second.sizes)], second.sizes)


def _unit(point: Point) -> int:
    """Return the tokens of a unit of decode."""
    row = point.head_dim * ITEM
    return unit_tokens(point.block_size, row, row, point.kv_heads * point.group * ITEM)


def write(point: Point) -> Work:
    """Return what writing the new tokens of a point runs."""
    tokens = point.batch * point.queries
    rows = torch.zeros(tokens, point.kv_heads, point.head_dim, dtype=DTYPE)
    blocks = -(-tokens // point.block_size)
    kv_cache = torch.zeros(2, blocks, point.kv_heads, point.block_size, point.head_dim, dtype=DTYPE)
    arguments = {"key": rows, "value": rows, "kv_cache": kv_cache, "kv_scales": None}
    counted = Counted(GENERATION, point.cores, None)
    with counted:
        cache.reshape_and_cache(counted.launch, {**arguments, "slot_mapping": torch.arange(tokens)})
    return Work(counted.kernels, [], counted.sizes)


def token_gather(counts: Counts, point: Point) -> Counts:
    """Return the counts of a kernel if it gathered tokens instead of units of them, all else being equal."""
    row, found = point.head_dim * ITEM, Counts({}, counts.turns, counts.barriers)
    for key, number in counts.instructions.items():
        cut = replace(key, descriptors=max(key.descriptors, key.bytes // row)) if key.gathered else key
        found.instructions[cut] = found.instructions.get(cut, 0) + number
    return found


def old(point: Point, known: dict[Any, Counts]) -> Counts | None:
    """Return what the old scheme runs, None where the old kernel could not: by its counts for one and two of each.

    Kv heads repeat all of it; tiles of context and query heads of a group repeat a part of it, the first ones apart.
    """
    if point.head_dim > P:
        return None
    tokens = -(-point.batch * point.queries // P) * P
    tiles = max(1, -(-point.batch * point.context // OLD_TILE))
    width = min(point.block_size, OLD_TILE // P)
    runs = {
        (i, j): known.setdefault((point.head_dim, tokens, width, i, j), old_counts(point.head_dim, tokens, width, i, j))
        for i, j in itertools.product((1, 2), (1, 2))
    }
    more, wider = tiles - 1, point.group - 1
    found = Counts()
    for run, factor in (
        ((1, 1), (1 - more) * (1 - wider)),
        ((2, 1), more * (1 - wider)),
        ((1, 2), (1 - more) * wider),
        ((2, 2), more * wider),
    ):
        found = found.plus(runs[run], factor)
    return Counts().plus(found, point.kv_heads)


def old_counts(head_dim: int, tokens: int, width: int, tiles: int, group: int, kv_heads: int = 1) -> Counts:
    """Return the counts of the old scheme, run as it is.

    Args:
        head_dim: D.
        tokens: T, padded.
        width: tokens of a row that is gathered.
        tiles: of context.
        group: query heads of a kv head.
        kv_heads: KH.
    """
    tile = width * P
    counted = Counted(GENERATION, 1, None)
    counted.launch(
        old_scheme,
        torch.zeros(kv_heads * group, head_dim, tokens, dtype=DTYPE),
        torch.zeros(kv_heads, head_dim, tokens, dtype=DTYPE),
        torch.zeros(kv_heads, tokens, head_dim, dtype=DTYPE),
        torch.zeros(1, width * head_dim, dtype=DTYPE),
        torch.zeros(kv_heads * tiles, 2 * P, dtype=torch.int32),
        torch.zeros(tokens, tiles * tile + tokens, dtype=torch.uint8),
        head_dim**-0.5,
    )
    return counted.kernels[0][1]


def _table(point: Point) -> dict[str, Any]:
    columns = max(1, -(-point.context // point.block_size))
    ids = torch.arange(point.batch * columns, dtype=torch.int32) % BLOCKS
    shape = (2, BLOCKS, point.kv_heads, point.block_size, point.head_dim)
    return {
        "kv_cache": torch.zeros(shape, dtype=DTYPE),
        "block_tables": ids.reshape(point.batch, columns),
        "context_lens": torch.full((point.batch,), point.context, dtype=torch.int32),
    }


_PLAIN: dict[str, Any] = {
    "kv_scales": None,
    "sinks": None,
    "alibi_slopes": None,
    "attn_mask": None,
    "softmax_scale": None,
    "logits_soft_cap": 0.0,
    "sliding_window": None,
    "attention_chunk": None,
    "value_dim": None,
}


def _decode(point: Point) -> dict[str, Any]:
    query = torch.zeros(point.batch, point.kv_heads * point.group, point.head_dim, dtype=DTYPE)
    return {"query": query, **_table(point), **_PLAIN}


def _prefill(point: Point) -> dict[str, Any]:
    lengths = (point.queries,) * point.batch
    tokens = sum(lengths)
    cached: dict[str, Any] = {"kv_cache": None, "block_tables": None, "context_lens": None}
    return {
        "query": torch.zeros(tokens, point.kv_heads * point.group, point.head_dim, dtype=DTYPE),
        "key": torch.zeros(tokens, point.kv_heads, point.head_dim, dtype=DTYPE),
        "value": torch.zeros(tokens, point.kv_heads, point.head_dim, dtype=DTYPE),
        "cu_seqlens_q": cumulative(lengths),
        "cu_seqlens_k": cumulative(lengths),
        **(_table(point) if point.context else cached),
        "max_seqlen_q": point.queries,
        "max_seqlen_k": point.queries + point.context,
        "query_positions": None,
        "causal": True,
        **_PLAIN,
    }
