"""The benchmarks run, write what they promise, catch a wrong peer, and judge goals rightly. Nothing here is timed."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cache_quality, decode, geometries, goals, limits, native, peers, report
from benchmarks.inputs import attention_pools
from benchmarks.timing import race
from benchmarks.work import OURS, PEAK, Row, Settings
from torch_paged.testing import AttentionCase

ROW = Row(
    benchmark="decode",
    group="grid",
    variant="",
    case="case",
    dtype="bfloat16",
    batch=8,
    context=4096,
    block_size=16,
    heads=32,
    kv_heads=8,
    head_dim=128,
    threads=1,
    contender=OURS,
    median_us=100.0,
    minimum_us=90.0,
    samples=5,
    bytes=10_000_000,
    flops=0,
    peak_bytes=None,
)
SUBJECTS = ("decode", "isa", "prefill", "cache-write", "overhead", "generate", "scaling")


def goal(rows: list[Row], work: str, quantity: str) -> goals.Goal:
    [found] = [g for g in goals.goals(rows) if (g.work, g.quantity) == (work, quantity)]
    return found


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_runs_and_writes_its_file(
    subject: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([subject, "--tiny", "--threads", "1", "--seed", "3", "--out", str(tmp_path)])
    head, rows = report.read_csv(tmp_path / f"{subject}.csv")
    assert {"processor", "processor flags", "commit", "torch", "kernels", "seed", "last-level cache bytes"} <= set(head)
    assert (head["seed"], head["size"]) == ("3", "tiny")
    assert rows
    for row in rows:
        assert row.benchmark == subject
        assert row.threads == 1
        assert 0 < row.minimum_us <= row.median_us
        assert row.peak_bytes is None or row.peak_bytes >= 0
    assert any(row.contender == OURS for row in rows)
    lines = (tmp_path / f"{subject}.csv").read_text().splitlines()
    assert ",".join(field.name for field in fields(Row)) in lines
    written = (tmp_path / "README.md").read_text()
    assert rows[0].case in capsys.readouterr().out
    assert f"| {rows[0].case} | 1 |" in written
    command.main(["report", "--out", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == written


def test_sizes_of_decode_can_be_chosen(tmp_path: Path) -> None:
    sizes = ["--dtypes", "float32", "--batch", "1", "2", "--context", "30", "--head-dim", "32", "--block-size", "8"]
    command.main(["decode", "--tiny", "--threads", "1", "--out", str(tmp_path), *sizes])
    _, rows = report.read_csv(tmp_path / "decode.csv")
    assert {(r.dtype, r.batch, r.context, r.head_dim, r.block_size) for r in rows} == {
        ("float32", batch, 30, 32, 8) for batch in (1, 2)
    }
    assert set(peers.PEERS) - {"flex_attention"} < {r.contender for r in rows}


def test_a_wrong_peer_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = peers.contiguous_sdpa

    def wrong(pools: Any) -> Any:
        call = right(pools)
        return lambda pool: call(pool) + 1e-2

    monkeypatch.setitem(peers.PEERS, "contiguous SDPA", wrong)
    with pytest.raises(AssertionError, match=r"contiguous SDPA is wrong: error 0\.01"):
        command.main(["decode", "--tiny", "--threads", "1", "--out", str(tmp_path)])


def test_the_limit_reads_each_live_byte_once() -> None:
    case = AttentionCase("limit", (40, 7, 0, 33), num_kv_heads=2, block_size=16, head_dim=512)
    [arguments, *_] = attention_pools(case, 0)
    pieces, total = limits._pieces(arguments)
    assert total == 2 * (40 + 7 + 33) * 2 * 512 * 4
    seen = torch.zeros(arguments["kv_cache"].nbytes, dtype=torch.int32)
    for offset, size in pieces.T.tolist():
        assert 0 < size <= limits.PIECE_BYTES
        seen[offset : offset + size] += 1
    live = torch.zeros(arguments["kv_cache"].shape[1:4], dtype=torch.bool)  # (N, KH, S)
    for table, length in zip(arguments["block_tables"], arguments["context_lens"].tolist(), strict=True):
        for token in range(length):
            live[table[token // 16], :, token % 16] = True
    assert torch.equal(seen.view(2, *live.shape, 512 * 4).bool(), live[None, ..., None].expand(2, *live.shape, 512 * 4))
    assert seen.max() == 1


def test_unused_blocks_are_left_out_of_the_pools() -> None:
    case = AttentionCase("window", (160, 200), sliding_window=16, head_dim=16)
    pools = attention_pools(case, 0)
    assert pools[0]["kv_cache"].size(1) == 3
    assert len({arguments["kv_cache"].data_ptr() for arguments in pools}) == len(pools) > 1


def test_a_race_takes_turns_through_the_pools_and_keeps_the_best_variant() -> None:
    turns: list[tuple[str, int]] = []
    calls = {name: lambda pool, name=name: turns.append((name, pool)) for name in ("a", "b @slow", "b @fast")}
    times = race(calls, 5, seconds=0.01, most_samples=6)
    assert set(times) == {"a", "b"}
    assert times["b"].variant in ("slow", "fast")
    assert all(5 <= len(taken.samples) <= 6 for taken in times.values())
    timed = [pool for _, pool in turns[6:]]
    assert timed == [(timed[0] + i) % 5 for i in range(len(timed))]


@pytest.mark.parametrize(
    ("values", "bound", "at_least", "reached", "met"),
    [
        ((2.0, 8.0), 3.0, True, 4.0, False),  # one cell below 0.8 of the mean
        ((3.9, 4.1), 3.9, True, 3.9987, True),
        ((3.9, 4.1), 4.1, True, 3.9987, False),
        ((1.0, 1.1), 1.1, False, 1.0488, True),
        ((1.0, 1.3), 1.1, False, 1.1402, False),
        ((0.5, 1.0), 1.1, False, 0.7071, False),
        ((2.5,), 3.0, False, 2.5, True),
        ((-0.2,), 3.0, False, -0.2, True),
        ((3.5,), 3.0, False, 3.5, False),
        ((), 3.0, True, None, None),
    ],
)
def test_a_goal_is_judged_by_mean_and_worst_cell(
    values: tuple[float, ...], bound: float, at_least: bool, reached: float | None, met: bool | None
) -> None:
    judged = goals.Goal("work", "quantity", bound, values, at_least)
    assert judged.reached == (None if reached is None else pytest.approx(reached, abs=1e-4))
    assert judged.met is met


def test_goals_read_the_right_rows() -> None:
    def cell(case: str, ours: float, limit: float, sdpa: float, **columns: Any) -> list[Row]:
        row = replace(ROW, case=case, **columns)
        others = {"paged read": limit, "contiguous SDPA": sdpa}
        return [
            replace(row, median_us=ours),
            *(replace(row, contender=name, median_us=taken) for name, taken in others.items()),
        ]

    rows = [
        *cell("first", 100, 80, 300),
        *cell("second", 100, 72, 310),
        *cell("first", 60, 50, 200, threads=2),
        *cell("too small to judge", 100, 10, 10, bytes=1_000_000),
        *cell("drawn", 100, 10, 10, group="random"),
    ]
    share = goal(rows, "decode, bfloat16", "of the paged-read limit, 1 thread")
    assert share.values == pytest.approx((0.8, 0.72))
    assert share.met is True
    assert goal(rows, "decode, bfloat16", "against contiguous SDPA").values == pytest.approx((3.0, 3.1, 10 / 3))
    assert goal(rows, "decode, context >= 4096", "2 threads against 1").values == pytest.approx((100 / 60,))
    assert goal(rows, "decode, drawn shapes", "of the dtype's goal, 1 thread").values == pytest.approx((0.1 / 0.7,))
    assert goal(rows, "decode, float32", "against contiguous SDPA").met is None


def test_variants_are_compared_with_their_plain_case() -> None:
    rows = [
        replace(ROW, group="options", case="plain"),
        replace(ROW, group="options", case="capped", variant="cap", median_us=108.0),
        replace(ROW, group="options", case="plain 2", threads=2, median_us=50.0),
        replace(ROW, group="options", case="capped 2", variant="cap", threads=2, median_us=52.0),
        replace(ROW, group="quantised", case="bf16"),
        replace(ROW, group="quantised", case="int8", variant="int8", dtype="int8", median_us=50.0),
    ]
    assert goal(rows, "decode with cap", "time of the plain case").values == pytest.approx((1.08, 1.04))
    assert goal(rows, "decode, int8 cache", "against a bfloat16 cache").values == pytest.approx((2.0,))


def test_instruction_sets_are_compared_with_each_other() -> None:
    row = replace(ROW, benchmark="isa", group="isa")
    times = {OURS: 50.0, "avx512": 48.0, "avx2": 60.0, "generic": 150.0, "contiguous SDPA": 300.0}
    rows = [replace(row, contender=name, median_us=taken) for name, taken in times.items()]
    assert goal(rows, "AVX2 kernels, bfloat16", "speed over AVX-512").values == pytest.approx((0.8,))
    assert goal(rows, "generic kernels, bfloat16", "against contiguous SDPA").values == pytest.approx((2.0,))
    assert goal(rows[:1], "AVX2 kernels, bfloat16", "speed over AVX-512").values == ()


def test_each_instruction_set_runs_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    if native.kernels() is None:
        pytest.skip("no build left the kernels' object files here")
    libraries = {name: library for name in native.ISAS if (library := native.kernels(name)) is not None}
    assert {name: library.instruction_set().decode() for name, library in libraries.items()} == {
        n: n for n in libraries
    }
    assert "generic" in libraries
    assert native.ISA_VARIABLE not in os.environ
    assert native.kernels("no such kernels") is None


def test_published_rates_are_scaled_by_the_limit() -> None:
    rows = [replace(ROW, bytes=16_000_000, median_us=1000.0), replace(ROW, contender="paged read", median_us=800.0)]
    work = "decode, bfloat16, vLLM 0.33 elsewhere"
    assert goal(rows, work, "share of the limit over its 24 %").values == pytest.approx((0.8 * 33 / 8,))
    assert goal(rows, work, "GB/s over its 8").values == pytest.approx((2.0,))
    assert goal(rows, work, "GB/s over its 8").met is None


def test_shares_of_the_peak_count_what_each_row_did() -> None:
    ours = replace(ROW, benchmark="prefill", group="prefill", variant="512", flops=600, median_us=10.0)
    peak = replace(ours, contender=PEAK, flops=400, median_us=5.0)
    assert goal([ours, peak], "prefill, bfloat16", "of the register peak").values == pytest.approx((0.75,))


def test_drawn_shapes_depend_on_the_seed_alone() -> None:
    def names(seed: int) -> list[str]:
        return [build.args[1].name for build in decode.random_works(Settings(seed=seed))]  # type: ignore[attr-defined]

    assert len(names(0)) == 20
    assert names(0) == names(0) != names(1)


def test_geometries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--geometry", "tiny", "--context", "48", "--new-tokens", "5", "--out", str(tmp_path)]
    for way in geometries.WAYS:
        geometries.main([*sizes, "--ways", way, "--here"])
    shown = geometries.show(tmp_path, "tiny")
    errors = [float(str(cell)) for cell in list(shown.columns[4].cells)[:2]]
    assert errors[1] <= 2 * errors[0]


def test_a_quantised_cache_keeps_the_perplexity() -> None:
    model, windows = cache_quality.model_and_windows(16)
    plain, num_bytes = cache_quality.perplexity(model, windows, None)
    for dtype, share in ((torch.int8, 0.002), (torch.float8_e4m3fn, 0.005), (torch.float8_e5m2, 0.02)):
        rounded, rounded_bytes = cache_quality.perplexity(model, windows, dtype)
        assert rounded == pytest.approx(plain, rel=share)
        assert rounded != plain
        assert rounded_bytes < 0.6 * num_bytes
