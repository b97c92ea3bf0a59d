"""Plant one fault at a time in the kernels and see the tests catch it: ``make mutants``.

Each mutant is a copy of the tree with one replacement, which must match exactly once. Only what the replacement touches
is compiled again, for the instruction set of this machine. A mutant that no test catches is a hole in the tests: exit
status 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from torch_paged.backends.cpu.support import isa

ROOT = Path(__file__).parents[1]
KEYS = "keys.h"
SOFTMAX = "softmax.h"
KERNEL = "attention_kernel.h"
TILE = "tile_item.h"
TILE_SOFTMAX = "tile_softmax.h"
ATTENTION = (
    "tests/test_paged_attention.py",
    "tests/test_flash_attn_varlen.py",
    "tests/test_semantics.py",
    "tests/test_hidden_keys.py",
    "tests/test_combinations.py",
)
CACHE = (
    "tests/test_reshape_and_cache.py",
    "tests/test_quantize_and_cache.py",
    "tests/test_copy_blocks.py",
    "tests/test_gather_cache.py",
    "tests/test_merge_attention_states.py",
)
CAP = "    if (rule.cap != 0.0f) x = rule.cap * vtanh(x / rule.cap);\n"
ALIBI = "    if (row.slope != 0.0f) x = x - row.slope * vabs((float)(row.distance - i) - lanes);\n"
MASK = "    x = select_bits((uint32_t)(row.bits >> i), x, set1(kNegInf));\n"
FAR_FUTURE = time.time() + 10**8


@dataclass(frozen=True)
class Mutant:
    """One fault: the file under csrc_shims/cpu, what stands there, what stands there instead."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ATTENTION


MUTANTS = [
    Mutant("window one key too wide", "plan.h", "keys.lo = position - args.sliding_window + 1;",
           "keys.lo = position - args.sliding_window;"),
    Mutant("window one key too narrow", "plan.h", "keys.lo = position - args.sliding_window + 1;",
           "keys.lo = position - args.sliding_window + 2;"),
    Mutant("forward window one key too wide", "plan.h", "keys.hi = position + args.sliding_window;",
           "keys.hi = position + args.sliding_window + 1;"),
    Mutant("causality shows the next key", "plan.h", "keys.hi = position + 1;",
           "keys.hi = position + 2 < keys.hi ? position + 2 : keys.hi;"),
    Mutant("attention chunk begins one key early", "plan.h",
           "position / args.attention_chunk * args.attention_chunk;",
           "position / args.attention_chunk * args.attention_chunk - 1;"),
    Mutant("wrong block", KEYS, "? seq.table[page] : 0;", "? seq.table[page > 0 ? page - 1 : 0] : 0;"),
    Mutant("dropped last split", KERNEL, "i < seq.num_splits;", "i + 1 < seq.num_splits;"),
    Mutant("dropped last key", "attention.cpp", "Interval all{seq.kv_len(), 0};\n",
           "Interval all{seq.kv_len(), 0};\n  if (seq.kv_len() > 600) return {0, seq.kv_len() - 1};\n"),
    Mutant("dead slots are read", KEYS, "  point_dead_keys(~block.live, zeros, unit);\n", ""),
    Mutant("NaN reaches rows that do not see it", SOFTMAX, "mixed = seen_by_some & ~seen_by_all;", "mixed = 0;"),
    Mutant("NaN scale reaches rows that do not see it", SOFTMAX,
           "p = select_bits((uint32_t)(rows[g].bits >> i), p * loadu(rule.value_scale + i), vf{});",
           "p = p * loadu(rule.value_scale + i);"),
    Mutant("new keys shifted by one", KEYS, "block.key0 + i - seq.context_len : 0;",
           "block.key0 + (i > block.split ? i - 1 : i) - seq.context_len : 0;"),
    Mutant("sink counted twice", SOFTMAX, "(args.sinks ? __builtin_expf(sink - base) : 0.0f)",
           "(args.sinks ? 2.0f * __builtin_expf(sink - base) : 0.0f)"),
    Mutant("max_logits includes the sink", SOFTMAX, "args.max_logits[row] = max;",
           "args.max_logits[row] = max > sink ? max : sink;"),
    Mutant("lse in base 2", SOFTMAX, "lse = base + __builtin_logf(total);", "lse = base + __builtin_log2f(total);"),
    Mutant("scale of the wrong head", KEYS, "cache.scales + head * cache.scale_stride_head",
           "cache.scales + (head ? head - 1 : 0) * cache.scale_stride_head"),
    Mutant("keys' scale for values", KEYS, "(cache.latent ? 0 : cache.scale_stride_kv)", "0"),
    Mutant("cap after ALiBi", SOFTMAX, CAP + ALIBI, ALIBI + CAP),
    Mutant("cap after mask", SOFTMAX, CAP + ALIBI + MASK, ALIBI + MASK + CAP),
    Mutant("ALiBi without the absolute value", SOFTMAX, "vabs((float)(row.distance - i) - lanes)",
           "((float)(row.distance - i) - lanes)"),
    Mutant("mask of the wrong head", KEYS, "args.mask_heads == args.num_heads ? query_head : kv_head",
           "args.mask_heads == args.num_heads ? kv_head : kv_head"),
    Mutant("mask read one column late", KEYS, "+ row * args.mask_stride_row + key0;",
           "+ row * args.mask_stride_row + (key0 ? key0 - 1 : 0);"),
    Mutant("row sum not rescaled", SOFTMAX, "        storeu(sum + g * W, loadu(sum + g * W) * shrink);\n", ""),
    Mutant("splits merged unweighted", KERNEL, "right = other == kNegInf ? 1.0f : __builtin_expf(other - base);",
           "right = 1.0f;"),
    Mutant("query head reads the wrong kv head", KERNEL, "item.head_begin + i / rows) * group + i % rows % group;",
           "item.head_begin + i / rows) * group + (group - 1 - i % rows % group);"),
    Mutant("tile's sum not rescaled", TILE_SOFTMAX, "loadu(sum + m * W) * shrink[m];", "loadu(sum + m * W);"),
    Mutant("tile ignores the mask", TILE, "all = plain && !args.attn_mask && ", "all = plain && "),
    Mutant("tile drops its last keys", TILE, "keys.end = (uint8_t)(64 - __builtin_clzll(some));",
           "keys.end = (uint8_t)(__builtin_clzll(some) ? 63 - __builtin_clzll(some) : 64);"),
    Mutant("logits go to base 2 before the maximum leaves", SOFTMAX, "loadu(s + g * 64 + i) * factor - base[g])",
           "(loadu(s + g * 64 + i) * (factor * kLog2E) - base[g] * kLog2E) / kLog2E)"),
    Mutant("a tile's logits go to base 2 before the maximum leaves", TILE_SOFTMAX,
           "const vf x = loadu(s + m * 64 + i) * factor - base[m];",
           "const vf x = (loadu(s + m * 64 + i) * (factor * kLog2E) - base[m] * kLog2E) / kLog2E;"),
    Mutant("huge products are not made logits", SOFTMAX, "if (__builtin_expect(large, false))", "if (large && false)",
           ("tests/test_faults_values.py",)),
    Mutant("a tile's huge products are not made logits", TILE_SOFTMAX, "any_above(size, kLargeLogit)", "false",
           ("tests/test_faults_values.py",)),
    Mutant("huge products change the rows beside them", SOFTMAX, "const float less = large ? 0.0f : *base;",
           "large = true;\n  const float less = 0.0f;", ("tests/test_faults_values.py",)),
    Mutant("tile shrinks though the maximum stays", TILE_SOFTMAX, "vexp(old - finite)",
           "vexp(old - finite * 0.9999999f)"),
    Mutant("tile adds poisoned values that a row does not see", TILE,
           "for (uint64_t left = poisoned.keys & s.bits[r]; left;", "for (uint64_t left = poisoned.keys; left;"),
    Mutant("sign of a quantised row lost", "rows_bytes.h", "magnitude, bytes, _mm512_set1_epi8((char)0x80), 0xf8",
           "magnitude, bytes, _mm512_set1_epi8((char)0x80), 0xf0"),
    Mutant("int8 -128 read as 0", "rows_bytes.h", "_mm512_movepi8_mask(index), _mm512_set1_epi8((char)0xc3)",
           "_mm512_movepi8_mask(index), _mm512_set1_epi8((char)0x80)"),
    Mutant("e4m3 NaN multiplied as a number", "rows_bytes.h", "byte == 0x7f :", "byte == 0x80 :"),
    Mutant("e5m2 infinity multiplied as a number", "rows_bytes.h", "return 0x7f80;", "return 0x7f7f;"),
    Mutant("staged rows not in the order of bytes", "rows_bytes.h",
           "_mm512_storeu_si512(p, _mm512_shuffle_i32x4(x, y, 0x88));", "_mm512_storeu_si512(p, x);"),
    Mutant("sums of bytes not in their natural order", "rows_bytes.h", "i / 64 * 64 + i % 64 / 4;",
           "i / 64 * 64 + i % 32 / 4;"),
    Mutant("low limbs of the probabilities lost", "rows_int8.h", ", 8), a[g * 4 + 2 + j]);",
           ", 8), _mm512_setzero_si512());"),
    Mutant("zero rows take the bits of all others", "rows_int8.h", "if (zero) value_scale[t] = 0.0f;", "(void)zero;"),
    Mutant("integers hide a NaN scale", "rows_int8.h", "if (bits >= 0x7f800000u)", "if (bits > 0x7fffffffu)"),
    Mutant("integer products of a query with NaN", KERNEL,
           "args.head_dim)) return false;", "args.head_dim)) return true;"),
    Mutant("unit of the wrong query row", "rows_int8.h", "query_unit(query + i / NK * ld, dim)",
           "query_unit(query, dim)"),
    Mutant("a group of rows sees what its first row sees", SOFTMAX, "masked_logits(rule, rows[g], count",
           "masked_logits(rule, rows[0], count"),
    Mutant("half of the lanes swapped", "rows.h", "i % 32 ? second : first", "i % 32 ? first : second"),
    Mutant("exp rounds its argument in base 2", "simd.h", "x - n * 0.693359375f + n * 2.12194440e-4f",
           "(x * kLog2E - n) * 0.69314718f", ("tests/test_faults_values.py",)),
    Mutant("e4m3 without NaN", "simd.h", " | (((magnitude + 1) << 7) & 0x4000)", "", CACHE),
    Mutant("quantisation rounds half up", "row_kernel.h", "((u >> kDrop) & 1u)", "1u", CACHE),
    Mutant("quantisation does not saturate", "row_kernel.h", "q > top ? top : q", "q", CACHE),
    Mutant("stored lanes beyond head_dim left stale", "cache_ops.cpp",
           "std::memset(out + dim * cache_es, 0, (cache.stored_dim - dim) * cache_es);", "(void)cache_es;", CACHE),
    Mutant("slot -1 written to slot 0", "cache_ops.cpp",
           "return args.slots ? args.slots[token] : args.slots32[token];",
           "return std::max<int64_t>(0, args.slots ? args.slots[token] : args.slots32[token]);", CACHE),
    Mutant("block copied after it was overwritten", "cache_ops.cpp", "if (copy >= 0) {", "if (copy > 99) {", CACHE),
    Mutant("gather ignores the left padding", "cache_ops.cpp", "args.starts ? args.starts[seq] : 0", "0", CACHE),
    Mutant("merge forgets the sink", "row_kernel.h", "(args.sinks ? __builtin_expf(sink - base) : 0.0f) + poison",
           "poison", CACHE),
    Mutant("a sink spoils rows without keys", SOFTMAX, "if (max != kNegInf || sum != 0.0f) {",
           "if (max != kNegInf || sum != 0.0f || args.sinks) {", ("tests/test_faults_values.py",)),
    Mutant("a sink spoils merged rows without keys", "row_kernel.h", "seen ? *sum / total : vf{}", "*sum / total",
           ("tests/test_faults_values.py",)),
]  # fmt: skip


def stale_sources(file: str) -> set[str]:
    """Return the sources to compile again: for a header, the kernels in use and whatever else includes it."""
    if file.endswith(".cpp"):
        return {file}
    return {f"kernels_{isa()}.cpp", *(["attention.cpp"] if file == "plan.h" else [])}


def prepare(folder: Path) -> None:
    """Copy the tree with its build, so that a mutant compiles one or two files."""
    for name in ("torch_paged", "csrc_shims", "tests", "build"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "MAX_JOBS": "2", "OMP_NUM_THREADS": "2"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def build(folder: Path, stale: set[str]) -> None:
    """Compile the stale sources only, whatever the time stamps say."""
    for path in (folder / "build").rglob("*.o"):
        stamp = 0 if f"{path.stem}.cpp" in stale else FAR_FUTURE
        os.utime(path, (stamp, stamp))
    result = run(folder, ["setup.py", "-q", "build_ext", "--inplace"])
    if result.returncode:
        raise SystemExit(f"mutants: the build failed\n{result.stderr[-3000:]}")


def catcher(folder: Path, tests: tuple[str, ...]) -> str | None:
    """Return the first test that fails, or None."""
    result = run(folder, ["-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests])
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if result.returncode not in (0, 1) and not failed:
        return f"the run ended with status {result.returncode}"
    return failed[0].split(" - ")[0].removeprefix("FAILED tests/") if failed else None


def caught_by(mutant: Mutant, folder: Path) -> str | None:
    path = folder / "csrc_shims" / "cpu" / mutant.file
    original = path.read_text()
    if original.count(mutant.old) != 1:
        raise SystemExit(f"mutants: '{mutant.name}' must match once in {mutant.file}, got {original.count(mutant.old)}")
    path.write_text(original.replace(mutant.old, mutant.new))
    stale = stale_sources(mutant.file)
    try:
        build(folder, stale)
        return catcher(folder, mutant.tests)
    finally:
        path.write_text(original)
        for built in (folder / "build").rglob("*.o"):  # the next build must not keep this fault
            if f"{built.stem}.cpp" in stale:
                built.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the mutants whose name contains this")
    only = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if only in mutant.name]
    table = Table("fault", "file", "caught by")
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        build(folder, set())
        without_fault = catcher(folder, (*ATTENTION, *CACHE))
        if without_fault is not None:
            raise SystemExit(f"mutants: the tests fail without a fault: {without_fault}")
        for mutant in track(chosen, description="mutants", console=Console(stderr=True)):
            test = caught_by(mutant, folder)
            survivors += test is None
            table.add_row(mutant.name, mutant.file, test or "[red]nothing[/red]")
    Console(width=160).print(table)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
