"""The quick part of the matrix of programs that the chips' compiler takes (``make tpu-matrix`` is all of it)."""

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tpu_matrix
from tpu_matrix import OPTIONS

from torch_paged.backends.tpu import aot, decode, varlen
from torch_paged.backends.tpu.export import exported


def test_as_many_cells_are_supported_as_were() -> None:
    found = {cell.name: tpu_matrix.outcome(cell) for cell in tpu_matrix.quick_cells()}
    wrong = {name: why for name, why in found.items() if why is not None}
    failed_before = json.loads(tpu_matrix.FIGURES.read_text()).get(f"quick, {tpu_matrix.versions()}", [])
    assert not {name: why for name, why in wrong.items() if name not in failed_before}


def test_the_option_cells_hold_every_pair() -> None:
    choices = [dict(zip(OPTIONS, choice, strict=True)) for choice in tpu_matrix.pairs(OPTIONS)]
    for a, b in itertools.combinations(OPTIONS, 2):
        pairs = {(choice[a], choice[b]) for choice in choices}
        assert pairs == set(itertools.product(OPTIONS[a], OPTIONS[b])), (a, b)


def test_a_program_that_copies_or_does_without_a_kernel_is_not_supported() -> None:
    cache = jax.ShapeDtypeStruct((2, 64, 2, 16, 128), jnp.float32)
    num_bytes = 2 * 64 * 2 * 16 * 128 * 4
    dense = aot.export_for("v5e", lambda x: jnp.einsum("nhsd,nhtd->nhst", x[0], x[1]), (cache,))
    why = tpu_matrix._compiled("v5e", dense, num_bytes, 0, kernels=1, gathered=0)
    assert why is not None
    assert "0 kernels, expected 1; matrix products outside the kernel" in why
    moved = aot.export_for("v5e", lambda x: jnp.flip(x, 1), (cache,))
    why = tpu_matrix._compiled("v5e", moved, num_bytes, num_bytes, kernels=0, gathered=0)
    assert why is not None
    assert why.startswith(f"0 bytes updated in place, expected {num_bytes}; of the cache's size: ")


@pytest.mark.parametrize(("source", "products"), [("decode", True), ("decode", False), ("cache", False)])
def test_a_dense_path_beside_the_kernels_is_seen(monkeypatch: pytest.MonkeyPatch, source: str, products: bool) -> None:
    """One that multiplies matrices, and one that gathers the blocks of the tables and adds them up."""
    cell = tpu_matrix.attention_cell({name: values[0] for name, values in OPTIONS.items()} | {"source": source})
    module = decode if source == "decode" else varlen
    function = getattr(module, cell.overload)

    def planted(query: Any, *arrays: Any, **options: Any) -> Any:
        kv_cache, tables = arrays[:2] if source == "decode" else arrays[4:6]
        blocks = kv_cache[:, jnp.clip(tables, 0, kv_cache.shape[1] - 1)]  # (2, B, M, KH, S, D)
        if products:
            extra = jnp.einsum("thd,bmsd->th", query, blocks[0, :, :, 0, :, : query.shape[-1]])
        else:
            extra = jnp.broadcast_to(jnp.abs(blocks).max(), query.shape[:2])
        return function(query, *arrays, **options) + extra[..., None].astype(query.dtype)

    exported.cache_clear()
    monkeypatch.setattr(module, cell.overload, planted)
    why = tpu_matrix._found(cell)
    exported.cache_clear()
    assert why is not None
    assert why.startswith(("matrix products outside the kernel", "blocks gathered outside the kernel"))
