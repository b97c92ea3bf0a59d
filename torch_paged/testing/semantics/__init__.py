"""Every numbered line of the contract as checks, which any backend can be judged by."""

from torch_paged.testing.semantics import logits, memory, positions, rows  # noqa: F401  (they register their checks)
from torch_paged.testing.semantics.registry import CHECKS, DTYPES, LINES, Check

CHECKS.sort(key=lambda check: check.line)

__all__ = ["CHECKS", "DTYPES", "LINES", "Check"]
