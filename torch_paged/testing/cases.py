"""Named cases of the attention ops, shared by tests and benchmarks, and ``build``, which makes their arguments."""

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from torch_paged.testing.tensors import GARBAGE_ENTRIES, generator_for, lay_out, random_cache, random_rows


@dataclass(frozen=True)
class AttentionCase:
    """One call of ``paged_attention`` or ``flash_attn_varlen``; lengths are per sequence, in tokens."""

    name: str
    context_lens: tuple[int, ...] | None = (17, 0, 63, 1)
    """Tokens in the cache; None: no cache."""
    query_lens: tuple[int, ...] | None = None
    """None: decode, one query for each sequence."""
    new_lens: tuple[int, ...] | None = None
    """Keys beside the cache; None: all keys are in the cache."""
    num_kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    stored_dim: int | None = None
    """None: head_dim."""
    value_dim: int | None = None
    new_value_dim: int | None = None
    """Width of the new values; None: value_dim, else head_dim."""
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    """None: the query dtype."""
    scales_rank: int | None = None
    latent: bool = False
    softmax_scale: float | None = None
    logits_soft_cap: float = 0.0
    causal: bool = True
    sliding_window: int | None = None
    attention_chunk: int | None = None
    sinks: bool = False
    alibi: bool = False
    mask: str | None = None
    """None, "shared", "kv_heads" or "heads"."""
    positions: str | None = None
    """None, "shuffled" (the default positions in another order) or "anywhere" (also before and behind the keys)."""
    layout: str = "contiguous"
    fused_rows: bool = False
    """Query and new keys are slices of a larger buffer."""
    shared_blocks: bool = False
    padding_rows: int = 0

    @property
    def op(self) -> str:
        """Schema name of the op that this case calls."""
        return "paged_attention" if self.query_lens is None else "flash_attn_varlen"

    @property
    def num_heads(self) -> int:
        """H."""
        return self.num_kv_heads * self.group

    @property
    def num_seqs(self) -> int:
        """B."""
        return len(self.query_lens if self.query_lens is not None else self.context_lens or ())

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Keys of each sequence, cached and new."""
        zeros = (0,) * self.num_seqs
        return tuple(a + b for a, b in zip(self.context_lens or zeros, self.new_lens or zeros, strict=True))


@singledispatch
def build(case: Any, seed: int = 0) -> dict[str, Any]:
    """Return the arguments of a case by schema name; the same case and seed give the same tensors.

    Every slot, lane, padding row and table entry that the op must not read holds NaN (127 in int8) or a wild block id.
    """
    raise TypeError(f"build: case must be one of the cases of torch_paged.testing, got {type(case).__name__}")


@build.register
def build_attention(case: AttentionCase, seed: int = 0) -> dict[str, Any]:
    """Build the arguments of one attention call."""
    generator = generator_for(case.name, seed)
    query_lens = (1,) * case.num_seqs if case.query_lens is None else case.query_lens
    live_rows = sum(query_lens)
    num_rows = live_rows + (0 if case.query_lens is None else case.padding_rows)
    query = random_rows(
        (num_rows, case.num_heads, case.head_dim), live_rows, case.dtype, generator, strided=case.fused_rows
    )
    positions = _positions(case, query_lens, generator)
    options: dict[str, Any] = {
        "kv_scales": None,
        "sinks": torch.randn(case.num_heads, generator=generator) if case.sinks else None,
        "alibi_slopes": torch.rand(case.num_heads, generator=generator) / 2 if case.alibi else None,
        "attn_mask": _mask(case, num_rows, generator),
        "softmax_scale": case.softmax_scale,
        "logits_soft_cap": case.logits_soft_cap,
        "sliding_window": case.sliding_window,
        "attention_chunk": case.attention_chunk,
        "value_dim": case.value_dim,
    }
    cache: dict[str, Any] = {"kv_cache": None, "block_tables": None, "context_lens": None}
    if case.context_lens is not None:
        cache = _cache(case, positions, generator)
        options["kv_scales"] = cache.pop("kv_scales")
    if case.op == "paged_attention":
        return {"query": query, **cache, **options}

    key = value = cu_seqlens_k = None
    if case.new_lens is not None:
        live = sum(case.new_lens)
        shape = (live + case.padding_rows, case.num_kv_heads)
        key = random_rows((*shape, case.head_dim), live, case.dtype, generator, strided=case.fused_rows)
        if not case.latent:
            width = case.new_value_dim or case.value_dim or case.head_dim
            value = random_rows((*shape, width), live, case.dtype, generator, strided=case.fused_rows)
        cu_seqlens_k = cumulative(case.new_lens)
    slack = int(torch.randint(0, 7, (), generator=generator))
    return {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens_q": cumulative(query_lens),
        "cu_seqlens_k": cu_seqlens_k,
        **cache,
        "max_seqlen_q": max(query_lens, default=0) + slack,
        "max_seqlen_k": max(case.kv_lens, default=0) + slack,
        "query_positions": None if case.positions is None else _padded(positions, num_rows),
        "causal": case.causal,
        **options,
    }


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    """Return (B + 1,) int32 prefix sums that start at 0."""
    return torch.tensor((0, *lengths)).cumsum(0).int()


def _padded(positions: list[Tensor], num_rows: int) -> Tensor:
    packed = torch.cat([torch.arange(0), *positions])
    return torch.nn.functional.pad(packed, (0, num_rows - packed.numel()), value=2**31 - 1).int()


def _positions(case: AttentionCase, query_lens: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    """Return the positions of the queries of each sequence."""
    positions = []
    for q_len, kv_len in zip(query_lens, case.kv_lens, strict=True):
        if case.positions == "anywhere":
            positions.append(torch.randint(-3, kv_len + 4, (q_len,), generator=generator))
        else:
            order = torch.randperm(q_len, generator=generator) if case.positions == "shuffled" else torch.arange(q_len)
            positions.append(kv_len - q_len + order)
    return positions


def _mask(case: AttentionCase, num_rows: int, generator: torch.Generator) -> Tensor | None:
    if case.mask is None:
        return None
    columns = max(case.kv_lens, default=0) + 2
    heads = {"shared": 1, "kv_heads": case.num_kv_heads, "heads": case.num_heads}[case.mask]
    wide = torch.rand((heads, num_rows, columns + 3), generator=generator) < 0.7
    wide[:, ::5] = False  # some rows see nothing
    mask = wide[:, :, :columns]
    return mask[0] if case.mask == "shared" else mask


def _cache(case: AttentionCase, positions: list[Tensor], generator: torch.Generator) -> dict[str, Any]:
    """Return cache, scales, tables and lengths; blocks that no query needs are freed."""
    assert case.context_lens is not None
    size = case.block_size
    counts = [-(-length // size) for length in case.context_lens]
    num_blocks = sum(counts) + 3
    ids = torch.randperm(num_blocks, generator=generator).split([*counts, num_blocks - sum(counts)])
    tables = torch.tensor(GARBAGE_ENTRIES).repeat(max(counts, default=0) + 2)[: max(counts, default=0) + 2]
    tables = tables.repeat(case.num_seqs, 1).int()  # (B, M)
    live = torch.zeros((num_blocks, size), dtype=torch.bool)
    for seq, (length, count) in enumerate(zip(case.context_lens, counts, strict=True)):
        mine = ids[seq].int()
        used = _used_entries(case, positions[seq], length)
        if case.shared_blocks and seq:
            common = min(length // size, case.context_lens[seq - 1] // size)
            before = tables[seq - 1, :common]
            mine = mine.clone()
            mine[:common] = torch.where((before >= 0) & (before < num_blocks), before, mine[:common])
        tables[seq, :count] = torch.where(used, mine, tables[seq, :count])
        filled = torch.arange(count * size).reshape(count, size) < length
        live[mine[used].long()] |= filled[used]
    width = case.value_dim or case.new_value_dim or case.head_dim
    cache, scales = random_cache(
        live,
        (case.head_dim,) if case.latent else (case.head_dim, width),
        case.num_kv_heads,
        case.stored_dim or case.head_dim,
        case.cache_dtype or case.dtype,
        case.scales_rank,
        generator,
    )
    return {
        "kv_cache": lay_out(cache, case.layout),
        "kv_scales": scales,
        "block_tables": tables,
        "context_lens": torch.tensor(case.context_lens, dtype=torch.int32),
    }


def _used_entries(case: AttentionCase, positions: Tensor, context_len: int) -> Tensor:
    """Return (blocks,) bool: entries with a key that length, window and chunk together let some query see."""
    p, j = positions[:, None], torch.arange(context_len)
    seen = torch.ones((positions.numel(), context_len), dtype=torch.bool)
    if case.sliding_window is not None:
        seen &= (p - j < case.sliding_window) & (p - j > (-1 if case.causal else -case.sliding_window))
    if case.attention_chunk is not None:
        seen &= (p // case.attention_chunk == j // case.attention_chunk) & (j <= p)
    seen = seen.any(0)
    return torch.nn.functional.pad(seen, (0, -context_len % case.block_size)).reshape(-1, case.block_size).any(1)
