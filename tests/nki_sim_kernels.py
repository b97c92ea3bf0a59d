"""Small NKI kernels made from text, run where `nki` is: on the strict simulator of this repository, or on the vendor's.

A kernel is a file of its own, since the simulator reads the source that it runs and names its lines. A test gives the
lines in the middle; around them, input arrays are copied into tiles and result tiles into outputs. `rejects` runs a
kernel that is right, then the same kernel with one thing changed, which must be refused in words that say why.
"""

import atexit
import importlib.util
import itertools
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import nki
import nki.isa as nisa
import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]

STRICT = Path(nki.__file__ or "").parent.parent.name == "nki_sim"
"""Whether `nki` is the simulator of this repository."""

strict_only = pytest.mark.skipif(not STRICT, reason="the vendor's simulator leaves this to its compiler")

HEADER = "import nki\nimport nki.isa as nisa\nimport nki.language as nl\n\n\n"
MESSAGE = re.compile(
    r"(?P<instruction>[\w.]+): (?P<operand>.+?) must (?P<rule>.+), got (?P<got>.+) "
    r"\((?P<file>.+):(?P<line>\d+)( of the kernel)?\)",
    re.DOTALL,
)
_directory = Path(tempfile.mkdtemp(prefix="nki_sim_kernels_"))
_numbers = itertools.count()
atexit.register(shutil.rmtree, _directory, ignore_errors=True)


@dataclass(frozen=True)
class Result:
    """A tile that a kernel's middle writes and that is handed back; `fill` is what it holds before."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    memory: str = "sbuf"
    fill: float | None = None


def dtype_of(name: str) -> np.dtype[Any]:
    """Return numpy's dtype for a name in nki.language."""
    return np.dtype(getattr(ml_dtypes, name, None) or {"bool_": "uint8", "tfloat32": "float32"}.get(name, name))


def f32(values: npt.ArrayLike) -> Array:
    return np.array(values, np.float32)


def i32(values: npt.ArrayLike) -> Array:
    return np.array(values, np.int32)


def cast_to(values: npt.ArrayLike, dtype: str) -> Array:
    """Cast fp32 values as the engines do at the write: ties to even, integers saturate, floats overflow to infinity."""
    exact, to = np.asarray(values, np.float32), dtype_of(dtype)
    if to.kind in "iu":
        return np.clip(np.rint(exact.astype(np.float64)), np.iinfo(to).min, np.iinfo(to).max).astype(to)
    with np.errstate(over="ignore"):
        return exact.astype(to)


def random(*shape: int, dtype: str = "float32", seed: int = 0) -> Array:
    """Draw normal floats, or integers of the dtype's whole range up to 2^20."""
    to, generator = dtype_of(dtype), np.random.default_rng(seed)
    if to.kind in "iu":
        limit = min(np.iinfo(to).max, 2**20)
        return generator.integers(-limit if to.kind == "i" else 0, limit, shape).astype(to)
    return generator.standard_normal(shape).astype(np.float32).astype(to)


def whole(*shape: int, dtype: str = "float32", limit: int = 4, seed: int = 0) -> Array:
    """Draw small whole numbers, whose sums of products are exact in whatever order they are added."""
    return np.random.default_rng(seed).integers(-limit, limit + 1, shape).astype(dtype_of(dtype))


def same(got: Array, wanted: Array) -> None:
    """Compare bit for bit, any NaN being equal to any other."""
    assert got.dtype == wanted.dtype, (got.dtype, wanted.dtype)
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    if wanted.dtype.kind in "iub":
        np.testing.assert_array_equal(got, wanted)
    else:
        np.testing.assert_array_equal(got.astype(np.float64), wanted.astype(np.float64))


def close(got: Array, wanted: npt.ArrayLike) -> None:
    """Compare within a few units in the last place of the result's dtype: for functions and for sums of any order."""
    ulp = float(ml_dtypes.finfo(got.dtype).eps)
    np.testing.assert_allclose(got.astype(np.float64), np.asarray(wanted, np.float64), rtol=8 * ulp, atol=8 * ulp)


def load(source: str) -> ModuleType:
    """Write a file with the source below the usual imports, and import it."""
    name = f"nki_sim_kernel_{next(_numbers)}"
    path = _directory / f"{name}.py"
    path.write_text(HEADER + source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def target(generation: str, lnc: int) -> Iterator[None]:
    """Choose the chip (trn2, trn3) and the cores that run a kernel together (1, 2)."""
    variables = {"NEURON_PLATFORM_TARGET_OVERRIDE": generation, "NEURON_LOGICAL_NC_CONFIG": str(lnc)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def call(source: str, *arguments: object, generation: str = "trn2", lnc: int = 1) -> Any:
    """Run the function `kernel` of a source on the arguments."""
    with target(generation, lnc):
        return nki.simulate(load(source).kernel)(*arguments)


def kernel_source(body: str, psum: Sequence[str], hbm: Sequence[str], tiles: Mapping[str, Array | Result]) -> str:
    """Return a kernel whose middle is `body`, with tiles for inputs and results around it."""
    inputs = [name for name, tile in tiles.items() if not isinstance(tile, Result)]
    lines = ["@nki.jit", f"def kernel({', '.join([*hbm, *(f'{name}_hbm' for name in inputs)])}):"]
    for name, tile in tiles.items():
        if isinstance(tile, Result):
            lines.append(f"    {name} = nl.ndarray({tile.shape}, nl.{tile.dtype}, buffer=nl.{tile.memory})")
            if tile.fill is not None:
                lines.append(f"    nisa.memset(dst={name}, value={tile.fill})")
        else:
            loaded = f"{name}_sbuf" if name in psum else name
            lines.append(f"    {loaded} = nl.ndarray({tile.shape}, {name}_hbm.dtype, buffer=nl.sbuf)")
            lines.append(f"    nisa.dma_copy(dst={loaded}, src={name}_hbm)")
            if name in psum:
                lines.append(f"    {name} = nl.ndarray({tile.shape}, {name}_hbm.dtype, buffer=nl.psum)")
                lines.append(f"    nisa.tensor_copy(dst={name}, src={loaded}, engine=nisa.engine.vector)")
    lines += [f"    {line}" for line in body.strip("\n").splitlines()]
    results = {name: tile for name, tile in tiles.items() if isinstance(tile, Result)}
    for name, tile in results.items():
        stored = f"{name}_stored" if tile.memory == "psum" else name
        if tile.memory == "psum":
            lines.append(f"    {stored} = nl.ndarray({tile.shape}, nl.{tile.dtype}, buffer=nl.sbuf)")
            lines.append(f"    nisa.tensor_copy(dst={stored}, src={name}, engine=nisa.engine.vector)")
        lines.append(f"    {name}_out = nl.ndarray({tile.shape}, nl.{tile.dtype}, buffer=nl.shared_hbm)")
        lines.append(f"    nisa.dma_copy(dst={name}_out, src={stored})")
    if results:
        lines.append(f"    return {', '.join(f'{name}_out' for name in results)}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Setup:
    """All that a kernel runs on besides its text."""

    tiles: Mapping[str, Array | Result]
    hbm: Mapping[str, object]
    psum: Sequence[str] = ()
    generation: str = "trn2"
    lnc: int = 1

    def source(self, body: str) -> str:
        return kernel_source(body, self.psum, list(self.hbm), self.tiles)

    def run(self, body: str) -> Any:
        arrays = [tile for tile in self.tiles.values() if not isinstance(tile, Result)]
        arguments = [*self.hbm.values(), *arrays]
        return call(self.source(body), *arguments, generation=self.generation, lnc=self.lnc)


def run(
    body: str,
    *,
    psum: Sequence[str] = (),
    hbm: Mapping[str, object] | None = None,
    generation: str | None = None,
    lnc: int = 1,
    **tiles: Array | Result,
) -> Any:
    """Run the lines of `body` between loads and stores.

    Args:
        body: lines of a kernel that use the names in `tiles` and `hbm`.
        psum: the inputs among the tiles that lie in PSUM.
        hbm: arguments handed to the kernel as they are.
        generation, lnc: where it runs; on trn3 and then on trn2, with the same results, where no generation is given.
        tiles: an array is loaded into a tile of its name; a Result is a tile whose contents are returned.

    Returns: the result, or a tuple of them in the order of `tiles`.
    """
    if generation is not None:
        return Setup(tiles, hbm or {}, psum, generation, lnc).run(body)
    copies = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in (hbm or {}).items()}
    newer = Setup(tiles, copies, psum, "trn3", lnc).run(body)
    older = Setup(tiles, hbm or {}, psum, "trn2", lnc).run(body)
    if older is not None:
        for first, second in zip(*((x if isinstance(x, tuple) else (x,)) for x in (older, newer)), strict=True):
            same(first, second)
    return older


def refused(action: Callable[[], object]) -> re.Match[str]:
    """Run what must be refused, and return the message in its parts."""
    with pytest.raises(nisa.NkiValidationError) as error:
        action()
    found = MESSAGE.fullmatch(str(error.value))
    assert found is not None, f"not in the words of a refusal: {error.value}"
    return found


def refused_with(action: Callable[[], object], instruction: str, operand: str, rule: str, line: int | None) -> None:
    """Check that a refusal names instruction, operand and line, and speaks of what `rule` (a pattern) says."""
    found = refused(action)
    assert re.fullmatch(instruction, found["instruction"].rpartition(".")[2]), found[0]
    assert re.search(rf"\b({operand})\b", found["operand"]), found[0]
    assert re.search(rule, found[0], re.IGNORECASE), found[0]
    assert line is None or int(found["line"]) == line, f"{found[0]}: expected line {line}"


def line_of(source: str, body: str, instruction: str) -> int:
    """Return the line marked with `# !`, or else the last of the body that calls the instruction."""
    lines = (HEADER + source).splitlines()
    first = lines.index(f"    {body.strip(chr(10)).splitlines()[0]}") if body != source else 0
    inside = range(first, first + len(body.strip("\n").splitlines()) if body != source else len(lines))
    marked = [number + 1 for number in inside if lines[number].endswith("# !")]
    calls = [number + 1 for number in inside if re.search(rf"\.({instruction})\(", lines[number])]
    return (marked or calls)[-1]


def rejects(
    body: str,
    instruction: str,
    operand: str,
    rule: str,
    but: tuple[str, str] | Mapping[str, Any],
    *,
    psum: Sequence[str] = (),
    hbm: Mapping[str, object] | None = None,
    generation: str = "trn2",
    lnc: int = 1,
    **tiles: Array | Result,
) -> None:
    """Check that a kernel runs, and is refused with one change: of a text in it, or of tiles, arguments or the target.

    The refusal must come from the line of `body` that ends in `# !`, or else the last one that calls the instruction.
    """
    setup = Setup(tiles, hbm or {}, psum, generation, lnc)
    setup.run(body)
    if not STRICT:
        pytest.skip("the vendor's simulator leaves this to its compiler")
    if isinstance(but, tuple):
        assert body.count(but[0]) == 1, f"{but[0]!r} is {body.count(but[0])} times in the kernel"
        body = body.replace(*but)
    else:
        changes = dict(but)
        settings = {name: changes.pop(name) for name in ("psum", "hbm", "generation", "lnc") if name in changes}
        setup = replace(setup, tiles={**setup.tiles, **changes}, **settings)
    refused_with(lambda: setup.run(body), instruction, operand, rule, line_of(setup.source(body), body, instruction))


def rejects_kernel(
    source: str, instruction: str, operand: str, rule: str, but: tuple[str, str], *arguments: object, **where: Any
) -> None:
    """Check that a whole kernel runs, and is refused with one text of it replaced."""
    assert source.count(but[0]) == 1, f"{but[0]!r} is {source.count(but[0])} times in the kernel"
    call(source, *arguments, **where)
    if not STRICT:
        pytest.skip("the vendor's simulator leaves this to its compiler")
    broken = source.replace(*but)
    refused_with(
        lambda: call(broken, *arguments, **where), instruction, operand, rule, line_of(broken, broken, instruction)
    )


def rejected(instruction: str, operand: str, rule: str, but: Any, body: str, **setup: Any) -> Any:
    """Return one case for `rejects` as a parameter of a test, named after what it breaks."""
    words = re.sub(r"\W+", "_", but[1] if isinstance(but, tuple) else "_".join(but)).strip("_")
    return pytest.param(body, instruction, operand, rule, but, setup, id=f"{instruction}-{operand}-{words}"[:80])
