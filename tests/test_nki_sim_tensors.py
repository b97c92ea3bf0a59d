"""Tensors and their views: shapes, slices and rearrangements as in numpy, and what hardware has not (SDK 2.32)."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from nki_sim_kernels import Result, call, dtype_of, f32, random, rejected, rejects, rejects_kernel, run, same

X = random(4, 6, 5)
SPLIT = X.reshape(4, 2, 3, 5).transpose(0, 2, 1, 3)
COPY = "nisa.tensor_copy(dst=dst, src={view})"


@pytest.mark.parametrize(
    ("view", "wanted"),
    [
        ("a[:, 1:3, 2:5]", X[:, 1:3, 2:5]),
        ("a[0:3]", X[0:3]),
        ("a[0:3, ..., 4]", X[0:3, :, 4]),
        ("a[:, 5]", X[:, 5]),
        ("a[:, 0:6:2, ::3]", X[:, 0:6:2, ::3]),
        ("a[:, nl.ds(2, 3), :]", X[:, 2:5]),
        ("a[0:4, 2, 1:2]", X[:, 2, 1:2]),
        ("a[0]", X[0:1]),
        ("a[0, 3]", X[0:1, 3]),
        ("a[:, 3, 2]", X[:, 3, 2:3]),
        ("a[0, 3, 2]", X[0:1, 3, 2:3]),
        ("a.slice(2, 1, 5, step=2)", X[:, :, 1:5:2]),
        ("a.slice(0, 0, 2)", X[0:2]),
        ("a.select(1, 4)", X[:, 4]),
        ("a.permute((0, 2, 1))", X.transpose(0, 2, 1)),
        ("a.reshape((4, 30))", X.reshape(4, 30)),
        ("a.reshape((4, 2, 3, 5))", X.reshape(4, 2, 3, 5)),
        ("a.reshape_dim(1, (2, -1))", X.reshape(4, 2, 3, 5)),
        ("a.flatten_dims(1, 2)", X.reshape(4, 30)),
        ("a.expand_dim(1)", X[:, None]),
        ("a[:, 2:3].squeeze_dim(1)", X[:, 2]),
        ("a[:, 2:3].broadcast(1, 4)", np.broadcast_to(X[:, 2:3], (4, 4, 5))),
        ("a.rearrange(('p', 'x', 'y'), ('p', 'y', 'x'))", X.transpose(0, 2, 1)),
        ("a.rearrange(('p', ('x', 'z'), 'y'), ('p', 'z', 'x', 'y'), {'x': 2})", SPLIT),
        ("a.permute((0, 2, 1))[:, 1:4, 3]", X.transpose(0, 2, 1)[:, 1:4, 3]),
        ("a[:, :, 1:4].permute((0, 2, 1))[:, :, ::5]", X[:, :, 1:4].transpose(0, 2, 1)[:, :, ::5]),
    ],
)
def test_view(view: str, wanted: Any) -> None:
    shape = f"assert tuple(({view}).shape) == {wanted.shape}, ({view}).shape"
    body = f"{shape}\n{COPY.format(view=view)}"
    same(run(body, a=X, dst=Result(wanted.shape)), wanted)


@pytest.mark.parametrize(
    ("view", "wanted"),
    [
        ("x[1]", X[1]),
        ("x[1, 2]", X[1, 2:3]),
        ("x[1:3, 2, 4]", X[1:3, 2, 4][:, None]),
        ("x[0:4:2, 5]", X[0:4:2, 5]),
        ("x.permute((2, 0, 1))[3]", X.transpose(2, 0, 1)[3]),
        ("x.reshape((24, 5))", X.reshape(24, 5)),
        ("x.select(0, 2)", X[2]),
    ],
)
def test_view_of_hbm(view: str, wanted: Any) -> None:
    """In HBM a number in an index drops its dimension; shapes of a copy may differ as long as counts agree."""
    same(run(f"nisa.dma_copy(dst=dst, src={view})", hbm={"x": X}, dst=Result(wanted.shape)), wanted)


def test_number_drops_dimensions_of_hbm() -> None:
    run("assert tuple(x[1, 2].shape) == (5,)\nassert tuple(x[1].shape) == (6, 5)", hbm={"x": X})


def test_attributes() -> None:
    body = """
t = nl.ndarray((4, 6, 5), nl.bfloat16, buffer=nl.sbuf, name="tile")
assert tuple(t.shape) == (4, 6, 5)
assert t.dtype == nl.bfloat16
assert t.dtype != nl.float16
assert t.buffer == nl.sbuf
assert t.ndim == 3
assert t.size == 120
assert t.name == "tile"
assert tuple(t.strides) == (30, 5, 1)
assert t.offset == 0
assert tuple(t[:, 2:4, ::2].shape) == (4, 2, 3)
assert t.is_contiguous()
assert not t.permute((0, 2, 1)).is_contiguous()
assert nl.is_sbuf(t.buffer)
assert nl.is_on_chip(t.buffer)
assert not nl.is_hbm(t.buffer)
assert nl.is_hbm(x.buffer)
nisa.tensor_copy(dst=dst, src=a)
"""
    same(run(body, hbm={"x": X}, a=X, dst=Result(X.shape)), X)


def test_writing_through_a_view() -> None:
    body = """
nisa.tensor_copy(dst=dst.permute((0, 2, 1)), src=a)
nisa.memset(dst=dst[:, 1:2, 0:4:3], value=9.0)
"""
    wanted = X.transpose(0, 2, 1).copy()
    wanted[:, 1:2, 0:4:3] = 9
    same(run(body, a=X, dst=Result((4, 5, 6))), wanted)


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        ("float32", "int32", (4, 6)),
        ("float32", "uint16", (4, 12)),
        ("uint8", "int32", (4, 2)),
        ("bfloat16", "uint8", (4, 12)),
    ],
)
def test_view_as_another_dtype(data: str, dtype: str, shape: tuple[int, ...]) -> None:
    a = random(4, 6 if data != "uint8" else 8, dtype=data)
    same(
        run(f"nisa.tensor_copy(dst=dst, src=a.view(nl.{dtype}))", a=a, dst=Result(shape, dtype)),
        a.view(dtype_of(dtype)),
    )


@pytest.mark.parametrize("maker", ["zeros", "ones", "full"])
@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "uint8"])
def test_filled(maker: str, dtype: str) -> None:
    value = ", 3" if maker == "full" else ""
    body = f"t = nl.{maker}((3, 4){value}, nl.{dtype})\nnisa.tensor_copy(dst=dst, src=t)"
    wanted = {"zeros": 0, "ones": 1, "full": 3}[maker]
    same(run(body, dst=Result((3, 4), dtype)), np.full((3, 4), wanted, dtype_of(dtype)))


def test_like() -> None:
    body = """
t = nl.zeros_like(a)
assert tuple(t.shape) == (4, 6, 5)
assert t.dtype == nl.float32
assert t.buffer == nl.sbuf
nisa.tensor_copy(dst=dst, src=t)
u = nl.empty_like(a, dtype=nl.int8, buffer=nl.hbm)
assert u.dtype == nl.int8
assert u.buffer == nl.hbm
"""
    same(run(body, a=X, dst=Result(X.shape)), np.zeros_like(X))


@pytest.mark.parametrize(
    "dtype",
    [
        *[
            "uint8",
            "int8",
            "uint16",
            "int16",
            "uint32",
            "int32",
            "float16",
            "bfloat16",
            "float32",
            "float8_e4m3",
            "float8_e5m2",
        ]
    ],
)
def test_dtypes_keep_their_bits(dtype: str) -> None:
    a = np.arange(4 * 64, dtype=np.uint8).reshape(4, 64).view(dtype_of(dtype))
    got = run("nisa.dma_copy(dst=dst, src=a)", a=a, dst=Result(a.shape, dtype))
    same(got.view(np.uint8), a.view(np.uint8))


STRICT_VIEWS = [
    rejected("slice|slicing", ".*", "partition|step", ("a[0:4:1]", "a[0:4:2]"), "v = a[0:4:1]  # !"),
    rejected(".*", ".*", "", ("a[:, 0:5]", "a[:, -5:6]"), "nisa.tensor_copy(dst=dst[:, 0:5], src=a[:, 0:5])  # !"),
    rejected(".*", ".*", "", ("a[:, 5]", "a[:, -1]"), "nisa.tensor_copy(dst=dst[:, 0], src=a[:, 5])  # !"),
    rejected(".*", ".*", "", ("a[:, 5]", "a[:, 6]"), "nisa.tensor_copy(dst=dst[:, 0], src=a[:, 5])  # !"),
    rejected(".*", ".*", "", ("a[:, 0:6]", "a[:, 0:7]"), "nisa.tensor_copy(dst=dst, src=a[:, 0:6])  # !"),
    rejected(".*", ".*", "", ("4:5", "5:5"), "nisa.tensor_copy(dst=dst[:, 0], src=a[:, 4:5])  # !"),
    rejected(".*", ".*", "", ("0, 4]", "0, 4, 0]"), "nisa.tensor_copy(dst=dst[:, 0, 0], src=a[:, 0, 4])  # !"),
    rejected("slice", "end|slice", "6", ("1, 0, 6", "1, 0, 7"), "nisa.tensor_copy(dst=dst, src=a.slice(1, 0, 6))  # !"),
    rejected("slice", "step", "", ("6, 1)", "6, 0)"), "nisa.tensor_copy(dst=dst, src=a.slice(1, 0, 6, 1))  # !"),
    rejected("permute", "dims", "", ("(0, 1, 2)", "(1, 0, 2)"), "v = a.permute((0, 1, 2))"),
    rejected("permute", "dims", "", ("(0, 1, 2)", "(0, 1, 1)"), "v = a.permute((0, 1, 2))"),
    rejected("broadcast", ".*", "1", ("0:1", "0:2"), "v = a[:, 0:1].broadcast(1, 3)"),
    rejected("broadcast", "dim", "", ("(1, 3)", "(0, 3)"), "v = a[0:1, 0:1].broadcast(1, 3)"),
    rejected("expand_dim", "dim", "", ("m(1", "m(0"), "v = a.expand_dim(1)"),
    rejected("squeeze_dim", ".*", "1", ("0:1", "0:2"), "v = a[:, 0:1].squeeze_dim(1)"),
    rejected("reshape", "shape", "", ("(4, 30)", "(4, 31)"), "v = a.reshape((4, 30))"),
    rejected("reshape", "shape", "", ("(4, 30)", "(2, 60)"), "v = a.reshape((4, 30))"),
    rejected(
        "reshape", ".*", "contiguous", ("(0, 1, 2)", "(0, 2, 1)"), "v = a.permute((0, 1, 2)).reshape((4, 30))  # !"
    ),
    rejected("view", ".*", "", ("(4, 8)", "(4, 6)"), "t = nl.ndarray((4, 8), nl.int8)\nv = t.view(nl.int32)"),
    rejected("view", ".*", "contiguous|last", ("::1]", "::2]"), "v = a[:, :, ::1].view(nl.int32)  # !"),
    rejected("tensor_copy", "dst", "twice|stride", ("b[:, 0:4]", "b[:, 0:1].broadcast(1, 4)"), """
b = nl.ndarray((4, 6, 5), nl.float32)
nisa.tensor_copy(dst=b, src=a)
nisa.tensor_copy(dst=b[:, 0:4], src=a[:, 0:4])  # !
"""),
    rejected("ndarray", "shape", "2", ("(4, 6)", "(4,)"), "t = nl.ndarray((4, 6), nl.float32)"),
    rejected("ndarray", "shape", "", ("(4, 6)", "(4, 0)"), "t = nl.ndarray((4, 6), nl.float32)"),
    rejected("ndarray", "buffer", "", ("nl.sbuf", "'sbuf'"), "t = nl.ndarray((4, 6), nl.float32, buffer=nl.sbuf)"),
    rejected("ndarray", "name", "", ("'two'", "'one'"), """
t = nl.ndarray((4, 6), nl.float32, name='one')
u = nl.ndarray((4, 6), nl.float32, name='two')
"""),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT_VIEWS)
def test_strict_views(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    del setup
    if "dst=dst" not in body:
        body += "\nnisa.tensor_copy(dst=dst, src=a)"
    rejects(body, instruction, operand, rule, but, a=X, dst=Result(X.shape, fill=0.0))


def test_squeeze_of_the_partitions() -> None:
    source = """
@nki.jit
def kernel(x):
    out = nl.ndarray((1, 8), x.dtype, buffer=nl.shared_hbm)
    t = nl.ndarray((1, 1, 8), x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=t, src=x)
    nisa.dma_copy(dst=out, src=t.squeeze_dim(1))
    return out
"""
    x = random(1, 8)
    same(call(source, x), x)
    rejects_kernel(source.replace("dim(1))", "dim(1))  # !"), "squeeze_dim", "dim", "", ("dim(1)", "dim(0)"), x)


def test_e4m3_has_infinities() -> None:
    assert np.isinf(np.float32(ml_dtypes.float8_e4m3(1000.0)))
    body = "nisa.tensor_copy(dst=dst, src=a, engine=nisa.engine.vector)"
    got = run(body, a=f32([[239, 241, 1000]]), dst=Result((1, 3), "float8_e4m3"))
    np.testing.assert_array_equal(got.astype(np.float32), [[240, 240, np.inf]])
