"""The accumulators that an engine keeps between instructions, one to a lane: what sets, reads and spoils them."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Result, cast_to, close, random, rejected, rejects, run, same, whole

REDUCE = (
    "nisa.tensor_scalar_reduce(dst=dst, data=a, op0=nl.multiply, operand0=2.0, reduce_op=nl.{op}, reduce_res=r{more})"
)
FUNCTIONS = {"add": np.add, "multiply": np.multiply, "maximum": np.maximum, "minimum": np.minimum}
A, B = whole(6, 10, limit=3), whole(6, 10, limit=3, seed=1)
A[A == 0] = 1
R = Result((6, 1))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_tensor_scalar_reduce(op: str) -> None:
    got, r = run(REDUCE.format(op=op, more=""), a=A, dst=Result((6, 10), "bfloat16"), r=R)
    same(got, cast_to(A * 2, "bfloat16"))
    same(r, FUNCTIONS[op].reduce(A * 2, 1, keepdims=True))


def test_sum_of_fp32_before_the_cast() -> None:
    a = random(6, 10) / 100 + np.float32(1)
    got, r = run(REDUCE.format(op="add", more=""), a=a, dst=Result((6, 10), "bfloat16"), r=R)
    same(got, cast_to(a * 2, "bfloat16"))
    close(r, (a.astype(np.float64) * 2).sum(1, keepdims=True))


def test_negated_result() -> None:
    more = ", reduce_res_negate=True"
    _, r = run(REDUCE.format(op="add", more=more), a=A, dst=Result((6, 10)), r=R)
    same(r, -(A * 2).sum(1, keepdims=True))


def test_the_register_is_not_negated() -> None:
    body = REDUCE.format(op="add", more=", reduce_res_negate=True") + "\n"
    body += REDUCE.format(op="add", more=", reduce_cmd=nisa.reduce_cmd.reduce")
    _, r = run(body, a=A, dst=Result((6, 10)), r=R)
    same(r, 4 * A.sum(1, keepdims=True))


def test_loaded_start() -> None:
    more = ", reduce_cmd=nisa.reduce_cmd.load_reduce, reduce_init=5.0"
    _, r = run(REDUCE.format(op="add", more=more), a=A, dst=Result((6, 10)), r=R)
    same(r, 5 + (A * 2).sum(1, keepdims=True))


def test_accumulating_over_instructions() -> None:
    body = "\n".join(
        f"nisa.tensor_scalar_reduce(dst=dst, data={data}, op0=nl.multiply, operand0=1.0, reduce_op=nl.add, "
        f"reduce_res={res}, reduce_cmd=nisa.reduce_cmd.{cmd})"
        for data, res, cmd in (("a", "None", "reset_reduce"), ("b", "None", "reduce"), ("a", "r", "reduce"))
    )
    _, r = run(body, a=A, b=B, dst=Result((6, 10)), r=R)
    same(r, (2 * A + B).sum(1, keepdims=True))


def test_lanes_are_partitions() -> None:
    """Tiles at other partitions continue other lanes."""
    body = """
wide = nl.ndarray((64, 10), nl.float32)
nisa.memset(dst=wide, value=1.0)
nisa.tensor_copy(dst=wide[32:38], src=b)
nisa.tensor_scalar_reduce(dst=wide, data=wide, op0=nl.multiply, operand0=1.0, reduce_op=nl.add)
nisa.tensor_scalar_reduce(dst=wide[32:38], data=wide[32:38], op0=nl.multiply, operand0=1.0, reduce_op=nl.add,
                          reduce_res=r, reduce_cmd=nisa.reduce_cmd.reduce)
"""
    r = run(body, b=B, r=R)
    same(r, 2 * B.sum(1, keepdims=True))


@pytest.mark.parametrize("op1", ["add", "subtract", "multiply", "maximum", "minimum"])
def test_cumulative(op1: str) -> None:
    data = whole(4, 6, limit=2) + np.float32(0.5)
    body = f"nisa.tensor_scalar_cumulative(dst=dst, src=a, op0=nl.multiply, op1=nl.{op1}, imm0=2.0)"
    register = np.full(4, {"multiply": 1, "maximum": -np.inf, "minimum": np.inf}.get(op1, 0), np.float32)
    columns = []
    for i in range(6):
        value = data[:, i] * np.float32(2)
        register = value - register if op1 == "subtract" else FUNCTIONS[op1](value, register)
        columns.append(register)
    same(run(body, a=data, dst=Result((4, 6))), np.stack(columns, 1))


def test_cumulative_with_a_start() -> None:
    body = (
        "nisa.tensor_scalar_cumulative(dst=dst, src=a, op0=nl.add, op1=nl.add, imm0=0.0, imm1=10.0, "
        "reduce_cmd=nisa.reduce_cmd.load_reduce)"
    )
    same(run(body, a=A, dst=Result((6, 10))), 10 + np.cumsum(A, 1))


def test_activation_sums() -> None:
    body = "\n".join(
        f"nisa.activation(dst=dst, op=nl.copy, data={data}, scale=2.0, reduce_op=nl.add, reduce_res={res}, "
        f"reduce_cmd=nisa.reduce_cmd.{cmd})"
        for data, res, cmd in (("a", "None", "reset_reduce"), ("b", "r", "reduce"))
    )
    _, r = run(body, a=A, b=B, dst=Result((6, 10), "bfloat16"), r=R)
    same(r, 2 * (A + B).sum(1, keepdims=True))


def test_idle_activation_keeps_the_sum() -> None:
    body = """
nisa.activation(dst=dst, op=nl.copy, data=a, reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.reset_reduce)
nisa.activation(dst=dst, op=nl.copy, data=b)
nisa.activation(dst=dst, op=nl.copy, data=b, reduce_op=nl.add, reduce_res=r, reduce_cmd=nisa.reduce_cmd.reduce)
"""
    _, r = run(body, a=A, b=B, dst=Result((6, 10)), r=R)
    same(r, (A + B).sum(1, keepdims=True))


def test_reset_of_the_sum() -> None:
    body = """
nisa.activation(dst=dst, op=nl.copy, data=a, reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.reset_reduce)
nisa.activation(dst=dst, op=nl.copy, data=a, reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.reset)
nisa.activation(dst=dst, op=nl.copy, data=b, reduce_op=nl.add, reduce_res=r, reduce_cmd=nisa.reduce_cmd.reduce)
"""
    _, r = run(body, a=A, b=B, dst=Result((6, 10)), r=R)
    same(r, B.sum(1, keepdims=True))


def test_activation_reduce() -> None:
    body = "nisa.activation_reduce(dst, nl.exp, a, reduce_op=nl.add, reduce_res=r, bias=b[:, 0:1], scale=0.5)"
    got, r = run(body, a=A, b=B, dst=Result((6, 10)), r=R)
    wanted = np.exp(A * 0.5 + B[:, :1])
    close(got, wanted)
    close(r / 100, wanted.sum(1, keepdims=True) / 100)


def test_exponential() -> None:
    """exp(x - max) with its sum, by the vector engine of trn3."""
    a = random(6, 10)
    body = """
nisa.exponential(dst=dst, src=a, max_value=m, reduce_res=r, reduce_cmd=nisa.reduce_cmd.reset_reduce)
nisa.exponential(dst=dst, src=a, max_value=m, reduce_res=r, reduce_cmd=nisa.reduce_cmd.reduce)
"""
    top = a.max(1, keepdims=True)
    tiles: dict[str, Any] = {"a": a, "m": top, "dst": Result((6, 10)), "r": R}
    got, r = run(body, generation="trn3", **tiles)
    close(got, np.exp(a - top))
    close(r, 2 * np.exp(a - top).sum(1, keepdims=True))
    marked = body.replace("reset_reduce)", "reset_reduce)  # !")
    older = {"generation": "trn2"}
    rejects(marked, "exponential", ".*", "trn3|v4|generation", older, generation="trn3", **tiles)


THREE = """
nisa.scalar_tensor_tensor(dst=dst, data=a, op0=nl.multiply, operand0=2.0, op1=nl.add, operand1=b{more})
"""


@pytest.mark.parametrize("op", FUNCTIONS)
def test_scalar_tensor_tensor(op: str) -> None:
    """A fold of 0.7, over two instructions."""
    body = THREE.format(more=f", reduce_op=nl.{op}")
    body += THREE.format(more=f", reduce_cmd=nisa.reduce_cmd.reduce, reduce_op=nl.{op}, reduce_res=r")
    got, r = run(body, a=A, b=B, dst=Result((6, 10)), r=R)
    same(got, A * 2 + B)
    same(r, FUNCTIONS[op].reduce(np.concatenate((A * 2 + B, A * 2 + B), 1), 1, keepdims=True))


SUM = REDUCE.format(op="add", more="")
FOLDED = THREE.format(more=", reduce_cmd=nisa.reduce_cmd.reset_reduce, reduce_op=nl.add, reduce_res=r")
NAMED = ", nisa.reduce_cmd.reset_reduce, nl.add"
CONTINUED = """
nisa.tensor_scalar_reduce(dst=dst, data=a, op0=nl.multiply, operand0=2.0, reduce_op=nl.add)
nisa.scalar_tensor_tensor(dst, a, nl.add, 1.0, nl.add, b, False, False, nisa.reduce_cmd.reset_reduce, nl.add)
nisa.tensor_scalar_reduce(dst=dst, data=a, op0=nl.multiply, operand0=2.0, reduce_op=nl.add, reduce_res=r,
                          reduce_cmd=nisa.reduce_cmd.reduce)
"""
RESET = REDUCE.format(op="add", more=", reduce_cmd=nisa.reduce_cmd.reset_reduce")
LOAD = REDUCE.format(op="add", more=", reduce_init=0.0, reduce_cmd=nisa.reduce_cmd.load_reduce")
FORWARD = REDUCE.format(op="add", more=", reverse0=False")
EXP = "nisa.activation_reduce(dst, nl.exp, a, nl.add, reduce_res=r)"
ONES = np.ones((6, 10), np.uint8)
ACTIVATION = """
nisa.activation(dst=dst, op=nl.copy, data=a, reduce_op=nl.add, reduce_res=r, reduce_cmd=nisa.reduce_cmd.reset_reduce)
"""
IDLE = """
nisa.tensor_scalar_reduce(dst=dst, data=a, op0=nl.multiply, operand0=2.0, reduce_op=nl.maximum, reduce_res=r)
nisa.select_reduce(dst=dst, predicate=u, on_true=a, on_false=0.0, reduce_cmd=nisa.reduce_cmd.reset_reduce)
nisa.select_reduce(dst=dst, predicate=u, on_true=a, on_false=0.0, reduce_res=r, reduce_cmd=nisa.reduce_cmd.reduce)
"""
STRICT = [
    rejected("tensor_scalar_reduce", "reduce_cmd", "", ("cmd.reset_reduce", "cmd.reduce"), RESET),
    rejected("select_reduce", "reduce_cmd", "idle|define", ("cmd.reset_reduce", "cmd.idle"), IDLE, u=ONES),
    rejected("activation", "reduce_cmd", "reduce", ("reset_reduce", "load_reduce"), ACTIVATION),
    rejected("activation", "reduce_op", "add", ("nl.add", "nl.maximum"), ACTIVATION),
    rejected("activation", "reduce_op", "", ("reduce_op=nl.add, ", ""), ACTIVATION),
    rejected("activation", "reduce_res", "", {"r": Result((6, 2), fill=0.0)}, ACTIVATION),
    rejected("activation_reduce", "reduce_op", "add", ("nl.add", "nl.maximum"), EXP),
    rejected("tensor_scalar_reduce", "reduce_op", "", ("nl.add, ", "nl.less, "), SUM),
    rejected("tensor_scalar_reduce", "reverse0", "", ("reverse0=False", "reverse0=True"), FORWARD),
    rejected("tensor_scalar_reduce", "reduce_init", "", (", reduce_init=0.0", ""), LOAD),
    rejected("tensor_scalar_reduce", "reduce_init", "", ("=r)", "=r, reduce_init=1.0)"), SUM),
    rejected("tensor_scalar_reduce", "op0", "", ("nl.multiply", "nl.bitwise_and"), SUM),
    rejected("tensor_scalar_reduce", "data|dst", "4|rank|dim", ("data=a", "data=a.reshape((6, 1, 1, 2, 5))"), SUM),
    rejected("tensor_scalar_reduce", "reduce_cmd", "", ("cmd.reset_reduce", "cmd.reset"), RESET),
    rejected("tensor_scalar_reduce", "reduce_cmd", "undefined", (NAMED, ""), CONTINUED, b=B),
    rejected("tensor_scalar_reduce", "reduce_cmd", "undefined", ("cmd.reset_reduce", "cmd.idle"), CONTINUED, b=B),
    rejected("scalar_tensor_tensor", "reduce_op", "given", ("reduce_op=nl.add, ", ""), FOLDED, b=B),
    rejected("scalar_tensor_tensor", "reduce_op", "", ("reduce_op=nl.add", "reduce_op=nl.less"), FOLDED, b=B),
    rejected("scalar_tensor_tensor", "reduce_cmd", "", ("cmd.reset_reduce", "cmd.load_reduce"), FOLDED, b=B),
    rejected("scalar_tensor_tensor", "reduce_cmd", "undefined", ("cmd.reset_reduce", "cmd.reduce"), FOLDED, b=B),
    rejected("scalar_tensor_tensor", "reduce_res", "", ("cmd.reset_reduce", "cmd.idle"), FOLDED, b=B),
    rejected("scalar_tensor_tensor", "reduce_res", "", {"r": Result((6, 2), fill=0.0)}, FOLDED, b=B),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT)
def test_strict(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    tiles: dict[str, Any] = {"a": A, "dst": Result((6, 10)), "r": Result((6, 1), fill=0.0)}
    rejects(body, instruction, operand, rule, but, **{**tiles, **setup})
