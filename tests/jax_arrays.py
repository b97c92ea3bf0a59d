"""Tensors of torch as arrays of jax and back, with their bits."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from torch import Tensor

_SAME_BITS = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}


def to_jax(x: Tensor) -> Any:
    """Return a copy as an array."""
    if x.dtype in _SAME_BITS:
        integer, dtype = _SAME_BITS[x.dtype]
        return jnp.asarray(x.contiguous().view(integer).numpy().view(dtype))
    return jnp.asarray(x.contiguous().numpy())


def to_torch(x: Any) -> Tensor:
    """Return a copy as a tensor."""
    array = np.array(x)
    for dtype, (integer, same) in _SAME_BITS.items():
        if array.dtype == same:
            return torch.from_numpy(array.view(torch.empty(0, dtype=integer).numpy().dtype)).view(dtype)
    return torch.from_numpy(array)
