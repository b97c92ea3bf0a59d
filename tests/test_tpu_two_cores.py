"""The attention kernels on two simulated cores at the same time: no races, and one core's scratch is its own."""

import inspect
import os
from typing import Any

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax_arrays import to_jax, to_torch

from torch_paged.backends.tpu import decode, varlen
from torch_paged.backends.tpu.block_sizes import CHIPS
from torch_paged.backends.tpu.bridge_interpret import COMPILER_OPTIONS, no_races
from torch_paged.backends.tpu.calls import jax_call
from torch_paged.testing import AttentionCase, assert_attention, build

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="simulated cores wait for each other: a thread for each is needed"
)
_PARAMETERS = inspect.signature(pltpu.InterpretParams).parameters
_CORES: dict[str, Any] = {name: 2 for name in ("num_cores_or_threads", "num_cores_per_device") if name in _PARAMETERS}
SIMULATED = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan", **_CORES)
SHAPE: dict[str, Any] = {"stored_dim": 128, "alibi": True, "sinks": True, "group": 2}


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("heads_of_one_sequence", context_lens=(40,), **SHAPE),
        AttentionCase("sequences", context_lens=(40, 0, 21), **SHAPE),
        AttentionCase("tiles", (37, 63, 9, 200), (17, 0, 1, 40), (17, 0, 1, 40), padding_rows=5, **SHAPE),
    ],
    ids=lambda case: case.name,
)
def test_two_cores(case: AttentionCase) -> None:
    arguments = build(case)
    call = jax_call(f"{case.op}.with_stats", arguments)
    function = decode.paged_attention if case.op == "paged_attention" else varlen.flash_attn_varlen
    run = jax.jit(
        lambda *arrays: function(*arrays, **call.options, chip=CHIPS["v4"], interpret=SIMULATED),
        compiler_options=COMPILER_OPTIONS,
    )
    with no_races(case.op):
        results = run(*(None if array is None else to_jax(array) for array in call.arrays))
        assert_attention(case.op, arguments, *map(to_torch, results))
