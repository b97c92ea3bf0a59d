"""The kernels are right for NKI 0.6 and 0.7 alike: the names of 0.6 alone, whatever a loop hands over as its index."""

import ast
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from neuron_calls import run
from nki_sim_kernels import strict_only
from torch import Tensor

import torch_paged
from torch_paged.backends.neuron import (
    bridge_simulator,
    cache,
    copy_kernel,
    gather_kernel,
    merge,
    merge_kernel,
    write_kernel,
)
from torch_paged.backends.neuron.launch import Launch
from torch_paged.testing import AttentionCase, CopyCase, GatherCase, MergeCase, WriteCase, assert_same, build

KERNELS = sorted((Path(torch_paged.__file__).parent / "backends" / "neuron").glob("*_kernel.py"))
NEW_NAMES = {"NkiScalar", "scalar_load", "scalar_store", "int64", "uint64"}
NEW_ARGUMENTS = {
    "activation": {"engine"},
    "activate2": {"engine"},
    "scalar_tensor_tensor": {"reduce_cmd", "reduce_op", "reduce_res"},
}


def later_names(tree: ast.AST) -> list[str]:
    """Return what of a source is not in 0.6."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in NEW_NAMES:
            found.append(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            own = NEW_ARGUMENTS.get(node.func.attr, set())
            found += [f"{node.func.attr}: {keyword.arg}" for keyword in node.keywords if keyword.arg in own]
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_names_of_0_6(path: Path) -> None:
    assert later_names(ast.parse(path.read_text())) == []


def test_names_that_would_be_found() -> None:
    source = "nisa.activation(dst=a, engine=b)\nnisa.scalar_load(c)\nnisa.scalar_tensor_tensor(a, reduce_op=nl.add)"
    assert sorted(later_names(ast.parse(source))) == [
        "activation: engine",
        "scalar_load",
        "scalar_tensor_tensor: reduce_op",
    ]


def attended(case: AttentionCase) -> tuple[Tensor, ...]:
    return run(build(case))


def changed(launch: Launch, op: str, case: WriteCase | CopyCase) -> tuple[Tensor, ...]:
    arguments = build(case)
    getattr(cache, op)(launch, arguments)
    return tuple(arguments[name] for name in ("kv_cache", "kv_scales") if arguments[name] is not None)


CYCLE = tuple((block, (block + 1) % 150) for block in range(150))
OPS: dict[str, Callable[[Launch], tuple[Tensor, ...]]] = {
    "write": lambda launch: changed(
        launch, "reshape_and_cache", WriteCase("rows", num_tokens=300, num_blocks=40, num_kv_heads=1)
    ),
    "copy": lambda launch: changed(launch, "copy_blocks", CopyCase("blocks", CYCLE, 150, num_kv_heads=1, block_size=8)),
    "gather": lambda launch: cache.gather_cache(launch, build(GatherCase("rows", (1500, 0, 1300), block_size=8))),
    "merge": lambda launch: merge.merge_attention_states(
        launch, build(MergeCase("parts", parts=17, tokens=90, num_heads=3, head_dim=1100))
    ),
    "decode": lambda launch: attended(
        AttentionCase("keys", context_lens=(5200, 0, 40), num_kv_heads=1, group=2, block_size=8)
    ),
    "packed": lambda launch: attended(
        AttentionCase("rows", context_lens=(17, 0, 40), query_lens=(5, 0, 3), new_lens=(5, 0, 3))
    ),
}


@pytest.fixture
def short_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few rows be enough for a turn of each loop."""
    for module in (copy_kernel, gather_kernel, write_kernel):
        monkeypatch.setattr(module, "TILES", 1)
    monkeypatch.setattr(merge_kernel, "UNROLLED", 0)


def loops_of(path: Path) -> set[str]:
    """Return "<file>:<line>" of each dynamic loop."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr == "fori_loop"]
    return {f"{path.name}:{node.lineno}" for node in named}


def calling_line() -> str:
    """Return "<file>:<line>" of the kernel that runs."""
    frames = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_filename.endswith("_kernel.py"))
    frame = next(frames, None)
    return "no kernel" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@strict_only
def test_indices_of_0_6_and_0_7(short_loops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loop of each kernel gets a register, as 0.6 has it, and a scalar, with which nothing may be computed."""
    from nki._dtypes import _OF_NUMPY
    from nki._register import NkiScalar, RunTimeValue, VirtualRegister
    from nki.language import _control

    ran: dict[type, set[str]] = {NkiScalar: set(), VirtualRegister: set()}
    by_bounds = _control.loop_index

    def index_of_0_7(number: int, lower: Any, upper: Any) -> RunTimeValue:
        index = by_bounds(number, lower, upper)
        ran[NkiScalar].add(calling_line())
        return index

    def index_of_0_6(number: int, lower: Any, upper: Any) -> RunTimeValue:
        ran[VirtualRegister].add(calling_line())
        return VirtualRegister(number, frozen=True)

    def refuse(self: NkiScalar, title: str, left: Any, right: Any) -> NkiScalar:
        raise AssertionError(f"{title} of a loop's index at {calling_line()}, which 0.6 has not")

    monkeypatch.delitem(_OF_NUMPY, np.dtype(np.int64))  # arguments of 0.6 have no int64
    monkeypatch.setattr(NkiScalar, "_operate", refuse)
    with pytest.raises(AssertionError, match="add of a loop's index"):
        NkiScalar._operate(NkiScalar.__new__(NkiScalar), "add", 1, 1)
    launch = Launch("trn2", 1, bridge_simulator.run)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    for name, op in OPS.items():
        monkeypatch.setattr(_control, "loop_index", index_of_0_7)
        newer = op(launch)
        monkeypatch.setattr(_control, "loop_index", index_of_0_6)
        for actual, expected in zip(op(launch), newer, strict=True):
            assert_same(actual, expected, name)
    loops = set().union(*map(loops_of, KERNELS))
    assert len(loops) > 8
    assert ran[NkiScalar] == ran[VirtualRegister] == loops
