"""Memories, dtypes and sizes of each operand of nki.isa, one broken at a time (SDK 2.32 API reference)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Array, Result, dtype_of, random, rejects, strict_only, whole

pytestmark = strict_only

A, INTS, BYTES = random(32, 16), whole(32, 16, dtype="int32", limit=9), np.ones((32, 16), np.uint8)
VECTOR, SHORTS, WORDS = np.ones((32, 1), np.float32), np.ones((32, 1), np.uint16), np.ones((32, 16), np.uint32)
HALF, EIGHT = random(32, 16, dtype="bfloat16"), np.tile(np.arange(8, dtype=np.float32), (32, 2))
OUT, SUM, INT_OUT = Result((32, 16)), Result((32, 1)), Result((32, 16), "int32")
COPY = "\nnisa.tensor_copy(dst=dst, src=a)"


@dataclass(frozen=True)
class Call:
    """A kernel that keeps all rules, and how to break them: lines of "operand tile kind ...".

    kind: `memory` (the other one on chip), `partitions` (one fewer), `elements` (one more per partition), or a dtype.
    """

    instruction: str
    body: str
    breaks: str
    tiles: Mapping[str, Array | Result] = field(default_factory=dict)
    generation: str = "trn2"

    def cases(self) -> list[tuple[str, str, str]]:
        lines = [line.split() for line in self.breaks.strip().splitlines()]
        return [(operand, tile, kind) for operand, tile, *kinds in lines for kind in kinds]


def broken(value: Array | Result, tile: str, kind: str) -> dict[str, Any]:
    """Return the change of a kernel's setup that breaks one rule of a tile."""
    if kind == "memory":
        if isinstance(value, Result):
            return {tile: replace(value, memory="psum" if value.memory == "sbuf" else "sbuf")}
        return {"psum": (tile,)}
    if kind == "partitions":
        return (
            {tile: replace(value, shape=(value.shape[0] - 1, *value.shape[1:]))}
            if isinstance(value, Result)
            else {tile: value[:-1]}
        )
    if kind == "elements":
        if isinstance(value, Result):
            return {tile: replace(value, shape=(*value.shape[:-1], value.shape[-1] + 1))}
        return {tile: np.concatenate([value, value[..., -1:]], -1)}
    if isinstance(value, Result):
        return {tile: replace(value, dtype=kind)}
    return {tile: value.astype(dtype_of(kind))}


CALLS = [
    Call(
        "activation",
        "nisa.activation(dst=dst, op=nl.exp, data=a, bias=b, scale=s, reduce_op=nl.add, reduce_res=r,"
        " reduce_cmd=nisa.reduce_cmd.reset_reduce)",
        """data a partitions elements
           bias b int32 elements partitions
           scale s bfloat16 elements partitions
           reduce_res r int32 elements partitions""",
        {"b": VECTOR, "s": VECTOR, "r": SUM},
    ),
    Call(
        "activation_reduce",
        "nisa.activation_reduce(dst=dst, op=nl.exp, data=a, reduce_op=nl.add, reduce_res=r, bias=b, scale=s)",
        """data a partitions elements
           bias b int32 elements
           scale s bfloat16 elements
           reduce_res r int32 elements""",
        {"b": VECTOR, "s": VECTOR, "r": SUM},
    ),
    Call(
        "activate2",
        "nisa.activate2(dst=dst, op=nl.prelu, data=a, imm0=b, imm1=s, op0=nl.multiply, op1=nl.add, relu_param=p,"
        " reduce_op=nl.add, reduce_res=r, reduce_cmd=nisa.reduce_cmd.reset_reduce)",
        """data a partitions elements
           imm0 b elements
           imm1 s elements
           relu_param p elements
           reduce_res r int32 elements""",
        {"b": VECTOR, "s": VECTOR, "p": VECTOR, "r": SUM},
        "trn3",
    ),
    Call(
        "affine_select",
        "nisa.affine_select(dst=dst, pattern=[[1, 16]], channel_multiplier=-1, on_true_tile=a, on_false_value=0.0,"
        " cmp_op=nl.less_equal)",
        """dst dst memory int32
           on_true_tile a memory int32 partitions elements""",
    ),
    Call("bn_stats", "nisa.bn_stats(dst=dst, data=a)", "data a partitions\ndst dst elements", {"dst": Result((32, 6))}),
    Call(
        "bn_aggr",
        "nisa.bn_aggr(dst=dst, data=a)",
        "data a partitions elements\ndst dst elements",
        {"a": abs(A[:, :6]) + 1, "dst": Result((32, 2))},
    ),
    Call(
        "dropout",
        "nisa.dropout(dst=dst, data=a, prob=p)",
        "prob p int32 elements partitions\ndata a partitions elements\ndst dst bfloat16",
        {"p": VECTOR},
    ),
    Call(
        "exponential",
        "nisa.exponential(dst=dst, src=a, max_value=m, reduce_res=r, reduce_cmd=nisa.reduce_cmd.load_reduce,"
        " reduce_init=i)",
        """dst dst uint32 float8_e4m3fn
           src a float8_e4m3fn partitions elements
           max_value m bfloat16 elements
           reduce_res r int32 elements
           reduce_init i bfloat16 elements""",
        {"m": VECTOR, "r": SUM, "i": VECTOR},
        "trn3",
    ),
    Call(
        "local_gather",
        "nisa.local_gather(dst=dst, src_buffer=a, index=i)",
        """dst dst memory bfloat16
           src_buffer a memory partitions
           index i memory uint32 partitions""",
        {"i": SHORTS},
    ),
    Call("max8", "nisa.max8(dst=dst, src=a)", "src a partitions\ndst dst elements", {"dst": Result((32, 8))}),
    Call(
        "nc_find_index8",
        "nisa.nc_find_index8(dst=dst, data=a, vals=v)",
        "dst dst elements int32\ndata a partitions\nvals v partitions elements",
        {"a": EIGHT, "v": EIGHT[:, :8], "dst": Result((32, 8), "uint32")},
    ),
    Call(
        "nc_match_replace8",
        "nisa.nc_match_replace8(dst=dst, data=a, vals=v, imm=0.0, dst_idx=i)",
        """data a partitions elements
           vals v partitions elements
           dst_idx i partitions elements int32""",
        {"a": EIGHT, "v": EIGHT[:, :8], "i": Result((32, 8), "uint32")},
    ),
    Call(
        "nc_matmul",
        "nisa.nc_matmul(dst=dst, stationary=a, moving=b, accumulate=False)",
        """dst dst memory int32 bfloat16
           stationary a memory int32 bfloat16
           moving b memory int32 bfloat16 partitions""",
        {"b": A, "dst": Result((16, 16), memory="psum")},
    ),
    Call(
        "nc_matmul_mx",
        "nisa.nc_matmul_mx(dst=dst, stationary=a.view(nl.float8_e5m2_x4), moving=b.view(nl.float8_e5m2_x4),"
        " stationary_scale=s, moving_scale=t, accumulate=False)",
        """dst dst memory float16
           stationary a memory
           moving b memory partitions
           stationary_scale s memory uint16
           moving_scale t memory uint16""",
        {"a": BYTES, "b": BYTES, "s": BYTES[:4, :4], "t": BYTES[:4, :4], "dst": Result((4, 4), memory="psum")},
        "trn3",
    ),
    Call(
        "nc_n_gather",
        "nisa.nc_n_gather(dst=dst, data=a, indices=i)",
        """dst dst memory bfloat16
           data a memory partitions
           indices i memory int32 partitions elements""",
        {"i": WORDS},
    ),
    Call(
        "nonzero_with_count",
        "nisa.nonzero_with_count(dst=dst, src=a)",
        "dst dst memory uint32\nsrc a memory int16 partitions",
        {"dst": Result((32, 17), "int32", fill=0)},
    ),
    Call(
        "quantize_mx",
        "nisa.quantize_mx(dst=q.view(nl.float8_e5m2_x4), src=a, dst_scale=s)\nnisa.tensor_copy(dst=dst, src=a)",
        "dst q memory\nsrc a memory float32 partitions\ndst_scale s memory uint16",
        {"a": HALF, "q": Result((32, 16), "uint8"), "s": Result((4, 4), "uint8"), "dst": Result((32, 16), "bfloat16")},
        "trn3",
    ),
    Call(
        "rand2",
        "nisa.rand2(dst=dst, min=b, max=s)",
        "dst dst float8_e4m3fn\nmin b bfloat16 elements\nmax s bfloat16 elements",
        {"b": VECTOR, "s": VECTOR * 2},
        "trn3",
    ),
    Call(
        "rand_set_state",
        "nisa.rand_set_state(src_seeds=w[:, 0:6])  # !" + COPY,
        "src_seeds w memory int32",
        {"w": WORDS},
    ),
    Call("rng", "nisa.rng(dst=dst)", "dst dst float32", {"dst": INT_OUT}),
    Call(
        "range_select",
        "nisa.range_select(dst=dst, on_true_tile=a, comp_op0=nl.greater_equal, comp_op1=nl.less, bound0=b, bound1=s,"
        " reduce_res=r)",
        """dst dst int32
           on_true_tile a int32 partitions elements
           bound0 b bfloat16 elements
           bound1 s int32 elements
           reduce_res r int32 elements""",
        {"b": VECTOR, "s": VECTOR, "r": SUM},
    ),
    Call("reciprocal", "nisa.reciprocal(dst=dst, data=a)", "data a partitions elements"),
    Call(
        "scalar_tensor_tensor",
        "nisa.scalar_tensor_tensor(dst=dst, data=a, op0=nl.multiply, operand0=s, op1=nl.add, operand1=b)",
        """data a partitions elements
           operand0 s bfloat16 elements
           operand1 b partitions elements""",
        {"b": A, "s": VECTOR},
    ),
    Call(
        "select_reduce",
        "nisa.select_reduce(dst=dst, predicate=u, on_true=a, on_false=f, reduce_res=r,"
        " reduce_cmd=nisa.reduce_cmd.reset_reduce)",
        """predicate u float32 int32 partitions elements
           on_true a int32 uint32 partitions elements
           on_false f int32 elements
           reduce_res r int32 elements""",
        {"u": BYTES, "f": VECTOR, "r": SUM},
    ),
    Call(
        "sequence_bounds",
        "nisa.sequence_bounds(dst=dst, segment_ids=a)",
        "dst dst memory int32\nsegment_ids a memory int16",
        {"a": np.ones((1, 9), np.float32), "dst": Result((1, 2, 9))},
    ),
    Call("set_rng_seed", "nisa.set_rng_seed(src_seeds=w[0:1, 0:1])  # !" + COPY, "src_seeds w uint16", {"w": WORDS}),
    Call(
        "tensor_copy_predicated",
        "nisa.memset(dst=dst, value=0.0)\nnisa.tensor_copy_predicated(dst=dst, src=a, predicate=u)",
        "src a bfloat16 partitions elements\npredicate u int32 float32 partitions elements",
        {"u": BYTES},
    ),
    Call(
        "tensor_partition_reduce",
        "nisa.tensor_partition_reduce(dst=dst, op=nl.add, data=a)",
        "dst dst memory\ndata a memory",
        {"dst": Result((1, 16))},
    ),
    Call("tensor_reduce", "nisa.tensor_reduce(dst=dst, op=nl.add, data=a, axis=1)", "data a partitions", {"dst": SUM}),
    Call(
        "tensor_scalar",
        "nisa.tensor_scalar(dst=dst, data=a, op0=nl.add, operand0=s, op1=nl.multiply, operand1=b)",
        """data a partitions elements
           operand0 s bfloat16 elements partitions
           operand1 b int32 elements partitions""",
        {"s": VECTOR, "b": VECTOR},
    ),
    Call(
        "tensor_scalar_cumulative",
        "nisa.tensor_scalar_cumulative(dst=dst, src=a, op0=nl.add, op1=nl.add, imm0=s, imm1=b,"
        " reduce_cmd=nisa.reduce_cmd.load_reduce)",
        """dst dst int32
           src a int32 partitions elements
           imm0 s bfloat16 elements
           imm1 b bfloat16 elements""",
        {"s": VECTOR, "b": VECTOR},
    ),
    Call(
        "tensor_scalar_reduce",
        "nisa.tensor_scalar_reduce(dst=dst, data=a, op0=nl.add, operand0=s, reduce_op=nl.add, reduce_res=r,"
        " reduce_cmd=nisa.reduce_cmd.load_reduce, reduce_init=b)",
        """data a partitions elements
           operand0 s bfloat16 elements
           reduce_res r int32 elements
           reduce_init b bfloat16 elements""",
        {"s": VECTOR, "b": VECTOR, "r": SUM},
    ),
    Call(
        "tensor_tensor",
        "nisa.tensor_tensor(dst=dst, data1=a, data2=b, op=nl.add)",
        "data1 a partitions elements\ndata2 b partitions elements",
        {"b": A},
    ),
    Call(
        "tensor_tensor_scan",
        "nisa.tensor_tensor_scan(dst=dst, data0=a, data1=b, initial=s, op0=nl.multiply, op1=nl.add)",
        "data0 a partitions elements\ndata1 b partitions elements\ninitial s partitions elements",
        {"b": A, "s": VECTOR},
    ),
]


@pytest.mark.parametrize(
    ("call", "operand", "tile", "kind"),
    [
        pytest.param(call, *case, id=f"{call.instruction}-{case[0]}-{case[2]}")
        for call in CALLS
        for case in call.cases()
    ],
)
def test_operand(call: Call, operand: str, tile: str, kind: str) -> None:
    tiles: dict[str, Any] = {"a": A, "dst": OUT, **call.tiles}
    change = broken(tiles[tile], tile, kind)
    rule = {"memory": "sbuf|psum", "partitions": "partition", "elements": "element|shape|size"}.get(
        kind, "dtype|fp32|nl."
    )
    rejects(call.body, call.instruction, operand, rule, change, generation=call.generation, **tiles)


NEWER = {
    "trn2": ("activate2", "exponential", "nc_matmul_mx", "quantize_mx", "rand2"),
    "trn1": ("range_select", "nonzero_with_count", "rand_set_state"),
}


@pytest.mark.parametrize(
    ("call", "older"),
    [
        pytest.param(call, older, id=call.instruction)
        for older, names in NEWER.items()
        for call in CALLS
        if call.instruction in names and ".view(" not in call.body
    ],
)
def test_generation(call: Call, older: str) -> None:
    tiles: dict[str, Any] = {"a": A, "dst": OUT, **call.tiles}
    rejects(
        call.body,
        call.instruction,
        "instruction",
        "generation",
        {"generation": older},
        generation=call.generation,
        **tiles,
    )
