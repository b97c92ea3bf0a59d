"""What the TPU backend refuses, in whose words, and that it refuses nothing else."""

import importlib.metadata
import importlib.util
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from torch_paged.backends.tpu import BACKEND, support
from torch_paged.backends.tpu.calls import jax_call
from torch_paged.backends.tpu.export import program_of
from torch_paged.contract.validate import validate
from torch_paged.testing import AttentionCase, build
from torch_paged.testing.processes import SOURCE

SERVED = AttentionCase("served", head_dim=80, stored_dim=128, query_lens=(3, 0, 5, 1), new_lens=(3, 0, 5, 1))
NO_TPU = "no TPU is in reach here; docs/tpu.md has the commands for a TPU VM"
QUIET = ("PJRT_DEVICE", "TORCH_DEVICE_BACKEND_AUTOLOAD")
"""Settings of the tests that a user has not."""
ALLOCATE = "allocate it by torch_paged.cache.allocate_kv_cache(..., backend='tpu')"


def refusal(case: AttentionCase, **changes: Any) -> str | None:
    arguments = build(case) | changes
    validate(case.op, arguments)
    return support.refusal(case.op, arguments)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": torch.float16}, "query of float16 (float32 or bfloat16); convert it to bfloat16"),
        (
            {"latent": True, "value_dim": 64, "num_kv_heads": 1},
            "latent caches (keys and values); expand the latent rows into keys and values",
        ),
        ({"stored_dim": 80}, f"kv_cache with DS = 80 (a multiple of 128); {ALLOCATE}"),
        (
            {"block_size": 3},
            f"kv_cache with S = 3 (8, 16, 32, 64 or 128); {ALLOCATE} and such a block size",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], says: str) -> None:
    case = replace(SERVED, **changes)
    assert refusal(case) == f"flash_attn_varlen: backend 'tpu' does not support {says}"


def test_a_cache_in_another_layout_is_refused() -> None:
    said = refusal(replace(SERVED, layout="nhd"))
    assert said is not None
    assert said.startswith("flash_attn_varlen: backend 'tpu' does not support kv_cache with strides (")
    assert said.endswith(") (contiguous); pass kv_cache.contiguous()")


def test_a_cache_of_too_many_rows_is_refused() -> None:
    kv_cache = torch.empty((2, 2**23, 8, 16, 128), dtype=torch.int8, device="meta")
    said = support.refusal("copy_blocks", {"kv_cache": kv_cache})
    assert said is not None
    assert f"kv_cache with 2 * N * KH * S = {2**31} (less than 2^31)" in said


@pytest.mark.parametrize("query_lens", [None, SERVED.query_lens])
def test_a_row_of_a_table_that_no_scalar_memory_holds_is_refused(query_lens: tuple[int, ...] | None) -> None:
    case = replace(SERVED, query_lens=query_lens, new_lens=query_lens)
    tables = torch.zeros((4, 2**17 + 1), dtype=torch.int32)
    said = refusal(case, block_tables=tables)
    assert said is not None
    assert said.endswith(
        f"block_tables with M = {2**17 + 1} (at most {2**17}); pass fewer columns, or use a larger block size"
    )
    assert refusal(case, block_tables=tables[:, 1:]) is None


@pytest.mark.parametrize("query_lens", [None, SERVED.query_lens])
def test_a_block_that_vmem_does_not_hold_twice_is_refused(query_lens: tuple[int, ...] | None) -> None:
    case = replace(SERVED, query_lens=query_lens, new_lens=query_lens, num_kv_heads=32, block_size=128)
    arguments = build(case)
    arguments["kv_cache"] = torch.empty((2, 9, 32, 128, 256), device="meta")
    call = jax_call(case.op, arguments)
    with pytest.raises(NotImplementedError) as raised:
        program_of(call, "tpu", "v4")
    assert str(raised.value) == (
        f"{case.op}: backend 'tpu' does not support kv_cache with {2**23} bytes in a block on v4 (at most "
        f"{9 * 2**19}, as VMEM holds two blocks and what is computed of them); use a smaller block size"
    )
    for chip in ("v5e", "v5p", "v6e", "tpu7x"):
        assert program_of(call, "tpu", chip).chip == chip
    assert program_of(call, "cpu", "v4").chip == "v4"
    half = arguments | {"kv_cache": torch.empty((2, 9, 32, 64, 256), device="meta")}
    assert program_of(jax_call(case.op, half), "tpu", "v4").chip == "v4"


@pytest.mark.parametrize("head_dim", [1, 17, 64, 80, 96, 128, 192, 256])
def test_what_is_not_refused(head_dim: int) -> None:
    stored_dim = -(-head_dim // 128) * 128
    for block_size, group, (dtype, stored, rank) in itertools.product(
        support.BLOCK_SIZES,
        (1, 3, 4, 8),
        (
            (torch.float32, None, None),
            (torch.bfloat16, None, None),
            (torch.bfloat16, torch.int8, 1),
            (torch.float32, torch.float8_e4m3fn, 2),
            (torch.bfloat16, torch.float8_e5m2, 4),
        ),
    ):
        case = AttentionCase(
            "served",
            context_lens=(3,),
            head_dim=head_dim,
            stored_dim=stored_dim,
            block_size=block_size,
            group=group,
            dtype=dtype,
            cache_dtype=stored,
            scales_rank=rank,
            sinks=True,
            alibi=True,
            mask="heads",
            sliding_window=2,
            attention_chunk=16,
            logits_soft_cap=5.0,
        )
        assert refusal(case) is None


@pytest.mark.parametrize(
    ("package", "found", "says"),
    [
        ("jax", None, "it needs jax >= 0.7.1, which is not installed: "),
        ("jax", "0.6.2", "it needs jax >= 0.7.1, got 0.6.2: "),
        ("libtpu", "0.0.20", "it needs libtpu >= 0.0.21, got 0.0.20: "),
        ("libtpu", "0.0.21.dev20250919", None),
        ("jax", "0.10.2", None),
        ("jax", "1.0", None),
        ("torch_xla", "2.8.1", "it needs torch_xla >= 2.9, got 2.8.1: "),
        ("torch_xla", "2.9.0+libtpu", None),
        ("torch_tpu", "0.1.3", "it needs torch_tpu >= 0.2, got 0.1.3: "),
    ],
)
def test_a_package_that_is_missing_or_old(
    monkeypatch: pytest.MonkeyPatch, package: str, found: str | None, says: str | None
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    said = support.missing(package)
    assert said == (None if says is None else says + support.install_line())


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"jax": "0.10.2", "libtpu": "0.0.51"}, "no tensor here is on a TPU: "),
        ({"jax": "0.7.1", "libtpu": "0.0.21", "torch_xla": "2.8.0"}, "it needs torch_xla >= 2.9, got 2.8.0: "),
        ({"jax": "0.7.1", "torch_xla": "2.9.0"}, "it needs libtpu >= 0.0.21, which is not installed: "),
        ({"libtpu": "0.0.21", "torch_xla": "2.9.0"}, "it needs jax >= 0.7.1, which is not installed: "),
        ({"jax": "0.7.1", "libtpu": "0.0.21", "torch_xla": "2.9.0"}, None),
    ],
)
def test_why_it_is_off_has_the_install_line(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str], says: str | None
) -> None:
    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found.get(name))
    said = BACKEND.why_off()
    assert said == says if says is None else str(said).startswith(says + support.install_line())


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["tests/tpu_device.py"], f"test-tpu-device: {NO_TPU}"),
        (["-m", "benchmarks", "tpu", "--device"], f"benchmarks tpu: {NO_TPU}"),
        (["examples/08_tpu_torch_xla.py"], "torch_xla is not installed: see docs/tpu.md for the install commands"),
        (["examples/09_tpu_torch_tpu.py"], "no TPU is in reach of torch_tpu: reshape_and_cache: no backend serves "),
    ],
    ids=["tests", "benchmark", "torch_xla", "torch_tpu"],
)
def test_without_a_tpu_it_ends_with_one_sentence(command: list[str], says: str) -> None:
    if "08" in command[0] and importlib.util.find_spec("torch_xla") is not None:
        pytest.skip("torch_xla interprets it: tests/test_tpu_xla.py")
    settings = {name: value for name, value in os.environ.items() if name not in QUIET}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=SOURCE,
        env={**settings, "PYTHONPATH": str(SOURCE)},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    *logged, sentence = done.stderr.splitlines()
    assert sentence.startswith(says)
    assert not [line for line in logged if "Traceback" in line]
