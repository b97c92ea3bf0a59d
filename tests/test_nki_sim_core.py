"""Who may use a tensor or a register, and when: cores, turns of loops, handles of instructions (SDK 2.32)."""

import numpy as np
import pytest
from nki_sim_kernels import Result, call, random, refused_with, rejects, rejects_kernel, strict_only

KEPT = """
class Kept(nl.NKIObject):
    tile = None


kept = Kept()


@nki.jit
def kernel(x):
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    if nl.program_id(0) == 0:
        kept.tile = tile
    nisa.core_barrier(data=out, cores=(0, 1))
    if nl.program_id(0) == 1:
        nisa.dma_copy(dst=out, src=tile)  # !
    return out
"""


def test_the_other_cores_memory() -> None:
    rejects_kernel(KEPT, "dma_copy", "src", "own core", ("src=tile)  # !", "src=kept.tile)  # !"), random(4, 3), lnc=2)


def test_reach_of_a_register() -> None:
    """A run-time offset counts bytes in 32 bits, whatever is done with what lies outside."""
    body = """
nisa.memset(dst=dst, value=0.0)
at = nisa.register_alloc(9)
nisa.dma_copy(dst=dst, src=x.ap([[2048, 1], [1, 4]], 0, scalar_offset=at), oob_mode=nisa.oob_mode.skip)
"""
    x = random(4, 2048)
    rejects(body, "dma_copy", "src", "32 bits", ("alloc(9)", "alloc(2**20)"), hbm={"x": x}, dst=Result((1, 4)))


def test_a_run_time_offset_stays_in_its_partition() -> None:
    body = """
at = nisa.register_alloc(4)
nisa.tensor_copy(dst=dst, src=a.ap([[8, 2], [1, 4]], 0, scalar_offset=at, indirect_dim=1))
"""
    rejects(body, "tensor_copy", "src", "run-time", ("alloc(4)", "alloc(5)"), a=random(4, 8), dst=Result((2, 4)))


LOOPS = """
@nki.jit
def kernel(x):
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    one = nl.ndarray((1, 1), nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=one, value=1)
    outer = nisa.register_alloc(0)
    kept = [outer]
    before = nisa.tensor_copy(dst=tile, src=tile)

    def body(i):
        inner = nisa.register_alloc(0)
        kept.append(inner)
        first = nisa.tensor_copy(dst=tile, src=tile)
        second = nisa.tensor_copy(dst=tile, src=tile)
        {line}

    nl.fori_loop(0, 2, body)
    {after}
    nisa.dma_copy(dst=out, src=tile)
    return out
"""


@pytest.mark.parametrize(
    ("good", "bad", "instruction", "operand"),
    [
        ("nisa.register_load(inner, one)", "nisa.register_load(outer, one)", "register_load", "dst"),
        ("nisa.register_move(inner, outer)", "nisa.register_move(outer, inner)", "register_move", "dst"),
        ("second.depends_on(first)", "second.depends_on(before)", "tensor_copy.depends_on|depends_on", "producers"),
        (
            "nl.ndarray((1, 1), nl.int32, buffer=nl.private_hbm)",
            "nl.ndarray((1, 1), nl.int32, buffer=nl.shared_hbm)",
            "ndarray",
            "buffer",
        ),
    ],
)
@strict_only
def test_bodies(good: str, bad: str, instruction: str, operand: str) -> None:
    x = random(4, 3)
    call(LOOPS.format(line=good, after=""), x)
    refused_with(lambda: call(LOOPS.format(line=bad, after=""), x), instruction, operand, "", None)


@strict_only
def test_a_register_ends_with_its_turn() -> None:
    x, use = random(4, 3), "nisa.register_store(one, kept[{}])"
    call(LOOPS.format(line="", after=use.format(0)), x)
    refused_with(lambda: call(LOOPS.format(line="", after=use.format(1)), x), "register_store", "src", "turn", None)


SHARED = """
@nki.jit
def kernel(x):
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    rows, half = 4, slice(nl.program_id(0) * 2, nl.program_id(0) * 2 + 2)
    nisa.dma_copy(dst=out[half], src=x[half])
    {more}
    return out
"""


@pytest.mark.parametrize(
    "more",
    [
        "other = nl.ndarray((3, rows + nl.program_id(0)), x.dtype, buffer=nl.shared_hbm)",
        "other = nl.ndarray((3, rows), nl.int32 if nl.program_id(0) else nl.int8, buffer=nl.shared_hbm)",
        "other = nl.ndarray((3, rows), x.dtype, buffer=nl.shared_hbm) if nl.program_id(0) else out",
    ],
)
@strict_only
def test_shared_tensors_are_those_of_both_cores(more: str) -> None:
    x = random(4, 3)
    call(SHARED.format(more="other = nl.ndarray((3, rows), x.dtype, buffer=nl.shared_hbm)"), x, lnc=2)
    refused_with(lambda: call(SHARED.format(more=more), x, lnc=2), "ndarray|kernel", ".*", "core", None)


@strict_only
def test_a_while_loop_on_both_cores() -> None:
    source = """
@nki.jit
def kernel(n):
    out = nl.ndarray((1, 1), nl.int32, buffer=nl.shared_hbm)
    left = nl.ndarray((1, 1), nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=left, value=3{more})
    more = nisa.register_alloc()
    nisa.register_load(more, left)

    def body(r):
        nisa.tensor_scalar(dst=left, data=left, op0=nl.subtract, operand0=1.0)
        nisa.register_load(r, left)
        return r

    nl.while_loop(more, body)
    if nl.program_id(0) == 0:
        nisa.dma_copy(dst=out, src=left)
    return out
"""
    n = np.zeros((1, 1), np.int32)
    assert call(source.format(more=""), n, lnc=2)[0, 0] == 0
    broken = source.format(more=" + nl.program_id(0)")
    refused_with(lambda: call(broken, n, lnc=2), "while_loop", "control flow", "core", None)


@strict_only
def test_rows_of_a_gather_stay_together() -> None:
    body = "v = x.vector_select(0, idx)[{rows}, 0:2]  # !\nnisa.dma_copy(dst=dst, src=v)"
    index = np.array([[2], [0], [1]], np.int32)
    change = (":, 0:2", "0:2, 0:2")
    body = body.format(rows=":")
    rejects(body, "dma_copy|slice", ".*", "", change, hbm={"x": random(4, 3)}, idx=index, dst=Result((3, 2)))


@strict_only
def test_a_constant_argument() -> None:
    source = """
@nki.jit
def kernel(x):
    tile = nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    nisa.dma_copy(dst=x, src=tile)
"""
    x = random(4, 3)
    call(source, x)
    x.flags.writeable = False
    refused_with(lambda: call(source, x), "dma_copy", "dst", "read-only", None)


def test_a_pattern_stays_in_its_partition() -> None:
    body = "nisa.tensor_copy(dst=dst, src=a.ap(pattern=[[8, 2], [1, 4]], offset=4))"
    rejects(body, "ap", "pattern", "partition", ("offset=4", "offset=5"), a=random(4, 8), dst=Result((2, 4)))


TRACED = """
@nki.jit
def kernel(x):
    out = nl.ndarray((2, 3), nl.float32, buffer=nl.shared_hbm)
    tile = nl.ndarray((2, 3), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=0.0)
    turns = []

    def body(i):
        turns.append(0)
        {line}
        nisa.tensor_scalar(dst=tile, data=tile, op0=nl.add, operand0=1.0)

    nl.fori_loop(0, 3, body)
    nisa.dma_copy(dst=out, src=tile)
    return out
"""


@pytest.mark.parametrize(
    "line",
    [
        "nisa.tensor_scalar(dst=tile, data=tile, op0=nl.add, operand0=float(len(turns)))",
        "if len(turns) == 1: nisa.memset(dst=tile, value=0.0)",
        "if len(turns) == 2: nisa.memset(dst=tile, value=0.0)",
        "nisa.memset(dst=tile[:, 0 : len(turns)], value=0.0)",
        "if len(turns) == 3: return",
    ],
)
@strict_only
def test_a_body_is_traced_once(line: str) -> None:
    x = random(1, 1)
    call(TRACED.format(line="nisa.memset(dst=tile, value=0.0)"), x)
    refused_with(lambda: call(TRACED.format(line=line), x), "loop", "body", "traced once", None)


@pytest.mark.parametrize(
    ("dtype", "value", "bad", "rule"),
    [
        ("int32", 3e9, np.nan, "NaN"),
        ("uint8", -5.0, np.nan, "NaN"),
        ("float8_e4m3fn", 448.0, 500.0, "range"),
    ],
)
@strict_only
def test_casts_that_no_document_describes(dtype: str, value: float, bad: float, rule: str) -> None:
    """A NaN as an integer, and what float8_e4m3fn does not reach; integers saturate, as documented."""
    body = "nisa.tensor_copy(dst=dst, src=a)"
    good, change = np.full((2, 3), value, np.float32), {"a": np.full((2, 3), bad, np.float32)}
    rejects(body, "tensor_copy", "dst", rule, change, dst=Result((2, 3), dtype), generation="trn3", a=good)
