"""The tutorial kernels of aws-neuron/nki-samples, from a checkout that NKI_SAMPLES names: none is in this tree."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from nki_sim_kernels import Array, random, target

SAMPLES = os.environ.get("NKI_SAMPLES", "")
TUTORIALS = Path(SAMPLES) / "src" / "nki_samples" / "tutorials"
pytestmark = pytest.mark.skipif(not SAMPLES, reason="NKI_SAMPLES names no checkout of aws-neuron/nki-samples")


def load(folder: str, file: str) -> ModuleType:
    """Import a file of a tutorial, which may import its neighbours."""
    path = TUTORIALS / folder / file
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"nki_samples_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


def attention(q: Array, k: Array, v: Array) -> Array:
    """Unscaled attention on (D, T) inputs, as the tutorial has it."""
    scores = q.T @ k
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ v.T  # type: ignore[no-any-return]


def product(a: Array, b: Array) -> Array:
    """Give a.T @ b."""
    return a.T @ b  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A kernel, its inputs, and the same in numpy."""

    folder: str
    file: str
    kernel: str
    inputs: tuple[object, ...]
    reference: Callable[..., Array]
    tolerance: float = 1e-5
    generations: tuple[str, ...] = ("trn2", "trn3")


def _attention(version: str, tokens: int, tolerance: float) -> Case:
    inputs = tuple(random(128, tokens, seed=seed) * np.float32(0.3) for seed in range(3))
    folder, kernel = "attention_fwd_performance", f"attn_fwd_v{version}"
    return Case(folder, "attention_kernels.py", kernel, inputs, attention, tolerance)


def _product(kernel: str, *shape: int, tolerance: float = 1e-4) -> Case:
    k, m, n = shape
    folder, file = "matrix_multiplication", "matrix_multiplication_nki_kernels.py"
    return Case(folder, file, kernel, (random(k, m), random(k, n, seed=1)), product, tolerance)


POOLED = np.arange(72, dtype=np.float16).reshape(2, 6, 6)
COLUMNS = np.random.default_rng(0).integers(0, 100, (1, 64)).astype(np.uint16)
CASES = [
    _product("nki_matmul_basic_", 128, 64, 512),
    _product("nki_matmul_tiled_", 256, 128, 1024),
    _product("nki_matmul_hoist_load_", 256, 256, 512),
    _product("nki_matmul_block_free_dimension_", 256, 256, 1024),
    _product("nki_matmul_fully_optimized_", 1024, 2048, 1024, tolerance=1e-3),
    _attention("1", 128, 1e-5),
    _attention("2", 128, 1e-5),
    *(_attention(version, 512, 1e-5) for version in ("3", "4", "5")),
    *(_attention(version, 512, 1e-2) for version in ("6", "7", "8", "8a", "10")),
    Case(
        "average_pool2d",
        "average_pool2d_nki_kernels.py",
        "tensor_avgpool_kernel",
        (POOLED, 2),
        lambda x, size: x.reshape(2, 3, size, 3, size).mean((2, 4)),
    ),
    Case(
        "tensor_indirection",
        "tensor_indirection_nki_kernels.py",
        "tensor_indirection_kernel",
        (COLUMNS, random(64, 100)),
        lambda index, data: data[:, index[0]],
        generations=("trn3",),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
def test_tutorial(case: Case) -> None:
    kernel = getattr(load(case.folder, case.file), case.kernel)
    wanted = case.reference(*case.inputs).astype(np.float32)
    for generation in case.generations:
        with target(generation, 1):
            got = kernel(*case.inputs)
        np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=case.tolerance, atol=case.tolerance)
