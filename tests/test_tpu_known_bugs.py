"""Bugs that older Pallas kernels of paged attention had: one test for each, in a simulated TPU.

Copies happen as late as they may, reads out of bounds raise, races are looked for, and fresh memory, unused slots and
unused blocks hold NaN. Blocks of two pages make many steps of a short context.
"""

from functools import cache
from typing import Any

import jax
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu
from jax_arrays import to_jax, to_torch

from torch_paged.backends.tpu import decode, varlen
from torch_paged.backends.tpu.block_sizes import CHIPS, Blocks
from torch_paged.backends.tpu.bridge_interpret import COMPILER_OPTIONS, no_races
from torch_paged.backends.tpu.calls import jax_call
from torch_paged.testing import AttentionCase, assert_attention, build

SIMULATED = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan")
S = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "decode_blocks", lambda *_: Blocks(pages=2, tile_pages=2, buffers=2))


@cache
def jitted(options: tuple[tuple[str, Any], ...]) -> Any:
    function = varlen.flash_attn_varlen if "causal" in dict(options) else decode.paged_attention
    return jax.jit(
        lambda *arrays: function(*arrays, **dict(options), chip=CHIPS["v5e"], interpret=SIMULATED),
        compiler_options=COMPILER_OPTIONS,
    )


def attend(arguments: dict[str, Any], op: str = "paged_attention") -> tuple[torch.Tensor, ...]:
    """Return out, lse and max_logits of the kernel."""
    call = jax_call(f"{op}.with_stats", arguments)
    arrays = [None if array is None else to_jax(array) for array in call.arrays]
    with no_races(op):
        return tuple(map(to_torch, jitted(tuple(call.options.items()))(*arrays)))


def case(*context_lens: int, **fields: Any) -> dict[str, Any]:
    """Return the arguments of four sequences with room for 64 tokens each, so that one program serves them."""
    shape = AttentionCase("known", context_lens=(*context_lens, 64), block_size=S, head_dim=128, group=2, **fields)
    arguments = build(shape)
    return {**arguments, **{name: arguments[name][:4] for name in ("query", "block_tables", "context_lens")}}


def check(arguments: dict[str, Any], op: str = "paged_attention") -> tuple[torch.Tensor, ...]:
    results = attend(arguments, op)
    assert_attention(op, arguments, *results)
    return results


def test_a_buffer_is_read_only_after_its_own_copies_have_landed() -> None:
    """One semaphore for keys, values and both buffers: a wait may return for the copies of another buffer."""
    check(case(64, 64, 48, 64))


def test_empty_sequences_have_outputs() -> None:
    """Their rows were never written."""
    out, lse, max_logits = check(case(0, 20, 0, 0))
    assert not out[[0, 2, 3]].any()
    assert (lse[[0, 2, 3]] == -torch.inf).all()
    assert (max_logits[[0, 2, 3]] == -torch.inf).all()


@pytest.mark.parametrize("lengths", [(5, 0, 0, 64), (64, 16, 8, 0)])
def test_the_sequence_after_the_last_is_not_looked_up(lengths: tuple[int, ...]) -> None:
    """The prefetch for the next sequence read ``lengths[B]``."""
    check(case(*lengths))


def test_padding_of_the_table_is_not_followed() -> None:
    """Ids behind a sequence's last page were copied from, wild ones too."""
    arguments = case(9, 17, 1, 33)
    tables = arguments["block_tables"].clone()
    pages = -(-arguments["context_lens"] // S)
    tables[torch.arange(tables.size(1)) >= pages[:, None]] = 2**31 - 1
    check({**arguments, "block_tables": tables})


def test_stale_slots_hold_nan() -> None:
    """A weight of 0 times NaN is NaN: what lies behind the last token reached the sum."""
    arguments = case(1, 7, 9, 63)
    assert arguments["kv_cache"].isnan().any()
    out, _, _ = check(arguments)
    assert out.isfinite().all()


def test_tail_pages_count() -> None:
    """``length // S`` pages were read: tokens of a page that is not full were dropped, all of a short sequence's."""
    arguments = case(1, 7, 9, 17)
    _, lse, _ = check(arguments)
    _, shorter, _ = attend({**arguments, "context_lens": arguments["context_lens"] // S * S})
    assert (lse > shorter).all()


def test_chunked_prefill_may_begin_and_end_within_a_page() -> None:
    """Chunks were taken for whole pages: the tail of the prompt was never attended to."""
    prompt = AttentionCase("prompt", (21, 21), (21, 21), block_size=S, head_dim=128, group=2, num_kv_heads=1)
    whole = build(prompt)
    expected = check(whole, "flash_attn_varlen")
    begin = torch.tensor([0, 21])
    for end, done in ((16, 0), (21, 16), (21, 13)):
        size = end - done
        rows = torch.cat([first + torch.arange(done, end) for first in begin])
        query = torch.full_like(whole["query"], torch.nan)
        query[: 2 * size] = whole["query"][rows]
        chunk = {
            **whole,
            "query": query,
            "cu_seqlens_q": torch.tensor([0, size, 2 * size], dtype=torch.int32),
            "context_lens": torch.full_like(whole["context_lens"], end),
            "max_seqlen_q": whole["max_seqlen_q"],
        }
        for actual, wanted in zip(check(chunk, "flash_attn_varlen"), expected, strict=True):
            torch.testing.assert_close(actual[: 2 * size], wanted[rows])


def test_float32_caches_stay_float32() -> None:
    """Keys and values were multiplied in bfloat16, which keeps 8 bits."""
    arguments = case(30, 20, 10, 40)
    arguments["kv_cache"][1] = torch.where(arguments["kv_cache"][1].isnan(), torch.nan, 1 + 2.0**-12)
    out, _, _ = attend(arguments)
    torch.testing.assert_close(out, torch.full_like(out, 1 + 2.0**-12), rtol=2**-20, atol=0)


@pytest.mark.parametrize("window", [S, S + 1])
def test_a_window_ends_where_it_says(window: int) -> None:
    """One key too many, or too few, at the edge of a page."""
    arguments = {**case(16, 17, 24, 3), "sliding_window": window}
    arguments["query"] = torch.zeros_like(arguments["query"])
    lengths = arguments["context_lens"]
    cache, tables = arguments["kv_cache"], arguments["block_tables"]
    for seq, length in enumerate(lengths.tolist()):
        for token in range(length):
            cache[1, tables[seq, token // S], :, token % S] = float(token)
    out, _, _ = check(arguments)
    first = (lengths - window).clamp(min=0)
    torch.testing.assert_close(out, ((first + lengths - 1) / 2)[:, None, None].expand_as(out))
