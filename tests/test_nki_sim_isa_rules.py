"""Rules of instructions that the tests by kind leave out, each with a kernel that keeps it (SDK 2.32 API reference)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Result, random, rejected, rejects, strict_only, whole

pytestmark = strict_only

A, INTS, BITS = random(32, 16), whole(32, 16, dtype="int32", limit=9), whole(32, 16, dtype="int32", limit=9)
ROW = np.float32([[1, 1, 1, 2, 2, 0, 0, 3, 3]])
EIGHT = np.tile(np.arange(8, dtype=np.float32), (32, 2))
VALS = EIGHT[:, :8]
INDEX = np.arange(32, dtype=np.uint16)[:, None] % 16
SEEDS = np.ones((1, 1), np.uint32)
OUT = Result((32, 16))
INT_OUT = Result((32, 16), "int32")
FILLED = Result((32, 16), fill=0.0)
PSUM_OUT = Result((16, 16), memory="psum")
SUM = Result((32, 1))
HALF = random(32, 16, dtype="bfloat16")
EIGHT_BIT = random(32, 16, dtype="float8_e5m2")
PAIRS = random(32, 2, 16, dtype="float8_e5m2")
EYE = np.eye(32, dtype=np.float32)

SCALAR = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.multiply, operand0=2.0)"
ROOT = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.abs, operand0=0.0, reverse0=False)"
AND = "nisa.tensor_scalar(dst=dst, data=a, op0=nl.bitwise_and, operand0=7)"
CUMULATIVE = "nisa.tensor_scalar_cumulative(dst=dst, src=a, op0=nl.multiply, op1=nl.add, imm0=1.0)"
EXPONENTIAL = "nisa.exponential(dst=dst, src=a, max_value=9.0, reduce_cmd=nisa.reduce_cmd.{}, reduce_init={})"
SELECT = (
    "nisa.select_reduce(dst=dst, predicate=u, on_true=a, on_false=0.0, reduce_res=r, reduce_cmd=nisa.reduce_cmd.{})"
)
READ = (
    "nisa.activation(dst=dst, op=nl.copy, data=a, reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.{})\n"
    "nisa.activation(dst=dst, op=nl.copy, data=a, reduce_res=r)"
)
IOTA = "nisa.iota(dst=dst, pattern=[[1, 16]], offset=0, channel_multiplier=1)"
COPY = "nisa.tensor_copy(dst=dst, src=a)"
PREDICATED = "nisa.memset(dst=dst, value=0)\nnisa.tensor_copy_predicated(dst=dst, src=1, predicate=u)"
LOCAL = "nisa.local_gather(dst=dst[:, 0:3], src_buffer=a, index=i, num_valid_indices=3)"
SHUFFLE = f"nisa.nc_stream_shuffle(dst=dst[0:16], src=a[0:16], shuffle_mask={[0] * 32})"
REDUCE = "nisa.tensor_reduce(dst=r, op=nl.add, data=a, axis=1)"
ACROSS = "nisa.tensor_partition_reduce(dst=dst[0:1], op=nl.add, data=a)"
DROPOUT = "nisa.dropout(dst=dst, data=a, prob=p)"
STAGES = "nisa.activate2(dst=dst, op=nl.copy, data=a, imm0=p, imm1=s, op0=nl.multiply, op1=nl.{}, reverse1=False)"
BOUNDS = "nisa.sequence_bounds(dst=dst, segment_ids=a)"
BOUNDED = {"a": ROW, "dst": Result((1, 2, 9))}
TENSOR = "nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.{}, engine=nisa.engine.{})"
MATMUL = "nisa.nc_matmul(dst=dst, stationary=a, moving=b, accumulate=False)"
TILED = MATMUL[:-1] + ", tile_position=(0, 0), tile_size=(32, 128))"
DOUBLE = MATMUL[:-1] + ", perf_mode=nisa.matmul_perf_mode.double_row)"
TRANSPOSE = "nisa.nc_matmul(dst=dst, stationary=a, moving=b, is_transpose=True, accumulate=False)"
TURN = "nisa.nc_transpose(dst=dst, data=a)"
WITH: dict[str, Any] = {"a": A, "b": A, "dst": PSUM_OUT}
TURNED: dict[str, Any] = {"a": A, "b": EYE, "dst": Result((16, 32), memory="psum")}
REPLACE = "nisa.nc_match_replace8(dst=dst, data=a, vals=v, imm=0.0, dst_idx=i)"
TOPK = """
nisa.memset(dst=v, value=0.0)
nisa.memset(dst=i, value=0)
"""

STRICT = [
    rejected("tensor_scalar", "operand0", "float32", ("2.0", "1e39"), SCALAR),
    rejected("tensor_scalar", "reverse0", "False", ("reverse0=False", "reverse0=True"), ROOT),
    rejected("tensor_scalar", "operand0", "fit 32", ("=7", "=2**32"), AND, a=BITS, dst=INT_OUT),
    rejected("tensor_scalar", "data", "integer", {"a": A}, AND, a=BITS, dst=INT_OUT),
    rejected("tensor_scalar", "operand0", "31 bits", ("and, operand0=7", "or, operand0=7, op1=nl.left_shift, operand1=3"),
             AND.replace("bitwise_and", "bitwise_or").replace("or, operand0=7", "and, operand0=7"), a=BITS, dst=INT_OUT)
    if False
    else rejected("tensor_scalar", "operand0", "shift", ("operand0=7", "operand0=32"), AND.replace("bitwise_and", "left_shift"),
                  a=BITS, dst=INT_OUT),
]  # fmt: skip
