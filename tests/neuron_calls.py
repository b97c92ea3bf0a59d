"""Calls of attention by the NKI kernels, directly on the simulator."""

from collections.abc import Callable
from typing import Any

import nki
import pytest
from torch import Tensor

from torch_paged.backends.neuron import bridge_simulator, decode, varlen
from torch_paged.backends.neuron.launch import Launch
from torch_paged.testing import AttentionCase, assert_attention, assert_same, build

GENERATIONS = ("trn2", "trn3")
Results = tuple[Tensor, Tensor, Tensor]


def run(
    arguments: dict[str, Any],
    generation: str = "trn2",
    cores: int = 1,
    simulate: Callable[..., Any] = bridge_simulator.run,
) -> Results:
    """Return what decode gives, or packed queries where the arguments are theirs."""
    op = varlen.flash_attn_varlen if "cu_seqlens_q" in arguments else decode.paged_attention
    cache = arguments["kv_cache"]
    given = arguments if cache is None else dict(arguments, kv_cache=cache.contiguous())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", generation)
        return op(Launch(generation, cores, simulate), given)


def check(case: AttentionCase, generation: str = "trn2", cores: int = 1) -> None:
    """Assert that a case is within the rule."""
    arguments = build(case)
    assert_attention(case.op, arguments, *run(arguments, generation, cores))


def assert_all_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Assert equal bits of out, lse and max_logits."""
    for name, a, b in zip(("out", "lse", "max_logits"), actual, expected, strict=True):
        assert_same(a, b, name)


def counted(arguments: dict[str, Any]) -> tuple[list[Any], Results]:
    """Return what the kernels ran, as the simulator tallies it, and the results."""
    tallies = []

    def keep(kernel: Any, cores: int, *given: Any) -> Any:
        simulated = nki.simulate(kernel)
        found = simulated(*given)
        tallies.append(simulated.cores[0].tally)
        return found

    results = run(arguments, simulate=keep)
    return tallies, results
