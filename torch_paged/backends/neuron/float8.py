"""What the bytes of float8_e4m3fn mean, for the engines of trn2, which do not know the format."""

import torch
from torch import Tensor


def float8_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the value of each byte of e4m3fn, (1, 256), in a dtype."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
    return values.reshape(1, 256).to(device)
