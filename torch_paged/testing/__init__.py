"""How a backend is judged: named cases with their tensors, the tolerance rule, and a suite of the contract's lines.

``check_backend(name)`` runs the suite, ``python -m torch_paged.testing --backend NAME`` prints its table.
"""

from torch_paged.testing.batches import permute_blocks, take_sequences
from torch_paged.testing.cache_cases import CopyCase, GatherCase, MergeCase, WriteCase
from torch_paged.testing.cases import AttentionCase, build
from torch_paged.testing.combinations import option_pairs, random_case
from torch_paged.testing.compare import (
    assert_attention,
    assert_close,
    assert_double_close,
    assert_merged,
    assert_same,
    assert_stats,
    oracle,
    plain_attention,
)
from torch_paged.testing.suite import Outcome, check_backend

__all__ = [
    "AttentionCase",
    "CopyCase",
    "GatherCase",
    "MergeCase",
    "Outcome",
    "WriteCase",
    "assert_attention",
    "assert_close",
    "assert_double_close",
    "assert_merged",
    "assert_same",
    "assert_stats",
    "build",
    "check_backend",
    "option_pairs",
    "oracle",
    "permute_blocks",
    "plain_attention",
    "random_case",
    "take_sequences",
]
