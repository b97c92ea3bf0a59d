"""explain() says what a call runs, or why it is refused, without running it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_paged
from torch_paged import backends
from torch_paged.backends.cpu.support import MAX_DIRECT_ROWS
from torch_paged.testing.processes import SOURCE, run_python


def decode_arguments(device: str = "meta", **changes: Any) -> dict[str, Any]:
    return {
        "query": torch.empty(4, 8, 64, device=device),
        "kv_cache": torch.empty(2, 16, 2, 16, 64, device=device),
        "block_tables": torch.zeros(4, 4, dtype=torch.int32, device=device),
        "context_lens": torch.zeros(4, dtype=torch.int32, device=device),
        **changes,
    }


def varlen_arguments(tokens: int, max_seqlen_q: int, heads: int = 8) -> dict[str, Any]:
    return decode_arguments(
        query=torch.empty(tokens, heads, 64, device="meta"),
        cu_seqlens_q=torch.empty(5, dtype=torch.int32, device="meta"),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=64,
    )


def test_decode_on_meta_tensors() -> None:
    choice = torch_paged.explain("paged_attention", device="cpu", **decode_arguments())
    assert (choice.backend, choice.variant, choice.compiled, choice.cache) == ("cpu", "decode", True, "float32")
    assert choice.isa in ("avx512", "avx2", "generic")
    assert choice.refusal is None
    assert str(choice) == f"paged_attention on cpu: cpu, decode, {choice.isa}, compiled, cache: float32"


@pytest.mark.parametrize(
    ("tokens", "max_seqlen_q", "variant"),
    [(4, 1, "decode"), (4 * 4, 4, "decode"), (4 * 5, 5, "prefill"), (4 * 100, 100, "prefill"), (103, 100, "mixed")],
)
def test_varlen_variants(tokens: int, max_seqlen_q: int, variant: str) -> None:
    choice = torch_paged.explain("flash_attn_varlen", backend="cpu", **varlen_arguments(tokens, max_seqlen_q))
    assert choice.variant == variant


@pytest.mark.parametrize(("heads", "variant"), [(32, "decode"), (34, "prefill")])
def test_many_query_heads_run_packed_tiles(heads: int, variant: str) -> None:
    query = torch.empty(4, heads, 64, device="meta")
    assert torch_paged.explain("paged_attention", backend="cpu", **decode_arguments(query=query)).variant == variant
    for tokens in (4, 3):  # every sequence has one query token, or none
        choice = torch_paged.explain("flash_attn_varlen", backend="cpu", **varlen_arguments(tokens, 1, heads))
        assert choice.variant == variant


def test_the_threshold_is_the_kernels() -> None:
    plan = Path(SOURCE, "csrc_shims/cpu/plan.h").read_text()
    [value] = re.findall(r"kMaxDirectRows = (\d+);", plan)
    assert int(value) == MAX_DIRECT_ROWS


def test_real_tensors_name_the_device() -> None:
    choice = torch_paged.explain("paged_attention", **decode_arguments("cpu"))
    assert (choice.device_type, choice.backend) == ("cpu", "cpu")


def test_meta_tensors_need_a_device() -> None:
    with pytest.raises(ValueError, match=r"^explain: paged_attention on meta tensors needs `device=` or `backend=`"):
        torch_paged.explain("paged_attention", **decode_arguments())


def test_the_reference_can_be_asked() -> None:
    choice = torch_paged.explain("paged_attention", backend="reference", **decode_arguments())
    assert (choice.backend, choice.compiled) == ("reference", False)


@pytest.mark.parametrize(
    ("shape", "cache_dtype", "scales", "kind"),
    [
        ((2, 16, 2, 16, 64), torch.int8, (2,), "int8 per tensor"),
        ((2, 16, 2, 16, 64), torch.float8_e4m3fn, (2, 2), "float8_e4m3fn per head"),
        ((2, 16, 2, 16, 64), torch.float8_e5m2, (2, 16, 2, 16), "float8_e5m2 per token and head"),
        ((1, 16, 2, 16, 64), torch.float32, None, "latent float32"),
    ],
)
def test_cache_kinds(
    shape: tuple[int, ...], cache_dtype: torch.dtype, scales: tuple[int, ...] | None, kind: str
) -> None:
    arguments = decode_arguments(
        kv_cache=torch.empty(shape, dtype=cache_dtype, device="meta"),
        kv_scales=None if scales is None else torch.empty(scales, device="meta"),
        value_dim=48,
    )
    choice = torch_paged.explain("paged_attention", device="cpu", **arguments)
    assert (choice.cache, choice.refusal) == (kind, None)


def test_no_cache() -> None:
    lses = torch.empty(2, 3, 4, device="meta")
    outs = torch.empty(2, 3, 4, 8, device="meta")
    choice = torch_paged.explain("merge_attention_states", device="cpu", outs=outs, lses=lses)
    assert (choice.variant, choice.cache) == ("merge_attention_states", "no cache")


def test_a_refusal_is_what_the_call_raises() -> None:
    arguments = decode_arguments("cpu", context_lens=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^paged_attention: context_lens must") as raised:
        torch_paged.paged_attention(**arguments)
    choice = torch_paged.explain("paged_attention", **arguments)
    assert choice.refusal == str(raised.value)
    assert (choice.backend, choice.variant, choice.isa, choice.compiled) == ("cpu", None, None, None)
    assert str(choice) == f"paged_attention on cpu: refused: {raised.value}"


def test_a_device_without_a_backend() -> None:
    choice = torch_paged.explain("paged_attention", device="lazy", **decode_arguments())
    assert choice.backend is None
    assert choice.refusal is not None
    assert choice.refusal.startswith("paged_attention: no backend serves device 'lazy' (available backends: ")


def test_a_backend_is_not_explained_for_another_device() -> None:
    for name in backends.discover():
        choice = torch_paged.explain("paged_attention", device="lazy", backend=name, **decode_arguments())
        served = backends.discover()[name].serves()
        assert (choice.variant, choice.refusal) == (
            None,
            f"paged_attention: backend '{name}' does not support device 'lazy' (it serves {', '.join(served)}); "
            "move the tensors, or name another backend",
        )


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("attention", {}, "explain: op must be one of reshape_and_cache, .*, got 'attention'"),
        ("paged_attention", {"window": 3}, "explain: paged_attention has no argument 'window'; it has query, "),
        (
            "paged_attention",
            {"backend": "gpu"},
            f"explain: backend must be one of {', '.join(backends.discover())}, got 'gpu'",
        ),
        ("reshape_and_cache", {}, "explain: reshape_and_cache has no argument 'query'"),
    ],
)
def test_wrong_questions(op: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        torch_paged.explain(op, **decode_arguments("cpu", **changes))


def test_a_missing_argument() -> None:
    with pytest.raises(ValueError, match=r"^explain: paged_attention needs the argument 'block_tables'$"):
        torch_paged.explain("paged_attention", query=torch.empty(1, 1, 8), kv_cache=torch.empty(2, 1, 1, 1, 8))


def test_the_log_tells_each_new_choice_once() -> None:
    code = """
import torch, torch_paged
cache, ids = torch.zeros(2, 3, 1, 1, 1), torch.tensor([0])
for _ in range(3):
    torch_paged.copy_blocks(cache, ids, ids + 1)
torch_paged.gather_cache(cache, ids.int()[None], ids.int(), 1)
"""
    lines = run_python(code, TORCH_PAGED_LOG="1").stderr.splitlines()
    assert [line.partition(" on cpu: cpu, ")[0] for line in lines] == [
        "torch_paged: copy_blocks",
        "torch_paged: gather_cache",
    ]
    assert run_python(code).stderr == ""
    configured = 'import logging; logging.basicConfig(format="own %(name)s: %(message)s")\n' + code
    lines = run_python(configured, TORCH_PAGED_LOG="1").stderr.splitlines()
    assert [line.partition(" on cpu: cpu, ")[0] for line in lines] == [
        "own torch_paged: copy_blocks",
        "own torch_paged: gather_cache",
    ]
