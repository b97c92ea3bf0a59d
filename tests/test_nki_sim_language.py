"""nki.language: functions that allocate their results, constants, and the order of instructions (SDK 2.30 to 2.32)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Result, call, cast_to, close, load, random, rejected, rejects, run, same, strict_only, whole

X, Y = random(6, 10), random(6, 10, seed=1)
KEEP = "\nnisa.tensor_copy(dst=dst, src=t)"


@pytest.mark.parametrize("op", ["add", "subtract", "multiply", "maximum", "minimum", "greater", "less_equal", "equal"])
def test_binary(op: str) -> None:
    wanted = getattr(np, op)(X, Y).astype(np.float32)
    same(run(f"t = nl.{op}(a, b)" + KEEP, a=X, b=Y, dst=Result((6, 10))), wanted)
    got = run(f"t = nl.{op}(a, b, dtype=nl.bfloat16)" + KEEP, a=X, b=Y, dst=Result((6, 10), "bfloat16"))
    same(got, cast_to(wanted, "bfloat16"))


@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        ("exp", np.exp),
        ("tanh", np.tanh),
        ("square", np.square),
        ("sqrt", np.sqrt),
        ("rsqrt", lambda x: x**-0.5),
        ("log", np.log),
        ("reciprocal", np.reciprocal),
        ("abs", np.abs),
    ],
)
def test_unary(op: str, wanted: Any) -> None:
    a = np.abs(X) + np.float32(0.5)
    close(run(f"t = nl.{op}(a)" + KEEP, a=a, dst=Result((6, 10))), wanted(a.astype(np.float64)))


@pytest.mark.parametrize(("op", "wanted"), [("max", np.max), ("min", np.min), ("sum", np.sum), ("mean", np.mean)])
def test_reductions(op: str, wanted: Any) -> None:
    a = whole(6, 4, 2, 3)
    for axis in (3, [2, 3], (1, 2, 3)):
        expected = wanted(a, axis=axis if isinstance(axis, int) else tuple(axis), keepdims=True)
        body = f"t = nl.{op}(a, axis={axis}, keepdims=True)\nassert tuple(t.shape) == {expected.shape}" + KEEP
        close(run(body, a=a, dst=Result(expected.shape)), expected)


def test_load_and_store() -> None:
    y = np.zeros((6, 10), np.float32)
    run("t = nl.load(x)\nnl.store(y, nl.add(t, t))", hbm={"x": X, "y": y})
    same(y, X + X)


def test_products() -> None:
    a, b = whole(20, 6), whole(20, 9)
    same(run("t = nl.matmul(a, b, transpose_x=True)" + KEEP, a=a, b=b, dst=Result((6, 9))), a.T @ b)
    same(run("t = nl.transpose(a)" + KEEP, a=a, dst=Result((6, 20))), a.T)


PRODUCT = "t = nl.matmul(a, a, transpose_x=True)"
STRICT = [
    rejected("matmul", "transpose_x", "True", ("=True", "=False"), PRODUCT, dst=Result((10, 10))),
    rejected("store", "value", "SBUF|PSUM", {"psum": ("a",)}, "nl.store(x, a)", dst=Result((1, 1), fill=0.0)),
    rejected("load", "src", "HBM", ("load(x)", "load(a)"), "t = nl.load(x)", dst=Result((6, 10))),
    rejected("program_id", "axis", "0", ("id(0)", "id(1)"), "t = nl.program_id(0)", dst=Result((1, 1), fill=0.0)),
    rejected("num_programs", "axes", "0", ("(0)", "(1)"), "t = nl.num_programs(0)", dst=Result((1, 1), fill=0.0)),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT)
def test_strict(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    if "nl.matmul" in body or "nl.load" in body:
        body = body.replace(")", ")  # !") + KEEP
    rejects(body, instruction, operand, rule, but, hbm={"x": X.copy()}, a=X, **setup)


@strict_only
def test_no_broadcasting() -> None:
    """Broadcasting in these functions is known not to work on the chip."""
    with pytest.raises(Exception, match=r"add|tensor_tensor"):
        run("t = nl.add(a, b)" + KEEP, a=X, b=Y[:, :3], dst=Result((6, 10)))


def test_constants() -> None:
    source = """
import numpy as np

TABLE = np.arange(12, dtype=np.int32).reshape(3, 4)


@nki.jit
def kernel(x):
    out = nl.ndarray((3, 4), nl.int32, buffer=nl.shared_hbm)
    table = nl.shared_constant(TABLE)
    assert table.buffer == nl.shared_hbm
    nisa.dma_copy(dst=out, src=table)
    return out
"""
    assert hasattr(load(source), "TABLE")
    same(call(source, X), np.arange(12, dtype=np.int32).reshape(3, 4))


def test_identity() -> None:
    body = "nl.shared_identity_matrix(6, dtype=nl.bfloat16, dst=t)" + KEEP
    body = "t = nl.ndarray((6, 6), nl.bfloat16)\n" + body
    same(run(body, dst=Result((6, 6), "bfloat16")), cast_to(np.eye(6), "bfloat16"))


def test_least_number() -> None:
    assert_line = "assert nl.fp32.min == -3.4028234663852886e+38 or nl.fp32.min == -3.4028235e+38"
    run(assert_line + "\nnisa.memset(dst=dst, value=nl.fp32.min)", dst=Result((1, 1)))


LABELLED = """
first = nisa.memset(dst=dst, value=0.0, name='first')
nisa.tensor_copy(dst=dst, src=a, name='second').depends_on(first)
"""


def test_labels() -> None:
    same(run(LABELLED, a=X, dst=Result((6, 10))), X)
    rejects(LABELLED, "tensor_copy", "name", "", ("'second'", "'first'"), a=X, dst=Result((6, 10)))


@strict_only
@pytest.mark.parametrize("producer", ["a", "None", "3"])
def test_producers_are_instructions(producer: str) -> None:
    with pytest.raises(Exception, match="depends_on"):
        run(LABELLED.replace("depends_on(first)", f"depends_on({producer})"), a=X, dst=Result((6, 10)))


IN_A_LOOP = """
@nki.jit
def kernel(x):
    out = nl.ndarray((4, 8), nl.float32, buffer=nl.shared_hbm)
    tile = nl.ndarray((4, 8), nl.float32)
    first = nisa.memset(dst=tile, value=1.0)
    {before}nl.fori_loop(0, 2, body){after}
    nisa.dma_copy(dst=out, src=tile)
    return out
"""
BODY = """    def body(i):
        inner = nisa.tensor_scalar(dst=tile, data=tile, op0=nl.add, operand0=1.0)
        nisa.tensor_scalar(dst=tile, data=tile, op0=nl.add, operand0=1.0).depends_on({on})

"""


def in_a_loop(on: str = "inner", before: str = "") -> str:
    text = IN_A_LOOP.format(before=before, after="").replace("    first = nisa", "    first = nisa", 1)
    head, _, tail = text.partition(f"    {before}nl.fori_loop")
    return head + BODY.format(on=on) + f"    {before}nl.fori_loop" + tail


@strict_only
def test_order_across_a_loop() -> None:
    same(call(in_a_loop(), X), np.full((4, 8), 5, np.float32))
    with pytest.raises(Exception, match="depends_on"):
        call(in_a_loop(on="first"), X)


@strict_only
def test_no_loop_within_no_reorder() -> None:
    with pytest.raises(Exception, match="no_reorder"):
        call(in_a_loop(before="with nl.no_reorder(): "), X)


def test_print(capfd: pytest.CaptureFixture[str]) -> None:
    run(
        "nl.device_print('tile', a)\nnisa.tensor_copy(dst=dst, src=a)",
        a=np.full((1, 2), 7.5, np.float32),
        dst=Result((1, 2)),
    )
    printed = capfd.readouterr().out
    assert "tile" in printed
    assert "7.5" in printed


@strict_only
@pytest.mark.parametrize(
    "line", ["dst[0] = a[0]", "t = a + a", "if a: t = 1", "t = float(a)", "t = -a", "for row in a: t = row"]
)
def test_tensors_are_no_arrays(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)tensor|operand|lint|unsupported|must"):
        run(f"{line}\nnisa.tensor_copy(dst=dst, src=a)", a=X, dst=Result((6, 10)))
