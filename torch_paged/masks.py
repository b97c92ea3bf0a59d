"""Masks that causality alone cannot say: image blocks, trees, prefixes, gated chunks; for ``flash_attn_varlen``.

Each is a bool ``attn_mask``: a row for each packed query token, a column for each key position *of its sequence*.
Causality is in it, so pass it with ``causal=False`` and without the window or chunk that it was given. Rows of padding,
at and behind ``cu_seqlens_q[B]``, are False. Lengths are checked on the host: on an accelerator that waits for them.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Rows:
    """Where each packed query token is. Rows of padding have ``valid`` False."""

    seqs: Tensor  # (T,) int64, clamped for padding
    positions: Tensor  # (T,) int64, may be negative
    columns: Tensor  # (C,) int64
    valid: Tensor  # (T, C) bool: a row of a sequence, a column below its kv length


def image_block_mask(
    run_ids: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    *,
    num_tokens: int | None = None,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
) -> Tensor:
    """Open numbered runs of tokens to both directions, on top of causal attention.

    A key is visible when causality, window and chunk let it be seen, *or* when it lies in the same run as the query,
    however far away. The text around an image stays causal; the tokens of one image see each other.

    Dimensions:
        T packed query tokens, B sequences, C columns (key positions).

    Args:
        run_ids: (B, C) int. Number of the run that each token of the sequence belongs to (an image, a video frame),
            from the first token of the sequence on; below 0: none. Equal numbers are one run, adjacent or not.
        cu_seqlens_q: (B + 1,) int32, as for ``flash_attn_varlen``.
        kv_lens: (B,) int. Keys of each sequence: cached context and new tokens, at most C.
        num_tokens: T. None: ``cu_seqlens_q[B]``.
        sliding_window: tokens, as for ``flash_attn_varlen``. None: off.
        attention_chunk: tokens, as for ``flash_attn_varlen``. None: off.

    Returns:
        (T, C) bool, for ``causal=False`` without window and chunk.

    Mask:
        Six tokens, text, image 0 (three tokens), text, text; window 3::

            1 0 0 0 0 0
            1 1 1 1 0 0
            1 1 1 1 0 0
            0 1 1 1 0 0
            0 0 1 1 1 0
            0 0 0 1 1 1

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit together, a window or chunk below 1.

    Source:
        Gemma 3 Technical Report, arXiv 2503.19786, and its documentation in transformers (bidirectional image tokens).

    Example:
        >>> import torch
        >>> from torch_paged.masks import image_block_mask
        >>> runs = torch.tensor([[-1, 0, 0, 0, -1, -1]])
        >>> mask = image_block_mask(runs, torch.tensor([0, 6]), torch.tensor([6]), sliding_window=3)
        >>> mask.int()[:3]
        tensor([[1, 0, 0, 0, 0, 0],
                [1, 1, 1, 1, 0, 0],
                [1, 1, 1, 1, 0, 0]], dtype=torch.int32)
    """
    _check_ints("image_block_mask", "run_ids", run_ids, 2)
    _check_size("image_block_mask", "sliding_window", sliding_window, 1)
    _check_size("image_block_mask", "attention_chunk", attention_chunk, 1)
    rows = _rows("image_block_mask", cu_seqlens_q, kv_lens, num_tokens, run_ids.size(1))
    _check_batch("image_block_mask", "run_ids", run_ids.size(0), kv_lens)
    positions, columns = rows.positions[:, None], rows.columns
    visible = columns <= positions
    if sliding_window is not None:
        visible &= positions - columns < sliding_window
    if attention_chunk is not None:
        visible &= _floor_div(positions, attention_chunk) == _floor_div(columns, attention_chunk)
    if run_ids.size(1) and run_ids.size(0):
        own_run = run_ids[rows.seqs, rows.positions.clamp(0, run_ids.size(1) - 1)]  # (T,)
        inside = (own_run >= 0) & (rows.positions >= 0)
        visible |= inside[:, None] & (run_ids[rows.seqs] == own_run[:, None])
    return visible & rows.valid


def tree_mask(
    parents: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    *,
    num_tokens: int | None = None,
    num_columns: int | None = None,
) -> Tensor:
    """Let each token of a speculation tree see the context, its ancestors and itself.

    The query tokens of a sequence are the nodes of its tree(s), parents first; their keys lie at the last ``q_len``
    positions of the sequence, in the same order. A chain of parents is causal attention.

    Dimensions:
        T packed query tokens, B sequences, C columns (key positions).

    Args:
        parents: (T,) int. The parent of each node, counted from its sequence's first query token; -1: none, the node
            hangs on the context. Ignored at and behind ``cu_seqlens_q[B]``.
        cu_seqlens_q: (B + 1,) int32, as for ``flash_attn_varlen``.
        kv_lens: (B,) int. Keys of each sequence: context and all nodes.
        num_tokens: T. None: ``parents.size(0)``.
        num_columns: C. None: the largest of ``kv_lens``.

    Returns:
        (T, C) bool, for ``causal=False``. Rotary positions are depths, not columns: they are the caller's.

    Mask:
        Two tokens of context, then nodes with parents -1, 0, 0, 1 (0 is the root, 3 hangs on 1)::

            1 1  1 0 0 0
            1 1  1 1 0 0
            1 1  1 0 1 0
            1 1  1 1 0 1

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit together, a parent that is not before its child.

    Source:
        Miao et al., SpecInfer, arXiv 2305.09781; Cai et al., Medusa, arXiv 2401.10774.

    Example:
        >>> import torch
        >>> from torch_paged.masks import tree_mask
        >>> tree_mask(torch.tensor([-1, 0, 0, 1]), torch.tensor([0, 4]), torch.tensor([6])).int()
        tensor([[1, 1, 1, 0, 0, 0],
                [1, 1, 1, 1, 0, 0],
                [1, 1, 1, 0, 1, 0],
                [1, 1, 1, 1, 0, 1]], dtype=torch.int32)
    """
    _check_ints("tree_mask", "parents", parents, 1)
    if num_tokens is not None and num_tokens != parents.size(0):
        raise ValueError(f"tree_mask: parents must have num_tokens = {num_tokens} entries, got {parents.size(0)}")
    rows = _rows("tree_mask", cu_seqlens_q, kv_lens, parents.size(0), num_columns)
    starts = cu_seqlens_q.long()
    if kv_lens.numel() == 0 or parents.numel() == 0:
        return rows.valid
    own = torch.arange(parents.size(0), device=parents.device) - starts[rows.seqs]  # (T,) index in the sequence
    live = torch.arange(parents.size(0), device=parents.device) < starts[-1]
    wrong = live & ((parents >= own) | (parents < -1))
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            "tree_mask: parents must be -1 or the index of an earlier token of the sequence, "
            f"got {int(parents[index])} at index {index}"
        )
    context = (kv_lens.long() - starts.diff())[rows.seqs]  # (T,)
    visible = rows.columns < context[:, None]
    node = torch.where(live, own, -1)
    while bool((node >= 0).any()):
        visible |= (rows.columns == (context + node)[:, None]) & (node >= 0)[:, None]
        node = torch.where(node >= 0, parents[(starts[rows.seqs] + node).clamp(min=0)].long(), -1)
    return visible & rows.valid


def prefix_lm_mask(
    prefix_lens: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    *,
    num_tokens: int | None = None,
    num_columns: int | None = None,
) -> Tensor:
    """Let every token see the whole prefix, and what follows the prefix causally.

    Dimensions:
        T packed query tokens, B sequences, C columns (key positions).

    Args:
        prefix_lens: (B,) int. Tokens of the prefix, counted from the first token of the sequence; 0: causal attention.
        cu_seqlens_q: (B + 1,) int32, as for ``flash_attn_varlen``.
        kv_lens: (B,) int. Keys of each sequence: cached context and new tokens.
        num_tokens: T. None: ``cu_seqlens_q[B]``.
        num_columns: C. None: the largest of ``kv_lens``.

    Returns:
        (T, C) bool, for ``causal=False``. A query in the prefix sees the part of the prefix that has keys.

    Mask:
        Five tokens, a prefix of three::

            1 1 1 0 0
            1 1 1 0 0
            1 1 1 0 0
            1 1 1 1 0
            1 1 1 1 1

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit together.

    Source:
        Raffel et al., T5, arXiv 1910.10683, section 3.2.1; Dong et al., UniLM, arXiv 1905.03197; Beyer et al.,
        PaliGemma, arXiv 2407.07726.

    Example:
        >>> import torch
        >>> from torch_paged.masks import prefix_lm_mask
        >>> prefix_lm_mask(torch.tensor([3]), torch.tensor([0, 2]), torch.tensor([5])).int()
        tensor([[1, 1, 1, 1, 0],
                [1, 1, 1, 1, 1]], dtype=torch.int32)
    """
    _check_ints("prefix_lm_mask", "prefix_lens", prefix_lens, 1)
    rows = _rows("prefix_lm_mask", cu_seqlens_q, kv_lens, num_tokens, num_columns)
    _check_batch("prefix_lm_mask", "prefix_lens", prefix_lens.size(0), kv_lens)
    if kv_lens.numel() == 0:
        return rows.valid
    visible = (rows.columns <= rows.positions[:, None]) | (rows.columns < prefix_lens[rows.seqs][:, None])
    return visible & rows.valid


def moba_mask(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    *,
    chunk_size: int,
    top_k: int,
) -> Tensor:
    """Let each query head see its own chunk of keys and the earlier chunks that score best against it.

    The score of a chunk is the query times the mean of the chunk's keys, in float32. Only chunks before the query's own
    compete (a later one would show the future); among equals the earlier wins.

    Dimensions:
        T packed query tokens, B sequences, H query heads, KH kv heads, D head_dim, C columns (key positions).

    Args:
        query: (T, H, D). The queries that attend, after rotary embedding.
        key: (B, KH, C, D') with D' >= D, the keys by position, as ``gather_cache`` returns them. What lies behind a
            sequence's kv length is not looked at.
        cu_seqlens_q: (B + 1,) int32, as for ``flash_attn_varlen``.
        kv_lens: (B,) int. Keys of each sequence: cached context and new tokens, at most C.
        chunk_size: tokens in a chunk, >= 1.
        top_k: chunks that a query sees, its own included, >= 1. 1: the own chunk only. Large: causal attention.

    Returns:
        (H, T, C) bool, for ``causal=False``.

    Mask:
        Six tokens in chunks of two, ``top_k=2``, queries that like the first chunk::

            1 0  0 0  0 0
            1 1  0 0  0 0
            1 1  1 0  0 0
            1 1  1 1  0 0
            1 1  0 0  1 0
            1 1  0 0  1 1

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit together, a size below 1.

    Source:
        Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189, section 2.2.

    Example:
        >>> import torch
        >>> from torch_paged.masks import moba_mask
        >>> key = torch.tensor([3.0, 3.0, 1.0, 1.0, 2.0, 2.0]).reshape(1, 1, 6, 1)
        >>> mask = moba_mask(torch.ones(2, 1, 1), key, torch.tensor([0, 2]), torch.tensor([6]), chunk_size=2, top_k=2)
        >>> mask.int()
        tensor([[[1, 1, 0, 0, 1, 0],
                 [1, 1, 0, 0, 1, 1]]], dtype=torch.int32)
    """
    for name, size in (("chunk_size", chunk_size), ("top_k", top_k)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"moba_mask: {name} must be an int >= 1, got {size!r}")
    for name, value in (("query", query), ("key", key)):
        if not isinstance(value, Tensor):
            raise ValueError(f"moba_mask: {name} must be a tensor, got {value!r}")
    if (
        query.dim() != 3
        or key.dim() != 4
        or key.size(1) == 0
        or query.size(1) % key.size(1)
        or key.size(3) < query.size(2)
    ):
        raise ValueError(
            "moba_mask: key must be (B, KH, C, D') for query (T, H, D), with H % KH == 0 and D' >= D, got "
            f"{tuple(key.shape)} for {tuple(query.shape)}"
        )
    num_tokens, num_heads, head_dim = query.shape
    rows = _rows("moba_mask", cu_seqlens_q, kv_lens, num_tokens, key.size(2))
    _check_batch("moba_mask", "key", key.size(0), kv_lens)
    num_chunks = key.size(2) // chunk_size  # whole ones: a chunk that competes has all its keys
    own_chunk = _floor_div(rows.positions, chunk_size)  # (T,)
    chosen = torch.zeros((num_heads, num_tokens, -(-key.size(2) // chunk_size)), dtype=torch.bool, device=query.device)
    if num_chunks and num_tokens and top_k > 1:
        scores = torch.zeros((num_heads, num_tokens, num_chunks), device=query.device)
        grouped = query.float().unflatten(1, (key.size(1), num_heads // key.size(1)))  # (T, KH, G, D)
        bounds = cu_seqlens_q.tolist()
        for seq, (first, last) in enumerate(pairwise(bounds)):
            means = _chunk_means(key[seq, :, :, :head_dim], int(kv_lens[seq]), chunk_size, num_chunks)
            scores[:, first:last] = torch.einsum("tkgd,kcd->kgtc", grouped[first:last], means).flatten(0, 1)
        past = torch.arange(num_chunks, device=query.device) < own_chunk[:, None]  # (T, chunks)
        scores = scores.masked_fill(~past, float("-inf"))
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : top_k - 1]
        chosen[..., :num_chunks].scatter_(-1, best, True)
        chosen[..., :num_chunks] &= past
    chunks = _floor_div(rows.columns, chunk_size)  # (C,)
    visible = chosen[..., chunks] | (chunks == own_chunk[:, None])
    return visible & (rows.columns <= rows.positions[:, None]) & rows.valid


def _chunk_means(keys: Tensor, kv_len: int, chunk_size: int, num_chunks: int) -> Tensor:
    """Return (KH, chunks, D) float32 means of the whole chunks of keys (KH, C, D); 0 where there are no keys."""
    whole = min(kv_len // chunk_size, num_chunks)
    means = torch.zeros((keys.size(0), num_chunks, keys.size(2)), device=keys.device)
    means[:, :whole] = keys[:, : whole * chunk_size].float().unflatten(1, (whole, chunk_size)).mean(2)
    return means


def _rows(
    function: str, cu_seqlens_q: Tensor, kv_lens: Tensor, num_tokens: int | None, num_columns: int | None
) -> _Rows:
    _check_ints(function, "cu_seqlens_q", cu_seqlens_q, 1)
    _check_ints(function, "kv_lens", kv_lens, 1)
    num_seqs = kv_lens.size(0)
    if cu_seqlens_q.size(0) != num_seqs + 1:
        raise ValueError(
            f"{function}: cu_seqlens_q must have one entry more than kv_lens, got {cu_seqlens_q.size(0)} for {num_seqs}"
        )
    _check_size(function, "num_tokens", num_tokens, 0)
    _check_size(function, "num_columns", num_columns, 0)
    starts, lengths = cu_seqlens_q.tolist(), kv_lens.tolist()
    if num_tokens is None:
        num_tokens = starts[-1]
    if num_columns is None:
        num_columns = max(lengths, default=0)
    _check_lengths(function, starts, lengths, num_tokens, num_columns)
    device = cu_seqlens_q.device
    tokens = torch.arange(num_tokens, device=device)
    columns = torch.arange(num_columns, device=device)
    if num_seqs == 0:
        return _Rows(tokens, tokens, columns, torch.zeros((num_tokens, num_columns), dtype=torch.bool, device=device))
    bounds = cu_seqlens_q.long()
    seqs = torch.searchsorted(bounds[1:], tokens, right=True).clamp(max=num_seqs - 1)
    positions = kv_lens.long()[seqs] - bounds[seqs + 1] + tokens
    valid = (tokens < bounds[-1])[:, None] & (columns < kv_lens[seqs][:, None])
    return _Rows(seqs, positions, columns, valid)


def _check_lengths(function: str, starts: list[int], kv_lens: list[int], num_tokens: int, num_columns: int) -> None:
    if starts[0] != 0:
        raise ValueError(f"{function}: cu_seqlens_q must start with 0, got {starts[0]} at index 0")
    for index, (before, start) in enumerate(pairwise(starts), 1):
        if start < before:
            raise ValueError(f"{function}: cu_seqlens_q must not decrease, got {start} after {before} at index {index}")
    if starts[-1] > num_tokens:
        end = f"{starts[-1]} at index {len(starts) - 1}"
        raise ValueError(f"{function}: cu_seqlens_q must end at or before T = {num_tokens}, got {end}")
    for index, kv_len in enumerate(kv_lens):
        if kv_len < 0:
            raise ValueError(f"{function}: kv_lens must be >= 0, got {kv_len} at index {index}")
        if kv_len > num_columns:
            raise ValueError(f"{function}: kv_lens must lie in [0, C = {num_columns}], got {kv_len} at index {index}")


def _check_size(function: str, name: str, size: int | None, low: int) -> None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < low):
        raise ValueError(f"{function}: {name} must be None or an int >= {low}, got {size!r}")


def _floor_div(x: Tensor, size: int) -> Tensor:
    return x.div(size, rounding_mode="floor")


def _check_ints(function: str, name: str, tensor: Tensor, rank: int) -> None:
    is_tensor = isinstance(tensor, Tensor)
    if not is_tensor or tensor.dim() != rank or tensor.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(tensor.shape)} {tensor.dtype}" if is_tensor else repr(tensor)
        raise ValueError(
            f"{function}: {name} must have {rank} dimension{'s' * (rank > 1)} of int32 or int64, got {got}"
        )


def _check_batch(function: str, name: str, size: int, kv_lens: Tensor) -> None:
    if size != kv_lens.size(0):
        raise ValueError(f"{function}: {name} must have one row for each of {kv_lens.size(0)} sequences, got {size}")
