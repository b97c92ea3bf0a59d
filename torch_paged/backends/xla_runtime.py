"""Whose devices torch_xla's tensors are on: two backends could take the device type ``xla``, and one has it."""

import importlib.util
import os


def on_neuron() -> bool:
    """Return whether torch_xla's devices are NeuronCores: where ``PJRT_DEVICE`` says so, else beside torch_neuronx."""
    if importlib.util.find_spec("torch_xla") is None:
        return False
    named = os.environ.get("PJRT_DEVICE")
    return named == "NEURON" if named else importlib.util.find_spec("torch_neuronx") is not None
