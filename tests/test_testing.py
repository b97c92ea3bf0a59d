"""The conformance suite itself: it passes what is right, and sees each fault in the line that it breaks."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
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


def _reads_all(arguments: Arguments) -> Arguments:
    dead = 0 * arguments["kv_cache"].float().sum()
    return arguments | {"query": arguments["query"] + dead.to(arguments["query"].dtype)}


def _no_cap_on(arguments: Arguments) -> Arguments:
    return arguments if arguments.get("alibi_slopes") is None else arguments | {"logits_soft_cap": 0.0}


def _beyond_the_keys(arguments: Arguments) -> Arguments:
    return arguments | {"causal": False} if "causal" in arguments else arguments


def _changed(name: str, change: Callable[[Arguments, Tensor], Tensor | None]) -> Callable[[Arguments], Arguments]:
    """Return a fault that makes something else of one argument, where there is one."""

    def spoil(arguments: Arguments) -> Arguments:
        given = arguments.get(name)
        return arguments if given is None else arguments | {name: change(arguments, given)}

    return spoil


def _first_head(arguments: Arguments, x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def _first_head_beside_new_keys(arguments: Arguments, x: Tensor) -> Tensor:
    return x if arguments.get("key") is None else x[:1].expand_as(x)


def _new_heads_flipped(arguments: Arguments) -> Arguments:
    new = {name: x.flip(1) for name in ("key", "value") if (x := arguments.get(name)) is not None}
    return arguments | new if "query" in arguments else arguments


def _counted_from_the_sequence(arguments: Arguments, x: Tensor, dim: int) -> Tensor:
    """Return rows of packed queries that a kernel reads as if each sequence were the first."""
    counted, bounds = x.clone(), arguments.get("cu_seqlens_q", torch.arange(1)).tolist()
    for first, last in pairwise(bounds):
        counted.narrow(dim, first, last - first).copy_(x.narrow(dim, 0, last - first))
    return counted


def _as_if_contiguous(arguments: Arguments, mask: Tensor) -> Tensor:
    return torch.as_strided(mask, mask.shape, torch.empty(mask.shape, device="meta").stride())


def _longest(arguments: Arguments) -> int:
    lengths = arguments.get("context_lens")
    return 0 if lengths is None else int(lengths.max())


def _latent_as_zeros(arguments: Arguments, cache: Tensor) -> Tensor:
    return torch.zeros_like(cache) if cache.size(0) == 1 else cache


BEFORE: dict[int, Callable[[Arguments], Arguments]] = {
    0: _changed("kv_cache", lambda _, cache: cache.flip(2)),
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
    15: lambda x: x * 2,
}
"""Faults in its results, each of them a tensor."""


MIXED_UP: dict[str, tuple[int, Callable[[Arguments], Arguments]]] = {
    "new keys of the other kv head": (0, _new_heads_flipped),
    "latent caches read as zeros": (0, _changed("kv_cache", _latent_as_zeros)),
    "scale of the first kv head": (
        0,
        _changed("kv_scales", lambda _, x: x[:, :1].expand_as(x) if x.dim() == 2 else x),
    ),
    "scales of tokens left out": (0, _changed("kv_scales", lambda _, x: torch.ones_like(x) if x.dim() == 4 else x)),
    "slope of the first head": (2, _changed("alibi_slopes", _first_head)),
    "positions counted from the sequence": (
        3,
        _changed("query_positions", lambda arguments, x: _counted_from_the_sequence(arguments, x, 0)),
    ),
    "window too wide in long contexts": (
        4,
        _changed("sliding_window", lambda arguments, x: x + (_longest(arguments) > 64)),
    ),
    "chunk too wide in long contexts": (
        5,
        _changed("attention_chunk", lambda arguments, x: x + (_longest(arguments) > 64)),
    ),
    "mask of the first head": (
        6,
        _changed("attn_mask", lambda _, x: x if x.dim() == 2 else x[:1].expand_as(x)),
    ),
    "mask rows counted from the sequence": (
        6,
        _changed("attn_mask", lambda arguments, x: _counted_from_the_sequence(arguments, x, -2)),
    ),
    "mask rows without their stride": (6, _changed("attn_mask", _as_if_contiguous)),
    "sink of the first head beside new keys": (7, _changed("sinks", _first_head_beside_new_keys)),
}
"""Faults that do no harm to one head, one sequence or few keys, with the line that they break."""


def _each(results: Results, change: Callable[[Tensor], Tensor]) -> Results:
    if isinstance(results, Tensor):
        return change(results)
    return results if results is None else tuple(change(result) for result in results)


def _mine(call: Callable[[str, Arguments], Results]) -> Backend:
    """Return a backend of kernels from elsewhere, each of which is this call."""
    kernels = {name: lambda name=name, **arguments: call(name, arguments) for name in KERNELS}
    return Backend("mine", torch.device("cpu"), kernels=kernels)


def _faulty(line: int) -> Backend:
    spoil, change = BEFORE.get(line, dict), AFTER.get(line, torch.Tensor.clone)
    return _mine(lambda name, arguments: _each(KERNELS[name](**spoil(arguments)), change))


def _failing(backend: Backend, line: int) -> list[str]:
    """Return the checks of a line that fail, each for the first of its dtypes."""
    failing = []
    for check in CHECKS:
        if check.line == line and not check.of_ops:
            try:
                check.run(backend, check.dtypes[0])
            except (AssertionError, IndexError):  # IndexError: the fault reads a table entry that nothing uses
                failing.append(check.name)
    return failing


@pytest.mark.parametrize("line", [*BEFORE, *AFTER])
def test_a_fault_is_seen_in_its_line(line: int) -> None:
    assert _failing(Backend("mine", torch.device("cpu"), kernels=KERNELS), line) == []
    assert _failing(_faulty(line), line) != []


@pytest.mark.parametrize("name", MIXED_UP)
def test_a_fault_that_spares_the_simplest_calls_is_seen(name: str) -> None:
    line, spoil = MIXED_UP[name]
    assert _failing(_mine(lambda op, arguments: KERNELS[op](**spoil(arguments))), line) != []


def test_bits_that_depend_on_the_batch_in_long_contexts_are_seen() -> None:
    def kernel(name: str, arguments: Arguments) -> Results:
        factor = 1 + 1e-6 * arguments["context_lens"].numel() * (_longest(arguments) > 512)
        return _each(KERNELS[name](**arguments), lambda x: x * factor)

    assert {check.partition("[")[0] for check in _failing(_mine(kernel), 13)} == {
        "a_long_sequence_gives_equal_bits_in_any_batch"
    }


def test_weights_that_large_logits_round_are_seen() -> None:
    def kernel(name: str, arguments: Arguments) -> Results:
        results = KERNELS[name](**arguments)
        if not name.endswith(".with_stats"):
            return results
        out, lse, max_logits = results
        return out * (1 + 2.0**-24 * max_logits.nan_to_num(0, 0, 0)[..., None]).to(out.dtype), lse, max_logits

    assert any("have_in_common" in name for name in _failing(_mine(kernel), 10))


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("reshape_and_cache", "slot_mapping"),
        ("quantize_and_cache", "slot_mapping"),
        ("paged_attention.with_stats", "block_tables"),
        ("flash_attn_varlen.with_stats", "block_tables"),
        ("copy_blocks", "dst_blocks"),
        ("gather_cache", "block_tables"),
    ],
)
def test_offsets_that_wrap_at_two_to_the_31_are_seen(op: str, name: str) -> None:
    def kernel(called: str, arguments: Arguments) -> Results:
        if called == op:
            _, _, heads, block_size, lanes = arguments["kv_cache"].shape
            rows = 2**31 // (heads * lanes) // (1 if name == "slot_mapping" else block_size)
            arguments[name] = arguments[name] % rows
        return KERNELS[called](**arguments)

    (check,) = (check for check in CHECKS if check.line == 12)
    with pytest.raises(AssertionError):
        check.run(_mine(kernel), torch.int8)


@pytest.mark.parametrize("op", ["reshape_and_cache", "quantize_and_cache", "copy_blocks"])
def test_an_op_that_writes_nothing_is_seen(op: str) -> None:
    def kernel(name: str, arguments: Arguments) -> Results:
        return None if name == op else KERNELS[name](**arguments)

    assert _failing(_mine(kernel), 15) != []


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
    with pytest.raises(
        ValueError, match=r"^check_backend: name must be one of cpu, neuron, reference, tpu, got 'gpu'$"
    ):
        check_backend("gpu")
    with pytest.raises(ValueError, match=r"^check_backend: backend 'neuron' is off here: \w"):
        check_backend("neuron")


def test_kernels_that_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match=r"^check_backend: name must be none of .*tpu with kernels, got 'tpu'$"):
        check_backend("tpu", KERNELS)
    some = {name: kernel for name, kernel in KERNELS.items() if name not in ("copy_blocks", "gather_cache")}
    with pytest.raises(ValueError, match=r"^check_backend: kernels must .*, got none for copy_blocks, gather_cache$"):
        check_backend("mine", some)


def test_bad_input_may_be_refused_in_words_of_its_own() -> None:
    def checking(name: str, arguments: Arguments) -> Results:
        for option in ("sliding_window", "attention_chunk"):
            if arguments.get(option) in (0, -1):
                raise ValueError("mine: that is no size")
        return KERNELS[name](**arguments)

    checks = [check for check in CHECKS if check.name.startswith("window_and_chunk_are_none_or_positive")]
    assert len(checks) == 4
    for check in checks:
        check.run(_mine(checking), torch.float32)


def test_a_setting_that_cannot_be_served_is_one_sentence() -> None:
    environment = os.environ | {"TORCH_PAGED_BACKEND": "foo"}
    done = subprocess.run(
        [sys.executable, "-m", "torch_paged.testing"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout.startswith("torch_paged: TORCH_PAGED_BACKEND must be one of ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--backend", "reference"]) == 0
    printed = capsys.readouterr().out
    for line, title in LINES.items():
        assert line in (12, 14) or f"{line} {title}" in printed
    assert "0 failed" in printed
    assert main(["--backend", "gpu"]) == 2
