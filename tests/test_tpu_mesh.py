"""The TPU's attention kernels on several chips: kv heads or keys split by shard_map, interpreted on virtual devices."""

import os
import subprocess
import sys

import pytest
from tpu_mesh import CASES, DEVICES

from torch_paged.testing.processes import SOURCE

FLAGS = (
    f"--xla_force_host_platform_device_count={DEVICES}",
    "--xla_backend_optimization_level=0",  # most of the time goes into compiling, as in COMPILER_OPTIONS
    "--xla_cpu_use_fusion_emitters=false",
)


@pytest.fixture(scope="module")
def output() -> str:
    """What the checks print, all run by one process."""
    settings = {"XLA_FLAGS": " ".join(FLAGS), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, str(SOURCE / "tests" / "tpu_mesh.py")],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("check", CASES)
def test_as_on_one_device(check: str, output: str) -> None:
    assert f"passed: {check}\n" in output, output
