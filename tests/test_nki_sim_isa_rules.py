"""Rules of nki.isa that the tests by kind of instruction leave out, each beside a kernel that keeps it (SDK 2.32)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Result, random, refused, rejected, rejects, run, strict_only, whole

pytestmark = strict_only

A = random(32, 16)
INTS = whole(32, 16, dtype="int32", limit=9)
HALF = random(32, 16, dtype="bfloat16")
ONES = np.ones((32, 16), np.uint8)
SEEDS = np.ones((1, 1), np.uint32)
VECTOR = np.full((32, 1), 0.5, np.float32)
INDEX = np.arange(64, dtype=np.uint16)[:, None] % 16
ROW = np.array([[1, 1, 1, 2, 2, 0, 0, 3, 3]], np.float32)
EIGHT = np.tile(np.arange(8, dtype=np.float32), (32, 2))
OUT = Result((32, 16))
INT_OUT = Result((32, 16), "int32")
FILLED = Result((32, 1), fill=0.0)
TRN3: dict[str, Any] = {"generation": "trn3"}
COPY = "\nnisa.tensor_copy(dst=dst, src=a)"

SCALAR = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.multiply, operand0=2.0, engine=nisa.engine.scalar)"
ROOT = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.abs, operand0=0.0, reverse0=False)"
AND = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.bitwise_and, operand0=7)"
MASK = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.bitwise_and, operand0=m)"
BITS: dict[str, Any] = {"a": INTS, "dst": INT_OUT}
PAIR = "nisa.tensor_tensor(dst=dst, data1=a, data2=a, op=nl.{}, engine=nisa.engine.{})"
POWER = "nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.power)"
CUMULATIVE = "nisa.tensor_scalar_cumulative(dst=dst, src=a, op0=nl.multiply, op1=nl.add, imm0=1.0)"
EXPONENTIAL = "nisa.exponential(dst=dst, src=a, reduce_cmd=nisa.reduce_cmd.reset_reduce, reduce_init=0.0)"
SELECT = """nisa.select_reduce(dst=dst, predicate=u, on_true=a, on_false=0.0, reduce_res=r,
                   reduce_cmd=nisa.reduce_cmd.reset_reduce)"""
READ = """
nisa.activation(dst=dst, op=nl.copy, data=a, reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.reset_reduce)
nisa.activation(dst=dst, op=nl.copy, data=a, reduce_res=r)  # !"""
STAGES = "nisa.activate2(dst=dst, op=nl.copy, data=a, imm0=p, imm1=s, op0=nl.multiply, op1=nl.{}, reverse1=False)"
STAGED: dict[str, Any] = {"p": VECTOR, "s": VECTOR, **TRN3}
REDUCE = "nisa.tensor_reduce(dst=dst, op=nl.add, data=a, axis=1)"
ACROSS = "nisa.tensor_partition_reduce(dst=dst, op=nl.add, data=a)"
DROPOUT = "nisa.dropout(dst=dst, data=a, prob=p)"
SEED = "nisa.set_rng_seed(src_seeds=s)  # !" + COPY

FOLD = """nisa.tensor_scalar_reduce(dst=dst, data=a, op0=nl.add, operand0=0.0, reduce_op=nl.add,
                          reduce_cmd=nisa.reduce_cmd.{})"""
BETWEEN = "nisa.tensor_tensor(dst=dst, data1=a, data2=a, op=nl.add)"
CLOBBER = "nisa.scalar_tensor_tensor(dst=dst, data=a, op0=nl.add, operand0=0.0, op1=nl.add, operand1=a)"
FOLDS = "\n".join([FOLD.format("reset_reduce"), BETWEEN, FOLD.format("reduce")])

ELEMENTWISE = [
    rejected("tensor_scalar_reduce", "reduce_cmd", "undefined", (BETWEEN, CLOBBER), FOLDS),
    rejected("tensor_scalar", "operand0", "float32", ("2.0", "1e39"), SCALAR),
    rejected("tensor_scalar", "engine", "generation", {"generation": "trn1"}, SCALAR),
    rejected("tensor_scalar", "reverse0", "False", ("=False", "=True"), ROOT),
    rejected("tensor_scalar", "operand0", "32 bits", ("=7", "=2**32"), AND, **BITS),
    rejected("tensor_scalar", "data", "integer", {"a": A}, AND, **BITS),
    rejected("tensor_scalar", "operand0", "dtype", {"m": np.ones((32, 1), np.uint32)}, MASK, m=INTS[:, :1], **BITS),
    rejected("tensor_tensor", "engine", "vector", ("vector", "gpsimd"), PAIR.format("bitwise_and", "vector"), **BITS),
    rejected("tensor_tensor", "engine", "vector", ("vector", "gpsimd"), PAIR.format("abs_max", "vector"), **TRN3),
    rejected("tensor_tensor", "data1", "sbuf", {"psum": ("a",)}, POWER, a=abs(A), b=A),
    rejected("tensor_scalar_cumulative", "imm1", "load_reduce", ("=1.0", "=1.0, imm1=2.0"), CUMULATIVE),
    rejected("exponential", "reduce_init", "load_reduce", ("=0.0", "=1.0"), EXPONENTIAL, **TRN3),
    rejected("select_reduce", "reduce_res", "idle", ("reset_reduce", "idle"), SELECT, u=ONES, r=FILLED),
    rejected("activation", "reduce_res", "defined", ("reset_reduce", "idle"), READ, r=Result((32, 1))),
    rejected("activate2", "imm1", "dtype", {"s": VECTOR.astype(np.float16)}, STAGES.format("add"), **STAGED),
    rejected("activate2", "reverse1", "bypass", ("=False", "=True"), STAGES.format("bypass"), **STAGED),
    rejected("tensor_reduce", "axis", "integer", ("axis=1", "axis=1.0"), REDUCE, dst=Result((32, 1))),
    rejected("tensor_partition_reduce", "dst", "16", {"dst": Result((1, 15))}, ACROSS, dst=Result((1, 16))),
    rejected("dropout", "prob", "float32", {"p": VECTOR.astype(np.float16)}, DROPOUT, p=VECTOR, **BITS),
    rejected("dropout", "prob", "probability", {"p": VECTOR * 3}, DROPOUT, p=VECTOR),
    rejected("set_rng_seed", "src_seeds", "1, 1", {"s": SEEDS.repeat(2, 0)}, SEED, s=SEEDS),
]  # fmt: skip

IOTA = "nisa.iota(dst=dst, pattern=[[1, 16]], offset=0, channel_multiplier=1)"
FILL = "nisa.memset(dst=dst, value=7)"
WIDE = "w = nl.ndarray((2, 2, 32760), nl.bfloat16)\nnisa.memset(dst=w[:, :, 0:1], value=0.0)  # !" + COPY
PREDICATED = "nisa.memset(dst=dst, value=0)\nnisa.tensor_copy_predicated(dst=dst, src=1, predicate=u)"
LOCAL = "nisa.local_gather(dst=dst, src_buffer=a, index=i, num_valid_indices=3)"
SHUFFLE = f"nisa.nc_stream_shuffle(dst=dst, src=a, shuffle_mask={[0] * 32})"
BOUNDS = "nisa.sequence_bounds(dst=dst, segment_ids=a)"
BOUNDED: dict[str, Any] = {"a": ROW, "dst": Result((1, 2, 9))}
TWO_ROWS = {"a": ROW.repeat(2, 0), "dst": Result((2, 2, 9))}
LARGEST = "nisa.max8(dst=dst, src=a)"
FIND = "nisa.nc_find_index8(dst=dst, data=a, vals=v)"
FOUND: dict[str, Any] = {"a": EIGHT, "v": EIGHT[:, :8], "dst": Result((32, 8), "uint32")}
SEVEN = {"a": EIGHT[:, :7], "dst": Result((32, 7))}
REPLACE = "nisa.nc_match_replace8(dst=dst, data=a, vals=v, imm=0.0, dst_idx=i)"
REPLACED: dict[str, Any] = {"a": EIGHT, "v": EIGHT[:, :8], "i": Result((32, 8), "uint32")}
SCALED_BYTES = "nisa.tensor_copy(dst=dst, src=a)"

MOVED = [
    rejected("iota", "offset", "32 bits", ("offset=0", "offset=2**31"), IOTA, dst=INT_OUT),
    rejected("iota", "pattern", "32 bits", ("offset=0", "offset=2**31 - 20"), IOTA, dst=INT_OUT),
    rejected("iota", "pattern", "at least 1", ("[1, 16]", "[1, 16], [1, 0]"), IOTA, dst=INT_OUT),
    rejected("memset", "value", "uint8", ("=7", "=300"), FILL, dst=Result((32, 16), "uint8")),
    rejected("memset", "dst", "step", ("32760", "33000"), WIDE),
    rejected("tensor_copy", "src", "dtype", ("=a", "=a.view(nl.float8_e8m0fnu)"), SCALED_BYTES, a=ONES, **TRN3),
    rejected("tensor_copy_predicated", "src", "integer", ("=1,", "=1.0,"), PREDICATED, u=ONES, dst=INT_OUT),
    rejected("local_gather", "num_valid_indices", "16", ("=3", "=17"), LOCAL, i=INDEX[:32], dst=Result((32, 3))),
    rejected("nc_stream_shuffle", "shuffle_mask", "16", ("[0,", "[20,"), SHUFFLE, a=A[:16], dst=Result((16, 16))),
    rejected("sequence_bounds", "segment_ids", "1 part", TWO_ROWS, BOUNDS, **BOUNDED),
    rejected("sequence_bounds", "dst", "shape", {"dst": Result((1, 9, 2))}, BOUNDS, **BOUNDED),
    rejected("sequence_bounds", "segment_ids", "negative", {"a": -ROW}, BOUNDS, **BOUNDED),
    rejected("sequence_bounds", "segment_ids", "together", {"a": np.roll(ROW, 1)}, BOUNDS, **BOUNDED),
    rejected("max8", "src", "NaN", {"a": A * np.nan}, LARGEST, dst=Result((32, 8))),
    rejected("nc_find_index8", "data", "8 to 16384", {"a": EIGHT[:, :7]}, FIND, **FOUND),
    rejected("nc_match_replace8", "data", "8 to 16384", SEVEN, REPLACE, **REPLACED),
    rejected("nc_match_replace8", "vals", "found", {"v": EIGHT[:, :8] + 1}, REPLACE, **REPLACED),
]  # fmt: skip

TAKEN = "nisa.tensor_copy(dst=dst, src=a.indirect(i, 16), engine=nisa.engine.vector)"
PART = "nisa.tensor_copy(dst=dst, src=a.indirect(i[0:16], 16))"
SCATTERED = (
    """
w = nl.ndarray((32, 16), nl.float32, buffer=nl.sbuf)
nisa.activation(dst=w.indirect(i, 16), op=nl.copy, data=a)  # !
"""
    + COPY
)
INVERSE = "nisa.reciprocal(dst=dst, data=a)"
BY_INDEX: dict[str, Any] = {"i": INDEX[:32], **TRN3}
BY_PART: dict[str, Any] = {"a": A[:16], "i": INDEX, "dst": Result((16, 16)), **TRN3}

INDIRECT = [
    rejected("tensor_copy", "engine", "vector", ("vector", "gpsimd"), TAKEN, **BY_INDEX),
    rejected("activation", "dst", "PSUM", ("nl.sbuf", "nl.psum"), SCATTERED, **BY_INDEX),
    rejected("reciprocal", "data", "indirect", ("=a", "=a.indirect(i, 16)"), INVERSE, **BY_INDEX),
    rejected("tensor_copy", "index of src", "32", ("0:16", "16:32"), PART, **BY_PART),
    rejected("tensor_copy", "index of src", "partition 0", ("0:16", "32:48"), PART, **BY_PART),
]  # fmt: skip

MATMUL = "nisa.nc_matmul(dst=dst, stationary=a, moving=b, accumulate=False)"
SHIFTED = "nisa.nc_matmul(dst=dst, stationary=a[0:32], moving=b[0:32], accumulate=False)"
TILED = MATMUL[:-1] + ", tile_position=(0, 0), tile_size=(32, 128))"
ONEZERO = MATMUL[:-1] + ", is_moving_onezero=True)"
LOWER = """nisa.nc_matmul(dst=dst, stationary=a[32:64], moving=b[32:64], accumulate=False, tile_position=(32, 0),
               tile_size=(32, 128))"""
DOUBLE = MATMUL[:-1] + ", perf_mode=nisa.matmul_perf_mode.double_row)"
TRANSPOSE = MATMUL[:-1] + ", is_transpose=True)"
GATHERED = "nisa.nc_matmul(dst=dst, stationary=a.indirect(i, 16), moving=b, accumulate=False)"
TURN = "nisa.nc_transpose(dst=dst, data=a, engine=nisa.engine.tensor)"
AFTER = "nisa.memset(dst=dst, value=0.0)\nnisa.nc_matmul(dst=dst, stationary=a, moving=b)"
LONG = random(64, 16, dtype="bfloat16")
PAIRS = random(32, 2, 16, dtype="float8_e5m2")
PRODUCT: dict[str, Any] = {"a": A, "b": A, "dst": Result((16, 16), memory="psum")}
HALVES: dict[str, Any] = {**PRODUCT, "a": HALF, "b": HALF, "i": INDEX[:32], **TRN3}
DOUBLED: dict[str, Any] = {**PRODUCT, "a": PAIRS, "b": PAIRS}
TURNED: dict[str, Any] = {"a": A, "b": np.eye(32, dtype=np.float32), "dst": Result((16, 32), memory="psum")}
HALF_TURNED: dict[str, Any] = {
    "a": HALF,
    "b": np.eye(32).astype(HALF.dtype),
    "i": np.arange(32, dtype=np.uint16)[:, None],
    "dst": Result((16, 32), "bfloat16", memory="psum"),
    **TRN3,
}
NARROW = {"dst": Result((16, 32), "bfloat16", memory="psum")}
SHORT = {"dst": Result((16, 30), memory="psum")}
FP16 = {"dst": Result((16, 16), "float16", memory="psum")}
BOTH_LONG = {"a": LONG, "b": LONG}

TENSOR_ENGINE = [
    rejected("nc_matmul", "dst", "float32", FP16, MATMUL, **PRODUCT, **TRN3),
    rejected("nc_matmul", "stationary", "same part", ("a[0:32]", "a[32:64]"), SHIFTED, **{**PRODUCT, **BOTH_LONG}),
    rejected("nc_matmul", "tile_position", "pair", ("(0, 0)", "(0, 0, 0)"), TILED, **PRODUCT),
    rejected("nc_matmul", "stationary", "32", BOTH_LONG, TILED, **PRODUCT),
    rejected("nc_matmul", "moving", "zeros", {"b": A}, ONEZERO, **{**PRODUCT, "b": np.ones_like(A)}),
    rejected("nc_matmul", "tile_position", "indirect", ("a[32:64]", "a[32:64].indirect(i[32:64], 16)"), LOWER,
             **{**HALVES, **BOTH_LONG, "i": INDEX}),
    rejected("nc_matmul", "perf_mode", "generation", {"generation": "trn1"}, DOUBLE, **DOUBLED),
    rejected("nc_matmul", "is_transpose", "double", ("perf_mode=", "is_transpose=True, perf_mode="), DOUBLE, **DOUBLED),
    rejected("nc_matmul", "stationary", "K, 2", {"a": PAIRS.reshape(32, 32)}, DOUBLE, **DOUBLED),
    rejected("nc_matmul", "dst", "dtype", NARROW, TRANSPOSE, **TURNED),
    rejected("nc_matmul", "dst", "shape", SHORT, TRANSPOSE, **TURNED),
    rejected("nc_matmul", "accumulate", "False", ("accumulate=False", "accumulate=True"), TRANSPOSE, **TURNED),
    rejected("nc_matmul", "moving", "indirect", ("=b", "=b.indirect(i, 32)"), TRANSPOSE, **HALF_TURNED),
    rejected("nc_matmul", "stationary", "indirect", {"a": A, "b": A}, GATHERED, **HALVES),
    rejected("nc_matmul", "accumulate", "wrote", ("value=0.0", "value=1.0"), AFTER, **PRODUCT),
    rejected("nc_transpose", "dst", "32", SHORT, TURN, a=A, dst=TURNED["dst"]),
]  # fmt: skip

QUANTIZE = (
    """
q = nl.ndarray((32, 4), nl.float8_e4m3fn_x4)
s = nl.ndarray((4, 4), nl.uint8)
nisa.quantize_mx(dst=q, src=a, dst_scale=s)
"""
    + COPY
)
SCALED = (
    """
q = nl.ndarray((32, 4), nl.float8_e4m3fn_x4)
s = nl.ndarray((4, 4), nl.uint8)
p = nl.ndarray((4, 4), nl.float32, buffer=nl.psum)
nisa.quantize_mx(dst=q, src=a, dst_scale=s)
nisa.memset(dst=s, value=127)
nisa.nc_matmul_mx(dst=p, stationary=q, moving=q, stationary_scale=s, moving_scale=s)
"""
    + COPY
)
QUANTIZED: dict[str, Any] = {"a": HALF, "i": INDEX[:32] % 4, "dst": Result((32, 16), "bfloat16"), **TRN3}

SCALES = [
    rejected("quantize_mx", "dst_scale", "4", ("(4, 4)", "(8, 4)"), QUANTIZE, **QUANTIZED),
    rejected("quantize_mx", "dst_scale", "4 elem", ("(4, 4)", "(4, 5)"), QUANTIZE, **QUANTIZED),
    rejected("quantize_mx", "dst", "4 elem", ("(32, 4)", "(32, 3)"), QUANTIZE, **QUANTIZED),
    rejected("quantize_mx", "src", "multiple of 4", ("src=a,", "src=a[:, 0:15],"), QUANTIZE, **QUANTIZED),
    rejected("quantize_mx", "src", "multiple of 32", ("=q, src=a,", "=q[0:16], src=a[0:16],"), QUANTIZE, **QUANTIZED),
    rejected("quantize_mx", "src", "finite", {"a": np.full_like(HALF, np.inf)}, QUANTIZE, **QUANTIZED),
    rejected("quantize_mx", "dst", "dtype", ("float8_e4m3fn_x4", "float4_e2m1fn_x4"), QUANTIZE, **QUANTIZED),
    rejected("nc_matmul_mx", "stationary", "dtype", ("=q, mov", "=q.view(nl.uint32), mov"), SCALED, **QUANTIZED),
    rejected("nc_matmul_mx", "moving", "dtype", ("moving=q", "moving=q.view(nl.uint32)"), SCALED, **QUANTIZED),
    rejected("nc_matmul_mx", "stationary", "32", ("=q, moving=q", "=q[0:16], moving=q[0:16]"), SCALED, **QUANTIZED),
    rejected("nc_matmul_mx", "stationary", "even", ("stationary=q,", "stationary=q[:, 0:3],"), SCALED, **QUANTIZED),
    rejected("nc_matmul_mx", "stationary_scale", "number", ("=127", "=255"), SCALED, **QUANTIZED),
    rejected("nc_matmul_mx", "stationary_scale", "index", ("=q, mov", "=q.indirect(i, 4), mov"), SCALED, **QUANTIZED),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "instruction", "operand", "rule", "but", "setup"),
    [*ELEMENTWISE, *MOVED, *INDIRECT, *TENSOR_ENGINE, *SCALES],
)
def test_strict(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body, instruction, operand, rule, but, **{"a": A, "dst": OUT, **setup})


TOPK = "nisa.topk(val_dst=v, idx_dst=i, src=a, n=n)"


def top(
    n: int = 64, k: int = 8, partitions: int = 16, columns: int = 4, src: str = "bfloat16", memory: str = "sbuf"
) -> Callable[[], Any]:
    """Return a call that finds the k largest of n."""
    a = random(partitions, columns, dtype=src)
    results: dict[str, Any] = {
        "v": Result((partitions, k), src, memory=memory),
        "i": Result((partitions, k), "uint32"),
    }
    return lambda: run(TOPK, hbm={"n": n}, a=a, **results)


def test_topk_is_not_documented_enough() -> None:
    with pytest.raises(NotImplementedError, match="which of the 16 partitions"):
        top()()


@pytest.mark.parametrize(
    ("operand", "change"),
    [
        ("n", {"n": 7}),
        ("val_dst", {"k": 65}),
        ("src", {"columns": 3}),
        ("src", {"partitions": 15}),
        ("val_dst", {"src": "float16"}),
        ("val_dst", {"memory": "psum"}),
    ],
)
def test_strict_topk(operand: str, change: dict[str, Any]) -> None:
    assert refused(top(**change))["operand"] == operand


def test_the_state_of_random_numbers_is_not_documented() -> None:
    body, state = "nisa.rand_get_state(dst=dst)", Result((32, 6), "uint32")
    with pytest.raises(NotImplementedError, match="advances"):
        run(body, dst=state)
    assert refused(lambda: run(body, dst=Result((32, 6), "int32")))["operand"] == "dst"
    assert refused(lambda: run(body, generation="trn1", dst=state))["operand"] == "instruction"


def test_derivative_of_the_sigmoid_gelu() -> None:
    x, step = np.linspace(-6, 6, 64).reshape(4, 16), 1e-6
    body = "nisa.activation(dst=dst, op=nl.gelu_apprx_sigmoid_dx, data=a)"
    up, down = ((x + h) / (1 + np.exp(-1.702 * (x + h))) for h in (step, -step))
    got = run(body, a=x.astype(np.float32), dst=Result(x.shape))
    np.testing.assert_allclose(got, (up - down) / (2 * step), atol=1e-5)
