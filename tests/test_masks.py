"""Masks against loops over their definitions, on ragged batches with context in the cache, and through the op."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_paged import reference
from torch_paged.masks import image_block_mask, moba_mask, prefix_lm_mask, tree_mask
from torch_paged.testing import assert_attention, assert_close
from torch_paged.testing.backends import Backend

QUERY_LENS = (5, 0, 1, 7, 3)
KV_LENS = (5, 4, 9, 12, 1)  # the last has more queries than keys
COLUMNS, PADDING = 14, 2
CU_SEQLENS_Q = torch.tensor([0, *QUERY_LENS]).cumsum(0).int()
KV_LENS_TENSOR = torch.tensor(KV_LENS, dtype=torch.int32)
TOKENS = sum(QUERY_LENS) + PADDING
Visible = Callable[[int, int, int], bool]


def looped(visible: Visible, columns: int = COLUMNS, tokens: int = TOKENS) -> Tensor:
    """The mask of ``visible(seq, position, key)``, one element at a time."""
    mask = torch.zeros((tokens, columns), dtype=torch.bool)
    row = 0
    for seq, (query_len, kv_len) in enumerate(zip(QUERY_LENS, KV_LENS, strict=True)):
        for index in range(query_len):
            for key in range(kv_len):
                mask[row, key] = visible(seq, kv_len - query_len + index, key)
            row += 1
    return mask


def assert_mask(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.bool
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected), f"\n{actual.int()}\n{expected.int()}"


def random_runs(seed: int) -> Tensor:
    """Runs of random lengths, numbered anew in each sequence; what lies behind a sequence is garbage."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (len(KV_LENS), COLUMNS // 2), generator=generator).repeat_interleave(2, 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_image_blocks(seed: int, window: int | None, chunk: int | None) -> None:
    runs = random_runs(seed)

    def visible(seq: int, p: int, j: int) -> bool:
        ordinary = j <= p
        ordinary &= window is None or p - j < window
        ordinary &= chunk is None or p // chunk == j // chunk
        same_run = p >= 0 and runs[seq, p] >= 0 and runs[seq, p] == runs[seq, j]
        return bool(ordinary or same_run)

    mask = image_block_mask(
        runs, CU_SEQLENS_Q, KV_LENS_TENSOR, num_tokens=TOKENS, sliding_window=window, attention_chunk=chunk
    )
    assert_mask(mask, looped(visible))


def test_image_blocks_do_not_join_images() -> None:
    runs = torch.tensor([[0, 0, 1, 1, -1]])
    mask = image_block_mask(runs, torch.tensor([0, 5]), torch.tensor([5]))
    expected = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert mask.int().tolist() == expected


@pytest.mark.parametrize("seed", range(4))
def test_trees(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kv_lens = [max(pair) for pair in zip(KV_LENS, QUERY_LENS, strict=True)]
    parents: list[list[int]] = []
    for query_len in QUERY_LENS:
        draws = torch.rand(query_len, generator=generator).tolist()
        parents.append([math.floor(draw * (index + 1)) - 1 for index, draw in enumerate(draws)])
    expected = torch.zeros((TOKENS, COLUMNS), dtype=torch.bool)
    row = 0
    for seq, nodes in enumerate(parents):
        context = kv_lens[seq] - len(nodes)
        for index in range(len(nodes)):
            expected[row, :context] = True
            node = index
            while node >= 0:
                expected[row, context + node] = True
                node = nodes[node]
            row += 1
    packed = torch.tensor([parent for nodes in parents for parent in nodes] + [99] * PADDING)
    mask = tree_mask(packed, CU_SEQLENS_Q, torch.tensor(kv_lens), num_columns=COLUMNS)
    assert_mask(mask, expected)


def test_tree_that_is_a_chain_is_causal() -> None:
    chain = torch.cat([torch.arange(-1, query_len - 1) for query_len in QUERY_LENS])
    mask = tree_mask(chain, CU_SEQLENS_Q, KV_LENS_TENSOR.maximum(CU_SEQLENS_Q.diff()))
    causal = looped(lambda seq, p, j: j <= p, max(KV_LENS), sum(QUERY_LENS))
    assert_mask(mask[:-3], causal[:-3])
    assert mask[-3:, :3].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("prefixes", [(0, 0, 0, 0, 0), (3, 4, 9, 7, 1), (99, 99, 99, 99, 99)])
def test_prefix_lm(prefixes: tuple[int, ...]) -> None:
    mask = prefix_lm_mask(torch.tensor(prefixes), CU_SEQLENS_Q, KV_LENS_TENSOR, num_tokens=TOKENS, num_columns=COLUMNS)
    assert_mask(mask, looped(lambda seq, p, j: j <= p or j < prefixes[seq]))


def moba_loop(query: Tensor, key: Tensor, chunk: int, top_k: int) -> Tensor:
    group = query.size(1) // key.size(1)
    masks = []
    for head in range(query.size(1)):
        rows = iter(query[:, head])
        chosen: dict[tuple[int, int], set[int]] = {}
        for seq, (query_len, kv_len) in enumerate(zip(QUERY_LENS, KV_LENS, strict=True)):
            for p in range(kv_len - query_len, kv_len):
                row = next(rows)
                scores = []
                for past in range(max(p, 0) // chunk):
                    mean = key[seq, head // group, past * chunk : (past + 1) * chunk, : query.size(2)].float().mean(0)
                    scores.append((-float(row.float() @ mean), past))
                chosen[seq, p] = {past for _, past in sorted(scores)[: top_k - 1]} | {p // chunk}
        masks.append(looped(lambda seq, p, j, c=chosen: j <= p and j // chunk in c[seq, p]))  # type: ignore[misc]
    return torch.stack(masks)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("top_k", [1, 2, 3, 50])
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_moba(chunk: int, top_k: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(chunk * 7 + top_k)
    query = torch.randint(-4, 5, (TOKENS, 4, 8), generator=generator).float()
    key = torch.randint(-4, 5, (len(KV_LENS), 2, COLUMNS, 10), generator=generator).float()
    if kind == "ties":
        query, key = torch.ones_like(query), torch.ones_like(key)
    else:
        query += torch.rand(query.shape, generator=generator)
    expected = moba_loop(query, key, chunk, top_k)
    query[-PADDING:] = float("nan")
    for seq, kv_len in enumerate(KV_LENS):
        key[seq, :, kv_len:] = float("nan")
    key[..., 8:] = float("nan")
    mask = moba_mask(query, key, CU_SEQLENS_Q, KV_LENS_TENSOR, chunk_size=chunk, top_k=top_k)
    assert_mask(mask, expected)
    if top_k == 50:
        assert_mask(mask, looped(lambda seq, p, j: j <= p).expand(4, -1, -1))


def paged_batch(block_size: int = 4) -> dict[str, Any]:
    """Arguments of a call whose keys all lie in the cache, behind shuffled tables."""
    generator = torch.Generator().manual_seed(3)
    heads, kv_heads, head_dim, width = 4, 2, 8, 4
    order = torch.randperm(len(KV_LENS) * width, generator=generator).int()
    return {
        "query": torch.randn((TOKENS, heads, head_dim), generator=generator),
        "key": None,
        "value": None,
        "cu_seqlens_q": CU_SEQLENS_Q,
        "cu_seqlens_k": None,
        "kv_cache": torch.randn((2, order.numel(), kv_heads, block_size, head_dim), generator=generator),
        "block_tables": order.reshape(len(KV_LENS), width),
        "context_lens": KV_LENS_TENSOR,
        "max_seqlen_q": max(QUERY_LENS),
        "max_seqlen_k": max(KV_LENS),
        "causal": False,
    }


def brute_force(arguments: dict[str, Any], mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention row by row over the keys that the mask keeps."""
    query = arguments["query"].to(dtype)
    keys, values = reference.gather_cache(
        arguments["kv_cache"].to(dtype), arguments["block_tables"], arguments["context_lens"], COLUMNS
    )
    group = query.size(1) // keys.size(1)
    out = torch.zeros_like(query)
    row = 0
    for seq, query_len in enumerate(QUERY_LENS):
        for _ in range(query_len):
            for head in range(query.size(1)):
                seen = (mask if mask.dim() == 2 else mask[head])[row]
                if seen.any():
                    logits = keys[seq, head // group, seen] @ query[row, head] / math.sqrt(query.size(2))
                    out[row, head] = logits.softmax(0) @ values[seq, head // group, seen]
            row += 1
    return out


def make_mask(name: str, arguments: dict[str, Any]) -> Tensor:
    if name == "image":
        return image_block_mask(random_runs(1), CU_SEQLENS_Q, KV_LENS_TENSOR, num_tokens=TOKENS, sliding_window=3)
    if name == "prefix":
        return prefix_lm_mask(
            torch.tensor([3, 4, 9, 7, 1]), CU_SEQLENS_Q, KV_LENS_TENSOR, num_tokens=TOKENS, num_columns=COLUMNS
        )
    if name == "tree":
        parents = torch.tensor([-1, 0, 0, 1, -1, -1, -1, 0, 1, 1, 0, 4, 5, -1, -1, 0, 0, 0])
        return tree_mask(parents[:TOKENS], CU_SEQLENS_Q, KV_LENS_TENSOR, num_columns=COLUMNS)
    keys, _ = reference.gather_cache(
        arguments["kv_cache"], arguments["block_tables"], arguments["context_lens"], COLUMNS
    )
    return moba_mask(arguments["query"], keys, CU_SEQLENS_Q, KV_LENS_TENSOR, chunk_size=2, top_k=2)


@pytest.mark.parametrize("name", ["image", "prefix", "tree", "moba"])
def test_through_the_op(name: str, implementation: Backend) -> None:
    arguments = paged_batch(implementation.block_size(4))
    mask = make_mask(name, arguments)
    assert mask.any()
    assert not mask.all()
    arguments["attn_mask"] = mask
    out = implementation("flash_attn_varlen", arguments)
    assert_close(out, brute_force(arguments, mask, torch.float64), brute_force(arguments, mask, torch.float32))
    assert_attention("flash_attn_varlen", arguments, out)


def test_empty_batches() -> None:
    none, starts = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    assert image_block_mask(torch.zeros((0, 4), dtype=torch.int32), starts, none).shape == (0, 4)
    assert tree_mask(none, starts, none).shape == (0, 0)
    assert prefix_lm_mask(none, starts, none, num_tokens=2, num_columns=3).tolist() == [[False] * 3] * 2
    assert moba_mask(torch.zeros(0, 2, 4), torch.zeros(0, 1, 3, 4), starts, none, chunk_size=2, top_k=2).shape == (
        2,
        0,
        3,
    )
    only_padding = moba_mask(torch.ones(3, 2, 4), torch.ones(0, 1, 3, 4), starts, none, chunk_size=2, top_k=2)
    assert only_padding.shape == (2, 3, 3)
    assert not only_padding.any()


ONE, TWO = torch.tensor([0, 2]), torch.tensor([4])
MASKS: dict[str, Callable[..., Tensor]] = {
    "image_block_mask": lambda cu, lens, **sizes: image_block_mask(
        torch.zeros((2, 4), dtype=torch.int32), cu, lens, **sizes
    ),
    "tree_mask": lambda cu, lens, **sizes: tree_mask(
        torch.full((sizes.get("num_tokens", 5),), -1), cu, lens, num_columns=4
    ),
    "prefix_lm_mask": lambda cu, lens, **sizes: prefix_lm_mask(torch.tensor([1, 1]), cu, lens, num_columns=4, **sizes),
    "moba_mask": lambda cu, lens, **sizes: moba_mask(
        torch.zeros(sizes.get("num_tokens", 5), 2, 4), torch.zeros(2, 2, 4, 4), cu, lens, chunk_size=2, top_k=1
    ),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    ("starts", "kv_lens", "sizes", "message"),
    [
        ((1, 2, 5), (3, 4), {}, "cu_seqlens_q must start with 0, got 1 at index 0"),
        ((0, 3, 2), (3, 4), {}, "cu_seqlens_q must not decrease, got 2 after 3 at index 2"),
        ((0, 2, 5), (3, -1), {}, "kv_lens must be >= 0, got -1 at index 1"),
        ((0, 2, 5), (3, 4), {"num_tokens": 4}, "cu_seqlens_q must end at or before T = 4, got 5 at index 2"),
        ((0, 2, 5), (5, 4), {}, r"kv_lens must lie in \[0, C = 4\], got 5 at index 0"),
    ],
)
def test_lengths_that_do_not_fit(
    name: str, starts: tuple[int, ...], kv_lens: tuple[int, ...], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}$"):
        MASKS[name](torch.tensor(starts), torch.tensor(kv_lens), **sizes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: image_block_mask(torch.zeros(4, dtype=torch.int32), ONE, TWO),
            "image_block_mask: run_ids must have 2 d",
        ),
        (
            lambda: image_block_mask(torch.zeros(1, 4), ONE, TWO),
            "image_block_mask: run_ids must have 2 dimensions of int32",
        ),
        (
            lambda: image_block_mask(torch.zeros((2, 4), dtype=torch.int32), ONE, TWO),
            "image_block_mask: run_ids must have one row for each of 1 sequences, got 2",
        ),
        (
            lambda: image_block_mask(torch.zeros((1, 4), dtype=torch.int32), ONE, TWO, sliding_window=0),
            "image_block_mask: sliding_window must be None or an int >= 1, got 0",
        ),
        (
            lambda: image_block_mask(torch.zeros((1, 4), dtype=torch.int32), ONE, TWO, attention_chunk=-1),
            "image_block_mask: attention_chunk must be None or an int >= 1, got -1",
        ),
        (lambda: tree_mask(torch.tensor([-1, 1]), ONE, TWO), "tree_mask: parents must be -1 or .*, got 1 at index 1"),
        (lambda: tree_mask(torch.tensor([-2, 0]), ONE, TWO), "tree_mask: parents must be -1 or .*, got -2 at index 0"),
        (
            lambda: tree_mask(torch.tensor([-1, 0]), ONE, TWO, num_tokens=3),
            "tree_mask: parents must have num_tokens = 3 entries, got 2",
        ),
        (
            lambda: prefix_lm_mask(torch.tensor([1]), torch.tensor([0]), TWO),
            "prefix_lm_mask: cu_seqlens_q must have one entry more than kv_lens, got 1 for 1",
        ),
        (
            lambda: prefix_lm_mask(torch.tensor([1]), ONE, TWO.float()),
            "prefix_lm_mask: kv_lens must have 1 dimension of",
        ),
        (
            lambda: moba_mask(torch.zeros(2, 3, 4), torch.zeros(1, 2, 4, 4), ONE, TWO, chunk_size=2, top_k=1),
            r"moba_mask: key must be \(B, KH, C, D'\)",
        ),
        (
            lambda: moba_mask(torch.zeros(2, 2, 4), torch.zeros(1, 2, 4, 4), ONE, TWO, chunk_size=0, top_k=1),
            "moba_mask: chunk_size must be an int >= 1, got 0",
        ),
        (
            lambda: moba_mask(torch.zeros(2, 2, 4), torch.zeros(1, 2, 4, 4), ONE, TWO, chunk_size=1, top_k=0),
            "moba_mask: top_k must be an int >= 1, got 0",
        ),
        (
            lambda: moba_mask(torch.zeros(2, 2, 4), torch.zeros(1, 2, 4, 4), ONE, TWO, chunk_size=1, top_k=2.5),  # type: ignore[arg-type]
            "moba_mask: top_k must be an int >= 1, got 2.5",
        ),
        (
            lambda: moba_mask(torch.zeros(2, 2, 4), torch.zeros(1, 2, 4, 4), ONE, TWO, chunk_size=True, top_k=1),
            "moba_mask: chunk_size must be an int >= 1, got True",
        ),
        (
            lambda: image_block_mask(torch.zeros((1, 4), dtype=torch.int32), ONE, TWO, sliding_window=1.5),  # type: ignore[arg-type]
            "image_block_mask: sliding_window must be None or an int >= 1, got 1.5",
        ),
        (
            lambda: prefix_lm_mask(torch.tensor([1]), ONE, TWO, num_tokens=2.5),  # type: ignore[arg-type]
            "prefix_lm_mask: num_tokens must be None or an int >= 0, got 2.5",
        ),
        (
            lambda: prefix_lm_mask(torch.tensor([1]), ONE, TWO, num_columns=-1),
            "prefix_lm_mask: num_columns must be None or an int >= 0, got -1",
        ),
        (
            lambda: moba_mask(torch.zeros(2, 2, 4), torch.zeros(2, 2, 4, 4), ONE, TWO, chunk_size=1, top_k=1),
            "moba_mask: key must have one row for each of 1 sequences, got 2",
        ),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
