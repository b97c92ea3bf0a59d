"""Build the wheel again, from the source distribution, and compare the bytes: ``reproducible_wheel.py dist/*.whl``.

The second build differs in what must not matter: its folder, the modes and ages of its files, how many of them are
compiled at once, the order of sets.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OTHERWISE = {"MAX_JOBS": "1", "PYTHONHASHSEED": "1", "SOURCE_DATE_EPOCH": ""}


def rebuild(folder: Path) -> Path:
    """Return a wheel that was built in ``folder`` from a source distribution of this tree."""
    sdist = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    sdist += ["sdist", "--formats", "gztar", "--dist-dir", str(folder)]
    subprocess.run(sdist, check=True, cwd=ROOT, env={**os.environ, "TORCH_PAGED_NO_EXT": "1"})
    [archive] = folder.glob("*.tar.gz")
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "-q",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
    ]
    environment = {name: value for name, value in {**os.environ, **OTHERWISE}.items() if value}
    command = [*wheel, "--wheel-dir", str(folder), str(archive)]
    subprocess.run(command, check=True, env={**environment, "TMPDIR": str(folder)}, umask=0o077)
    [built] = folder.glob("*.whl")
    return built


def contents(wheel: Path) -> dict[str, object]:
    """Return what is packed of each file: date, mode and bytes."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: (info.date_time, info.external_attr, archive.read(info)) for info in archive.infolist()}


def main(wheel: Path) -> None:
    """Compare; name the files that differ."""
    with tempfile.TemporaryDirectory() as folder:
        again = rebuild(Path(folder))
        first, second = contents(wheel), contents(again)
        differing = sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
        if again.name != wheel.name or again.read_bytes() != wheel.read_bytes():
            sys.exit(f"{wheel.name} and {again.name} differ in {', '.join(differing) or 'the archive itself'}")
    print(f"two builds, same bytes: {wheel.name}, sha256 {hashlib.sha256(wheel.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
