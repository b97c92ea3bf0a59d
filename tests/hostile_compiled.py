"""Hostile calls of compiled graphs: one graph for a share of the calls, with other values, sizes and corruptions."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hostile import HostileCall, change, compiled_changes, isolate

import torch_paged
from torch_paged.testing.bad_input import BASE_OPS, BASES
from torch_paged.testing.cases import AttentionCase, build

_QUERY_LENS = (0, 1, 5, 16, 17, 40)
_CONTEXT_LENS = _QUERY_LENS * 3 + (600, 2100)


class CompiledShare:
    """The graph that is compiled at present, and calls of it."""

    def __init__(self) -> None:
        self._number = -1
        self._base = ""
        self.way = ""
        self._graph: Callable[..., Any] | None = None

    def draw(self, number: int, rng: random.Random) -> HostileCall:
        """Draw a call of the graph of this share; compile another graph where the last one was of another share."""
        if number != self._number:
            self._compile(number)
        case = BASES[self._base]
        if isinstance(case, AttentionCase):  # of few sizes: each that differs in kind is compiled anew, for seconds
            case = _resized(case, random.Random(4 * number + rng.randrange(4)))
        call = HostileCall(BASE_OPS[self._base], build(case, rng.randrange(1000)))
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            change(call, rng, compiled_changes(rng))
        isolate(call)
        return call

    def run(self, call: HostileCall, way: str) -> Any:
        """Call the graph."""
        assert self._graph is not None
        return self._graph(**call.arguments)

    def _compile(self, number: int) -> None:
        rng = random.Random(number)
        self._number, self._base = number, rng.choice(sorted(BASES))
        name = BASE_OPS[self._base]
        packet, public = getattr(torch.ops.paged, name), rng.random() < 0.5
        stats = rng.random() < 0.3 and hasattr(packet, "with_stats")
        self.way = "compiled" + (", public" if public else "") + (", statistics" if stats else "")
        op: Callable[..., Any] = packet.with_stats if stats else packet.default
        if public:
            op = partial(getattr(torch_paged, name), **({"return_stats": True} if stats else {}))
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
        backend = rng.choice(("inductor", "aot_eager"))
        self._graph = torch.compile(lambda **kwargs: op(**kwargs), fullgraph=True, dynamic=True, backend=backend)


def _resized(case: AttentionCase, rng: random.Random) -> AttentionCase:
    """Return the case with other lengths of as many sequences."""

    def drawn(lengths: tuple[int, ...] | None, values: tuple[int, ...]) -> tuple[int, ...] | None:
        return None if lengths is None else tuple(rng.choice(values) for _ in lengths)

    queries = drawn(case.query_lens, _QUERY_LENS)
    return replace(
        case,
        context_lens=drawn(case.context_lens, _CONTEXT_LENS),
        query_lens=queries,
        new_lens=None if case.new_lens is None else queries,
    )
