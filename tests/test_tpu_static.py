"""The gate on static estimates: what the compiler's dumps say is read right, and costs may only get better."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

if tuple(map(int, importlib.metadata.version("libtpu").split(".")[:3])) < (0, 0, 51):
    pytest.skip("the estimates are of libtpu 0.0.51 and later", allow_module_level=True)
from benchmarks import tpu, tpu_gate, tpu_worker
from benchmarks.tpu_known import know

LOOPS = """control target key start
control target key end
     0   :  { %1 = smov.u32 0 }
  0x1 LB: > { %2 = vmatmul.bf16 %v1, %v2 }
  0x2   : > { %3 = vadd.f32 %v1, %v2 }
  0x3 LB: >> { %4 = vmatmul.bf16 %v1, %v2  ;;  %5 = vmatmul.bf16 %v3, %v2 }
  0x4   : >> { %6 = vst [#allocation5_spill] %v2 }
  0x5   : > { %7 = vadd.f32 %v1, %v2 }
  0x6 LB: >> { %8 = vadd.f32 %v1, %v2 }
  0x7   :  { %9 = vadd.f32 %v1, %v2 }
"""


@pytest.mark.parametrize(("tiles", "bundles"), [(1, 2), (3, 6 + 2 * 2)])
def test_the_loop_with_the_products_is_found(tiles: int, bundles: int) -> None:
    assert tpu_worker._loop(LOOPS.splitlines(), tiles) == (bundles, 1)


def add_known(values: Any, table: Any, x: Any) -> Any:
    """Return the sum over all blocks of what the kernel reads in its scalar operands."""

    def kernel(values: Any, table: Any, x: Any, out: Any) -> None:
        seq = pl.program_id(0)
        first, second = values[seq], table[seq * 2 + 1]
        out[...] = x[...] + (first + second).astype(jnp.float32)

    spec = pl.BlockSpec((8, 128), lambda seq, *_: (seq, 0))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=2, grid=(4,), in_specs=[spec], out_specs=spec),
        interpret=True,
    )(values * 2, table, x)


@pytest.mark.parametrize("values", [[3, 3, 3, 3], [1, 4, 7, 10], [1, 4, 7, 99]])
def test_known_operands_give_what_the_kernel_would_read(values: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda x, space: x)
    table = np.array([[5, 100], [5, 90], [5, 80], [5, 70]], np.int32).reshape(-1)
    arguments = (np.array(values, np.int32), table, np.zeros((32, 128), np.float32))
    expected = add_known(*arguments)
    assert float(expected[31, 0]) == values[3] * 2 + 70
    zeros = (np.zeros(4, np.int32), np.zeros(8, np.int32), arguments[2])
    assert jnp.array_equal(know(add_known, arguments)(*zeros), expected)


def test_costs_that_grow_are_told() -> None:
    before = {"a": {"cycles": 100.0, "loop_bundles": 10.0}, "b": {"cycles": 5.0}}
    assert tpu_gate.worse(before, before) == []
    now = {"a": {"cycles": 101.0, "loop_bundles": 9.0}, "b": {"spills": 4.0}, "c": {"cycles": 1.0}}
    assert tpu_gate.worse(now, before) == [
        "c has no committed figure",
        "a: cycles grew from 100.0 to 101.0",
        "b has no cycles any more",
    ]


def test_decode_costs_no_more_than_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = json.loads(tpu_gate.FIGURES.read_text())
    if committed["taken with"] != tpu.versions():
        pytest.skip(f"the figures were taken with {committed['taken with']}, this is {tpu.versions()}")
    monkeypatch.setattr(tpu, "MEMORY", tmp_path)
    name = "decode, v6e"
    now = {name: tpu_gate._figures(tpu.row(tpu_gate.POINTS[name]))}
    assert tpu_gate.worse(now, {name: committed["figures"][name]}) == []


def test_tables_and_plot_say_that_nothing_ran(tmp_path: Path) -> None:
    rows = [
        tpu.Row(
            way, chip, batch, context, 8, 16, known=True, cycles=cycles * batch * context, kernel_cycles=1, spills=0
        )
        for way, cycles in ((tpu.OURS, 5), (tpu.PAGED, 10))
        for chip in ("v5e", "v6e")
        for batch, context in ((8, 1024), (8, 8192), (64, 1024))
    ]
    for table in tpu.tables(rows):
        assert tpu.STATIC in table.title
    [decode] = [table for table in tpu.tables(rows) if table.title.startswith("decode, cycles")]
    assert len(decode.lines) == 8
    assert {line[7] for line in decode.lines} == {"0.50"}
    assert next(line for line in decode.lines if line[1:3] == ("64", "8192"))[5] == str(5 * 64 * 8192)
    tpu.draw(rows, tmp_path)
    assert (tmp_path / "tpu_decode.svg").stat().st_size > 10_000
    assert importlib.metadata.version("libtpu") in tpu.versions()
