"""Lines 8 to 10: rows without keys, statistics, and dtypes."""

import math
from typing import Any

import torch
from torch import Tensor

from torch_paged.testing.backends import Backend
from torch_paged.testing.cases import AttentionCase, build
from torch_paged.testing.compare import assert_attention, assert_stats
from torch_paged.testing.semantics.attend import LANES, assert_weights, attend, query_dtype, sourced, typed
from torch_paged.testing.semantics.registry import FLOATS, QUANTIZED, SOURCES, check

_NOTHING = float("-inf")


@check(8, SOURCES)
def a_row_without_keys_is_zero(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """Its lse is -inf, or the sink."""
    mask = torch.zeros(2, 4, dtype=torch.bool)
    for sink in (None, 0.75):
        sinks: dict[str, Any] = {} if sink is None else {"sinks": torch.tensor([sink])}
        weights, lse, max_logits = attend(backend, dtype, [1.0] * 4, 2, source, attn_mask=mask, **sinks)
        assert (weights == 0).all(), f"out of rows without keys is {weights.tolist()}"
        wanted = _NOTHING if sink is None else sink
        assert lse.tolist() == [wanted] * 2, f"lse of rows without keys is {lse.tolist()}, expected {wanted}"
        assert max_logits.tolist() == [_NOTHING] * 2, f"max_logits of rows without keys is {max_logits.tolist()}"


@check(8)
def a_sequence_without_keys_is_zero(backend: Backend, dtype: torch.dtype) -> None:
    """In decode: context length 0."""
    case = backend.served(typed(AttentionCase("no keys", context_lens=(0, 9, 0)), dtype))
    out, lse, max_logits = backend(case.op, build(case), stats=True)
    assert out[1].isfinite().all(), "out of the sequence with keys is not finite"
    _assert_nothing(out[::2], lse[::2], max_logits[::2])


@check(8)
def padding_rows_are_zero_and_ignore_the_sink(backend: Backend, dtype: torch.dtype) -> None:
    """Rows from cu_seqlens_q[B] on."""
    case = backend.served(typed(AttentionCase("padding", query_lens=(2, 0, 3, 1), sinks=True, padding_rows=3), dtype))
    out, lse, max_logits = backend(case.op, build(case), stats=True)
    _assert_nothing(out[6:], lse[6:], max_logits[6:])


def _assert_nothing(out: Tensor, lse: Tensor, max_logits: Tensor) -> None:
    assert (out == 0).all(), "out of rows without keys is not zero"
    for name, statistic in (("lse", lse), ("max_logits", max_logits)):
        assert (statistic == _NOTHING).all(), f"{name} of rows without keys is not -inf"


@check(9, SOURCES)
def lse_is_natural_and_max_logits_come_after_cap_and_alibi(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """The sink is the largest logit, and not among max_logits."""
    _, lse, max_logits = attend(
        backend,
        dtype,
        [6.0, 1.0],
        1,
        source,
        logits_soft_cap=3.0,
        alibi_slopes=torch.tensor([0.5]),
        sinks=torch.tensor([50.0]),
    )
    assert_stats(max_logits, torch.tensor([3 * math.tanh(2.0) - 0.5]).double(), name="max_logits")
    assert_stats(lse, torch.tensor([50.0]).double())


@check(10, queries=(None, (5, 0, 17, 3)))
def out_has_the_query_dtype_and_statistics_do_not(
    backend: Backend, dtype: torch.dtype, queries: tuple[int, ...] | None
) -> None:
    """Statistics are float32."""
    case = backend.served(typed(AttentionCase("dtypes", query_lens=queries), dtype))
    dtypes = tuple(result.dtype for result in backend(case.op, build(case), stats=True))
    assert dtypes == (case.dtype, torch.float32, torch.float32), f"out, lse and max_logits are {dtypes}"


@check(10)
def lse_is_not_rounded_to_the_query_dtype(backend: Backend, dtype: torch.dtype) -> None:
    """log(3) has no short form."""
    arguments = {
        "query": torch.zeros(1, 1, LANES, dtype=query_dtype(dtype)),
        "kv_cache": torch.zeros(2, 1, 1, backend.block_size(3), LANES).to(dtype),
        "block_tables": torch.zeros(1, 1, dtype=torch.int32),
        "context_lens": torch.tensor([3], dtype=torch.int32),
    }
    if dtype.itemsize == 1:
        arguments["kv_scales"] = torch.ones(2)
    _, lse, _ = backend("paged_attention", arguments, stats=True)
    assert_stats(lse, torch.tensor([[math.log(3.0)]]).double())


@check(10, SOURCES, dtypes=FLOATS[:1])
def float32_is_not_rounded(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """Keys that bfloat16 cannot tell apart."""
    weights, _, _ = attend(backend, dtype, [1.0 + 2.0**-12, 1.0], 1, source, softmax_scale=2.0**12)
    assert_weights(weights[0], [1.0, 0.0])


@check(10, SOURCES, dtypes=(torch.float32, *QUANTIZED), mask=(None, "shared"))
def what_logits_have_in_common_costs_no_accuracy(
    backend: Backend, dtype: torch.dtype, source: str, mask: str | None
) -> None:
    """Logits near 5000 that float32 holds exactly, over several blocks of keys: weights depend on their differences.

    The scale is 1: one that rounds logits costs plain PyTorch as much.
    """
    case = typed(AttentionCase("common", (1100, 0, 63, 1), num_kv_heads=1, softmax_scale=1.0, mask=mask), dtype)
    case = backend.served(sourced(case, source))
    arguments = build(case)
    arguments["query"] = torch.zeros_like(arguments["query"])
    arguments["query"][..., 0], arguments["query"][..., 1] = 5000, 0.8125
    if case.scales_rank:
        arguments["kv_scales"] = torch.ones(2)
    for keys in (None if source == "new" else arguments["kv_cache"][0], arguments.get("key")):
        if keys is not None:
            keys[..., 0] = 1
            keys[..., 1] = keys[..., 1].float().round().clamp(-8, 8).to(keys.dtype)
    assert_attention(case.op, arguments, *backend(case.op, arguments, stats=True))
