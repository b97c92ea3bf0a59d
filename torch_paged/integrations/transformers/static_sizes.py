"""Sizes on devices that compile a program for every shape: powers of two, so that there are few."""

import torch

_DEVICES = ("xla", "tpu", "neuron")


def compiles_each_shape(device: torch.device) -> bool:
    """Say whether a new shape costs a compilation on a device."""
    return device.type in _DEVICES


def static_size(size: int, device: torch.device) -> int:
    """Return the size to take on a device for one that is asked for: where it counts, the next power of two."""
    return 1 << max(0, size - 1).bit_length() if compiles_each_shape(device) else size
