"""Named cases of the ops that write, copy and gather the cache, and of ``merge_attention_states``."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from torch_paged.testing.cases import build
from torch_paged.testing.tensors import GARBAGE_ENTRIES, generator_for, lay_out, random_cache, random_rows


@dataclass(frozen=True)
class WriteCase:
    """One call of ``reshape_and_cache``, or of ``quantize_and_cache`` when the scales have rank 4."""

    name: str
    num_tokens: int = 17
    skipped_tokens: int = 0
    """Tokens with slot -1, whose rows are NaN."""
    num_kv_heads: int = 2
    head_dim: int = 64
    value_dim: int | None = None
    """None: head_dim."""
    stored_dim: int | None = None
    """None: head_dim."""
    num_blocks: int = 5
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    """None: the dtype of the rows."""
    scales_rank: int | None = None
    latent: bool = False
    layout: str = "contiguous"
    fused_rows: bool = False
    slot_dtype: torch.dtype = torch.int64
    magnitude: float = 1.0

    @property
    def op(self) -> str:
        """Schema name of the op that this case calls."""
        return "quantize_and_cache" if self.scales_rank == 4 else "reshape_and_cache"


@dataclass(frozen=True)
class CopyCase:
    """One call of ``copy_blocks``."""

    op: ClassVar[str] = "copy_blocks"
    name: str
    pairs: tuple[tuple[int, int], ...] = ((0, 3), (4, 1))
    num_blocks: int = 6
    num_kv_heads: int = 2
    stored_dim: int = 40
    block_size: int = 3
    cache_dtype: torch.dtype = torch.float32
    scales_rank: int | None = None
    latent: bool = False
    layout: str = "contiguous"
    id_dtype: torch.dtype = torch.int64


@dataclass(frozen=True)
class GatherCase:
    """One call of ``gather_cache``."""

    op: ClassVar[str] = "gather_cache"
    name: str
    context_lens: tuple[int, ...] = (17, 0, 63, 1)
    left_padded: bool = False
    missing_entries: bool = False
    """Some entries inside the context are -1."""
    extra_columns: int = 3
    num_kv_heads: int = 2
    stored_dim: int = 64
    block_size: int = 16
    cache_dtype: torch.dtype = torch.float32
    scales_rank: int | None = None
    latent: bool = False
    layout: str = "contiguous"


@dataclass(frozen=True)
class MergeCase:
    """One call of ``merge_attention_states``."""

    op: ClassVar[str] = "merge_attention_states"
    name: str
    parts: int = 3
    tokens: int = 17
    num_heads: int = 8
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    sinks: bool = False
    empty: bool = False
    """Some (part, row) pairs saw no key, and a whole row saw none."""


@build.register
def build_write(case: WriteCase, seed: int = 0) -> dict[str, Any]:
    """Build the arguments of one write; the cache is poison before it, tokens may have slot -1."""
    generator = generator_for(case.name, seed)
    rows = case.num_tokens + case.skipped_tokens
    order = torch.randperm(rows, generator=generator)
    cache_dtype = case.cache_dtype or case.dtype
    stored_dim = case.stored_dim or case.head_dim
    new = []
    for width in (case.head_dim,) if case.latent else (case.head_dim, case.value_dim or case.head_dim):
        shape = (rows, case.num_kv_heads, width)
        buffer = random_rows(shape, case.num_tokens, case.dtype, generator, strided=case.fused_rows)
        buffer[...] = case.magnitude * buffer[order]
        new.append(buffer)
    slots = torch.randperm(case.num_blocks * case.block_size, generator=generator)[: case.num_tokens]
    slots = torch.cat([slots, torch.full((case.skipped_tokens,), -1)])[order]
    dead = torch.zeros((case.num_blocks, case.block_size), dtype=torch.bool)
    cache, scales = random_cache(
        dead, (0,) * len(new), case.num_kv_heads, stored_dim, cache_dtype, case.scales_rank, generator
    )
    arguments = {
        "key": new[0],
        "value": None if case.latent else new[1],
        "kv_cache": lay_out(cache, case.layout),
        "slot_mapping": slots.to(case.slot_dtype),
        "kv_scales": scales,
    }
    order_of_names = ("key", "value", "kv_cache", "kv_scales", "slot_mapping")
    return {name: arguments[name] for name in order_of_names} if case.op == "quantize_and_cache" else arguments


@build.register
def build_copy(case: CopyCase, seed: int = 0) -> dict[str, Any]:
    """Build the arguments of one copy; every block is live."""
    live = torch.ones((case.num_blocks, case.block_size), dtype=torch.bool)
    widths = (case.stored_dim,) * (1 if case.latent else 2)
    cache, scales = random_cache(
        live,
        widths,
        case.num_kv_heads,
        case.stored_dim,
        case.cache_dtype,
        case.scales_rank,
        generator_for(case.name, seed),
    )
    pairs = torch.tensor(case.pairs, dtype=case.id_dtype).reshape(-1, 2)
    return {
        "kv_cache": lay_out(cache, case.layout),
        "src_blocks": pairs[:, 0].contiguous(),
        "dst_blocks": pairs[:, 1].contiguous(),
        "kv_scales": scales,
    }


@build.register
def build_gather(case: GatherCase, seed: int = 0) -> dict[str, Any]:
    """Build the arguments of one gather; every slot outside the sequences is poison."""
    generator = generator_for(case.name, seed)
    size = case.block_size
    counts = [-(-length // size) for length in case.context_lens]
    num_blocks = sum(counts) + 2
    ids = torch.randperm(num_blocks, generator=generator).split([*counts, 2])
    width = max(counts, default=0) + 1
    tables = torch.tensor(GARBAGE_ENTRIES).repeat(width)[:width].repeat(len(counts), 1).int()
    live = torch.zeros((num_blocks, size), dtype=torch.bool)
    for seq, (length, count) in enumerate(zip(case.context_lens, counts, strict=True)):
        kept = torch.ones(count, dtype=torch.bool)
        if case.missing_entries:
            kept[1::2] = False
        tables[seq, :count] = torch.where(kept, ids[seq], -1).int()
        filled = torch.arange(count * size).reshape(count, size) < length
        live[ids[seq][kept]] = filled[kept]
    cache, scales = random_cache(
        live,
        (case.stored_dim,) * (1 if case.latent else 2),
        case.num_kv_heads,
        case.stored_dim,
        case.cache_dtype,
        case.scales_rank,
        generator,
    )
    lengths = torch.tensor(case.context_lens, dtype=torch.int32)
    max_len = max(case.context_lens, default=0) + case.extra_columns
    return {
        "kv_cache": lay_out(cache, case.layout),
        "block_tables": tables,
        "context_lens": lengths,
        "max_len": max_len,
        "kv_scales": scales,
        "starts": max_len - lengths if case.left_padded else None,
    }


@build.register
def build_merge(case: MergeCase, seed: int = 0) -> dict[str, Any]:
    """Build the arguments of one merge; the outputs of parts that saw no key are NaN."""
    generator = generator_for(case.name, seed)
    shape = (case.parts, case.tokens, case.num_heads)
    outs = torch.randn((*shape, case.head_dim), generator=generator).to(case.dtype)
    lses = torch.randn(shape, generator=generator) * 3
    if case.empty:
        nothing = torch.rand(shape, generator=generator) < 0.3
        nothing[:, -1:] = True
        lses.masked_fill_(nothing, float("-inf"))
        outs.masked_fill_(nothing[..., None], float("nan"))
    return {
        "outs": outs,
        "lses": lses,
        "sinks": torch.randn(case.num_heads, generator=generator) if case.sinks else None,
    }
