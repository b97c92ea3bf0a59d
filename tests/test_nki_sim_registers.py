"""Registers: thirty-two bits that loops and offsets read, and nothing in Python may look at (SDK 2.32)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Result, i32, random, rejected, rejects, run, same, strict_only

STORE = "nisa.register_store(dst, r)"
FOUR = "r = nisa.register_alloc(4)\n"


@pytest.mark.parametrize("value", [0, 7, -3, 2**31 - 1, -(2**31)])
def test_constants(value: int) -> None:
    result = Result((1, 1), "int32")
    same(run(f"r = nisa.register_alloc({value})\n{STORE}", dst=result), i32([[value]]))
    moved = f"r = nisa.register_alloc()\nnisa.register_move(r, nisa.register_alloc({value}))\n{STORE}"
    same(run(moved, dst=result), i32([[value]]))


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_load(dtype: str) -> None:
    x = np.array([[5, 113]], dtype)
    body = f"r = nisa.register_alloc()\nnisa.register_load(r, a[:, 1:2])\n{STORE}"
    same(run(body, a=x, dst=Result((1, 1), "int32")), i32([[113]]))
    same(run(body.replace("a[", "x["), hbm={"x": x}, dst=Result((1, 1), "int32")), i32([[113]]))


def test_moves_take_values() -> None:
    body = f"{FOUR}s = nisa.register_alloc(9)\nnisa.register_move(s, r)\nnisa.register_move(r, s)\n{STORE}"
    same(run(body, dst=Result((1, 1), "int32")), i32([[4]]))


def test_arithmetic_goes_through_a_tile() -> None:
    body = """
r = nisa.register_alloc(20)
tile = nl.ndarray((1, 1), nl.int32)
nisa.register_store(tile, r)
nisa.tensor_scalar(dst=tile, data=tile, op0=nl.add, operand0=22.0)
nisa.register_load(r, tile)
nisa.register_store(dst, r)
"""
    same(run(body, dst=Result((1, 1), "int32")), i32([[42]]))


ALLOC = FOUR + STORE
LOAD = FOUR + "nisa.register_load(r, a[0:1, 0:1])\n" + STORE
MOVE = FOUR + "s = nisa.register_alloc(3)\nnisa.register_move(r, s)\n" + STORE
STRICT = [
    rejected("register_store", "src", "initiali|value|written|set", ("alloc(4)", "alloc()"), ALLOC),
    rejected("register_alloc", "x", "32", ("alloc(4)", "alloc(2**31)"), ALLOC),
    rejected("register_alloc", "x", "int", ("alloc(4)", "alloc(4.0)"), ALLOC),
    rejected("register_alloc", "x", "int", ("alloc(4)", "alloc(a)"), ALLOC),
    rejected("register_store", "dst", "element|one", ("(dst, r)", "(a, r)"), ALLOC),
    rejected("register_store", "src", "register", ("(dst, r)", "(dst, 4)"), ALLOC),
    rejected("register_load", "src", "element|one", ("a[0:1, 0:1]", "a[0:1, 0:2]"), LOAD),
    rejected("register_load", "src", "element|one", ("a[0:1, 0:1]", "a[0:2, 0:1]"), LOAD),
    rejected("register_load", "src", "SBUF|HBM|PSUM", {"psum": ("a",)}, LOAD),
    rejected("register_load", "src", "int", {"a": np.zeros((2, 3), np.float32)}, LOAD),
    rejected("register_load", "dst", "register", ("load(r", "load(dst"), LOAD),
    rejected("register_move", "src", "", ("move(r, s)", "move(r, a)"), MOVE),
    rejected("register_move", "src", "initiali|value|written|set", ("alloc(3)", "alloc()"), MOVE),
    rejected("register_move", "arguments|imm", "src|imm", ("move(r, s)", "move(r, imm=3)"), MOVE),
]


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT)
def test_strict(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    tiles: dict[str, Any] = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "dst": Result((1, 1), "int32")}
    rejects(body, instruction, operand, rule, but, **{**tiles, **setup})


@strict_only
@pytest.mark.parametrize(
    "line",
    [
        "if r: print(1)",
        "print(int(r))",
        "for i in range(r): print(i)",
        "s = r + 1",
        "print(r == 4)",
        "s = dst[r]",
        "s = -r",
    ],
)
def test_python_cannot_look(line: str) -> None:
    run(f"{FOUR}{STORE}", dst=Result((1, 1), "int32"))
    with pytest.raises(Exception, match=r"(?i)register"):
        run(f"{FOUR}{line}\n{STORE}", dst=Result((1, 1), "int32"))


def test_as_offsets_and_bounds() -> None:
    a = random(3, 8)
    body = """
r = nisa.register_alloc(5)
nisa.tensor_copy(dst=dst, src=a.select(1, r))
"""
    same(run(body, a=a, dst=Result((3, 1))), a[:, 5:6])
