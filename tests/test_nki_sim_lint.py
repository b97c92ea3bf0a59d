"""The part of Python that the compiler's parser takes, and how kernels are launched (SDK 2.32, language guide)."""

from typing import Any

import nki
import nki.isa as nisa
import numpy as np
import pytest
from nki_sim_kernels import call, load, random, refused_with, same, strict_only, target

KERNEL = """
SCALE = 2.0


class Kind(Enum):
    first = 1
    second = 2


@dataclass
class Config(nl.NKIObject):
    rows: int
    scale: float = 3.0

    def twice(self):
        return self.scale * 2


def helper(tile, factor{separator}, more=0.0):
    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=factor + more)
    return tile


def kernel(x, kind={default}, sizes=(1, 2)):
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, x.dtype)
    nisa.dma_copy(dst=tile, src=x)
    factor = 1.0
    {line}
    helper(tile, factor)
    nisa.dma_copy(dst=out, src=tile)
    return out
"""


def source(line: str, separator: str = "", default: str = "None") -> str:
    imports = "from dataclasses import dataclass\nfrom enum import Enum\n\nimport numpy as np\n"
    body = "\n    ".join(line.splitlines())
    return imports + KERNEL.format(line=body, separator=separator, default=default)


@pytest.mark.parametrize(
    ("line", "factor"),
    [
        ("factor = SCALE", 2),
        ("for i in range(3):\n    factor = factor + i", 4),
        ("for i in range(0, 5, 2):\n    factor = factor + i", 7),
        ("for i in nl.affine_range(3):\n    factor = factor + i", 4),
        ("for i in nl.static_range(1, 3):\n    factor = factor + i", 4),
        ("for i in nl.sequential_range(1, 6, 2):\n    factor = factor + i", 10),
        ("factor = nisa.get_nc_sub_version() + 2.0", 2),
        ("factor = nl.program_ndim() + 2.0", 2),
        ("while factor < 5.0:\n    factor = factor * 2", 8),
        ("if x.shape[0] > 2:\n    factor = 5.0\nelse:\n    factor = 6.0", 5),
        ("if kind == None:\n    factor = 5.0", 5),
        ("config = Config(rows=4)\nfactor = config.scale", 3),
        ("config = Config(4, scale=1.5)\nfactor = config.twice()", 3),
        ("config = Config(rows=4)\nconfig.LATER = 7.0\nfactor = config.LATER", 7),
        ("factor = 2.0 if Kind.first == Kind.first else 3.0", 2),
        ("sums = {'a': 1.0}\nsums['b'] = 2.0\nfactor = sums['a'] + sums['b']", 3),
        ("parts = []\nparts.append(4.0)\nparts.extend([1.0])\nfactor = parts[0] + parts[1] + len(parts)", 7),
        ("assert x.shape[0] == 4, f'{x.shape[0]} rows'\nfactor = 9.0", 9),
        ("function = helper\nfunction(tile, 3.0, more=1.0)", 4),
        ("a, b = 3.0, 4.0\nfactor = a * b", 12),
        ("factor = sizes[0] + sizes[1] * 1.0", 3),
        ("with nl.no_reorder():\n    helper(tile, 2.0)", 2),
        ("factor = 2.0 ** 3 - 7 // 2 + 5 % 3", 7),
    ],
)
def test_taken(line: str, factor: float) -> None:
    x = np.ones((4, 3), np.float32)
    same(call(source(line), x), x * np.float32(factor))


@strict_only
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("if kind is None:\n    factor = 5.0", "is"),
        ("if kind is not x:\n    factor = 5.0", "is"),
        ("f = lambda v: v\nfactor = f(2.0)", "lambda"),
        ("factor = sum(v for v in sizes) * 1.0", "generator"),
        ("try:\n    factor = 2.0\nexcept ValueError:\n    factor = 3.0", "try"),
        ("sums = {1: 2.0}\nfactor = sums[1]", "str|key"),
        ("factor = np.float32(2.0)", "np|numpy"),
        ("factor = float(np.sqrt(4.0))", "np|numpy"),
        ("global SCALE\nfactor = SCALE", "global"),
        ("import math\nfactor = math.sqrt(4.0)", "import"),
        ("def part(*args):\n    return args[0]\nfactor = part(2.0)", r"\*|args|def|star"),
        ("with open('/dev/null'):\n    factor = 2.0", "with"),
        ("helper(tile, **{'factor': 2.0})", r"\*|key"),
    ],
)
def test_refused(line: str, said: str) -> None:
    x = np.ones((4, 3), np.float32)
    call(source("factor = 2.0"), x)
    broken = source(line)
    refused_with(lambda: call(broken, x), "kernel|lint|.*", ".*", said, None)


@strict_only
def test_refused_in_a_helper() -> None:
    x = np.ones((4, 3), np.float32)
    call(source("factor = 2.0", default="(1, 2)"), x)
    refused_with(lambda: call(source("factor = 2.0", separator=", *"), x), ".*", ".*", "keyword", None)
    refused_with(lambda: call(source("factor = 2.0", default="[1, 2]"), x), ".*", ".*", "list|tuple", None)


@strict_only
def test_refused_arguments() -> None:
    x = np.ones((4, 3), np.float32)
    call(source("factor = 2.0"), x, None, (3, 4))
    refused_with(lambda: call(source("factor = 2.0"), x, None, [3, 4]), ".*", "sizes", "list|tuple", None)


@strict_only
def test_free_variables() -> None:
    text = """
def make(factor):
    @nki.jit
    def kernel(x):
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        tile = nl.ndarray(x.shape, x.dtype)
        nisa.dma_copy(dst=tile, src=x)
        nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0={})
        nisa.dma_copy(dst=out, src=tile)
        return out
    return kernel


kernel = make(2.0)
"""
    x = random(4, 3)
    same(call(text.format("3.0"), x), x * 3)
    refused_with(lambda: call(text.format("factor"), x), ".*", ".*", "factor.*enclosing", None)


@strict_only
@pytest.mark.parametrize("parent", ["object", "nl.NKIObject, Base"])
def test_classes_inherit_one_thing(parent: str) -> None:
    x = np.ones((4, 3), np.float32)
    line = "config = Config(rows=4)\nfactor = config.scale"
    call(source(line), x)
    broken = source(line).replace("class Config(nl.NKIObject)", f"class Config({parent})")
    broken = broken.replace("@dataclass", "class Base:\n    pass\n\n\n@dataclass")
    refused_with(lambda: call(broken, x), ".*", ".*", "NKIObject", None)


@pytest.mark.parametrize("decorated", [False, True])
def test_launch_forms(decorated: bool) -> None:
    x = np.ones((4, 3), np.float32)
    text = source("factor = 2.0")
    if decorated:
        text = text.replace("def kernel(", "@nki.jit\ndef kernel(")
    same(call(text, x), x * 2)


def test_calls_by_keyword() -> None:
    x = np.ones((4, 3), np.float32)
    with target("trn2", 1):
        same(nki.simulate(load(source("factor = sizes[0] * 1.0")).kernel)(x=x, sizes=(5, 6)), x * 5)


def test_results() -> None:
    text = """
@nki.jit
def kernel(x, y):
    first = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    second = nl.ndarray(y.shape, y.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=first, src=x)
    nisa.dma_copy(dst=second, src=y)
    nisa.dma_copy(dst=y[0:1], src=x[1:2])
    return first, second
"""
    x, y = random(4, 3), random(4, 3, seed=1)
    before = y.copy()
    first, second = call(text, x, y)
    same(first, x)
    same(second, before)
    same(y, np.concatenate([x[1:2], before[1:]]))


def test_torch() -> None:
    torch: Any = pytest.importorskip("torch")
    x = torch.ones(4, 3, dtype=torch.bfloat16)
    got = call(source("factor = 2.0"), x)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, x * 2)


@strict_only
@pytest.mark.parametrize("target_name", ["trn9", "gen1"])
def test_targets(target_name: str) -> None:
    with pytest.raises(Exception, match=target_name):
        call(source("factor = 2.0"), np.ones((4, 3), np.float32), generation=target_name)


@pytest.mark.parametrize(
    ("name", "version"), [("trn1", 2), ("inf2", 2), ("trn2", 3), ("gen3", 3), ("trn3", 4), ("gen4", 4)]
)
def test_versions(name: str, version: int) -> None:
    line = f"factor = 2.0 if nisa.get_nc_version() == nisa.nc_version.gen{version} else 3.0"
    x = np.ones((4, 3), np.float32)
    same(call(source(line), x, generation=name), x * 2)


def test_trn3_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEURON_PLATFORM_TARGET_OVERRIDE", "NEURON_LOGICAL_NC_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    line = "factor = nl.num_programs(0) * (2.0 if nisa.get_nc_version() == nisa.nc_version.gen4 else 3.0)"
    x = np.ones((4, 3), np.float32)
    same(nki.simulate(load(source(line)).kernel)(x), x * 2)


def test_the_error_is_an_exception_of_isa() -> None:
    assert nisa.NkiValidationError.__mro__[1] is Exception
