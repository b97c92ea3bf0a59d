"""The text of the examples: the Python standard library's own source, split by file name.

A file is held out when the checksum of its path within the library says so. The split therefore does not depend on the
Python version: what was held out from training stays held out wherever the checkpoint is evaluated.
"""

import sysconfig
import zlib
from pathlib import Path

EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "config", "dist-packages", "encodings", "idlelib", "lib2to3", "site-packages", "test", "tests"}
)
HELD_OUT_ONE_IN = 20


def stdlib_files() -> list[tuple[str, Path]]:
    """List the library's source files as ``(path within the library, path on disk)``, sorted by the former."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not EXCLUDED_FOLDERS.intersection(relative.parts):
            files.append((relative.as_posix(), path))
    return sorted(files)


def is_held_out(name: str) -> bool:
    """Say whether the file with this path within the library is kept away from training."""
    return zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0


def read_texts(*, held_out: bool) -> list[str]:
    """Return the text of every file of one side of the split, in the order of their names."""
    texts = []
    for name, path in stdlib_files():
        if is_held_out(name) == held_out:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return texts


PROMPTS = (("copy.py", 3), ("sched.py", 8), ("shutil.py", 5), ("http/server.py", 14))


def held_out_prompts() -> list[str]:
    """Return prompts of different lengths: the lines from a function in the middle of four held-out files."""
    paths = dict(stdlib_files())
    prompts = []
    for name, num_lines in PROMPTS:
        lines = paths[name].read_text(encoding="utf-8").splitlines(keepends=True)
        starts = [index for index, line in enumerate(lines) if line.lstrip().startswith("def ")]
        start = starts[len(starts) // 2]
        prompts.append("".join(lines[start : start + num_lines]))
    return prompts
