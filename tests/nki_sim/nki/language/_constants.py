"""Constants of nki.language: sizes of the hardware, the range of fp32, dynamic slices."""

from typing import Any

from nki._errors import require
from nki._machine import machine
from nki._memory import BANK_BYTES, PARTITIONS, PSUM_BANKS, usable_sbuf_bytes
from nki._register import RunTimeValue


class _TileSize:
    """Sizes of the hardware (nki.language.tile_size, SDK 2.33 API reference)."""

    pmax = PARTITIONS
    psum_bank_fmax = psum_fmax = BANK_BYTES // 4
    psum_bank_fmax_bytes = BANK_BYTES
    psum_num_banks = PSUM_BANKS
    gemm_stationary_fmax = 128
    gemm_moving_fmax = 512
    bn_stats_fmax = 512

    @property
    def sbuf_fmax_bytes(self) -> int:
        """Usable bytes per partition of SBUF."""
        return usable_sbuf_bytes(machine().generation)

    @property
    def sbuf_fmax(self) -> int:
        """Usable fp32 elements per partition of SBUF."""
        return self.sbuf_fmax_bytes // 4

    @property
    def total_available_sbuf_size(self) -> int:
        """Deprecated name of sbuf_fmax_bytes."""
        return self.sbuf_fmax_bytes

    @property
    def sbuf_size_bytes(self) -> int:
        """Usable bytes of all partitions of SBUF."""
        return PARTITIONS * self.sbuf_fmax_bytes


class _Float32:
    """Range of float32."""

    min = -3.4028234663852886e38
    max = 3.4028234663852886e38


tile_size = _TileSize()
fp32 = _Float32()


def ds(start: Any, size: Any) -> slice:
    """Give the slice start:start + size, both known at compile time (guides disagree about registers)."""
    for operand, value in (("start", start), ("size", size)):
        good = hasattr(value, "__index__") and not isinstance(value, RunTimeValue)
        require(good, "ds", operand, "be an integer known at compile time", type(value).__name__)
    return slice(start, start + size)
