"""Names, order and defaults of arguments, and the members of enums, as documented (SDK 2.32 and 2.33 API reference)."""

import inspect
from typing import Any

import nki
import nki.isa as nisa
import nki.language as nl
import pytest
from nki_sim_kernels import STRICT, Result, random, refused_with, rejects, run, same

ISA = """
activate2(dst, op, data, imm0, imm1, op0, op1, relu_param=0.0, reverse0=False, reverse1=False, reduce_op=None,
 reduce_res=None, reduce_cmd=reduce_cmd.idle, engine=engine.scalar, name=None)
activation(dst, op, data, bias=None, scale=1.0, reduce_op=None, reduce_res=None, reduce_cmd=reduce_cmd.idle,
 engine=engine.scalar, name=None)
activation_reduce(dst, op, data, reduce_op, reduce_res, bias=None, scale=1.0, name=None)
affine_select(dst, pattern, channel_multiplier, on_true_tile, on_false_value, cmp_op=equal, offset=0, name=None)
bn_aggr(dst, data, name=None)
bn_stats(dst, data, name=None)
core_barrier(data, cores, engine=engine.gpsimd, name=None)
dma_compute(dst, srcs, reduce_op, scales=None, unique_indices=True, oob_mode=oob_mode.error, name=None)
dma_copy(dst, src, priority=None, oob_mode=oob_mode.error, dge_mode=dge_mode.unknown, engine=engine.unknown, name=None)
dma_transpose(dst, src, axes=None, priority=None, dge_mode=dge_mode.unknown, oob_mode=oob_mode.error, name=None)
dropout(dst, data, prob, name=None)
exponential(dst, src, max_value=0.0, reduce_res=None, reduce_cmd=reduce_cmd.idle, reduce_init=0.0, name=None)
get_nc_sub_version()
get_nc_version()
iota(dst, pattern, offset=0, channel_multiplier=0, name=None)
local_gather(dst, src_buffer, index, num_elem_per_idx=1, num_valid_indices=None, name=None)
max8(dst, src, name=None)
memset(dst, value, engine=engine.unknown, name=None)
nc_find_index8(dst, data, vals, name=None)
nc_match_replace8(dst, data, vals, imm, dst_idx=None, name=None)
nc_matmul(dst, stationary, moving, is_stationary_onezero=False, is_moving_onezero=False, is_transpose=False,
 accumulate=None, tile_position=(), tile_size=(), perf_mode=matmul_perf_mode.none, name=None)
nc_matmul_mx(dst, stationary, moving, stationary_scale, moving_scale, tile_position=None, tile_size=None,
 accumulate=None, name=None)
nc_n_gather(dst, data, indices, name=None)
nc_stream_shuffle(dst, src, shuffle_mask, name=None)
nc_transpose(dst, data, engine=engine.unknown, name=None)
nonzero_with_count(dst, src, index_offset=0, padding_val=-1, name=None)
quantize_mx(dst, src, dst_scale, name=None)
rand2(dst, min, max, name=None)
rand_get_state(dst, engine=engine.gpsimd, name=None)
rand_set_state(src_seeds, engine=engine.gpsimd, name=None)
range_select(dst, on_true_tile, comp_op0, comp_op1, bound0, bound1, reduce_cmd=reduce_cmd.reset_reduce,
 reduce_res=None, reduce_op=maximum, range_start=0, on_false_value=..., name=None)
reciprocal(dst, data, name=None)
register_alloc(x=None)
register_load(dst, src)
register_move(dst, src)
register_store(dst, src)
rng(dst, engine=engine.vector, name=None)
scalar_load(src)
scalar_store(dst, value)
scalar_tensor_tensor(dst, data, op0, operand0, op1, operand1, reverse0=False, reverse1=False,
 reduce_cmd=reduce_cmd.reset_reduce, reduce_op=..., reduce_res=None, name=None)
select_reduce(dst, predicate, on_true, on_false, reduce_res=None, reduce_cmd=reduce_cmd.idle, reduce_op=maximum,
 reverse_pred=False, name=None)
sendrecv(src, dst, send_to_rank, recv_from_rank, pipe_id, dma_engine=dma_engine.dma, name=None)
sequence_bounds(dst, segment_ids, name=None)
set_rng_seed(src_seeds, name=None)
tensor_copy(dst, src, engine=engine.unknown, name=None)
tensor_copy_predicated(dst, src, predicate, reverse_pred=False, name=None)
tensor_partition_reduce(dst, op, data, name=None)
tensor_reduce(dst, op, data, axis, negate=False, keepdims=False, name=None)
tensor_scalar(dst, data, op0, operand0, reverse0=False, op1=None, operand1=None, reverse1=False, engine=engine.unknown,
 name=None)
tensor_scalar_cumulative(dst, src, op0, op1, imm0, imm1=None, reduce_cmd=reduce_cmd.reset_reduce, name=None)
tensor_scalar_reduce(dst, data, op0, operand0, reduce_op, reduce_res=None, reverse0=False,
 reduce_cmd=reduce_cmd.reset_reduce, reduce_init=None, reduce_res_negate=False, name=None)
tensor_tensor(dst, data1, data2, op, engine=engine.unknown, name=None)
tensor_tensor_scan(dst, data0, data1, initial, op0, op1, reverse0=False, reverse1=False, name=None)
topk(val_dst, idx_dst, src, n, name=None)
"""
LANGUAGE = """
affine_range(start, stop=None, step=1)
empty_like(x, dtype=None, buffer=None, name='')
fori_loop(lower, upper, body_fun, step=1)
full(shape, fill_value, dtype, buffer=sbuf, name='')
ndarray(shape, dtype, buffer=sbuf, name='', address=None)
num_programs(axes=0)
ones(shape, dtype, buffer=sbuf, name='')
program_id(axis=0)
program_ndim()
sequential_range(start, stop=None, step=1)
static_range(start, stop=None, step=1)
while_loop(init, body_fun)
zeros(shape, dtype, buffer=sbuf, name='')
zeros_like(x, dtype=None, buffer=None, name='')
"""
TENSOR = """
ap(self, pattern, offset=None, scalar_offset=None, vector_offset=None, indirect_dim=0, dtype=None)
broadcast(self, dim, size)
expand_dim(self, dim)
flatten_dims(self, start_dim, end_dim)
is_contiguous(self)
permute(self, dims)
rearrange(self, src_pattern, dst_pattern, fixed_sizes=None)
reshape(self, shape)
reshape_dim(self, dim, shape)
select(self, dim, index)
slice(self, dim, start, end, step=1)
squeeze_dim(self, dim)
vector_select(self, dim, vector_offset)
view(self, dtype)
"""
ENUMS: dict[str, dict[str, Any]] = {
    "engine": {"unknown": 0, "tensor": 1, "scalar": 2, "gpsimd": 3, "dma": 4, "vector": 5, "sync": 6},
    "reduce_cmd": {"idle": 0, "reset": 1, "reduce": 2, "reset_reduce": 3, "load_reduce": 4},
    "dge_mode": {"unknown": 0, "swdge": 1, "hwdge": 2, "none": 3},
    "oob_mode": {"error": 0, "skip": 1},
    "matmul_perf_mode": {"none": "none", "double_row": "double_row"},
    "nc_version": {"gen2": 2, "gen3": 3, "gen4": 4},
    "dma_engine": {"dma": 1, "gpsimd_dma": 2},
}
REMOVED = (
    "tensor_copy_dynamic_src tensor_copy_dynamic_dst activation_accu shuffle exponential2 activation2 divide modulo"
)


def documented(table: str) -> dict[str, str]:
    """Return each signature of a table under the name that it is for."""
    lines = table.strip().replace("\n ", " ").splitlines()
    return {line.partition("(")[0]: line for line in lines}


def described(signature: inspect.Signature) -> list[tuple[str, Any]]:
    return [(parameter.name, parameter.default) for parameter in signature.parameters.values()]


def wanted(line: str) -> list[tuple[str, Any]]:
    """Return names and defaults of a documented signature, its defaults looked up in nki.isa and nki.language."""
    names: dict[str, Any] = {}
    names |= {name: getattr(nisa, name) for name in ENUMS}
    names |= {name: getattr(nl, name) for name in ("equal", "maximum", "sbuf")}
    exec(f"def {line}: ...", names)
    return described(inspect.signature(names[line.partition("(")[0]]))


def same_signature(function: Any, line: str) -> None:
    got = described(inspect.signature(function))
    if line.startswith("range_select"):  # the default stands for FP32_MIN
        got = [(name, ... if name == "on_false_value" else default) for name, default in got]
    assert got == wanted(line)


@pytest.mark.parametrize("name", documented(ISA))
def test_isa(name: str) -> None:
    same_signature(getattr(nisa, name), documented(ISA)[name])


@pytest.mark.parametrize("name", documented(LANGUAGE))
def test_language(name: str) -> None:
    same_signature(getattr(nl, name), documented(LANGUAGE)[name])


@pytest.mark.parametrize("name", documented(TENSOR))
def test_tensor(name: str) -> None:
    same_signature(getattr(nl.NkiTensor, name), documented(TENSOR)[name])


@pytest.mark.parametrize("name", documented(ISA))
def test_docstring_names_its_document(name: str) -> None:
    assert not STRICT or "SDK 2." in (inspect.getdoc(getattr(nisa, name)) or "")


@pytest.mark.parametrize(("enum", "member"), [(enum, member) for enum in ENUMS for member in ENUMS[enum]])
def test_enums(enum: str, member: str) -> None:
    value = getattr(getattr(nisa, enum), member).value
    assert value == ENUMS[enum][member]


@pytest.mark.parametrize("name", REMOVED.split())
def test_removed(name: str) -> None:
    assert not hasattr(nisa, name)


@pytest.mark.parametrize("name", ["tensor", "vector", "scalar", "gpsimd"])
def test_engine_constants(name: str) -> None:
    assert getattr(nisa, f"{name}_engine") == getattr(nisa.engine, name)


def test_classes() -> None:
    assert issubclass(nisa.NkiValidationError, Exception)
    assert inspect.isclass(nisa.VirtualRegister)
    assert described(inspect.signature(nisa.NkiScalar))[:2] == [("state", inspect.Parameter.empty), ("dtype", None)]
    assert inspect.isclass(nl.NKIObject)
    assert callable(nki.jit)
    assert callable(nki.simulate)


@pytest.mark.parametrize(
    ("body", "wanted_of"),
    [
        ("nisa.tensor_scalar(dst, a, nl.subtract, 1.0, True, nl.multiply, 2.0, False)", "(1 - a) * 2"),
        ("nisa.scalar_tensor_tensor(dst, a, nl.subtract, 1.0, nl.subtract, a, True, True)", "a - (1 - a)"),
        ("nisa.tensor_tensor(dst, a, a, nl.add)", "a + a"),
        ("nisa.activation(dst, nl.copy, a, None, 2.0)", "a * 2"),
    ],
)
def test_by_position(body: str, wanted_of: str) -> None:
    a = random(3, 4).round(1)
    same(run(body, a=a, dst=Result((3, 4))), eval(wanted_of, {"a": a}))


@pytest.mark.parametrize(
    ("call", "instruction", "argument"),
    [
        ("nisa.tensor_tensor(dst=dst, data1=a, data2=a, op=nl.add, mask=None)", "tensor_tensor", "mask"),
        ("nisa.tensor_copy(dst=dst, src=a, dtype=nl.float32)", "tensor_copy", "dtype"),
        ("nisa.dma_copy(dst=dst, src=a, dst_rmw_op=None)", "dma_copy", "dst_rmw_op"),
        ("nisa.dma_copy(dst=dst, src=a, unique_indices=True)", "dma_copy", "unique_indices"),
        ("nisa.activation(dst=dst, op=nl.copy, data=a, mask=None)", "activation", "mask"),
        (
            "nisa.scalar_tensor_tensor(dst, a, op0=nl.add, operand0=1.0, op1=nl.add, operand1=a, reduce_init=0.0)",
            "scalar_tensor_tensor",
            "reduce_init",
        ),
    ],
)
def test_unknown_argument(call: str, instruction: str, argument: str) -> None:
    extra = call[call.rindex(", ") : -1]
    fine, change = call.replace(extra, ""), (")", f"{extra})")
    rejects(fine, instruction, f"arguments|{argument}", argument, change, a=random(2, 3), dst=Result((2, 3)))


@pytest.mark.skipif(not STRICT, reason="the vendor's messages are its own")
def test_missing_argument() -> None:
    body = "nisa.tensor_tensor(dst=dst, data1=a, data2=a)"
    refused_with(lambda: run(body, a=random(2, 3), dst=Result((2, 3))), "tensor_tensor", "arguments|op", "op", None)


@pytest.mark.parametrize(
    ("good", "bad", "operand"),
    [("engine=nisa.engine.vector", "engine=5", "engine"), ("op=nl.add", "op='add'", "op"), ("op=nl.add", "op=1", "op")],
)
def test_not_a_member(good: str, bad: str, operand: str) -> None:
    body = "nisa.tensor_tensor(dst=dst, data1=a, data2=a, op=nl.add, engine=nisa.engine.vector)"
    rejects(body, "tensor_tensor", operand, "", (good, bad), a=random(2, 3), dst=Result((2, 3)))


def test_returns_an_instruction() -> None:
    body = "first = nisa.tensor_copy(dst=b, src=a)\nnisa.tensor_copy(dst=dst, src=b).depends_on(first)"
    a = random(3, 5)
    same(run("b = nl.ndarray((3, 5), nl.float32)\n" + body, a=a, dst=Result((3, 5))), a)
