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
import torch, torch_paged
from torch_paged.testing import build
from torch_paged.testing.every_op import EVERY_OP, call, digest, digests, outcome, written

fail_after = ctypes.CDLL(sys.argv[1]).fail_after
fail_after.restype = ctypes.c_long
fail_after.argtypes = (ctypes.c_long,)
expected = digests()

def attempt(name, allowed, threads):
    '''Return the name of what the call raised, of None too, or "" where no allocation failed.'''
    op, case = EVERY_OP[name]
    arguments = build(case)
    if op != "copy_blocks":  # also what is copied before the kernel can walk it
        arguments = {key: strided(value) if key in STRIDED else value for key, value in arguments.items()}
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

STRIDED = ("query", "key", "value", "slot_mapping", "context_lens", "lses")

def strided(x):
    return None if x is None else torch.stack((x, x), -1)[..., 0]

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

for name in EVERY_OP:
    for threads in (1, 2):
        count, kinds = sweep(name, threads)
        print(name, threads, count, *sorted(kinds))
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
