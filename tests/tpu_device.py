"""Run tests on the TPU of this machine, through torch_xla or torch_tpu: ``make test-tpu-device``.

Without a TPU it ends with one sentence.
"""

import os
import sys

import pytest

from torch_paged.testing.backends import tpu_device_type


def main() -> int:
    """Run pytest on what the command line names."""
    device = tpu_device_type()
    if device is None:
        print("test-tpu-device: no TPU is in reach here; docs/tpu.md has the commands for a TPU VM", file=sys.stderr)
        return 1
    os.environ["TORCH_PAGED_TEST_DEVICE"] = device
    return int(pytest.main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
