"""A strict simulator of NKI, Neuron's kernel interface, written from its public documents (SDK 2.32 and 2.33)."""

from nki import isa, language, typing
from nki.compiler import CompileConfig, SpecializationConfig, jit, simulate

__version__ = "0.6.0"
__all__ = ["CompileConfig", "SpecializationConfig", "isa", "jit", "language", "simulate", "typing"]
