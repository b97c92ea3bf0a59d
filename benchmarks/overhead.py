"""What a call costs beyond its kernel: eager, without gradients in two ways, and within a compiled graph.

The kernel alone is a loop in C++ over the same inputs (``native.cpp``). The case is small and its caches are warm, so
that the difference is not lost in the kernel's own time.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import torch_paged
from benchmarks.native import decode_call, kernels
from benchmarks.timing import Call
from benchmarks.work import OURS, Settings, Work, attention_check, attention_columns
from torch_paged.testing import AttentionCase, build

GRAPH_CALLS = 32
CALLS = 8 * GRAPH_CALLS
POOLS = 2


def works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Yield every case of the benchmark, unbuilt."""
    yield lambda: work(settings)


def work(settings: Settings) -> Work:
    """Build the ways to make the same small call, each ``CALLS`` times."""
    case = AttentionCase("small_decode", (16,), num_kv_heads=8, group=4, head_dim=128, dtype=torch.bfloat16)
    with torch.inference_mode(False):  # tensors of inference mode would skip the autograd keys everywhere
        arguments = build(case, settings.seed)

    needed = tuple(arguments[name] for name in ("query", "kv_cache", "block_tables", "context_lens"))

    def loop(function: Callable[..., Tensor], inference: bool) -> Call:
        def call(_: int) -> Tensor:
            with torch.inference_mode(inference), torch.no_grad():
                for _ in range(CALLS - 1):
                    function(*needed)
                return function(*needed)

        return call

    op = torch.ops.paged.paged_attention.default
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    calls: dict[str, Call] = {
        OURS: loop(torch_paged.paged_attention, True),
        f"{OURS}, no_grad": loop(torch_paged.paged_attention, False),
        "op": loop(op, True),
        "op, no_grad": loop(op, False),
        "op, every keyword": loop(partial(op, **defaults), True),
    }
    if settings.size != "tiny":
        calls[f"{OURS} in a compiled graph"] = graph_loop(torch_paged.paged_attention, needed)
        calls["op in a compiled graph"] = graph_loop(torch.ops.paged.paged_attention, needed)
    library = kernels()
    if library is not None:
        calls["kernel alone"] = decode_call(library, [arguments] * POOLS, CALLS)
    return Work(
        "overhead",
        "overhead",
        case.name,
        attention_columns(case),
        calls,
        POOLS,
        attention_check("paged_attention", arguments),
        repeats=CALLS,
        threads=(1,),
    )


def graph_loop(function: Callable[..., Tensor], needed: tuple[Tensor, ...]) -> Call:
    """Return a call of a compiled graph with a chain of calls, as in a model with that many layers."""
    first_query, *others = needed
    first = function(*needed)

    @torch.compile(fullgraph=True)
    def chain(query: Tensor) -> Tensor:
        for _ in range(GRAPH_CALLS):
            query = function(query, *others)
        return query

    def call(_: int) -> Tensor:
        for _ in range(CALLS // GRAPH_CALLS):
            chain(first_query)
        return first

    return call
