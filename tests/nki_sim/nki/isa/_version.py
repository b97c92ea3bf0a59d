"""The generation for which a kernel is being built."""

from nki._machine import machine
from nki.isa._enums import nc_version


def get_nc_version() -> nc_version:
    """The generation of the running core (nki.isa.get_nc_version, SDK 2.32 API reference)."""
    return nc_version(machine().generation)


def get_nc_sub_version() -> int:
    """The silicon revision within the generation: 0, the first (nki.isa.get_nc_sub_version, SDK 2.32 API reference)."""
    return 0
