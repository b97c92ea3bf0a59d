"""Every numbered line of the contract as checks, which any backend can be judged by."""

from torch_paged.testing.semantics import (  # noqa: F401  (they register their checks)
    caches,
    logits,
    memory,
    positions,
    rows,
)
from torch_paged.testing.semantics.registry import CHECKS, DTYPES, LINES, Check

CHECKS.sort(key=lambda check: check.line)

__all__ = ["CHECKS", "DTYPES", "LINES", "Check"]
