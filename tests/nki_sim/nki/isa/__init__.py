"""nki.isa: the instructions of a NeuronCore (signatures: SDK 2.32 and 2.33 API reference)."""

from nki._errors import NkiValidationError
from nki._instruction import NkiInstruction
from nki._register import NkiScalar, VirtualRegister
from nki.isa._accumulate import (
    exponential,
    range_select,
    select_reduce,
    tensor_scalar_cumulative,
    tensor_scalar_reduce,
)
from nki.isa._copy import affine_select, iota, memset, tensor_copy, tensor_copy_predicated
from nki.isa._cores import core_barrier, sendrecv
from nki.isa._dma import dma_compute, dma_copy, dma_transpose
from nki.isa._enums import (
    dge_mode,
    dma_engine,
    engine,
    gpsimd_engine,
    matmul_perf_mode,
    nc_version,
    oob_mode,
    reduce_cmd,
    scalar_engine,
    tensor_engine,
    unknown_engine,
    vector_engine,
)
from nki.isa._gather import local_gather, nc_n_gather, nc_stream_shuffle
from nki.isa._mx import nc_matmul_mx, quantize_mx
from nki.isa._reduce import bn_aggr, bn_stats, tensor_partition_reduce, tensor_reduce, tensor_tensor_scan
from nki.isa._registers import (
    register_alloc,
    register_load,
    register_move,
    register_store,
    scalar_load,
    scalar_store,
)
from nki.isa._rng import dropout, rand2, rand_get_state, rand_set_state, rng, set_rng_seed
from nki.isa._scalar import activate2, activation, activation_reduce
from nki.isa._search import (
    max8,
    nc_find_index8,
    nc_match_replace8,
    nonzero_with_count,
    sequence_bounds,
    topk,
)
from nki.isa._tensor_engine import nc_matmul, nc_transpose
from nki.isa._vector import reciprocal, scalar_tensor_tensor, tensor_scalar, tensor_tensor
from nki.isa._version import get_nc_sub_version, get_nc_version

__all__ = [
    "NkiInstruction",
    "NkiScalar",
    "NkiValidationError",
    "VirtualRegister",
    "activate2",
    "activation",
    "activation_reduce",
    "affine_select",
    "bn_aggr",
    "bn_stats",
    "core_barrier",
    "dge_mode",
    "dma_compute",
    "dma_copy",
    "dma_engine",
    "dma_transpose",
    "dropout",
    "engine",
    "exponential",
    "get_nc_sub_version",
    "get_nc_version",
    "gpsimd_engine",
    "iota",
    "local_gather",
    "matmul_perf_mode",
    "max8",
    "memset",
    "nc_find_index8",
    "nc_match_replace8",
    "nc_matmul",
    "nc_matmul_mx",
    "nc_n_gather",
    "nc_stream_shuffle",
    "nc_transpose",
    "nc_version",
    "nonzero_with_count",
    "oob_mode",
    "quantize_mx",
    "rand2",
    "rand_get_state",
    "rand_set_state",
    "range_select",
    "reciprocal",
    "reduce_cmd",
    "register_alloc",
    "register_load",
    "register_move",
    "register_store",
    "rng",
    "scalar_engine",
    "scalar_load",
    "scalar_store",
    "scalar_tensor_tensor",
    "select_reduce",
    "sendrecv",
    "sequence_bounds",
    "set_rng_seed",
    "tensor_copy",
    "tensor_copy_predicated",
    "tensor_engine",
    "tensor_partition_reduce",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_scalar_cumulative",
    "tensor_scalar_reduce",
    "tensor_tensor",
    "tensor_tensor_scan",
    "topk",
    "unknown_engine",
    "vector_engine",
]
