"""Names for annotations in kernels (nki.typing)."""

from nki._tensor import NkiTensor as tensor

__all__ = ["tensor"]
