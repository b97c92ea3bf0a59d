"""Cache management on the host: allocation, layouts of other projects, and which block holds which tokens."""

from torch_paged.cache.allocation import KVCache, allocate_kv_cache, blocks_that_fit, cache_bytes
from torch_paged.cache.allocator import BlockAllocator
from torch_paged.cache.batch import Batch
from torch_paged.cache.layouts import LAYOUTS, Converted, from_layout, to_layout
from torch_paged.cache.pool import OutOfBlocks

__all__ = [
    "LAYOUTS",
    "Batch",
    "BlockAllocator",
    "Converted",
    "KVCache",
    "OutOfBlocks",
    "allocate_kv_cache",
    "blocks_that_fit",
    "cache_bytes",
    "from_layout",
    "to_layout",
]
