"""The conformance suite itself: it passes what is right, and sees each fault in the line that it breaks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_paged.contract import reference
from torch_paged.contract.schema import SCHEMAS
from torch_paged.testing import check_backend
from torch_paged.testing.__main__ import main
from torch_paged.testing.backends import Backend
from torch_paged.testing.semantics import CHECKS, LINES
from torch_paged.testing.suite import FAILED, NOT_RUN, PASSED, UNSUPPORTED

Results = Any
Arguments = dict[str, Any]
KERNELS = {name: getattr(reference, name.replace(".", "_")) for name in SCHEMAS}


def _with(**changed: Any) -> Callable[[Arguments], Arguments]:
    """Return a fault that gives the kernel other arguments."""
    return lambda arguments: {name: changed.get(name, value) for name, value in arguments.items()}


def _scaled_by_stored_lanes(arguments: Arguments) -> Arguments:
    cache = arguments["kv_cache"]
    lanes = arguments["query"].size(-1) if cache is None else cache.size(-1)
    return arguments if arguments.get("softmax_scale") is not None else arguments | {"softmax_scale": lanes**-0.5 / 2}


def _wider(arguments: Arguments) -> Arguments:
    window = arguments.get("sliding_window")
    return arguments if window is None else arguments | {"sliding_window": window + 1}


def _heads_interleaved(arguments: Arguments) -> Arguments:
    return arguments | {"kv_cache": arguments["kv_cache"].flip(2)}


def _reads_all(arguments: Arguments) -> Arguments:
    dead = 0 * arguments["kv_cache"].float().sum()
    return arguments | {"query": arguments["query"] + dead.to(arguments["query"].dtype)}


def _no_cap_on(arguments: Arguments) -> Arguments:
    return arguments if arguments.get("alibi_slopes") is None else arguments | {"logits_soft_cap": 0.0}


def _beyond_the_keys(arguments: Arguments) -> Arguments:
    return arguments | {"causal": False} if "causal" in arguments else arguments


BEFORE: dict[int, Callable[[Arguments], Arguments]] = {
    0: _heads_interleaved,
    1: _scaled_by_stored_lanes,
    2: _no_cap_on,
    3: _beyond_the_keys,
    4: _wider,
    5: _with(attention_chunk=None),
    6: _with(attn_mask=None),
    7: _with(sinks=None),
    11: _reads_all,
}
"""Faults in what a kernel makes of its arguments, by the line that they break."""

AFTER: dict[int, Callable[[Tensor], Tensor]] = {
    8: lambda x: x.nan_to_num(neginf=-1e30),
    9: lambda x: x / 2 if x.dim() == 2 else x,
    10: lambda x: x.double(),
    13: lambda x: x + x.size(0) * 1e-6,
}
"""Faults in its results, each of them a tensor."""


def _each(results: Results, change: Callable[[Tensor], Tensor]) -> Results:
    if isinstance(results, Tensor):
        return change(results)
    return results if results is None else tuple(change(result) for result in results)


def _faulty(line: int) -> Backend:
    spoil, change = BEFORE.get(line, dict), AFTER.get(line, torch.Tensor.clone)

    def kernel(name: str) -> Callable[..., Results]:
        return lambda **arguments: _each(KERNELS[name](**spoil(arguments)), change)

    return Backend("mine", torch.device("cpu"), kernels={name: kernel(name) for name in KERNELS})


def _failing(backend: Backend, line: int) -> list[str]:
    failing = []
    for check in CHECKS:
        if check.line == line and not check.of_ops:
            try:
                check.run(backend, check.dtypes[0])
            except AssertionError:
                failing.append(check.name)
    return failing


@pytest.mark.parametrize("line", [*BEFORE, *AFTER])
def test_a_fault_is_seen_in_its_line(line: int) -> None:
    assert _failing(Backend("mine", torch.device("cpu"), kernels=KERNELS), line) == []
    assert _failing(_faulty(line), line) != []


def test_a_fault_has_been_thought_of_for_each_line_that_kernels_decide() -> None:
    assert set(LINES) - set(BEFORE) - set(AFTER) == {
        12,
        14,
    }  # sizes and gradients, which the ops have tests of their own for


def test_kernels_from_elsewhere() -> None:
    """What they refuse is their own sentence; what they do not check fails."""

    def refusing(name: str) -> Callable[..., Results]:
        def kernel(**arguments: Any) -> Results:
            if arguments.get("kv_scales") is not None:
                raise NotImplementedError("mine: no quantised caches")
            return KERNELS[name](**arguments)

        return kernel

    outcomes = list(check_backend("mine", {name: refusing(name) for name in KERNELS}))
    by_status = {
        status: [x for x in outcomes if x.status == status] for status in (PASSED, UNSUPPORTED, NOT_RUN, FAILED)
    }
    assert {x.reason for x in by_status[UNSUPPORTED]} == {"mine: no quantised caches"}
    assert {x.dtype for x in by_status[UNSUPPORTED]} == {torch.int8, torch.float8_e4m3fn, torch.float8_e5m2}
    assert {x.check.partition("[")[0] for x in by_status[FAILED]} == {"window_and_chunk_are_none_or_positive"}
    assert {x.row.strip() for x in by_status[NOT_RUN]} == {f"14 {LINES[14]}"}
    assert {x.row for x in by_status[PASSED]} >= {f"{line:2d} {title}" for line, title in LINES.items() if line != 14}


def test_names_that_are_no_backend() -> None:
    with pytest.raises(ValueError, match=r"check_backend: name must be one of .*cpu.*reference, got 'gpu'"):
        check_backend("gpu")
    with pytest.raises(ValueError, match=r"^check_backend: backend 'neuron' is off here: \w"):
        check_backend("neuron")


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--backend", "reference"]) == 0
    printed = capsys.readouterr().out
    for line, title in LINES.items():
        assert line in (12, 14) or f"{line} {title}" in printed
    assert "0 failed" in printed
    assert main(["--backend", "gpu"]) == 2
