"""Rows by index in DMA: several columns of indices, transposes of gathered rows, sums into rows (SDK 2.32)."""

from typing import Any

import numpy as np
import pytest
from nki_sim_kernels import Result, i32, random, rejected, rejects, run, same

MANY = "nisa.dma_copy(dst=dst, src=x.ap(pattern=[[6, 384], [1, 6]], offset=0, vector_offset=idx))"
TABLE = random(500, 6)
IDX = np.random.default_rng(0).permutation(500)[:384].astype(np.int32).reshape(128, 3)


def test_columns_of_indices() -> None:
    """Indices are taken column by column, rows are written one after the other."""
    got = run(MANY, hbm={"x": TABLE}, idx=IDX, dst=Result((128, 18)))
    same(got.reshape(384, 6), TABLE[IDX.T.reshape(-1)])


def test_one_index_moves_a_block() -> None:
    """Block ids of a table that lies in HBM, a head in the offset, whole blocks of one head to a partition."""
    cache = random(9, 2, 4, 8)
    table = i32([5, 0, 8, 3])
    body = """
ids = nl.ndarray((3, 1), nl.int32)
nisa.dma_copy(dst=ids, src=table.ap(pattern=[[1, 3], [1, 1]], offset=1))
nisa.dma_copy(dst=dst, src=cache.ap(pattern=[[64, 3], [1, 32]], offset=32, vector_offset=ids, indirect_dim=0))
"""
    got = run(body, hbm={"cache": cache, "table": table}, dst=Result((3, 32)))
    same(got, cache[[0, 8, 3], 1].reshape(3, 32))


def test_a_block_by_a_number_read_at_run_time() -> None:
    cache = random(9, 2, 4, 8)
    table = i32([[5, 0, 8, 3]])
    body = """
ids = nl.ndarray((1, 4), nl.int32)
nisa.dma_copy(dst=ids, src=table)
nisa.dma_copy(dst=dst, src=cache.ap(pattern=[[8, 4], [1, 8]], offset=32, indirect_dim=0,
                                    scalar_offset=ids.ap(pattern=[[4, 1], [1, 1]], offset=2)))
"""
    same(run(body, hbm={"cache": cache, "table": table}, dst=Result((4, 8))), cache[8, 1])


def test_keys_of_blocks_transposed() -> None:
    """A gather and a transpose in one: (blocks, 1, tokens, dim) to (dim, 1, tokens, blocks)."""
    cache = random(40, 2, 4, 128, dtype="bfloat16")
    ids = np.random.default_rng(0).permutation(40)[:16].astype(np.uint32)[:, None]
    body = """
nisa.dma_transpose(dst=dst, axes=(3, 1, 2, 0), dge_mode=nisa.dge_mode.swdge,
                   src=cache.ap(pattern=[[1024, 16], [1, 1], [128, 4], [1, 128]], offset=512, vector_offset=ids))
"""
    got = run(body, hbm={"cache": cache}, ids=ids, dst=Result((128, 1, 4, 16), "bfloat16"))
    same(got, cache[ids[:, 0], 1:2].transpose(3, 1, 2, 0))


def test_skipped_rows_of_a_transpose() -> None:
    x = random(40, 128, dtype="bfloat16")
    ids = np.arange(16, dtype=np.uint32)[:, None] * 5
    body = """
nisa.memset(dst=dst, value=3.0)
nisa.dma_transpose(dst=dst, src=x.ap(pattern=[[128, 16], [1, 128]], offset=0, vector_offset=ids),
                   oob_mode=nisa.oob_mode.skip)
"""
    got = run(body, hbm={"x": x}, ids=ids, dst=Result((128, 16), "bfloat16"))
    wanted = np.full((128, 16), 3, x.dtype)
    wanted[:, :8] = x[ids[:8, 0]].T
    same(got, wanted)


def test_skipped_scalars() -> None:
    """An offset that lies outside drops the whole transfer, at either side."""
    for at, wanted in ((3, TABLE[3:4]), (500, np.full((1, 6), 2, np.float32)), (-1, np.full((1, 6), 2, np.float32))):
        body = f"""
at = nl.ndarray((1, 1), nl.int32)
nisa.memset(dst=at, value={at})
nisa.dma_copy(dst=dst, src=x.ap(pattern=[[6, 1], [1, 6]], offset=0, scalar_offset=at), oob_mode=nisa.oob_mode.skip)
"""
        same(run(body, hbm={"x": TABLE}, dst=Result((1, 6), fill=2.0)), wanted)
        x = TABLE.copy()
        back = body.replace("dst=dst, src=x.ap(", "src=a, dst=x.ap(")
        run(back, hbm={"x": x}, a=np.zeros((1, 6), np.float32))
        assert (x != TABLE).any(1).sum() == (at == 3)


def test_skipped_rows_of_a_sum() -> None:
    ids = i32([[7], [500], [3]])
    rows = "x.ap(pattern=[[6, 3], [1, 6]], offset=0, vector_offset=ids)"
    body = f"nisa.dma_compute(dst=dst, srcs=[dst, {rows}], reduce_op=nl.add, oob_mode=nisa.oob_mode.skip)"
    got = run(body, hbm={"x": TABLE}, ids=ids, dst=Result((3, 6), fill=1.0))
    same(got, np.stack([TABLE[7] + 1, np.ones(6, np.float32), TABLE[3] + 1]).astype(np.float32))


BF = random(40, 128, dtype="bfloat16")
U16 = np.arange(16, dtype=np.uint32)[:, None]
TURN = "nisa.dma_transpose(dst=dst, src=x.ap(pattern=[[128, 16], [1, 128]], offset=0, vector_offset=ids))"
TURNED: dict[str, Any] = {"hbm": {"x": BF}, "ids": U16, "dst": Result((128, 16), "bfloat16")}
MODE = TURN[:-1] + ", dge_mode=nisa.dge_mode.swdge)"
ROWS = "x.ap(pattern=[[6, 3], [1, 6]], offset=0, vector_offset=ids)"
ADD = f"nisa.dma_compute(dst=dst, srcs=[dst, {ROWS}], reduce_op=nl.add)"
ADDED: dict[str, Any] = {
    "hbm": {"x": TABLE},
    "ids": np.array([[7], [1], [3]], np.int32),
    "dst": Result((3, 6), fill=1.0),
    "a": random(3, 6),
}
COLUMNS: dict[str, Any] = {"hbm": {"x": TABLE.copy()}, "idx": IDX, "dst": Result((128, 18), fill=0.0)}
SCATTER = "nisa.dma_copy(dst=dst, src=x.ap(pattern=[[6, 384], [1, 6]], offset=0, vector_offset=idx))"
OVERLAP = "nisa.dma_copy(dst=dst[0:2], src=dst[2:4])"
TAKE = f"nisa.dma_copy(dst=dst, src={ROWS})"
WRONG = {"hbm": {"x": random(40, 128)}, "dst": Result((128, 16))}
LONG = "D = x.shape[1]\n" + TURN.replace("[[128, 16], [1, 128]]", "[[D, 16], [1, D]]").replace(
    "dst=dst", "dst=dst[0:128]"
)
DIRECT = "nisa.dma_transpose(dst=dst, src=x[0:16], dge_mode=nisa.dge_mode.hwdge)"
LONGER = {"x": random(40, 129, dtype="bfloat16")}
ALONE = "nisa.dma_compute(dst=dst, srcs=[a], reduce_op=nl.add)"
HARDWARE = "nisa.dma_copy(dst=dst, src=a, dge_mode=nisa.dge_mode.hwdge)"
URGENT = "nisa.dma_copy(dst=dst, src=a, priority=0, dge_mode=nisa.dge_mode.unknown)"
SCATTERED = f"nisa.dma_compute(dst={ROWS}, srcs=[a, {ROWS}], reduce_op=nl.add)"
STRICT = [
    rejected("dma_transpose|ap", ".*", "indices", {"ids": U16[:15]}, TURN, **TURNED),
    rejected("dma_transpose", ".*", "16", {"ids": np.arange(24, dtype=np.uint32)[:, None]}, TURN, **TURNED),
    rejected("dma_transpose", ".*", "128", {"ids": np.arange(32, dtype=np.uint32).reshape(16, 2)}, TURN, **TURNED),
    rejected("dma_transpose", "src", "byte|dtype", WRONG, TURN, **TURNED),
    rejected("dma_transpose", "dge_mode", "", ("swdge", "hwdge"), MODE, **TURNED),
    rejected("dma_transpose", "dst", "SBUF|PSUM", {"dst": Result((128, 16), "bfloat16", "psum")}, TURN, **TURNED),
    rejected("dma_compute", "unique_indices", "", ("nl.add)", "nl.add, unique_indices=False)"), ADD, **ADDED),
    rejected("dma_compute", "srcs", "two|2", ("[dst, ", "[dst, a, "), ADD, **ADDED),
    rejected("dma_compute", "srcs", "dst", ("[dst, ", "[a, "), ADD, **ADDED),
    rejected("dma_compute", "srcs.*", "", ("vector_offset=ids)]", "vector_offset=ids), 3.0]"), ADD, **ADDED),
    rejected("dma_compute", "scales", "1", ("nl.add)", "nl.add, scales=[1.0, 0.5])"), ADD, **ADDED),
    rejected("dma_copy", "dst", "overlap", ("dst[2:4]", "dst[1:3]"), OVERLAP, dst=Result((4, 3), fill=1.0)),
    rejected("dma_copy|ap", ".*", "indices", {"idx": IDX[:64]}, SCATTER, **COLUMNS),
    rejected("dma_copy", "src", "dtype|contiguous", {"dst": Result((128, 18), "bfloat16")}, SCATTER, **COLUMNS),
    rejected("dma_copy", "src", "", {"idx": IDX + 500}, SCATTER, **COLUMNS),
    rejected("dma_copy", "src", "generation|trn2|v3", {"generation": "trn1"}, TAKE, **ADDED),
    rejected("dma_transpose", "src|dst", "15", ("[128, 16]", "[128, 15]"), TURN, **TURNED),
    rejected("dma_transpose", "src|dst", "12[89]", {"hbm": LONGER}, LONG, **TURNED),
    rejected("dma_transpose", "dge_mode", "", ("hwdge", "swdge"), DIRECT, **TURNED),
    rejected("dma_copy", "dge_mode", "trn2|generation|v3", {"generation": "trn1"}, HARDWARE, **ADDED),
    rejected("dma_copy", "priority", "none", ("unknown", "none"), URGENT, generation="trn3", **ADDED),
    rejected("dma_compute", "srcs", "list", ("[a]", "a"), ALONE, **ADDED),
    rejected("dma_compute", "srcs", "dst", (f"dst={ROWS}", "dst=x[0:3]"), SCATTERED, **ADDED),
    rejected("dma_copy", "dst|src", "index|partition", {"dst": Result((1, 18))}, TAKE, **ADDED),
]  # fmt: skip


@pytest.mark.parametrize(("body", "instruction", "operand", "rule", "but", "setup"), STRICT)
def test_strict(body: str, instruction: str, operand: str, rule: str, but: Any, setup: dict[str, Any]) -> None:
    rejects(body, instruction, operand, rule, but, **setup)


def test_an_offset_that_leaves_the_row() -> None:
    """An index is tested, or the last address: with offset and free pattern within one row, both are the same."""
    body = "nisa.dma_copy(dst=dst, src=x.ap(pattern=[[6, 3], [1, 4]], offset=2, vector_offset=ids))"
    tiles: dict[str, Any] = {"hbm": {"x": TABLE}, "ids": ADDED["ids"], "dst": Result((3, 4))}
    same(run(body, **tiles), TABLE[[7, 1, 3], 2:])
    rejects(body, "ap", ".*", "row|6", ("offset=2", "offset=3"), **tiles)
