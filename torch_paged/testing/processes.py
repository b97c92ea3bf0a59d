"""Fresh Python processes, for what can be seen only at import."""

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2]


def run_python(
    code: str, *arguments: str, path: Path | None = SOURCE, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python process.

    Args:
        code: the program.
        arguments: its ``sys.argv[1:]``.
        path: folder to run in and to import from first; None for the current one.
        check: fail, showing its output, when the process fails.
        environment: variables that it gets beside those of this process, less all ``TORCH_PAGED_*``.

    Returns:
        The finished process, with its output as text.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_PAGED_")}
    search = {} if path is None else {"PYTHONPATH": str(path)}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=path,  # the interpreter looks there before PYTHONPATH
        env={**kept, "OMP_NUM_THREADS": "1", **search, **environment},
    )
    if check and result.returncode != 0:
        raise AssertionError(f"the process failed with {result.returncode}:\n{result.stdout}{result.stderr}")
    return result
