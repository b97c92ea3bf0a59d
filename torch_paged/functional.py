"""The public functions: defaults, ``return_stats``, and one full positional call of each op.

Positional, because DTensor needs tensors that way; in one place per op, because that is easy to get wrong. A decode
without options spells no options either: reading them costs the dispatcher more than checking the whole call.
"""

from typing import Literal, TypeAlias, overload

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from torch_paged.dispatch import calls as _calls
from torch_paged.dispatch import overloads as _ops
from torch_paged.explain import LOG, log_choice

Stats: TypeAlias = tuple[Tensor, Tensor, Tensor]


def reshape_and_cache(
    key: Tensor, value: Tensor | None, kv_cache: Tensor, slot_mapping: Tensor, *, kv_scales: Tensor | None = None
) -> None:
    """Write new keys and values into their slots of the cache, in place.

    Each token's rows go to slot ``block_id * S + offset`` of a ``(2, N, KH, S, DS)`` cache; lanes from the rows' width
    up to ``DS`` become zero. With ``kv_scales`` per tensor or per head the rows are quantised with these scales.

    Dimensions:
        T: tokens, KH: kv heads, D: key width, DV: value width (DV <= D <= DS), N: blocks, S: tokens in a block.

    Args:
        key: (T, KH, D) float32, bfloat16 or float16. New keys, already rotated where the model rotates them.
        value: (T, KH, DV), the key's dtype. New values. None exactly for a latent cache.
        kv_cache: (2, N, KH, S, DS), the key's dtype, int8, float8_e4m3fn or float8_e5m2; (1, N, KH, S, DS) is a latent
            cache. Written in place.
        slot_mapping: (T,) int64 or int32. The slot of each token; -1 skips the token. Slots should be distinct: the
            last writer of a slot is unspecified.
        kv_scales: (2,) or (2, KH) float32, with a quantised cache only. ``x ~= q * scale``. None: not quantised.

    Returns:
        None.

    Raises:
        ValueError: an argument breaks a rule, or a slot lies outside ``[-1, N * S)``. Nothing was written.
        NotImplementedError: the device's backend cannot do this call.

    Source:
        vLLM's ``reshape_and_cache`` (https://github.com/vllm-project/vllm), whose slot arithmetic this keeps.

    Example:
        >>> import torch, torch_paged
        >>> kv_cache = torch.zeros(2, 4, 1, 2, 8)  # 4 blocks of 2 tokens
        >>> key = torch.ones(3, 1, 8)
        >>> slots = torch.tensor([6, 7, -1])  # block 3; the last token is padding
        >>> torch_paged.reshape_and_cache(key, 2 * key, kv_cache, slots)
        >>> kv_cache[:, 3, 0, :, 0]
        tensor([[1., 1.],
                [2., 2.]])
    """
    if LOG:
        log_choice("reshape_and_cache", key, value, kv_cache, slot_mapping, kv_scales)
    ops = _ops if is_dynamo_compiling() else _calls
    ops.reshape_and_cache(key, value, kv_cache, slot_mapping, kv_scales)


def quantize_and_cache(
    key: Tensor, value: Tensor | None, kv_cache: Tensor, kv_scales: Tensor, slot_mapping: Tensor
) -> None:
    """Quantise new keys and values with a scale per token and head, and write rows and scales into the cache, in place.

    The scale of a row is its largest magnitude divided by the dtype's largest value (int8 127, float8_e4m3fn 448,
    float8_e5m2 57344), and 1 for a row of zeros. The layout is that of ``reshape_and_cache``.

    Dimensions:
        T: tokens, KH: kv heads, D: key width, DV: value width (DV <= D <= DS), N: blocks, S: tokens in a block.

    Args:
        key: (T, KH, D) float32, bfloat16 or float16. New keys.
        value: (T, KH, DV), the key's dtype. New values. None exactly for a latent cache.
        kv_cache: (2, N, KH, S, DS) int8, float8_e4m3fn or float8_e5m2; (1, N, KH, S, DS) is a latent cache. Written in
            place.
        kv_scales: (2, N, KH, S) float32, leading size that of ``kv_cache``. Written in place at the tokens' slots.
        slot_mapping: (T,) int64 or int32. The slot of each token; -1 skips the token.

    Returns:
        None.

    Raises:
        ValueError: an argument breaks a rule, or a slot lies outside ``[-1, N * S)``. Nothing was written.
        NotImplementedError: the device's backend cannot do this call.

    Source:
        Symmetric quantisation with one scale per token and head, as in KVQuant (https://arxiv.org/abs/2401.18079).

    Example:
        >>> import torch, torch_paged
        >>> kv_cache = torch.zeros(2, 4, 1, 2, 8, dtype=torch.int8)
        >>> kv_scales = torch.ones(2, 4, 1, 2)
        >>> key = torch.full((1, 1, 8), 12.7)
        >>> torch_paged.quantize_and_cache(key, key, kv_cache, kv_scales, torch.tensor([5]))
        >>> kv_cache[0, 2, 0, 1, :3], round(kv_scales[0, 2, 0, 1].item(), 4)
        (tensor([127, 127, 127], dtype=torch.int8), 0.1)
    """
    if LOG:
        log_choice("quantize_and_cache", key, value, kv_cache, kv_scales, slot_mapping)
    _ops.quantize_and_cache(key, value, kv_cache, kv_scales, slot_mapping)


@overload
def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    kv_scales: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...
@overload
def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    kv_scales: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    return_stats: Literal[True],
) -> Stats: ...
def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    kv_scales: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    return_stats: bool = False,
) -> Tensor | Stats:
    """Attend with one query per sequence to the sequence's tokens in the paged cache (decode).

    The query sits at position ``context_len - 1``: its own key is already in the cache and counted. Softmax and
    accumulation are float32; the cache is ``(2, N, KH, S, DS)`` and token ``j`` of a sequence lies in block
    ``block_tables[b, j // S]``.

    Dimensions:
        B: sequences, H: query heads, KH: kv heads (H % KH == 0; head h reads kv head h // (H // KH)), D: head_dim,
        N: blocks, S: tokens in a block, M: block-table width, DS: stored head_dim (DS >= D).

    Args:
        query: (B, H, D) float32, bfloat16 or float16.
        kv_cache: (2, N, KH, S, DS), the query's dtype, int8, float8_e4m3fn or float8_e5m2; (1, N, KH, S, DS) is a
            latent cache, whose value is the first ``value_dim`` lanes of the key.
        block_tables: (B, M) int32. Block ids. Entries that no query can see may hold anything, -1 included.
        context_lens: (B,) int32. Tokens of each sequence in the cache. 0 is legal.
        kv_scales: (2,), (2, KH) or (2, N, KH, S) float32, with a quantised cache only. None: not quantised.
        sinks: (H,) float32. One more logit per head, without a value. None: no sink.
        alibi_slopes: (H,) float32. Adds ``-slope * distance in tokens`` to the logits. None: no bias.
        attn_mask: (B, C), (KH, B, C) or (H, B, C) bool. Column = key position; False hides. None: nothing hidden.
        softmax_scale: factor on the logits. None: ``1 / sqrt(D)``.
        logits_soft_cap: ``cap * tanh(logit / cap)``, >= 2**-126 (a normal float32). 0.0: off.
        sliding_window: tokens that a query sees, itself included. None: all.
        attention_chunk: chunk length in tokens; a query sees its own chunk only. None: off.
        value_dim: width of the output in lanes. Required for a latent cache. None: D.
        return_stats: also return ``lse`` and ``max_logits``.

    Returns:
        out (B, H, value_dim) in the query's dtype. With ``return_stats`` also lse (B, H) float32, natural log, sink
        included, and max_logits (B, H) float32, sink excluded. A row that sees no key is 0, lse -inf (or its sink),
        max_logits -inf.

    Mask:
        context_len 6, sliding_window 4: keys 0..5 of the one query::

            0 0 1 1 1 1

    Raises:
        ValueError: an argument breaks a rule, or a used block id lies outside ``[0, N)``.
        NotImplementedError: the device's backend cannot do this call.

    Source:
        Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention (https://arxiv.org/abs/2309.06180).

    Example:
        >>> import torch, torch_paged
        >>> kv_cache = torch.zeros(2, 4, 1, 2, 8)
        >>> kv_cache[1, 3] = 1.0  # values of block 3
        >>> kv_cache[1, 0] = 4.0
        >>> query = torch.ones(1, 2, 8)  # one sequence, 2 query heads share a kv head
        >>> block_tables = torch.tensor([[3, 0]], dtype=torch.int32)
        >>> context_lens = torch.tensor([3], dtype=torch.int32)  # two tokens in block 3, one in block 0
        >>> torch_paged.paged_attention(query, kv_cache, block_tables, context_lens)[0, :, 0]
        tensor([2., 2.])
    """
    compiling = is_dynamo_compiling()
    ops = _ops if compiling else _calls
    op = ops.paged_attention_with_stats if return_stats else ops.paged_attention
    if compiling:
        # Inductor passes what is left to its default by keyword, at 0.2 us each: spell the last argument.
        if value_dim is None and query.dim() == 3 and kv_cache.dim() == 5 and kv_cache.size(0) == 2:
            value_dim = query.size(-1)
    elif (
        (kv_scales is None and sinks is None and alibi_slopes is None and attn_mask is None)
        and (softmax_scale is None and logits_soft_cap == 0.0)
        and (sliding_window is None and attention_chunk is None and value_dim is None)
        and not LOG
    ):
        return op(query, kv_cache, block_tables, context_lens)  # type: ignore[no-any-return]
    arguments = (
        query,
        kv_cache,
        block_tables,
        context_lens,
        kv_scales,
        sinks,
        alibi_slopes,
        attn_mask,
        softmax_scale,
        logits_soft_cap,
        sliding_window,
        attention_chunk,
        value_dim,
    )
    if LOG:
        log_choice("paged_attention", *arguments)
    return op(*arguments)  # type: ignore[no-any-return]


@overload
def flash_attn_varlen(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    kv_cache: Tensor | None = None,
    block_tables: Tensor | None = None,
    context_lens: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    kv_scales: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...
@overload
def flash_attn_varlen(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    kv_cache: Tensor | None = None,
    block_tables: Tensor | None = None,
    context_lens: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    kv_scales: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    return_stats: Literal[True],
) -> Stats: ...
def flash_attn_varlen(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    kv_cache: Tensor | None = None,
    block_tables: Tensor | None = None,
    context_lens: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    kv_scales: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    value_dim: int | None = None,
    return_stats: bool = False,
) -> Tensor | Stats:
    """Attend with packed ragged queries to new keys, to the paged cache, or to both in one softmax.

    Sequence ``b`` owns query rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``. Its keys are the ``context_lens[b]``
    tokens in the cache, then its rows of ``key`` and ``value``; either part may be left out. Rows after the last
    sequence are padding.

    Dimensions:
        T: query rows, B: sequences, Tk: rows of new keys, H: query heads, KH: kv heads (H % KH == 0), D: head_dim,
        DV: value width, N: blocks, S: tokens in a block, M: block-table width, DS: stored head_dim (DS >= D).

    Args:
        query: (T, H, D) float32, bfloat16 or float16.
        key: (Tk, KH, D), the query's dtype. New keys beside the cache. None: all keys are in the cache.
        value: (Tk, KH, DV), the query's dtype. Goes with ``key``; None for a latent cache.
        cu_seqlens_q: (B + 1,) int32. Starts at 0, never falls.
        cu_seqlens_k: (B + 1,) int32. The same for ``key``; goes with it.
        kv_cache: (2, N, KH, S, DS), the query's dtype, int8, float8_e4m3fn or float8_e5m2; (1, N, KH, S, DS) is latent.
            None: no cached context.
        block_tables: (B, M) int32. Block ids; goes with ``kv_cache``. Entries that no query can see may hold anything.
        context_lens: (B,) int32. Tokens of each sequence in the cache; goes with ``kv_cache``.
        max_seqlen_q: upper bound on the queries of a sequence, in tokens. The result does not depend on it.
        max_seqlen_k: upper bound on the kv length of a sequence, in tokens. The result does not depend on it.
        kv_scales: (2,), (2, KH) or (2, N, KH, S) float32, with a quantised cache only. None: not quantised.
        sinks: (H,) float32. One more logit per head, without a value. None: no sink.
        alibi_slopes: (H,) float32. Adds ``-slope * distance in tokens`` to the logits. None: no bias.
        attn_mask: (T, C), (KH, T, C) or (H, T, C) bool. Column = key position in its sequence; False hides. None: off.
        query_positions: (T,) int32. Position of each query row. None: the last rows of the kv length, in order.
        softmax_scale: factor on the logits. None: ``1 / sqrt(D)``.
        logits_soft_cap: ``cap * tanh(logit / cap)``, >= 2**-126 (a normal float32). 0.0: off.
        causal: a query sees keys up to its own position. False: off.
        sliding_window: window in tokens, itself included: ``0 <= p - j < window``, without ``causal``
            ``|p - j| < window``. None: off.
        attention_chunk: chunk length in tokens; a query sees its own chunk up to itself. None: off.
        value_dim: width of the output in lanes. Required for a latent cache. None: DV where values are given, else D.
        return_stats: also return ``lse`` and ``max_logits``.

    Returns:
        out (T, H, value_dim) in the query's dtype. With ``return_stats`` also lse (T, H) float32, natural log, sink
        included, and max_logits (T, H) float32, sink excluded. A row that sees no key is 0, lse -inf (or its sink),
        max_logits -inf; padding rows are 0, -inf, -inf.

    Mask:
        3 queries after 2 cached tokens, causal, without and with sliding_window 2::

            1 1 1 0 0      0 1 1 0 0
            1 1 1 1 0      0 0 1 1 0
            1 1 1 1 1      0 0 0 1 1

    Raises:
        ValueError: an argument breaks a rule, or a used block id lies outside ``[0, N)``.
        NotImplementedError: the device's backend cannot do this call.

    Source:
        Dao, FlashAttention-2 (https://arxiv.org/abs/2307.08691), and its ``flash_attn_varlen_func``, whose causal masks
        are aligned to the last key as here.

    Example:
        >>> import torch, torch_paged
        >>> query = torch.ones(3, 2, 8)  # one sequence of 3 tokens
        >>> key, value = torch.ones(3, 1, 8), torch.arange(3.0).reshape(3, 1, 1).expand(3, 1, 8)
        >>> cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
        >>> out = torch_paged.flash_attn_varlen(
        ...     query, key, value, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        ...     max_seqlen_q=3, max_seqlen_k=3, causal=True)
        >>> out[:, 0, 0]
        tensor([0.0000, 0.5000, 1.0000])
    """
    arguments = (
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        kv_cache,
        block_tables,
        context_lens,
        max_seqlen_q,
        max_seqlen_k,
        kv_scales,
        sinks,
        alibi_slopes,
        attn_mask,
        query_positions,
        softmax_scale,
        logits_soft_cap,
        causal,
        sliding_window,
        attention_chunk,
        value_dim,
    )
    if LOG:
        log_choice("flash_attn_varlen", *arguments)
    op = _ops.flash_attn_varlen_with_stats if return_stats else _ops.flash_attn_varlen
    return op(*arguments)  # type: ignore[no-any-return]


def merge_attention_states(outs: Tensor, lses: Tensor, *, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys into attention over their union.

    Each part is an ``out`` with its ``lse``, as ``return_stats=True`` gives them; the parts are stacked in the leading
    dimension and accumulated in float32.

    Dimensions:
        P: parts (P >= 1), T: query rows, H: query heads, D: head_dim.

    Args:
        outs: (P, T, H, D) float32, bfloat16 or float16. Outputs of the parts.
        lses: (P, T, H) float32. Natural logs. -inf: the part saw no key and weighs nothing.
        sinks: (H,) float32. Counted once here; leave it out of every part. None: no sink, or already in one part.

    Returns:
        out (T, H, D) in the dtype of ``outs`` and lse (T, H) float32. Rows that saw no key in any part are 0 and -inf
        (or their sink).

    Raises:
        ValueError: an argument breaks a rule.
        NotImplementedError: the device's backend cannot do this call.

    Source:
        The merge of attention states in FlashInfer (https://arxiv.org/abs/2501.01005), with natural logs.

    Example:
        >>> import math, torch, torch_paged
        >>> outs = torch.tensor([1.0, 5.0]).reshape(2, 1, 1, 1)
        >>> lses = torch.tensor([math.log(3.0), 0.0]).reshape(2, 1, 1)  # the first part weighs 3 of 4
        >>> out, lse = torch_paged.merge_attention_states(outs, lses)
        >>> round(out.item(), 3), round(math.exp(lse.item()), 3)
        (2.0, 4.0)
    """
    if LOG:
        log_choice("merge_attention_states", outs, lses, sinks)
    return _ops.merge_attention_states(outs, lses, sinks)  # type: ignore[no-any-return]


def copy_blocks(kv_cache: Tensor, src_blocks: Tensor, dst_blocks: Tensor, *, kv_scales: Tensor | None = None) -> None:
    """Copy whole blocks inside the cache, in place (copy-on-write, forks, beam search).

    All sources are read as they were before the call, so chains and swaps do what they say. Scales per token and head
    are copied with their blocks.

    Dimensions:
        P: pairs, N: blocks, KH: kv heads, S: tokens in a block, DS: stored head_dim.

    Args:
        kv_cache: (2, N, KH, S, DS) or (1, N, KH, S, DS), any dtype of the contract. Written in place.
        src_blocks: (P,) int64 or int32. Block ids to read; -1 skips the pair.
        dst_blocks: (P,) int64 or int32. Block ids to write, distinct; -1 skips the pair.
        kv_scales: float32, with a quantised cache only. (2, N, KH, S) is written in place, (2,) and (2, KH) are not
            touched.

    Returns:
        None.

    Raises:
        ValueError: an argument breaks a rule, a block id lies outside ``[-1, N)``, or two pairs have one destination.
        NotImplementedError: the device's backend cannot do this call.

    Source:
        Copy-on-write of Kwon et al. (https://arxiv.org/abs/2309.06180).

    Example:
        >>> import torch, torch_paged
        >>> kv_cache = torch.arange(3.0).reshape(1, 3, 1, 1, 1).repeat(2, 1, 1, 1, 1)
        >>> src, dst = torch.tensor([0, 1]), torch.tensor([1, 0])  # swap blocks 0 and 1
        >>> torch_paged.copy_blocks(kv_cache, src, dst)
        >>> kv_cache[0].flatten()
        tensor([1., 0., 2.])
    """
    if LOG:
        log_choice("copy_blocks", kv_cache, src_blocks, dst_blocks, kv_scales)
    _ops.copy_blocks(kv_cache, src_blocks, dst_blocks, kv_scales)


def gather_cache(
    kv_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_len: int,
    *,
    kv_scales: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the cached tokens of each sequence into dense keys and values.

    The result is in the layout of dense attention, ``(B, KH, max_len, DS)``; columns without a token are zero.

    Dimensions:
        B: sequences, N: blocks, KH: kv heads, S: tokens in a block, M: block-table width, DS: stored head_dim.

    Args:
        kv_cache: (2, N, KH, S, DS) or (1, N, KH, S, DS), any dtype of the contract.
        block_tables: (B, M) int32. Block ids; an entry below 0 gives zeros.
        context_lens: (B,) int32. Tokens of each sequence in the cache.
        max_len: columns of the result, in tokens.
        kv_scales: (2,), (2, KH) or (2, N, KH, S) float32, with a quantised cache only. None: not quantised.
        starts: (B,) int32. Column of each sequence's first token (left padding). None: 0.

    Returns:
        key and value (B, KH, max_len, DS), fresh, float32 for a quantised cache and else its dtype. The value of a
        latent cache has width 0.

    Raises:
        ValueError: an argument breaks a rule, or a sequence does not fit into ``max_len``.
        NotImplementedError: the device's backend cannot do this call.

    Source:
        The layout of ``torch.nn.functional.scaled_dot_product_attention``.

    Example:
        >>> import torch, torch_paged
        >>> kv_cache = torch.arange(6.0).reshape(1, 3, 1, 2, 1).repeat(2, 1, 1, 1, 1)
        >>> block_tables = torch.tensor([[2, 0]], dtype=torch.int32)
        >>> context_lens = torch.tensor([3], dtype=torch.int32)
        >>> key, value = torch_paged.gather_cache(kv_cache, block_tables, context_lens, 5)
        >>> key.flatten()
        tensor([4., 5., 0., 0., 0.])
    """
    if LOG:
        log_choice("gather_cache", kv_cache, block_tables, context_lens, max_len, kv_scales, starts)
    return _ops.gather_cache(  # type: ignore[no-any-return]
        kv_cache, block_tables, context_lens, max_len, kv_scales, starts
    )
