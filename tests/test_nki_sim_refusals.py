"""Rules of views, places, loops and launches that few kernels meet, each beside a kernel that keeps it (SDK 2.32)."""

from typing import Any

import nki
import numpy as np
import pytest
from nki_sim_kernels import (
    Result,
    call,
    i32,
    load,
    random,
    refused_with,
    rejected,
    rejects,
    rejects_kernel,
    same,
    strict_only,
    target,
)

A = random(4, 24)
H = random(10, 3, 4)
COPY = "\nnisa.tensor_copy(dst=dst, src=a)"
AT = "at = nisa.register_alloc(1)\n"
CUBE = "c = a.reshape((4, 2, 3, 4))\n"
PSUM = "t = nl.ndarray((4, 8), nl.float32, buffer=nl.psum, address=({}))"
SBUF = "t = nl.ndarray((40, 8), nl.float32, buffer=nl.sbuf, address=({}))"
AP = "v = a.ap(pattern=[[24, 4], [1, 24]], offset=0)"
PACKED = "t = nl.ndarray((4, 8), nl.float8_e4m3fn_x4)"
FLAT = CUBE + "v = c.permute((0, 1, 2, 3)).flatten_dims(1, 2)"
TURN = "v = a.rearrange(('p', 'f'), ('p', ('f',)))"
SPLIT = "v = a[:, 0:20].reshape_dim(1, (5, -1))"
AT_CUBE = AT + CUBE
STORED = AT + "t = nl.ndarray((1, 1), nl.int32)\nnisa.register_store(t, at)"
NAMED = "t = nl.ndarray((4, 8), nl.float32)\nnisa.memset(dst=t, value=0.0, name='m')"
COLUMNS = "t = nl.ndarray((16, 16), nl.float32)\nnisa.tensor_copy(dst=t, src=w.indirect(i, num_elem=16))"
TRN3: dict[str, Any] = {"generation": "trn3", "w": random(16, 8), "i": np.zeros((16, 1), np.uint16)}
IDENTITY = "t = nl.ndarray((4, 4), nl.float32)\nnl.shared_identity_matrix(4, dtype=nl.float32, dst=t)"
VIEWS = [
    rejected("select", "index", "", ("(1, 2)", "(1, 24)"), "v = a.select(1, 2)"),
    rejected("select", "index", "", ("(1, 2)", "(1, -1)"), "v = a.select(1, 2)"),
    rejected("select", "dim", "", ("(1, at)", "(0, at)"), AT + "v = a.select(1, at)"),
    rejected("select", ".*", "only|static", ("(1, 0)", "(1, at)"), AT_CUBE + "v = c.select(1, at).select(1, 0)"),
    rejected("vector_select", "dim", "0", ("select(0", "select(1"), "v = x.vector_select(0, idx)"),
    rejected("vector_select", ".*", "HBM", ("x.v", "a.v"), "v = x.vector_select(0, idx)"),
    rejected("vector_select", ".*", "int", {"idx": np.zeros((4, 1), np.float32)}, "v = x.vector_select(0, idx)"),
    rejected("view", ".*", "static", ("(1, 1)", "(1, at)"), AT_CUBE + "v = c.select(1, 1).view(nl.int32)"),
    rejected("reshape", ".*", "static", ("(1, 1)", "(1, at)"), AT_CUBE + "v = c.select(1, 1).reshape((4, 12))"),
    rejected("reshape", "shape", "-1", ("(4, 2, -1)", "(4, -1, -1)"), "v = a.reshape((4, 2, -1))"),
    rejected("reshape_dim", ".*", "partition", ("(1, (2, 12))", "(0, (2, 2))"), "v = a.reshape_dim(1, (2, 12))"),
    rejected("reshape_dim", "shape", "elements", ("(1, (5, -1))", "(1, (7, -1))"), SPLIT),
    rejected("flatten_dims", ".*", "contiguous", ("(0, 1, 2, 3)", "(0, 2, 1, 3)"), FLAT),
    rejected("flatten_dims", ".*", "", ("(1, 2)", "(0, 1)"), CUBE + "v = c.flatten_dims(1, 2)"),
    rejected("flatten_dims", ".*", "", ("(1, 2)", "(2, 1)"), CUBE + "v = c.flatten_dims(1, 2)"),
    rejected("rearrange", "src_pattern", "", ("('p', 'f')", "('p',)"), TURN),
    rejected("rearrange", "dst_pattern", "", ("('p', ('f',))", "('p', 'g')"), TURN),
    rejected("broadcast", "size", "", ("(1, 3)", "(1, 0)"), "v = a[:, 0:1].broadcast(1, 3)"),
    rejected("slice|slicing", "index", "", ("[..., 1:3]", "[..., ...]"), "v = a[..., 1:3]"),
    rejected("ds", ".*", "", ("(2, 3)", "(at, 3)"), AT + "v = a[:, nl.ds(2, 3)]"),
    rejected("ap", "pattern", "partition|pair", ("[[24, 4], [1, 24]]", "[[24, 4]]"), AP),
    rejected("ndarray", "address", "", ("0, 2048", "0, 16384"), PSUM.format("0, 2048")),
    rejected("ndarray", "address", "bank", ("0, 2016", "0, 2032"), PSUM.format("0, 2016")),
    rejected("ndarray", "address", "", ("32, 0", "16, 0"), PSUM.format("32, 0")),
    rejected("ndarray", "address", "", ("64, 64", "96, 64"), SBUF.format("64, 64")),
    rejected("ndarray", "address", "", ("64, 64", "32, 64"), SBUF.format("64, 64")),
    rejected("ndarray", "address", "", ("64, 64", "64"), SBUF.format("64, 64")),
    rejected("ndarray", "address", "", ("64, 64", "64, 260000"), SBUF.format("64, 64")),
    rejected("ndarray", "address", "chip", ("buffer=nl.sbuf, ", "buffer=nl.hbm, "), SBUF.format("64, 64")),
    rejected("ndarray", "dtype", "dtype", ("nl.float32", "'float32'"), "t = nl.ndarray((4, 8), nl.float32)"),
    rejected("ndarray", "dtype", "generation|trn3", {"generation": "trn2"}, PACKED, generation="trn3"),
    rejected("ndarray", "name", "string", ("name='t'", "name=3"), "t = nl.ndarray((4, 8), nl.float32, name='t')"),
    rejected("indirect", "num_elem", "", ("elem=16", "elem=17"), COLUMNS, **TRN3),
    rejected("indirect", "index", "int", {"i": np.zeros((16, 1), np.float32)}, COLUMNS, **TRN3),
    rejected("indirect", "index", "16", ("(i, num", "(i[0:15], num"), COLUMNS, **TRN3),
    rejected("tensor_copy", ".*", "8", {"i": np.full((16, 1), 8, np.uint16)}, COLUMNS, **TRN3),
    rejected("indirect", ".*", "chip|HBM", ("w.indirect", "x.indirect"), COLUMNS, **TRN3),
    rejected("register_store", "dst", "int32|32", ("nl.int32", "nl.int8"), STORED),
    rejected("ndarray", "shape", "tuple|int", ("(4, 8)", "(4.5, 8)"), "t = nl.ndarray((4, 8), nl.float32)"),
    rejected("memset", "name", "str", ("'m'", "3"), NAMED),
    rejected("shared_identity_matrix", "dst", "", ("matrix(4", "matrix(5"), IDENTITY),
    rejected("shared_identity_matrix", "dst", "", (", dst=t", ""), IDENTITY),
    rejected("device_print", "print_prefix", "", ("'a'", "3"), "nl.device_print('a', a)"),
    rejected("device_print", "tensor", "HBM|SBUF", {"psum": ("a",)}, "nl.device_print('a', a)"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), VIEWS)
def test_views_and_places(
    body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]
) -> None:
    tiles: dict[str, Any] = {"a": A, "idx": i32([[3], [1], [0], [2]]), "dst": Result((4, 24))}
    rejects(f"{body}  # !{COPY}", instruction, operand, rule, but, hbm={"x": H}, **{**tiles, **setup})


SHARED = "nl.ndarray((4, 24), nl.float32, buffer=nl.shared_hbm)"
LOOP = """
@nki.jit
def kernel(x):
    out = nl.ndarray((4, 24), nl.float32, buffer=nl.shared_hbm)
    tile = nl.ndarray((4, 24), nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    one = nisa.register_alloc(1)

    def body(i):
        inside = nl.ndarray((4, 24), nl.float32, buffer=nl.sbuf)  # !
        nisa.tensor_copy(dst=inside, src=tile)

    nl.fori_loop(0, 2, body)
    nisa.dma_copy(dst=out, src=tile)
    return out
"""


@pytest.mark.parametrize(
    ("instruction", "operand", "change"),
    [
        ("ndarray", "buffer", ("        inside =", f"        y = {SHARED}\n        inside =")),
        ("fori_loop|kernel", ".*", ("0, 2, body)", "0, 2, tile)")),
        ("fori_loop", "body_fun", ("def body(i)", "def body(i, j)")),
        ("dynamic_range|kernel", ".*", ("nl.fori_loop(0, 2, body)", "for i in nl.dynamic_range(2): print(1)")),
        ("while_loop", "init", ("    nl.fori_loop(0, 2, body)", "    nl.while_loop(2, body)")),
        ("while_loop", "body_fun", ("    nl.fori_loop(0, 2, body)", "    nl.while_loop(one, body)")),
    ],
)  # fmt: skip
@strict_only
def test_loops(instruction: str, operand: str, change: tuple[str, str]) -> None:
    same(call(LOOP, A), A)
    assert LOOP.count(change[0]) == 1
    refused_with(lambda: call(LOOP.replace(*change), A), instruction, operand, "", None)


def test_a_register_is_set_where_it_was_made() -> None:
    """A value carried from turn to turn lives in a tile."""
    source = LOOP.replace("  # !", "").replace(
        "src=tile)\n\n", "src=tile)\n        nisa.register_move(own, own)  # !\n\n"
    )
    source = source.replace("        inside =", "        own = nisa.register_alloc(3)\n        inside =", 1)
    rejects_kernel(source, "register_move", "dst", "loop", ("move(own, own)", "move(one, own)"), A)


SIMPLE = """
@nki.jit
def helper(tile):
    nisa.tensor_copy(dst=tile, src=tile)


def kernel(x, factor=2.0):
    out = nl.ndarray((4, 24), nl.float32, buffer=nl.shared_hbm)
    tile = nl.ndarray((4, 24), nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=factor)
    nisa.dma_copy(dst=out, src=tile)
    return out
"""


@strict_only
def test_no_kernel_within_a_kernel() -> None:
    same(call(SIMPLE, A), A * 2)
    broken = SIMPLE.replace("    nisa.dma_copy(dst=out", "    helper(tile)\n    nisa.dma_copy(dst=out")
    refused_with(lambda: call(broken, A), "helper|kernel", ".*", "jit|kernel", None)
    same(call(broken.replace("@nki.jit\n", ""), A), A * 2)


@strict_only
@pytest.mark.parametrize("keyword", ["mode", "platform_target", "grid"])
def test_old_keywords_of_jit(keyword: str) -> None:
    """They were ignored for a while, which a kernel must not count on."""
    marked = SIMPLE.replace("def kernel", "@nki.jit()\ndef kernel")
    same(call(marked, A), A * 2)
    refused_with(lambda: call(marked.replace("jit()", f"jit({keyword}='x')"), A), "jit", keyword, "", None)


@strict_only
@pytest.mark.parametrize("arguments", [(), (A, 2.0, 3), (A, 2.0, 3, 4)])
def test_arguments_of_a_kernel(arguments: tuple[Any, ...]) -> None:
    refused_with(lambda: call(SIMPLE, *arguments), "kernel", "arguments", "", None)


@strict_only
@pytest.mark.parametrize("given", [A.astype(np.float64), A.astype(np.complex64), np.ones((), np.float32)])
def test_arrays_that_no_tensor_holds(given: Any) -> None:
    with pytest.raises(Exception, match=r"(?i)x must|dtype|dimension"):
        call(SIMPLE, given)


@strict_only
@pytest.mark.parametrize(("generation", "lnc"), [("trn2", 3), ("trn2", 0), ("trn1", 2)])
def test_cores_that_are_not_there(generation: str, lnc: int) -> None:
    with target(generation, lnc), pytest.raises(nki.isa.NkiValidationError, match=r"1 or 2|trn2"):
        nki.simulate(load(SIMPLE).kernel)(A)
