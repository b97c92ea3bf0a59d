"""Scalars of 0.7: integers computed on device, by arithmetic that Python writes and cannot look at (SDK 2.33)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Array, Result, call, f32, i32, random, rejected, rejects, run, same, strict_only

pytestmark = strict_only
LOAD = "i = nisa.scalar_load(a)\n"
STORE = "\nnisa.scalar_store(dst, {value})"


def i64(values: Any) -> Array:
    return np.array(values, np.int64)


def computed(value: str, a: int, b: int, dtype: str = "int32") -> Array:
    """Return what an expression of the scalars i and j gives."""
    numbers = np.array([[[a]], [[b]]], dtype)
    body = LOAD + "j = nisa.scalar_load(b)" + STORE.format(value=value)
    return run(body, a=numbers[0], b=numbers[1], dst=Result((1, 1), dtype))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize(
    "expression",
    ["i + j", "i - j", "i * j", "-i", "i * 4 + 1", "3 - i", "2 * j", "1 + i", "i - 5", "(i + j) * (i - j)"],
)
def test_arithmetic(expression: str, dtype: str) -> None:
    wanted = eval(expression, {"i": 7, "j": -3})
    same(computed(expression, 7, -3, dtype), np.array([[wanted]], dtype))


def test_thirty_two_bits_wrap() -> None:
    same(computed("i * j", 100000, 100000), i32([[1410065408]]))
    same(computed("i + 1", 2**31 - 1, 0), i32([[-(2**31)]]))
    same(computed("-i", -(2**31), 0), i32([[-(2**31)]]))


def test_sixty_four_bits() -> None:
    same(computed("i * j + 1", 100000, 100000, "int64"), i64([[10**10 + 1]]))
    same(computed("i", -(2**63), 0, "int64"), i64([[-(2**63)]]))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_load_and_store_reach_hbm(dtype: str) -> None:
    source = f"""
@nki.jit
def kernel(x):
    out = nl.ndarray((1, 1), nl.{dtype}, buffer=nl.shared_hbm)
    tile = nl.ndarray((1, 1), nl.{dtype}, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x[1:2, 2:3])
    nisa.scalar_store(out, nisa.scalar_load(x[0:1, 1:2]) + nisa.scalar_load(tile))
    return out
"""
    x = np.arange(6).reshape(2, 3).astype(dtype)
    same(call(source, x), x[:1, 1:2] + x[1:, 2:])


ADDRESS = """
i = nisa.scalar_load({index})
nisa.{copy}
"""


def at(index: str, copy: str) -> str:
    return ADDRESS.format(index=index, copy=copy)


SELECT = at("one", "tensor_copy(dst=dst, src=a.select(1, i + 1))")
PATTERN = at("one", "tensor_copy(dst=dst, src=a.ap([[8, 3], [1, 1]], 0, scalar_offset=i + 1, indirect_dim=1))")
HBM = at("one", "dma_copy(dst=dst, src=x.ap([[8, 3], [1, 1]], 0, scalar_offset=i + 1, indirect_dim=1))")
HBM_SELECT = at("one", "dma_copy(dst=dst, src=x.select(1, i + 1))")


@pytest.mark.parametrize("body", [SELECT, PATTERN, HBM, HBM_SELECT])
def test_addresses(body: str) -> None:
    a = random(3, 8)
    tiles: dict[str, Any] = {"a": a, "one": i32([[4]]), "dst": Result((3, 1))}
    same(run(body, hbm={"x": a}, **tiles), a[:, 5:6])
    if "x." in body:
        same(run(body, hbm={"x": a}, **{**tiles, "one": i64([[4]])}), a[:, 5:6])


def test_wide_offsets_reach_further() -> None:
    """An offset of 32 bits counts bytes below 4 GiB."""
    body = at("one", "dma_copy(dst=dst, src=x.select(0, {}), oob_mode=nisa.oob_mode.skip)")
    body = body.replace("{}", "i") + "nisa.memset(dst=dst, value=1.0)\n"
    tiles: dict[str, Any] = {"one": i64([[2**30]]), "dst": Result((1, 8))}
    x = np.zeros((4, 8), np.float32)
    rejects(body, "dma_copy", "src", "32 bits", {"one": i32([[2**30]])}, hbm={"x": x}, **tiles)


LOOPED = """
@nki.jit
def kernel(x, n):
    out = nl.ndarray((8, 4), nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=x)
    four = nl.ndarray((1, 4), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=four, value=4.0)
    end = nisa.scalar_load(n)

    def body(i):
        nisa.dma_copy(dst=out.ap([[4, 1], [1, 4]], 0, scalar_offset=end - 1 - i), src=four)

    nl.fori_loop({bounds}, body)
    return out
"""


@pytest.mark.parametrize("bounds", ["0, end", "end - 2, end", "nisa.scalar_load(n) - end, 3", "0, end * 2 - 3"])
def test_loops(bounds: str) -> None:
    x = random(8, 4)
    wanted = x.copy()
    for i in eval(f"range({bounds.replace('nisa.scalar_load(n)', 'end')})", {"end": 3}):
        wanted[2 - i] = 4
    same(call(LOOPED.format(bounds=bounds), x, i32([[3]])), wanted)


ADD = LOAD + "j = nisa.scalar_load(b)" + STORE.format(value="i + j")
OPERATED = LOAD + "j = i + 3" + STORE.format(value="j")
WIDE = LOAD + STORE.format(value="i + i")
BOUND = LOAD + "def body(k):\n    nisa.scalar_store(dst, k)\n\nnl.fori_loop(0, i, body)  # !\n"
STRICT = [
    rejected("scalar_load", "src", "1x1", ("load(a)", "load(two)"), OPERATED),
    rejected("scalar_load", "src", "int32|int64", {"a": np.array([[1]], np.uint32)}, OPERATED),
    rejected("scalar_load", "src", "int32|int64", {"a": f32([[1]])}, OPERATED),
    rejected("scalar_load", "src", "HBM|SBUF", {"psum": ("a",)}, OPERATED),
    rejected("scalar_load", "src", "tensor", ("load(a)", "load(3)"), OPERATED),
    rejected("scalar_store", "value", "scalar", (", j)", ", 3)"), OPERATED),
    rejected("scalar_store", "value", "scalar", (", j)", ", nisa.register_alloc(3))"), OPERATED),
    rejected("scalar_store", "dst", "width", {"dst": Result((1, 1), "int64")}, OPERATED),
    rejected("scalar_store", "dst", "int32|int64", {"dst": Result((1, 1), "uint32")}, OPERATED),
    rejected("scalar_store", "dst", "1x1", ("store(dst", "store(two"), OPERATED),
    rejected("add", "operand", "dtype", {"b": np.array([[1]], np.int64)}, ADD + "  # !"),
    rejected("add", "operand", "integer", ("i + 3", "i + 3.0"), OPERATED.replace("i + 3", "i + 3  # !")),
    rejected("add", "operand", "integer", ("i + 3", "i + True"), OPERATED.replace("i + 3", "i + 3  # !")),
    rejected("add", "operand", "integer", ("i + 3", "i + a"), OPERATED.replace("i + 3", "i + 3  # !")),
    rejected("add", "operand", "32 bits", ("i + 3", "i + 2**31"), OPERATED.replace("i + 3", "i + 3  # !")),
    rejected("fori_loop", "upper", "32 bits", {"a": np.array([[2]], np.int64), "dst": Result((1, 1), "int32")}, BOUND),
]


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT)
def test_strict(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    tiles: dict[str, Any] = {"a": i32([[1]]), "b": i32([[2]]), "two": i32([[1, 2]]), "dst": Result((1, 1), "int32")}
    rejects(body, instruction, operand, rule, but, **{**tiles, **setup})


def test_sixty_four_bits_do_not_wrap() -> None:
    tiles: dict[str, Any] = {"a": i64([[2**62 - 1]]), "dst": Result((1, 1), "int64")}
    rejects(WIDE + "  # !", "add", "result", "64 bits", {"a": i64([[2**62]])}, **tiles)


@pytest.mark.parametrize("body", [SELECT, PATTERN])
def test_on_chip_offsets_have_32_bits(body: str) -> None:
    tiles: dict[str, Any] = {"a": random(3, 8), "one": i32([[4]]), "dst": Result((3, 1))}
    changed = {"one": i64([[4]])}
    rejects(body.strip() + "  # !", "select|ap", "index|scalar_offset", "32 bits", changed, **tiles)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize(
    "line",
    ["if i: print(1)", "print(int(i))", "print(float(i))", "for k in range(i): print(k)", "j = two[i]", "j = i // 2",
     "j = i % 2", "j = i < 3", "j = i == i", "j = 3 >= i", "j = i << 1", "j = i & 1", "j = i**2", "j = nl.ds(i, 1)",
     "j = i / 2", "nisa.iota(dst=two, pattern=[[1, 2]], offset=i)", "nisa.memset(dst=two, value=i)",
     "nisa.register_load(nisa.register_alloc(), i)", "j = nisa.register_alloc(i)", "j = nisa.NkiScalar(1)",
     "nl.while_loop(i, i)", "j = two.ap([[2, 1], [1, i]])"],
)  # fmt: skip
def test_python_cannot_look(line: str, dtype: str) -> None:
    tiles: dict[str, Any] = {"a": np.ones((1, 1), dtype), "two": i32([[1, 2]]), "dst": Result((1, 1), dtype)}
    rejects(f"{LOAD}j = i  # !{STORE.format(value='i')}", ".*", ".*", "", ("j = i", line), **tiles)


KEPT = """
kept = []
def body(i):
    kept.append(i + 1)

nl.fori_loop(0, 2, body)
nisa.scalar_store(dst, {value})
"""


def test_scalars_of_a_turn_end_with_it() -> None:
    body = LOAD + KEPT.format(value="i")
    rejects(body, "scalar_store", "value", "turn", (", i)", ", kept[0])"), a=i32([[1]]), dst=Result((1, 1), "int32"))


SIXTY_FOUR = """
tile = nl.ndarray((1, 1), nl.int64, buffer=nl.sbuf)
nisa.dma_copy(dst=tile, src=x[0:1, 0:1])
nisa.dma_copy(dst=dst, src=a)
"""


@pytest.mark.parametrize(
    ("good", "bad", "instruction", "rule"),
    [
        ("(1, 1), nl.int64", "(1, 2), nl.int64", "ndarray", "1, 1"),
        ("buffer=nl.sbuf)\n", "buffer=nl.psum)\n", "ndarray", "1, 1"),
        ("dma_copy(dst=dst, src=a)", "dma_copy(dst=dst, src=x[0:1, 0:1])", "dma_copy", "int64"),
        ("dma_copy(dst=dst, src=a)", "dma_copy(dst=tile, src=a)", "dma_copy", "int64"),
        ("dma_copy(dst=dst, src=a)", "tensor_copy(dst=dst, src=tile)", "tensor_copy", "int64"),
        ("dma_copy(dst=dst, src=a)", "tensor_scalar(dst=tile, data=tile, op0=nl.add, operand0=1.0)", "tensor_scalar",
         "dtype"),
        ("dma_copy(dst=dst, src=a)", "memset(dst=tile, value=0)", "memset", "dtype"),
        ("dma_copy(dst=dst, src=a)", "register_load(nisa.register_alloc(), tile)", "register_load", "int32"),
        ("dma_copy(dst=dst, src=a)", "tensor_copy(dst=dst, src=tile.view(nl.int32)[:, 0:1])", "view", "int64"),
        ("dma_copy(dst=dst, src=a)", "dma_copy(dst=dst, src=x.view(nl.int32)[0:1, 0:1])", "view", "int64"),
        ("dma_copy(dst=dst, src=a)", "tensor_copy(dst=dst, src=dst.select(1, tile))", "select", "int32"),
    ],
)  # fmt: skip
def test_nothing_else_knows_64_bits(good: str, bad: str, instruction: str, rule: str) -> None:
    tiles: dict[str, Any] = {"a": i32([[1]]), "dst": Result((1, 1), "int32")}
    body = SIXTY_FOUR.replace(good, good.rstrip("\n") + "  # !" + good[len(good.rstrip("\n")) :], 1)
    body = body.replace("nl.int64  # !, buffer=nl.sbuf)", "nl.int64, buffer=nl.sbuf)  # !")
    rejects(body, instruction, ".*", rule, (good.rstrip("\n"), bad.rstrip("\n")), hbm={"x": i64([[5, 6]])}, **tiles)
