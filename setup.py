"""Build the CPU kernels as one stable-ABI library, and the op definitions for programs without Python."""

import json
import os
import platform
import runpy
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from packaging.version import Version
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).parent.resolve()
SOURCES = "csrc_shims"
SCHEMA_LIBRARY = "torch_paged.libtorch_paged_schema"
MINIMUM_TORCH = Version("2.9")
MACHINES = {"x86_64": True, "aarch64": False}  # machine -> has the x86 kernels

COMMON_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]
ISA_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx512vnni"),
        *("-mavx512vbmi", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
        # GCC 12 warns of its own intrinsics headers.
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
}
# What is bound once at loading cannot be bound to something else later.
LINK_FLAGS = ["-Wl,--no-undefined", "-Wl,--as-needed", "-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack"]
OLDEST_DATE = "315532800"  # that a zip can hold, in seconds of Unix
OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n"


def no_extension() -> bool:
    asked = os.environ.get("TORCH_PAGED_NO_EXT", "")
    if asked not in ("", "0", "1"):
        raise SetupError(f"torch_paged: TORCH_PAGED_NO_EXT must be 0 or 1, got {asked!r}.")
    return asked == "1"


def torch_paths() -> tuple[Path, Path]:
    """Return torch's include and library directories, or stop with one sentence."""
    try:
        import torch
    except ImportError as error:
        raise SetupError(
            f"torch_paged: torch cannot be imported by this build ({error}); install torch >= {MINIMUM_TORCH} and "
            "build with `pip install --no-build-isolation`, or set TORCH_PAGED_NO_EXT=1 to leave out the CPU kernels."
        ) from None
    if Version(torch.__version__) < MINIMUM_TORCH:
        raise SetupError(
            f"torch_paged: torch must be >= {MINIMUM_TORCH} to build, got {torch.__version__}; upgrade torch first."
        )
    home = Path(torch.__file__).parent
    return home / "include", home / "lib"


def check_platform() -> None:
    if sys.platform != "linux" or platform.machine() not in MACHINES or sys.maxsize < 2**32:
        raise SetupError(
            f"torch_paged: the CPU kernels build on 64-bit Linux ({', '.join(MACHINES)}), got {sys.platform} "
            f"{platform.machine()}; set TORCH_PAGED_NO_EXT=1 for an install without them."
        )


def check_compiler(compiler: list[str]) -> None:
    """Compile and link one OpenMP program, so that what is missing is said in one sentence."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        for text, flags, missing in (
            ("int main() { return 0; }\n", [], "a C++17 compiler (apt install g++)"),
            (OPENMP_PROBE, ["-fopenmp"], "OpenMP (apt install g++, or libomp-dev with clang)"),
        ):
            source.write_text(text)
            command = [*compiler, "-std=c++17", *flags, str(source), "-o", str(Path(folder, "probe"))]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                raise SetupError(
                    f"torch_paged: the build needs {missing}, and `{' '.join(command[:2])}` does not provide it; "
                    "install it or set CXX, or set TORCH_PAGED_NO_EXT=1 for an install without CPU kernels."
                ) from None


def schema_source() -> str:
    """Return C++ that defines the ops of ``contract/schema.py``, so that a signature is written once."""
    schema = runpy.run_path(str(ROOT / "torch_paged/contract/schema.py"))
    lines = [f"  m.def({json.dumps(name + signature)});" for name, signature in schema["SCHEMAS"].items()]
    return "\n".join(
        [
            "#include <torch/csrc/stable/library.h>",
            f"STABLE_TORCH_LIBRARY({schema['NAMESPACE']}, m) {{",
            *lines,
            "}",
            "",
        ]
    )


def extensions() -> list[Extension]:
    if no_extension():
        return []
    x86 = MACHINES.get(platform.machine(), False)
    sources = sorted(ROOT.glob(f"{SOURCES}/registration*.cpp")) + sorted(ROOT.glob(f"{SOURCES}/cpu/*.cpp"))
    kept = [str(path.relative_to(ROOT)) for path in sources if x86 or path.name not in ISA_FLAGS]
    macros: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", "0x0209000000000000ULL")]
    if x86:
        macros.append(("TORCH_PAGED_X86", None))
    headers = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(f"{SOURCES}/**/*.h"))]
    common: dict[str, Any] = {
        "libraries": ["torch_cpu"],
        "define_macros": macros,
        "depends": [*headers, "setup.py", "torch_paged/contract/schema.py"],
        "language": "c++",
        "py_limited_api": True,
    }
    return [
        Extension("torch_paged._C", kept, extra_link_args=["-fopenmp"], **common),
        Extension(SCHEMA_LIBRARY, [], **common),
    ]


class BuildExtension(build_ext):
    """Compile the files in parallel, each with the flags of its instruction set."""

    def run(self) -> None:
        if self.extensions:
            check_platform()
            include, libraries = torch_paths()
            self.include_dirs.append(str(include))
            self.library_dirs.append(str(libraries))
        super().run()

    def build_extensions(self) -> None:
        check_compiler([self.compiler.compiler_cxx[0]])
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libtorch_paged_schema"):
            return fullname.replace(".", os.sep) + ".so"
        return str(super().get_ext_filename(fullname))

    def build_extension(self, ext: Extension) -> None:
        sources = list(ext.sources)
        if ext.name == SCHEMA_LIBRARY:
            generated = Path(self.build_temp, "schema.cpp")
            generated.parent.mkdir(parents=True, exist_ok=True)
            generated.write_text(schema_source())
            sources.append(str(generated))
        jobs = int(os.environ.get("MAX_JOBS", 0)) or max(1, (os.cpu_count() or 2) // 2)
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda source: self.compile(source, ext), sources))
        target = Path(self.get_ext_fullpath(ext.name))
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=ext.libraries,
            extra_postargs=[*LINK_FLAGS, *ext.extra_link_args],
            target_lang="c++",
        )

    def compile(self, source: str, ext: Extension) -> str:
        """Return the object file of a source, compiled unless it is newer than everything it was made from."""
        output = "" if Path(source).is_relative_to(self.build_temp) else self.build_temp
        [built] = self.compiler.object_filenames([source], output_dir=output)
        newest = max(os.path.getmtime(path) for path in [source, *ext.depends])
        if not self.force and os.path.exists(built) and os.path.getmtime(built) > newest:
            return str(built)
        # The builder's own flags come last: a sanitizer's build is not optimised as ours are.
        own = shlex.split(os.environ.get("CXXFLAGS", ""))
        flags = [*COMMON_FLAGS, "-fopenmp", *ISA_FLAGS.get(Path(source).name, [])]
        # Messages of headers, torch's among them, hold paths, which differ between machines.
        folders = {**dict.fromkeys(self.include_dirs, "include"), self.build_temp: "build"}
        flags += [*(f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()), *own]
        [built] = self.compiler.compile(
            [source],
            output_dir=output,
            macros=ext.define_macros,
            extra_postargs=flags,
        )
        return str(built)


class Wheel(bdist_wheel):
    """Tag the wheel for the stable Python ABI, as no Python symbol is used; the same sources give the same bytes."""

    def finalize_options(self) -> None:
        if not no_extension():
            self.py_limited_api = "cp310"
        super().finalize_options()

    def run(self) -> None:
        os.environ.setdefault("SOURCE_DATE_EPOCH", OLDEST_DATE)
        super().run()

    def write_wheelfile(self, *args: Any, **kwargs: Any) -> None:
        """Write the last file that is packed, then give all of them modes that no umask decides."""
        super().write_wheelfile(*args, **kwargs)
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(0o755 if path.is_dir() or path.suffix == ".so" else 0o644)


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel})
