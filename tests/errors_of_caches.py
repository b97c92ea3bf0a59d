"""The errors of the allocator and of the caches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from error_table import Error, Group

import torch_paged
from torch_paged.cache import BlockAllocator, allocate_kv_cache, blocks_that_fit, cache_bytes, from_layout, to_layout

_QUERY = torch.ones(2, 1, 1)
_SIZES = {"num_blocks": 2, "num_kv_heads": 1, "block_size": 4, "head_dim": 8}


def _error(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("ValueError", text, cause, remedy, provoke)


def _used(**options: Any) -> BlockAllocator:
    """Return an allocator of two blocks of 4 tokens whose sequence 0 has 6 tokens."""
    allocator = BlockAllocator(2, 4, **options)
    allocator.append(allocator.allocate(), 6)
    return allocator


def _use(method: str, *arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(_used(), method)(*arguments, **options)


def _fork_before_the_copy() -> None:
    allocator = BlockAllocator(4, 4)
    seq = allocator.allocate()
    allocator.append(seq, 6)
    allocator.append(allocator.fork(seq), 1)
    allocator.append(seq, 0)
    allocator.fork(1)


def _truncate_behind_the_window() -> None:
    allocator = BlockAllocator(8, 4, sliding_window=4)
    seq = allocator.allocate()
    allocator.append(seq, 8)
    allocator.append(seq, 8)
    allocator.append(seq, 1)
    allocator.truncate(seq, 5)


def _allocate(**options: Any) -> Any:
    sizes = {**_SIZES, **{name: options.pop(name) for name in tuple(options) if name in _SIZES}}
    return allocate_kv_cache(*sizes.values(), **{"dtype": torch.float32, **options})


def _three_tensors() -> None:
    cache: Any = (torch.ones(1),) * 3
    from_layout(cache, "jax")


def _no_tensors() -> None:
    cache: Any = [1, 2]
    from_layout(cache, "jax")


def _to_layout_of_no_tensor() -> None:
    cache: Any = _allocate()
    to_layout(cache, "jax")


ALLOCATOR = Group(
    "BlockAllocator",
    (
        Error(
            "OutOfBlocks",
            "append: needs <n> blocks, <n> of <n> are free; free a sequence or make a larger cache",
            "The cache is full. Nothing was changed.",
            "End or preempt a sequence and try again, or allocate more blocks.",
            (_use("append", 0, 5),),
        ),
        _error(
            "BlockAllocator: <argument> must be an int >= 1, got <value>",
            "A size is 0, negative, a float or a bool.",
            "Pass None to switch a window or chunk off.",
            partial(BlockAllocator, 0, 4),
        ),
        _error(
            "<function>: num_blocks must be < 2^31, as block tables are int32, got <value>",
            "The ids of so many blocks have no room in a block table.",
            "Pass the number of blocks of the cache; `blocks_that_fit` counts them.",
            partial(BlockAllocator, 2**40, 4),
            _use("grow", 2**31),
        ),
        _error(
            "grow: num_blocks must be an int >= <n>, got <value>",
            "A pool cannot shrink.",
            "Pass the new total of blocks.",
            _use("grow", 1),
        ),
        _error(
            "<function>: seq must be an allocated sequence, got <value>",
            "The sequence was freed or is of another allocator.",
            "Keep the number that `allocate` or `fork` returned until `free`.",
            _use("append", 7, 1),
            _use("append", [0], 1),
            _use("free", 7),
        ),
        _error(
            "<function>: <argument> must be an int >= 0, got <value>",
            "A number of tokens is negative.",
            "Take tokens back with `truncate`.",
            _use("append", 0, -1),
        ),
        _error(
            "<function>: <argument> must hold ints of 64 bits, got <value>",
            "A token id is a float, a string or too large.",
            "Pass `ids.tolist()`.",
            _use("allocate", ["a"]),
        ),
        _error(
            "allocate: salt must be bytes or a str, got <value>",
            "Blocks are found by a hash of the salt's bytes.",
            "Name the tenant, adapter or image by a string, such as `str(number)`.",
            _use("allocate", [1], salt=5),
        ),
        _error(
            "fork: seq must have its block copied and its slots written (take_copies), got <value>",
            "The last append of the sequence waits for a copy of its block.",
            "Call `copy_blocks(kv_cache, *allocator.take_copies())` and write the tokens first.",
            _fork_before_the_copy,
        ),
        _error(
            "truncate: length must be an int in [0, <n>], got <value>",
            "A sequence cannot become longer so.",
            "Use `append` for new tokens.",
            _use("truncate", 0, 7),
        ),
        _error(
            "truncate: length must leave a window whose blocks are still there (block <n> on), got <value>",
            "The blocks that the shorter sequence would see were freed behind the window.",
            "Truncate at most to the length before the last append, or start the sequence anew.",
            _truncate_behind_the_window,
        ),
        _error(
            "batch: <argument> must be a list of ints, got <value>",
            "It is None or a single number.",
            "Pass one entry for each sequence, in a list, also of one.",
            _use("batch", [0], None),
            _use("batch", 0, [1]),
        ),
        _error(
            "batch: query_lens must have one entry for each of <n> sequences, got <n>",
            "The lists differ in length.",
            "Pass 0 for a sequence without tokens in this step.",
            _use("batch", [0], []),
        ),
        _error(
            "batch: query_lens must be an int in [0, <n>], got <value> at index <i>",
            "A step has more tokens than were appended.",
            "Append them first.",
            _use("batch", [0], [7]),
        ),
        _error(
            "batch: <argument> must be an int >= <n> for these sequences, got <value>",
            "The batch does not fit into the size that it shall be padded to.",
            "Pass a larger size, or None.",
            _use("batch", [0], [1], num_tokens=0),
        ),
    ),
)
CACHES = Group(
    "Allocating and converting caches",
    (
        Error(
            "MemoryError",
            "allocate_kv_cache: no memory for <n> bytes; use fewer blocks",
            "The cache and its scales need more bytes than the system gives, or than 63 bits can count.",
            "`blocks_that_fit` returns the number of blocks for a number of bytes.",
            (
                partial(_allocate, num_blocks=2**45),
                partial(_allocate, num_blocks=2**45, huge_pages=False),
                partial(_allocate, num_blocks=2**62),
            ),
        ),
        Error(
            "RuntimeError",
            "Expected one of <devices> device type at start of device string: <value>",
            "Torch's own check of a device that is given by name, here and in every function that takes a device.",
            "Pass a device that torch knows, such as `'cpu'`.",
            (
                partial(_allocate, device="mars"),
                _use("batch", [0], [1], device="mars"),
                partial(torch_paged.explain, "merge_attention_states", outs=_QUERY, lses=_QUERY, device="mars"),
            ),
        ),
        _error(
            "<function>: <argument> must be an int >= 1, got <value>",
            "A size is 0, negative, a float or a bool.",
            "Pass a positive int.",
            partial(_allocate, num_blocks=0),
            partial(blocks_that_fit, 2**20, 1, 4, 8, dtype=torch.float32, num_layers=0),
        ),
        _error(
            "<function>: dtype must be one of <dtypes>, got <dtype>",
            "No cache has this dtype.",
            "Take that of the queries, int8 or a float8.",
            partial(_allocate, dtype=torch.float64),
        ),
        _error(
            "<function>: scales must be 'tensor', 'head', 'token' or None, got <value>",
            "There is no such granularity.",
            "Take one of these.",
            partial(_allocate, dtype=torch.int8, scales="block"),
        ),
        _error(
            "<function>: scales must be <rule> for a <dtype> cache, got <value>",
            "A quantised cache has scales, another one has none.",
            "Pass `scales` with int8 and float8 alone.",
            partial(_allocate, dtype=torch.int8),
            partial(cache_bytes, 1, 1, 1, 1, dtype=torch.float32, scales="head"),
        ),
        _error(
            "<function>: backend must be one of <backends>, got <value>",
            "There is no such backend.",
            "Take one of these.",
            partial(_allocate, backend="gpu"),
        ),
        _error(
            "<function>: layout must be one of <layouts>, got <value>",
            "There is no such layout.",
            "Take one of these; docs/migration.md shows their shapes.",
            partial(from_layout, torch.ones(1), "vllm"),
            partial(to_layout, torch.ones(1), "vllm"),
        ),
        _error(
            "from_layout: <argument> must have <n> dimensions <shape> for '<layout>', got <shape>",
            "The tensor is not of this layout.",
            "See docs/migration.md for the shape of each.",
            partial(from_layout, torch.ones(1), "vllm_kv_first"),
        ),
        _error(
            "from_layout: cache must be a pair (keys, values) for '<layout>', got one tensor",
            "The layout has two tensors.",
            "Pass `(keys, values)`.",
            partial(from_layout, torch.ones(1), "jax"),
        ),
        _error(
            "from_layout: cache must be a tensor or a pair of tensors, got <value>",
            "It is neither, such as an array of numpy.",
            "Convert it, by `torch.from_numpy` for one.",
            _no_tensors,
        ),
        _error(
            "from_layout: cache must be <what> for '<layout>', got <n> tensors",
            "The layout has another number of tensors.",
            "Pass one tensor or a pair, as the layout has it.",
            _three_tensors,
            partial(from_layout, (torch.ones(1),) * 2, "vllm_kv_first"),
        ),
        _error(
            "from_layout: cache must hold keys and values of one shape, dtype and device, got <tensors>",
            "The two tensors differ.",
            "Pad or convert one of them.",
            partial(from_layout, (torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 1)), "jax"),
        ),
        _error(
            "from_layout: cache must have an even last dimension for 'vllm_packed', got <n>",
            "Keys and values share the last dimension in equal parts.",
            "Check which layout the cache has.",
            partial(from_layout, torch.ones(1, 1, 1, 3), "vllm_packed"),
        ),
        _error(
            "from_layout: cache must hold 2 x num_kv_heads heads, got <n> for num_kv_heads <n>",
            "Keys and values take turns in the heads.",
            "Pass the model's number of kv heads.",
            partial(from_layout, torch.ones(1, 1, 3, 4), "rpa_v2"),
        ),
        _error(
            "to_layout: kv_cache must be a tensor, got <value>",
            "It is something else, such as the `KVCache` that `allocate_kv_cache` returns.",
            "Pass its `kv_cache`.",
            _to_layout_of_no_tensor,
        ),
        _error(
            "to_layout: kv_cache must be <shape> for '<layout>', got <shape>",
            "The cache has no such form: a latent cache is 'mla' alone, and 'mla' is latent.",
            "Choose another layout.",
            partial(to_layout, torch.ones(1), "jax"),
        ),
        _error(
            "to_layout: kv_cache must have a dtype of 1, 2 or 4 bytes for 'rpa_v3', got <dtype>",
            "This layout packs heads into words of 4 bytes.",
            "Convert the cache.",
            partial(to_layout, torch.ones(2, 1, 1, 1, 1, dtype=torch.float64), "rpa_v3"),
        ),
    ),
)
