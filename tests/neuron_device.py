"""Run tests on the NeuronCores of this machine, through TorchNeuron: ``make test-neuron-device``.

Without one it ends with one sentence.
"""

import os
import sys

import pytest

from torch_paged import dispatch


def main() -> int:
    """Run pytest on what the command line names."""
    if "neuron" not in dispatch.served():
        sentence = "no NeuronCore is in reach of TorchNeuron here; docs/neuron.md has the commands for a trn2 instance"
        print(f"test-neuron-device: {sentence}", file=sys.stderr)
        return 1
    os.environ["TORCH_PAGED_TEST_DEVICE"] = "neuron"
    return int(pytest.main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
