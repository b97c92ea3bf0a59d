"""What tests and benchmarks share: named cases with their tensors, and the tolerance rule."""

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

__all__ = [
    "AttentionCase",
    "CopyCase",
    "GatherCase",
    "MergeCase",
    "WriteCase",
    "assert_attention",
    "assert_close",
    "assert_double_close",
    "assert_merged",
    "assert_same",
    "assert_stats",
    "build",
    "option_pairs",
    "oracle",
    "permute_blocks",
    "plain_attention",
    "random_case",
    "take_sequences",
]
