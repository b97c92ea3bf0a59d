"""Uses that the options add up to, each against an answer that was found without them."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from torch_paged.testing import AttentionCase, assert_close, assert_stats, build, oracle
from torch_paged.testing.backends import REFERENCE, Backend
from torch_paged.testing.cases import cumulative

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend from (H, D) to (KH, L, D) keys."""
    rows = scaled_dot_product_attention(query[None, :, None], key[None], value[None], enable_gqa=True)
    return rows[0, :, 0]


def test_sparse_indexer_selection_as_a_mask(backend: Backend) -> None:
    """Each query attends to the 8 keys that an indexer scored highest; the answer attends to just these keys."""
    case = AttentionCase("indexer", context_lens=(63, 17, 100))
    arguments = build(case)
    scores = torch.rand((3, 100), generator=torch.Generator().manual_seed(0))
    scores.masked_fill_(torch.arange(100) >= arguments["context_lens"][:, None], -1.0)
    selected = scores.topk(8).indices
    mask = torch.zeros((3, 100), dtype=torch.bool).scatter_(1, selected, True)
    key, value = REFERENCE("gather_cache", _gather(arguments, 100))
    answers = []
    for dtype in (torch.float64, torch.float32):
        rows = [
            _sdpa(arguments["query"][seq].to(dtype), key[seq][:, picked].to(dtype), value[seq][:, picked].to(dtype))
            for seq, picked in enumerate(selected)
        ]
        answers.append(torch.stack(rows))
    assert_close(backend(case.op, dict(arguments, attn_mask=mask)), *answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_decode_over_a_dense_cache_through_an_identity_table(backend: Backend, dtype: torch.dtype) -> None:
    """A dense (B, KH, L, D) cache is a paged one with one block for each sequence."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn((4, 2, 100, 64), generator=generator).to(dtype) for _ in range(2))
    query = torch.randn((4, 8, 64), generator=generator).to(dtype)
    lengths = [100, 1, 37, 64]
    out = backend(
        "paged_attention",
        {
            "query": query,
            "kv_cache": torch.stack([key, value]),
            "block_tables": torch.arange(4, dtype=torch.int32)[:, None],
            "context_lens": torch.tensor(lengths, dtype=torch.int32),
        },
    )
    answers = []
    for wanted in (torch.float64, dtype):
        rows = [
            _sdpa(query[seq].to(wanted), key[seq, :, :length].to(wanted), value[seq, :, :length].to(wanted))
            for seq, length in enumerate(lengths)
        ]
        answers.append(torch.stack(rows))
    assert_close(out, *answers)


@pytest.mark.parametrize("sink_in", ["merge", "first", "second"])
def test_cached_part_and_new_part_merge_with_the_sink_counted_once(backend: Backend, sink_in: str) -> None:
    """Context in the cache and new tokens beside it, attended apart, are one call with both."""
    lengths = (5, 1, 17)
    case = AttentionCase("parts", context_lens=(63, 0, 100), query_lens=lengths, new_lens=lengths, sinks=True)
    arguments = build(case)
    sinks = arguments["sinks"]
    cached = {"key": None, "value": None, "cu_seqlens_k": None, "causal": False}
    fresh = {"kv_cache": None, "block_tables": None, "context_lens": None}

    def merged(implementation: Backend) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            implementation(case.op, arguments | part | {"sinks": sinks if sink_in == name else None}, stats=True)
            for name, part in (("first", cached), ("second", fresh))
        ]
        outs, lses, _ = (torch.stack(states) for states in zip(*parts, strict=True))
        merge = {"outs": outs, "lses": lses, "sinks": sinks if sink_in == "merge" else None}
        return implementation("merge_attention_states", merge)

    out, lse = merged(backend)
    expected, expected_lse, _ = oracle(case.op, arguments)
    assert_close(out, expected, merged(REFERENCE)[0])
    assert_stats(lse, expected_lse)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 20])
def test_zig_zag_context_parallel_halves(backend: Backend, ranks: int, window: int | None) -> None:
    """Rank r computes chunks r and 2R - 1 - r of the queries by ``query_positions``; together they are all rows."""
    case = AttentionCase("zigzag", context_lens=(96,), query_lens=(96,), sliding_window=window, block_size=3)
    case = backend.served(case)
    arguments = build(case)
    expected, expected_lse, expected_max = oracle(case.op, arguments)
    plain = REFERENCE(case.op, arguments)
    chunks = torch.arange(96).chunk(2 * ranks)
    covered = []
    for rank in range(ranks):
        rows = torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])
        share = {
            "query": arguments["query"][rows],
            "cu_seqlens_q": cumulative((rows.numel(),)),
            "max_seqlen_q": rows.numel(),
            "query_positions": rows.int(),
        }
        out, lse, max_logits = backend(case.op, arguments | share, stats=True)
        assert_close(out, expected[rows], plain[rows])
        assert_stats(lse, expected_lse[rows])
        assert_stats(max_logits, expected_max[rows], name="max_logits")
        covered.append(rows)
    assert torch.cat(covered).sort().values.tolist() == list(range(96))


def test_speculative_tokens_are_verified_like_single_steps(backend: Backend) -> None:
    """Four draft tokens in one varlen call see what four decode steps would see."""
    case = AttentionCase("speculative", context_lens=(40, 23), query_lens=(4, 4))
    arguments = build(case)
    plain = REFERENCE(case.op, arguments)
    for step in range(4):
        rows = torch.tensor([step, 4 + step])
        decode = {
            "query": arguments["query"][rows],
            "kv_cache": arguments["kv_cache"],
            "block_tables": arguments["block_tables"],
            "context_lens": arguments["context_lens"] - (3 - step),
        }
        expected, _, _ = oracle("paged_attention", decode)
        assert_close(backend("paged_attention", decode), expected, plain[rows])
        assert_close(backend(case.op, arguments)[rows], expected, plain[rows])


def _gather(arguments: dict[str, torch.Tensor], max_len: int) -> dict[str, object]:
    tensors = {name: arguments[name] for name in ("kv_cache", "block_tables", "context_lens")}
    return tensors | {"max_len": max_len}
