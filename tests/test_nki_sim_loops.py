"""Loops whose trips are known at run time, and what their bodies may not touch (SDK 2.32, dynamic loops)."""

import numpy as np
import pytest
from nki_sim_kernels import Array, call, f32, i32, random, refused_with, rejects_kernel, same, strict_only

LOOP = """
@nki.jit
def kernel(x, n):
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=x)
    bound = nl.ndarray((1, 1), nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=bound, src=n)
    end = nisa.register_alloc()
    nisa.register_load(end, bound)
    total = nl.ndarray((4, 1), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=total, value=0.0)

    def body(i):
        row = nl.ndarray((4, 1), nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=row, src=x.ap(pattern=[[1, 4], [1, 1]], offset=0, scalar_offset=i, indirect_dim=0))
        nisa.tensor_tensor(dst=total, data1=total, data2=row, op=nl.add)
        nisa.dma_copy(dst=out.ap(pattern=[[1, 4], [1, 1]], offset=0, scalar_offset=i, indirect_dim=0), src=total)

    nl.fori_loop({start}, {end}, body{step})
    return out
"""


def summed(x: Array, trips: range) -> Array:
    """Return what the loop leaves: rows replaced by the sums so far."""
    wanted = x.copy()
    total = np.zeros(4, np.float32)
    for i in trips:
        total = total + x[i]
        wanted[i] = total
    return wanted


@pytest.mark.parametrize(("start", "step"), [(0, 1), (3, 1), (1, 3)])
@pytest.mark.parametrize("end", [0, 1, 7, 10])
def test_trips(start: int, step: int, end: int) -> None:
    x = random(10, 4).round(1)
    source = LOOP.format(start=start, end="end", step=f", step={step}" if step != 1 else "")
    same(call(source, x, i32([[end]])), summed(x, range(start, end, step)))


def test_trips_known_beforehand() -> None:
    x = random(10, 4).round(1)
    same(call(LOOP.format(start=2, end=9, step=""), x, i32([[0]])), summed(x, range(2, 9)))


WHILE = """
@nki.jit
def kernel(n):
    out = nl.ndarray((1, 1), nl.int32, buffer=nl.shared_hbm)
    left = nl.ndarray((1, 1), nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=left, src=n)
    total = nl.ndarray((1, 1), nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=total, value=0)
    more = nisa.register_alloc()
    nisa.register_load(more, left)

    def body(r):
        nisa.tensor_tensor(dst=total, data1=total, data2=left, op=nl.add)
        nisa.tensor_scalar(dst=left, data=left, op0=nl.subtract, operand0=1.0)
        nisa.register_load(r, left)
        return r

    nl.while_loop(more, body)
    nisa.dma_copy(dst=out, src=total)
    return out
"""


@pytest.mark.parametrize("trips", [0, 1, 6])
def test_while(trips: int) -> None:
    same(call(WHILE, i32([[trips]])), i32([[trips * (trips + 1) // 2]]))


NESTED = """
@nki.jit
def kernel(n):
    out = nl.ndarray((3, 4), nl.float32, buffer=nl.shared_hbm)
    counts = nl.ndarray((1, 12), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=counts, value=0.0)

    def outer(i):
        limit = nl.ndarray((1, 1), nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=limit, src=n.ap(pattern=[[1, 1], [1, 1]], offset=0, scalar_offset=i, indirect_dim=0))
        inner_end = nisa.register_alloc()
        nisa.register_load(inner_end, limit)
        part = nl.ndarray((1, 4), nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=part, value=0.0)

        def inner(j):
            here = part.ap(pattern=[[4, 1], [1, 1]], offset=0, scalar_offset=j, indirect_dim=1)
            nisa.tensor_scalar(dst=here, data=here, op0=nl.add, operand0=1.0)

        nl.fori_loop(0, inner_end, inner)
        nisa.dma_copy(dst=out.ap(pattern=[[4, 1], [1, 4]], offset=0, scalar_offset=i, indirect_dim=0), src=part)

    nl.fori_loop(0, 3, outer)
    return out
"""


def test_loops_within_loops() -> None:
    wanted = f32([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    same(call(NESTED, i32([[2], [0], [4]])), wanted)


def test_an_if_at_run_time() -> None:
    """A loop of at most one trip stands for a branch on a register."""
    x = random(10, 4).round(1)
    for flag in (0, 1):
        same(call(LOOP.format(start=0, end="end", step=""), x, i32([[flag]])), summed(x, range(flag)))


BODY = """
@nki.jit
def kernel(x):
    out = nl.ndarray((8, 4), nl.float32, buffer=nl.shared_hbm)
    kept = nl.ndarray((8, 4), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=kept, value=0.0)
    tile = nl.ndarray((8, 8), nl.float32, buffer=nl.psum)
    nisa.memset(dst=tile, value=0.0)

    def body(i):
        inside = nl.ndarray((8, 4), nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=inside, value=1.0)
        sums = nl.ndarray((8, 4), nl.float32, buffer=nl.psum)
        nisa.tensor_copy(dst=sums, src=inside, engine=nisa.engine.vector)
        nisa.tensor_tensor(dst=kept, data1=kept, data2=sums, op=nl.add)
        {line}  # !

    nl.fori_loop(0, 3, body)
    nisa.dma_copy(dst=out, src=kept)
    return out
"""
ONE = i32([[1]])
FINE = "nisa.tensor_copy(dst=sums, src=inside)"


def test_control() -> None:
    same(call(BODY.format(line=FINE), ONE), np.full((8, 4), 3, np.float32))


@pytest.mark.parametrize(
    ("line", "instruction", "operand"),
    [
        ("nisa.register_move(i, nisa.register_alloc(3))", "register_move", "dst"),
        ("nisa.register_load(i, x)", "register_load", "dst"),
        ("nisa.tensor_copy(dst=tile[:, 0:4], src=inside)", "tensor_copy", "dst"),
        ("nisa.tensor_copy(dst=inside, src=tile[:, 0:4])", "tensor_copy", "src"),
    ],
)
def test_strict_bodies(line: str, instruction: str, operand: str) -> None:
    rejects_kernel(BODY.format(line=FINE), instruction, operand, "", (FINE, line), ONE)


BY_REGISTER = BODY.replace("fori_loop(0, 3,", "fori_loop(nisa.register_alloc(0), 3,")
LOOKS = ["for k in range(i): print(k)", "if i: print(1)", "j = int(i)", "j = kept[i]", "j = kept[:, i]", "j = i == 1"]


@pytest.mark.parametrize("line", [*LOOKS, "j = i + 1"])
@strict_only
def test_a_register_as_the_loop_variable_is_no_number(line: str) -> None:
    call(BY_REGISTER.format(line=FINE), ONE)
    with pytest.raises(Exception, match=r"(?i)register|VirtualRegister"):
        call(BY_REGISTER.format(line=line), ONE)


@pytest.mark.parametrize("line", LOOKS)
@strict_only
def test_a_scalar_as_the_loop_variable_is_no_number(line: str) -> None:
    call(BODY.format(line="j = i + 1"), ONE)
    refused_with(lambda: call(BODY.format(line=line), ONE), "scalar|slice", "use|index", "scalar", None)


STORED = """
@nki.jit
def kernel(x):
    out = nl.ndarray((1, 1), nl.int32, buffer=nl.shared_hbm)
    kept = nl.ndarray((1, 1), nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=kept, value=0)
    other = nisa.register_alloc(1)

    def body(i):
        copy = nisa.register_alloc(0)
        {line}  # !

    nl.fori_loop({lower}, {upper}, body)
    nisa.dma_copy(dst=out, src=kept)
    return out
"""
REGISTER, SCALAR = "nisa.register_alloc(0)", "nisa.scalar_load(kept)"
STORE, MOVE = "nisa.register_store(kept, i)", "nisa.register_move(copy, i)"


@pytest.mark.parametrize(
    ("lower", "upper"), [(REGISTER, "3"), ("0", "nisa.register_alloc(3)"), (REGISTER, "nisa.scalar_load(x)")]
)
def test_the_variable_is_a_register_where_a_bound_is(lower: str, upper: str) -> None:
    x = i32([[3]])
    same(call(STORED.format(line=STORE, lower=lower, upper=upper), x), i32([[2]]))
    same(call(STORED.format(line=MOVE, lower=lower, upper=upper), x), i32([[0]]))


@pytest.mark.parametrize(("line", "instruction"), [(STORE, "register_store"), (MOVE, "register_move")])
@pytest.mark.parametrize("upper", ["3", "nisa.scalar_load(x)"])
@pytest.mark.parametrize("lower", ["0", SCALAR])
def test_the_variable_is_a_scalar_where_no_bound_is_a_register(
    line: str, instruction: str, upper: str, lower: str
) -> None:
    """0.6 hands over a register, which 0.7 does with a register for a bound alone."""
    source = STORED.format(line=line, lower=lower, upper=upper).replace(lower + ", " + upper, REGISTER + ", " + upper)
    change = (REGISTER + ", " + upper, lower + ", " + upper)
    rejects_kernel(source, instruction, "src", "scalar.*bound", change, i32([[3]]))


@strict_only
def test_tensors_of_a_body_end_with_it() -> None:
    source = BODY.format(line="seen.append(inside)").replace("    def body", "    seen = []\n\n    def body")
    source = source.replace("src=kept)", "src=seen[0])")
    refused_with(lambda: call(source, ONE), "dma_copy|kernel", ".*", "loop", None)


def test_a_body_writes_before_it_reads() -> None:
    fills = "nisa.memset(dst=inside, value=1.0)"
    source = BODY.format(line=FINE).replace("  # !", "").replace("engine.vector)", "engine.vector)  # !")
    rejects_kernel(source, "tensor_copy", "src", "written|initiali", (fills, "j = 1"), ONE)


@pytest.mark.parametrize(
    ("call_line", "operand"),
    [
        ("nl.fori_loop(0, 3, body, step=0)", "step"),
        ("nl.fori_loop(0, 3, body, step=-1)", "step"),
        ("nl.fori_loop(0, 3.0, body)", "upper"),
        ("nl.fori_loop(0, 2**31, body)", "upper"),
    ],
)
def test_strict_bounds(call_line: str, operand: str) -> None:
    source = (
        BODY.format(line=FINE).replace("  # !", "").replace("nl.fori_loop(0, 3, body)", "nl.fori_loop(0, 3, body)  # !")
    )
    rejects_kernel(source, "fori_loop", operand, "", ("nl.fori_loop(0, 3, body)", call_line), ONE)


@pytest.mark.parametrize("returned", ["return i", "return 1"])
def test_a_body_returns_nothing(returned: str) -> None:
    source = BODY.format(line="return").replace("  # !", "").replace("0, 3, body)", "0, 3, body)  # !")
    rejects_kernel(source, "fori_loop", "body_fun", "", ("        return\n", f"        {returned}\n"), ONE)


def test_a_bound_that_nobody_set() -> None:
    source = LOOP.format(start=0, end="end", step="").replace(", end, body)", ", end, body)  # !")
    change = ("register_load(end, bound)", "register_store(bound, nisa.register_alloc(1))")
    rejects_kernel(source, "fori_loop", "upper", "", change, random(10, 4), i32([[2]]))
