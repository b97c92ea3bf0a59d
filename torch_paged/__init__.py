"""Paged attention for PyTorch: custom ops in the ``torch.ops.paged`` namespace, the same meaning on every device."""

import sys
from typing import Any

from torch_paged import cache, masks
from torch_paged import dispatch as _dispatch
from torch_paged.contract import reference
from torch_paged.explain import Explanation, explain
from torch_paged.functional import (
    copy_blocks,
    flash_attn_varlen,
    gather_cache,
    merge_attention_states,
    paged_attention,
    quantize_and_cache,
    reshape_and_cache,
)

__version__ = "0.1.0"

_TRANSFORMERS = ("PagedCache", "patch_model", "unpatch_model")

__all__ = [
    "Explanation",
    "PagedCache",
    "cache",
    "copy_blocks",
    "explain",
    "flash_attn_varlen",
    "gather_cache",
    "masks",
    "merge_attention_states",
    "paged_attention",
    "patch_model",
    "quantize_and_cache",
    "reference",
    "reshape_and_cache",
    "unpatch_model",
]

# While Python looks for the module after -m it imports this package first, with "-m" as the program's name.
if sys.argv[:1] == ["-m"] and {"torch_paged.collect_env", "torch_paged.testing"} & set(sys.orig_argv):
    _dispatch.register_for_report()
else:
    _dispatch.register()


def __getattr__(name: str) -> Any:
    if name in _TRANSFORMERS:
        from torch_paged.integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
