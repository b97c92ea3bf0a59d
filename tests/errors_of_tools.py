"""The errors of the masks, of ``explain`` and of ``check_backend``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from error_table import Error, Group
from torch import Tensor

import torch_paged
from torch_paged import dispatch
from torch_paged.backends import availability
from torch_paged.masks import image_block_mask, moba_mask, prefix_lm_mask, tree_mask
from torch_paged.testing import check_backend

_QUERY, _KEY = torch.ones(2, 1, 1), torch.ones(1, 1, 6, 1)


def _error(text: str, cause: str, remedy: str, *provoke: Callable[[], Any]) -> Error:
    return Error("ValueError", text, cause, remedy, provoke)


def _ints(*values: int) -> Tensor:
    return torch.tensor(values)


def _tree(parents: tuple[int, ...] = (-1, 0), starts: tuple[int, ...] = (0, 2), length: int = 4, **options: Any) -> Any:
    return tree_mask(_ints(*parents), _ints(*starts), _ints(length), **options)


def _tree_of_a_list() -> None:
    parents: Any = [-1, 0]
    tree_mask(parents, _ints(0, 2), _ints(4))


def _moba_of_a_list() -> None:
    query: Any = [[1.0]]
    moba_mask(query, _KEY, _ints(0, 2), _ints(6), chunk_size=2, top_k=1)


MASKS = Group(
    "Masks",
    (
        _error(
            "<function>: <argument> must have <n> dimension of int32 or int64, got <tensor>",
            "It is no tensor, or no vector of ints.",
            "Convert or flatten it.",
            partial(tree_mask, _ints(-1, 0).float(), _ints(0, 2), _ints(4)),
            _tree_of_a_list,
        ),
        _error(
            "<function>: <argument> must have <n> dimensions of int32 or int64, got <tensor>",
            "It is no tensor, or no matrix of ints.",
            "Convert or reshape it.",
            partial(image_block_mask, _ints(1), _ints(0, 1), _ints(1)),
        ),
        _error(
            "<function>: cu_seqlens_q must have one entry more than kv_lens, got <n> for <n>",
            "These are prefix sums of the query lengths, with a 0 before them.",
            "Make both from the same batch.",
            partial(_tree, starts=(0, 1, 2)),
        ),
        _error(
            "<function>: cu_seqlens_q must start with 0, got <value> at index 0",
            "These are prefix sums, not lengths.",
            "Pass `cumsum` of the lengths with a 0 before it.",
            partial(_tree, starts=(1, 2)),
        ),
        _error(
            "<function>: cu_seqlens_q must not decrease, got <value> after <value> at index <i>",
            "These are prefix sums, not lengths.",
            "Pass `cumsum` of the lengths with a 0 before it.",
            partial(_tree, starts=(0, -1)),
        ),
        _error(
            "<function>: cu_seqlens_q must end at or before T = <n>, got <value> at index <i>",
            "The sequences have more tokens than the mask shall have rows.",
            "Pass `num_tokens` of the packed query, padding included.",
            partial(_tree, starts=(0, 3)),
        ),
        _error(
            "<function>: kv_lens must be >= 0, got <value> at index <i>",
            "A length is negative.",
            "Pass context and new keys together.",
            partial(_tree, length=-1),
        ),
        _error(
            "<function>: kv_lens must lie in [0, C = <n>], got <value> at index <i>",
            "The mask shall have fewer columns than a sequence has keys.",
            "Pass a larger `num_columns`.",
            partial(_tree, num_columns=3),
        ),
        _error(
            "<function>: <argument> must be None or an int >= <n>, got <value>",
            "A size is negative, a float or a bool.",
            "Pass None for no limit.",
            partial(prefix_lm_mask, _ints(1), _ints(0, 1), _ints(1), num_tokens=-1),
        ),
        _error(
            "<function>: <argument> must have one row for each of <n> sequences, got <n>",
            "The batch sizes differ.",
            "Make both from the same batch.",
            partial(prefix_lm_mask, _ints(1, 1), _ints(0, 1), _ints(1)),
        ),
        _error(
            "tree_mask: parents must have num_tokens = <n> entries, got <n>",
            "There is one parent for each packed token.",
            "Pass `num_tokens` as the length of `parents`, or leave it out.",
            partial(_tree, num_tokens=3),
        ),
        _error(
            "tree_mask: parents must be -1 or the index of an earlier token of the sequence, got <value> at index <i>",
            "A parent comes after its child, or belongs to another sequence.",
            "Count from the sequence's first token, and put parents first.",
            partial(_tree, (-1, 1)),
        ),
        _error(
            "moba_mask: <argument> must be an int >= 1, got <value>",
            "A size is 0, negative, a float or a bool.",
            "`top_k=1` is the own chunk alone.",
            partial(moba_mask, _QUERY, _KEY, _ints(0, 2), _ints(6), chunk_size=0, top_k=1),
        ),
        _error(
            "moba_mask: <argument> must be a tensor, got <value>",
            "It is a list or None.",
            "Pass the packed queries, and what `gather_cache` returns.",
            _moba_of_a_list,
        ),
        _error(
            "moba_mask: key must be (B, KH, C, D') for query (T, H, D), with H % KH == 0 and D' >= D, got <shapes>",
            "The keys are not laid out by sequence and position.",
            "Pass what `gather_cache` returns.",
            partial(moba_mask, _QUERY, _KEY[0], _ints(0, 2), _ints(6), chunk_size=2, top_k=1),
        ),
    ),
)
EXPLAIN = Group(
    "explain",
    (
        _error(
            "explain: op must be one of <ops>, got <value>",
            "There is no such op.",
            "Take one of these.",
            partial(torch_paged.explain, "attention"),
        ),
        _error(
            "explain: <op> has no argument <value>; it has <arguments>",
            "The name is not one of the op.",
            "Take one of these.",
            partial(torch_paged.explain, "copy_blocks", cache=None),
        ),
        _error(
            "explain: <op> needs the argument <value>",
            "A required argument is missing.",
            "Pass it; tensors on the meta device do.",
            partial(torch_paged.explain, "copy_blocks"),
        ),
        _error(
            "explain: backend must be one of <backends>, got <value>",
            "There is no such backend.",
            "Take one of these.",
            partial(
                torch_paged.explain, "merge_attention_states", outs=_QUERY[None], lses=_QUERY[None, 0], backend="gpu"
            ),
        ),
        _error(
            "explain: <op> on meta tensors needs `device=` or `backend=` to be explained for",
            "Meta tensors are on no device.",
            "Name the device or the backend.",
            partial(torch_paged.explain, "merge_attention_states", outs=_QUERY.to("meta"), lses=_QUERY.to("meta")),
        ),
        Error(
            "AttributeError",
            "module 'torch_paged' has no attribute <value>",
            "There is no such function, or it lives in a part such as `torch_paged.cache`.",
            "`torch_paged.__all__` lists all.",
            (lambda: torch_paged.attention,),
        ),
    ),
)


def _judge_what_is_off() -> None:
    check_backend(next(name for name in availability() if name not in dispatch.served().values()))


JUDGING = Group(
    "check_backend",
    (
        _error(
            "check_backend: name must be one of <backends>, got <value>",
            "There is no such backend.",
            "Take one of these, or hand over kernels under a name of their own.",
            partial(check_backend, "gpu"),
        ),
        _error(
            "check_backend: name must be none of <backends> with kernels, got <value>",
            "Kernels of this name would be judged by what the backend refuses.",
            "Choose another name.",
            partial(check_backend, "cpu", {}),
        ),
        _error(
            "check_backend: kernels must have one for each op, got none for <ops>",
            "An op has no function.",
            "Add it; what it cannot do it refuses by `NotImplementedError`.",
            partial(check_backend, "mine", {}),
        ),
        _error(
            "check_backend: backend <value> is off here: <reason>",
            "No tensor here reaches its kernels.",
            "The reason says what is missing, or which setting.",
            _judge_what_is_off,
        ),
    ),
)
