"""Lines 3 to 5: where queries sit, and what causality, windows and chunks let them see."""

import torch

from torch_paged.testing.backends import Backend
from torch_paged.testing.cases import AttentionCase, build
from torch_paged.testing.compare import assert_same
from torch_paged.testing.semantics.attend import assert_seen, assert_weights, attend, seen, sourced, typed
from torch_paged.testing.semantics.registry import PACKED, SIZES, SOURCES, check


@check(3, SOURCES)
def queries_sit_at_the_end_of_the_keys(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """Each sees the keys up to its own."""
    assert_seen(seen(backend, dtype, 3, 5, source, causal=True), ["11100", "11110", "11111"])


@check(3, PACKED)
def without_causality_all_keys_are_seen(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """Those behind the query too."""
    assert_seen(seen(backend, dtype, 3, 5, source), ["11111", "11111", "11111"])


@check(3, PACKED)
def rows_at_negative_positions_see_nothing(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """More queries than keys."""
    assert_seen(seen(backend, dtype, 4, 2, source, causal=True), ["00", "00", "10", "11"])


@check(3, PACKED)
def query_positions_replace_the_default(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """Behind the keys and below 0 too."""
    positions = torch.tensor([7, -1, 0, 2], dtype=torch.int32)
    rows = seen(backend, dtype, 4, 4, source, causal=True, query_positions=positions)
    assert_seen(rows, ["1111", "0000", "1000", "1110"])


@check(3, PACKED)
def alibi_takes_the_distance_from_the_position(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """To both sides."""
    weights, _, _ = attend(
        backend,
        dtype,
        [0.0, 0.0, 0.0],
        1,
        source,
        alibi_slopes=torch.tensor([0.5]),
        query_positions=torch.tensor([1], dtype=torch.int32),
    )
    assert_weights(weights[0], [-0.5, 0.0, -0.5])


@check(4, SOURCES)
def a_window_counts_the_token_itself(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """A window of 1 is the token alone."""
    rows = seen(backend, dtype, 4, 4, source, causal=True, sliding_window=2)
    assert_seen(rows, ["1000", "1100", "0110", "0011"])
    rows = seen(backend, dtype, 4, 4, source, causal=True, sliding_window=1)
    assert_seen(rows, ["1000", "0100", "0010", "0001"])


@check(4, PACKED)
def a_window_without_causality_looks_both_ways(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """As far to each side."""
    assert_seen(seen(backend, dtype, 4, 4, source, sliding_window=2), ["1100", "1110", "0111", "0011"])


_LONG = (1100, 5, 70, 600)
"""Keys in the cache: one to three tiles, or parts, of most kernels."""


@check(4, ("decode", "both"), SIZES, window=(45, 700))
def windows_hold_in_long_contexts(backend: Backend, dtype: torch.dtype, source: str, window: int) -> None:
    """With all weights equal, so that lse counts the keys."""
    case = AttentionCase("far", _LONG, group=2, sliding_window=window, softmax_scale=0.0)
    backend.check(sourced(typed(case, dtype), source))


@check(4, option=("sliding_window", "attention_chunk"), queries=(None, (5, 0, 17, 3)), power=(31, 32, 33, 62))
def what_reaches_beyond_the_keys_hides_nothing(
    backend: Backend, dtype: torch.dtype, option: str, queries: tuple[int, ...] | None, power: int
) -> None:
    """Windows and chunks around powers of two change no bit."""
    case = backend.served(typed(AttentionCase("wide", query_lens=queries), dtype))
    arguments = build(case)
    expected = backend(case.op, arguments, stats=True)
    for size in (2**power, 2**power + 1):
        results = backend(case.op, arguments | {option: size}, stats=True)
        for name, actual, wanted in zip(("out", "lse", "max_logits"), results, expected, strict=True):
            assert_same(actual, wanted, name)


@check(4, of_ops=True, option=("sliding_window", "attention_chunk"), value=(0, -1))
def window_and_chunk_are_none_or_positive(backend: Backend, dtype: torch.dtype, option: str, value: int) -> None:
    """0 and -1 do not mean off; kernels from elsewhere may say so in words of their own."""
    said = "nothing"
    try:
        seen(backend, dtype, 2, 2, "cache", **{option: value})
    except ValueError as error:
        if backend.info is None:
            return
        said = str(error)
    fits = said.startswith(f"flash_attn_varlen: {option} must ") and said.endswith(f"got {value}")
    assert fits, f"{option}={value} must raise ValueError in the contract's words, raised {said}"


@check(5, SOURCES, causal=(False, True))
def a_chunk_is_causal_inside(backend: Backend, dtype: torch.dtype, source: str, causal: bool) -> None:
    """Whatever causal says."""
    rows = seen(backend, dtype, 5, 5, source, attention_chunk=2, causal=causal)
    assert_seen(rows, ["10000", "11000", "00100", "00110", "00001"])


@check(5, PACKED)
def the_chunk_of_a_negative_position_is_floored(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """It is no part of the chunk of position 0."""
    positions = torch.tensor([-1, -2, 1], dtype=torch.int32)
    rows = seen(backend, dtype, 3, 4, source, attention_chunk=2, query_positions=positions)
    assert_seen(rows, ["0000", "0000", "1100"])


@check(5, ("decode", "both"), SIZES)
def chunks_hold_in_long_contexts(backend: Backend, dtype: torch.dtype, source: str) -> None:
    """With all weights equal, so that lse counts the keys."""
    case = AttentionCase("far", _LONG, group=2, attention_chunk=700, softmax_scale=0.0)
    backend.check(sourced(typed(case, dtype), source))
