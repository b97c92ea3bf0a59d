"""Out of memory: whichever allocation of a call fails, Python sees an exception and what the op writes is untouched."""

import subprocess
from pathlib import Path

import pytest

from torch_paged import dispatch
from torch_paged.testing.every_op import EVERY_OP
from torch_paged.testing.processes import SOURCE, run_python

pytestmark = pytest.mark.skipif(
    dispatch.served().get("cpu") != "cpu", reason="the CPU kernels are not what serves this process"
)

FAIL_EACH = """
import ctypes, sys, threading
from dataclasses import replace
import torch, torch_paged
from torch_paged.testing import build
from torch_paged.testing.every_op import EVERY_OP, call, digest, outcome, written

fail_after = ctypes.CDLL(sys.argv[1]).fail_after
fail_after.restype = ctypes.c_long
fail_after.argtypes = (ctypes.c_long,)

# Every tensor that a kernel may have to copy first occurs in one of the calls.
MORE = {"beside": {"sinks": True, "mask": "shared", "positions": "shuffled"}, "gather": {"left_padded": True}}
CASES = {name: (op, replace(case, **MORE.get(name, {}))) for name, (op, case) in EVERY_OP.items()}
WALKED = ("kv_cache", "kv_scales")  # in place, whatever their strides
expected = {name: digest(outcome(call, op, build(case))) for name, (op, case) in CASES.items()}

def strided(arguments):
    return {
        name: torch.stack((x, x), -1)[..., 0] if isinstance(x, torch.Tensor) and name not in WALKED else x
        for name, x in arguments.items()
    }

def attempt(name, allowed, threads):
    '''Return the name of what the call raised, of None too, or "" where no allocation failed.'''
    op, case = CASES[name]
    arguments = strided(build(case))
    before = digest(written(op, arguments))
    torch.set_num_threads(threads)
    fail_after(allowed)
    try:
        results = call(op, arguments)
    except (MemoryError, RuntimeError) as error:
        failed = fail_after(-1) < 0
        assert failed, f"{name}: {error} without a failure"
        assert digest(written(op, arguments)) == before, f"{name}: allocation {allowed} failed after a write"
        return type(error).__name__
    failed = fail_after(-1) < 0  # sorting does without a buffer too
    assert digest(outcome(lambda *_: results, op, arguments)) == expected[name], f"{name}: allocation {allowed}"
    return "None" if failed else ""

def sweep(name, threads):
    kinds, allowed = set(), 0
    while True:
        # On a thread of its own: what a thread keeps from call to call is asked for anew.
        raised = []
        worker = threading.Thread(target=lambda: raised.append(attempt(name, allowed, threads)))
        worker.start()
        worker.join()
        [kind] = raised
        if not kind:
            return allowed, kinds
        kinds.add(kind)
        allowed += 1

copied = {}
for name, (op, case) in CASES.items():
    copied[name] = {key for key, x in build(case).items() if isinstance(x, torch.Tensor)}.difference(WALKED)
    for threads in (1, 2):
        count, kinds = sweep(name, threads)
        assert count >= len(copied[name]), f"{name}: {count} allocations, not one for each of {copied[name]}"
        print(name, threads, count, *sorted(kinds))
tensors = {
    argument.name
    for op, _ in CASES.values()
    for argument in getattr(torch.ops.paged, op).default._schema.arguments
    if "Tensor" in str(argument.real_type)
}
assert tensors - set().union(*copied.values()) == {*WALKED}
"""


def test_whichever_allocation_fails(tmp_path: Path) -> None:
    library = tmp_path / "fail_allocations.so"
    source = SOURCE / "tests/fail_allocations.cpp"
    subprocess.run(
        ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True
    )
    result = run_python(FAIL_EACH, str(library), LD_PRELOAD=str(library), OMP_NUM_THREADS="2")
    seen = [line.split() for line in result.stdout.splitlines()]
    assert [(name, int(threads)) for name, threads, *_ in seen] == [(name, n) for name in EVERY_OP for n in (1, 2)]
    for name, _, count, *kinds in seen:
        assert int(count) > 0, name
        assert {*kinds} - {"None"}, f"{name}: nothing was raised"
