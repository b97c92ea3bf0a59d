"""Hostile calls, a few of the many that ``make fuzz`` makes: the reference's results, or its sentence and no byte."""

import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from hostile import HostileCall, draw_call, isolate
from hostile_compiled import CompiledShare
from hostile_judge import judge, run, ways
from hypothesis import given, note, settings
from hypothesis import strategies as st

from torch_paged.testing import AttentionCase, MergeCase, WriteCase, build

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # Torch warns of kinds of tensors and of casts that are made here, and its compiler uses what torch deprecates.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning"),
]
Invoke = Callable[[HostileCall, str], Any]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rng=st.randoms(use_true_random=False))
def test_hostile_calls(rng: random.Random) -> None:
    call = draw_call(rng)
    way = rng.choice(ways(call))
    note(f"{call.op} by {way}: {call.corruptions}")
    judge(call, way)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rng=st.randoms(use_true_random=False))
def test_hostile_calls_of_a_graph(graph: CompiledShare, rng: random.Random) -> None:
    call = graph.draw(0, rng)
    note(f"{call.op}: {call.corruptions}")
    judge(call, graph.way, graph.run)


@pytest.fixture(scope="module")
def graph() -> Iterator[CompiledShare]:
    yield CompiledShare()
    torch.compiler.reset()


def valid_call(case: Any) -> HostileCall:
    call = HostileCall(case.op, build(case))
    isolate(call)
    return call


def writes_then_raises(call: HostileCall, way: str) -> Any:
    call.arguments["kv_cache"].view(-1)[3] = 7
    return run(call, way)


def writes_beside(call: HostileCall, way: str) -> Any:
    results = run(call, way)
    call.buffers[0][17] = 0
    return results


def adds_to_the_result(call: HostileCall, way: str) -> Any:
    out, *statistics = run(call, way)
    out[0] += 1e-3
    return (out, *statistics)


def adds_a_little_to_lse(call: HostileCall, way: str) -> Any:
    out, lse, *statistics = run(call, way)
    return (out, lse * 1.0001 + 0.2, *statistics)


def weighs_nothing(call: HostileCall, way: str) -> Any:
    out, *statistics = run(call, way)
    return (torch.where(out == 0, out, torch.inf), *statistics)


def sees_keys_where_none_are(call: HostileCall, way: str) -> Any:
    out, lse, max_logits = run(call, way)
    return out, lse.clamp(min=-1e30), max_logits


def fills_rows_without_keys(call: HostileCall, way: str) -> Any:
    out, *statistics = run(call, way)
    return (torch.where(out == 0, 1e-7, out), *statistics)


def raises_of_another_kind(call: HostileCall, way: str) -> Any:
    try:
        return run(call, way)
    except ValueError as error:
        raise RuntimeError(str(error)) from error


def says_something_else(call: HostileCall, way: str) -> Any:
    try:
        return run(call, way)
    except ValueError as error:
        raise ValueError("no") from error


def does_nothing(call: HostileCall, way: str) -> None:
    """Neither compute nor write nor refuse."""


DECODE, WRITE = AttentionCase("judged"), WriteCase("judged")
STORED = AttentionCase("judged", dtype=torch.bfloat16, cache_dtype=torch.int8, scales_rank=4)
MERGE = MergeCase("judged", sinks=True)
DECIDED, OPEN = {"softmax_scale": 1e4}, {"softmax_scale": 1e12}  # by one key; by what rounds its logits
SINKS = {"sinks": torch.full((8,), 1000.0)}
WILD = {"slot_mapping": torch.tensor([-2] + [-1] * 16)}


@pytest.mark.parametrize(
    ("case", "changes", "invoke", "says"),
    [
        (DECODE, {}, adds_to_the_result, "tolerance"),
        (DECODE, DECIDED, adds_to_the_result, "tolerance"),
        (DECODE, OPEN, adds_a_little_to_lse, "lse: .* values"),
        (DECODE, OPEN, weighs_nothing, "out is not finite"),
        (DECODE, SINKS, adds_to_the_result, "tolerance"),
        (DECODE, {}, sees_keys_where_none_are, "lse: 8 values"),
        (DECODE, {}, fills_rows_without_keys, "rows without keys"),
        (STORED, {}, adds_a_little_to_lse, "lse: .* values"),
        (MERGE, {}, adds_to_the_result, "tolerance"),
        (MERGE, {}, adds_a_little_to_lse, "lse: .* values"),
        (MERGE, SINKS, adds_to_the_result, "tolerance"),
        (DECODE, {}, writes_beside, "wrote 1 bytes"),
        (WRITE, {}, writes_beside, "1 bytes of a buffer"),
        (WRITE, {}, does_nothing, "bytes of a buffer"),
        (WRITE, WILD, writes_then_raises, "wrote .* bytes, but raised"),
        (WRITE, WILD, raises_of_another_kind, "raised <class 'RuntimeError'>"),
        (WRITE, WILD, says_something_else, "said 'no'"),
        (WRITE, WILD, does_nothing, "accepted"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_judge_sees_what_is_wrong(case: Any, changes: dict[str, Any], invoke: Invoke, says: str) -> None:
    call = valid_call(case)
    call.arguments |= changes
    with pytest.raises(AssertionError, match=says):
        judge(call, "op, statistics" if case.op == "paged_attention" else "op", invoke)


def test_tokens_with_one_slot_in_rows_of_one_lane() -> None:
    """The stride of a size 1 says nothing."""
    call = valid_call(WriteCase("thin", head_dim=1, dtype=torch.bfloat16))
    cache = call.arguments["kv_cache"]
    call.arguments["kv_cache"] = cache.as_strided(cache.shape, (*cache.stride()[:-1], 4))
    call.arguments["slot_mapping"][5:9] = call.arguments["slot_mapping"][4].item()
    assert judge(call, "op") == "matched"


def test_of_tokens_with_one_slot_one_is_the_last_writer() -> None:
    call = valid_call(WRITE)
    call.arguments["slot_mapping"][5:9] = call.arguments["slot_mapping"][4].item()
    assert judge(call, "op") == "matched"

    def mixes_two_writers(call: HostileCall, way: str) -> None:
        slot = int(call.arguments["slot_mapping"][4])
        run(call, way)
        size = call.arguments["kv_cache"].size(3)
        call.arguments["kv_cache"][0, slot // size, 0, slot % size, :7] = call.arguments["key"][4, 0, :7]

    call = valid_call(WRITE)
    call.arguments["slot_mapping"][5:9] = call.arguments["slot_mapping"][4].item()
    with pytest.raises(AssertionError, match="none of those"):
        judge(call, "op", mixes_two_writers)


@pytest.mark.parametrize(
    ("last_words", "says"),
    [("os.abort()", "seed 8: ended the process with -6"), ("time.sleep(99)", "seed 8: did not end within 3 seconds")],
)
def test_a_crash_and_a_hang_belong_to_the_call_that_had_begun(last_words: str, says: str) -> None:
    program = f"""
import os, sys, time
print('{{"begins": 7}}\\n{{"end": "matched"}}\\n{{"begins": 8}}', flush=True)
{last_words}
"""
    report = fuzz.Report()
    ended = list(fuzz.supervise([sys.executable, "-c", program], 7, 3, report))
    assert ended == [7, 8]
    assert report.findings == [says]
    assert report.ends == {"matched": 1, "FINDING": 1}


def test_programs_without_torch_have_all_that_the_kernels_call() -> None:
    """The targets of ``make fuzz-kernels``: CI links them to the library, whose torch has what they lack."""
    shims = Path(__file__).parents[1] / "csrc_shims"
    sources = [
        path.read_text() for path in shims.rglob("*") if path.suffix in (".h", ".cpp") and "tests" not in path.parts
    ]
    called = {name for source in sources for name in re.findall(r"\b(?:aoti_torch|omp)_\w+", source)}
    host = re.sub(r"TYPE\((\w+)", r"aoti_torch_dtype_\1(", (shims / "tests" / "fuzz" / "host.cpp").read_text())
    assert called
    assert called <= set(re.findall(r"\b(?:aoti_torch|omp)_\w+(?=\()", host))
