"""What is built, what is in the wheel, and what importing the package touches."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import torch_paged
from torch_paged.contract.schema import SCHEMAS
from torch_paged.testing.processes import SOURCE, run_python

PACKAGE = Path(torch_paged.__file__).parent
KERNELS, DEFINITIONS = PACKAGE / "_C.abi3.so", PACKAGE / "libtorch_paged_schema.so"
TORCH = Path(torch.__file__).parent
HEAVY = ("jax", "torch_xla", "torch_tpu", "nki", "neuronxcc", "transformers", "numba", "triton")

DECODE = """
kv_cache = torch.zeros(2, 4, 1, 2, 8)
tables, lengths = torch.tensor([[3, 0]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
kv_cache[1, 3], kv_cache[1, 0] = 1.0, 4.0
arguments = torch.ones(1, 1, 8), kv_cache, tables, lengths
"""


def copy_without_kernels(folder: Path) -> Path:
    shutil.copytree(PACKAGE, folder / "torch_paged", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def build_wheel(
    source: Path, into: Path, *, umask: int = 0o022, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-build-isolation", "--no-deps"]
    return subprocess.run(
        [*command, "--wheel-dir", str(into), str(source)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        umask=umask,
    )


def copy_sources(folder: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(SOURCE / name, folder)
    for name in ("torch_paged", "csrc_shims"):
        shutil.copytree(SOURCE / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def read_elf(option: str, library: Path) -> str:
    return subprocess.run(["readelf", "-W", option, str(library)], capture_output=True, text=True, check=True).stdout


def test_import_touches_no_device_library_and_no_transformers() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import torch_paged
print(sorted(name for name in set(sys.modules) - before if name.partition(".")[0] in {HEAVY!r}))
"""
    assert run_python(code).stdout.strip() == "[]"


def test_the_transformers_bridge_is_loaded_when_asked_for() -> None:
    names = ("PagedCache", "patch_model", "unpatch_model")
    assert set(names) <= set(torch_paged.__all__)
    for name in names:
        assert getattr(torch_paged, name) is getattr(torch_paged.integrations.transformers, name)
    with pytest.raises(AttributeError, match="module 'torch_paged' has no attribute 'paged'"):
        torch_paged.paged  # noqa: B018


def test_without_kernels_cpu_ops_say_what_to_do(tmp_path: Path) -> None:
    path = copy_without_kernels(tmp_path)
    code = f"""
import torch, torch_paged
{DECODE}
try:
    torch_paged.paged_attention(*arguments)
except NotImplementedError as error:
    print(error)
print(torch_paged.paged_attention(*(x.to("meta") for x in arguments)).shape)
print(torch_paged.explain("gather_cache", device="cpu", kv_cache=kv_cache, block_tables=tables, context_lens=lengths,
                          max_len=3).refusal)
"""
    sentence, shape, refusal = run_python(code, path=path).stdout.splitlines()
    off = (
        "no backend serves device 'cpu' (available backends: none); backend 'cpu' is off because this install has no "
        "C++ extension: reinstall with `pip install --no-build-isolation` and without TORCH_PAGED_NO_EXT, or set "
        "TORCH_PAGED_BACKEND=reference for slow kernels in plain PyTorch"
    )
    assert sentence == f"paged_attention: {off}"
    assert shape == "torch.Size([1, 1, 8])"
    assert refusal == f"gather_cache: {off}"


def test_without_kernels_the_reference_can_be_chosen(tmp_path: Path) -> None:
    code = f"import torch, torch_paged\n{DECODE}\nprint(torch_paged.paged_attention(*arguments).mean().item())"
    path = copy_without_kernels(tmp_path)
    assert run_python(code, path=path, TORCH_PAGED_BACKEND="reference").stdout.strip() == "2.0"


def test_without_kernels_the_cpu_backend_cannot_be_named(tmp_path: Path) -> None:
    path = copy_without_kernels(tmp_path)
    failed = run_python("import torch_paged", path=path, check=False, TORCH_PAGED_BACKEND="cpu")
    assert failed.stderr.splitlines()[-1].startswith(
        "ImportError: torch_paged: TORCH_PAGED_BACKEND=cpu cannot be served: this install has no C++ extension"
    )


def test_our_libraries_alone_run_in_a_process_with_torch() -> None:
    code = f"""
import sys, torch
for library in sys.argv[1:]:
    torch.ops.load_library(library)
{DECODE}
print(torch.ops.paged.paged_attention(*arguments).mean().item())
try:
    torch.ops.paged.paged_attention(*arguments[:3], lengths + 99)
except ValueError as error:
    print(error)
try:
    import torch_paged
except ImportError as error:
    print(error)
"""
    for libraries in ((KERNELS, DEFINITIONS), (DEFINITIONS, KERNELS)):
        value, sentence, twice = run_python(code, *map(str, libraries)).stdout.splitlines()
        assert value == "2.0"
        assert sentence.startswith("paged_attention: context_lens must ")
        assert twice.startswith("torch_paged: the ops of torch.ops.paged are already defined in this process")


def test_the_generated_definitions_are_the_schemas() -> None:
    code = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for schema in sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("paged::")):
    print(schema)
"""
    with_package = code.replace("torch.ops.load_library(sys.argv[1])", "import torch_paged")
    generated = run_python(code, str(DEFINITIONS)).stdout
    assert generated == run_python(with_package).stdout
    assert len(generated.splitlines()) == len(SCHEMAS)


def test_a_program_without_python_runs_the_ops(tmp_path: Path) -> None:
    program = tmp_path / "standalone"
    command = ["g++", "-std=c++20", "-O1", f"-I{TORCH}/include", str(SOURCE / "csrc_shims/tests/standalone.cpp")]
    command += ["-o", str(program), f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib", "-Wl,--no-as-needed"]
    subprocess.run([*command, "-ltorch_cpu", "-lc10", "-ldl"], check=True)
    result = subprocess.run([program, DEFINITIONS, KERNELS], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "paged_attention without Python: 1 result, largest error 0\n"
    without_kernels = subprocess.run([program, DEFINITIONS], capture_output=True, text=True)
    assert without_kernels.returncode != 0


def test_the_library_shares_torchs_openmp_and_knows_no_python() -> None:
    text = read_elf("-d", KERNELS)
    assert set(re.findall(r"NEEDED.*\[(.*?)\]", text)) >= {"libtorch_cpu.so", "libgomp.so.1"}
    assert "python" not in text
    assert "RPATH" not in text
    assert "RUNPATH" not in text
    code = """
import torch, torch_paged
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""
    assert run_python(code).stdout.strip() == "1"


@pytest.mark.parametrize("library", [KERNELS, DEFINITIONS], ids=lambda path: path.name)
def test_a_library_is_bound_once_and_has_no_path_of_its_build(library: Path) -> None:
    segments, dynamic = read_elf("-l", library), read_elf("-d", library)
    assert re.search(r"GNU_STACK .* RW +0x", segments)
    assert "GNU_RELRO" in segments
    assert "BIND_NOW" in dynamic
    assert not [
        path for path in (SOURCE, TORCH, Path.home(), "build/temp.") if str(path).encode() in library.read_bytes()
    ]


def test_the_pure_wheel_has_everything_but_kernels(tmp_path: Path) -> None:
    """`make test-wheel` builds, installs and uses the one with kernels; compiling that here would take minutes."""
    source = tmp_path / "source"
    source.mkdir()
    built = build_wheel(copy_sources(source), tmp_path, TORCH_PAGED_NO_EXT="1")
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name == f"torch_paged-{torch_paged.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(SOURCE)) for path in PACKAGE.rglob("*.py")}
    assert modules <= names
    assert {"torch_paged/py.typed", "torch_paged/backends/README.md"} <= names
    others = {name.split("/")[0] for name in names}
    assert others == {"torch_paged", f"torch_paged-{torch_paged.__version__}.dist-info"}
    assert not [name for name in names if ".so" in name]
    metadata = zipfile.ZipFile(wheel).read(f"torch_paged-{torch_paged.__version__}.dist-info/METADATA").decode()
    assert "Requires-Dist: torch>=2.9" in metadata
    extras = set(re.findall(r"Provides-Extra: (\S+)", metadata))
    assert {"tpu-xla", "tpu", "neuron", "transformers", "bench", "test", "docs"} <= extras


def test_the_sdist_has_what_the_make_targets_need(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--formats", "zip", "--dist-dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=SOURCE, env={**os.environ, "TORCH_PAGED_NO_EXT": "1"})
    [archive] = tmp_path.glob("*.zip")
    names = {name.partition("/")[2] for name in zipfile.ZipFile(archive).namelist()}
    wanted = {
        "Makefile",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        ".ci/run",
        ".ci/requirements.txt",
        ".clang-format",
    }
    for folder in ("torch_paged", "csrc_shims", "tests", "benchmarks", "examples", "docs"):
        paths = [path for path in (SOURCE / folder).rglob("*") if path.is_file() and path.suffix not in (".so", ".pyc")]
        wanted |= {str(path.relative_to(SOURCE)) for path in paths}
    assert wanted - names == set()


@pytest.fixture
def small_source(tmp_path: Path) -> Path:
    """The sources, with one small file instead of the kernels."""
    source = tmp_path / "source"
    source.mkdir()
    copy_sources(source)
    shutil.rmtree(source / "csrc_shims/cpu")
    (source / "csrc_shims/registration.cpp").write_text(
        "#include <torch/csrc/stable/library.h>\n#include <omp.h>\n"
        'extern "C" __attribute__((visibility("default"))) int threads() { return omp_get_max_threads(); }\n'
    )
    return source


def test_the_wheel_is_tagged_for_every_python_vendors_nothing_and_is_always_the_same(
    small_source: Path, tmp_path: Path
) -> None:
    """`make test-reproducible-wheel` builds the one with kernels twice."""
    elsewhere = tmp_path / "a/folder/of/another/length"
    shutil.copytree(small_source, elsewhere, copy_function=shutil.copyfile)
    for path in elsewhere.rglob("*"):
        path.chmod(0o700)
    wheels: list[Path] = []
    for source, umask in ((small_source, 0o022), (elsewhere, 0o077)):
        built = build_wheel(source, source / "dist", umask=umask, TORCH_PAGED_NO_EXT="0")
        assert built.returncode == 0, built.stderr
        wheels += (source / "dist").glob("*.whl")
    wheel, again = wheels
    assert re.fullmatch(rf"torch_paged-{torch_paged.__version__}-cp310-abi3-linux_\w+\.whl", wheel.name)
    libraries = {name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name}
    assert libraries == {"torch_paged/_C.abi3.so", "torch_paged/libtorch_paged_schema.so"}
    assert wheel.name == again.name
    assert wheel.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("change", "environment", "sentence"),
    [
        ("", {"CXX": "no-such-compiler"}, "torch_paged: the build needs a C++17 compiler (apt install g++)"),
        ("", {"CXX": "{folder}/no-openmp"}, "torch_paged: the build needs OpenMP (apt install g++, or libomp-dev"),
        (
            "import platform; platform.machine = lambda: 'pdp11'",
            {},
            "torch_paged: the CPU kernels build on 64-bit Linux (x86_64, aarch64), got linux pdp11",
        ),
        ("sys.modules['torch'] = None", {}, "torch_paged: torch cannot be imported by this build"),
        ("import torch; torch.__version__ = '2.8.1'", {}, "torch_paged: torch must be >= 2.9 to build, got 2.8.1"),
    ],
    ids=["compiler", "openmp", "platform", "torch", "torch version"],
)
def test_a_build_that_cannot_work_says_why(
    small_source: Path, tmp_path: Path, change: str, environment: dict[str, str], sentence: str
) -> None:
    compiler = tmp_path / "no-openmp"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    code = f"import os, runpy, sys\n{change}\nos.chdir({str(small_source)!r})\n"
    code += "sys.argv = ['setup.py', '-q', 'build_ext']\nrunpy.run_path('setup.py', run_name='__main__')"
    filled = {name: value.format(folder=tmp_path) for name, value in environment.items()}
    failed = run_python(code, check=False, path=None, **filled)
    assert failed.returncode != 0
    last = failed.stderr.strip().splitlines()[-1]
    assert last.removeprefix("error: ").startswith(sentence), failed.stderr
    assert "Traceback" not in failed.stderr
