"""Compile one call for a chip with the compiler's dumps on, and print what they say as one line of JSON.

libtpu reads its flags once for a process, so that each call gets a process: ``python -m benchmarks.tpu_worker POINT``.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

_PASSES = "original|final_bundles"
_CYCLES = re.compile(r"estimated_cycles: (\d+)")
_OPERATION = re.compile(r'hlo_op_name: "(.*)"')
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*:\s*((?:>\s*)*)\{")
_ALLOCATION = re.compile(r"#allocation\d+ \[shape = .*?space=vmem, size = (0x[0-9a-f]+)")


def flags(folder: Path, *, estimate: bool) -> str:
    """Return what makes libtpu write its programs, and its estimates if wanted, to a folder."""
    programs = f"--xla_jf_dump_to={folder}/programs --xla_jf_dump_llo_text=true"
    passes = f"--xla_jf_dump_llo_pass_label_regex=.*({_PASSES}).*"
    return f"{programs} {passes}" + (f" --xla_jf_dump_static_llo_profile_to={folder}/profiles" if estimate else "")


def read(folder: Path, kernels: tuple[str, ...], tiles: int) -> dict[str, Any]:
    """Return the metrics of a program from its dumps.

    ``cycles``: the estimate of the whole program, operations around the kernels included; ``kernel_cycles``: of the
    kernels; ``loop_bundles``: instructions of a turn of the loop over blocks of keys, the inner loop over ``tiles`` of
    a block unrolled; ``spills``, ``vmem_bytes``: of the kernels.
    """
    cycles = {}
    for path in (folder / "profiles").glob("*.textproto"):
        text = path.read_text()
        operation, estimate = _OPERATION.search(text), _CYCLES.search(text)
        if operation and estimate:
            cycles[operation[1]] = int(estimate[1])
    found: dict[str, Any] = {
        "cycles": sum(cycles.values()) if set(kernels) <= cycles.keys() else None,
        "kernel_cycles": sum(cycles[name] for name in kernels) if set(kernels) <= cycles.keys() else None,
    }
    loops, spills, vmem = [], 0, 0
    for kernel in kernels:
        [bundles] = [p for p in (folder / "programs").glob("*-final_bundles.txt") if _is_of(p, kernel)]
        loop, spilled = _loop(bundles.read_text().split("control target key end")[1].splitlines(), tiles)
        loops.append(loop)
        spills += spilled
        [original] = [p for p in (folder / "programs").glob("*-00-original.txt") if _is_of(p, kernel)]
        vmem += sum(int(size, 16) for size in _ALLOCATION.findall(original.read_text()))
    return {**found, "loop_bundles": max(loops, default=0), "spills": spills, "vmem_bytes": vmem}


def _is_of(path: Path, kernel: str) -> bool:
    return bool(re.fullmatch(rf"\d+-{re.escape(kernel)}-\d+-[a-z_]+\.txt", path.name))


def _loop(lines: list[str], tiles: int) -> tuple[int, int]:
    """Return the bundles of the steady state's loop, and the spills of the kernel.

    It is the shortest of the deepest loops with at least a third of the matrix products of any: what a kernel does
    about keys that are not seen is longer, and may multiply twice. With several ``tiles`` that is the loop over tiles:
    then the bundles are those of the loop around it.
    """
    open_loops: list[list[int]] = []  # bundles and products of each loop that is not closed, the outermost first
    closed: list[tuple[int, int, int]] = []  # depth, products, bundles
    spills = 0
    for line in [*lines, "0 : {"]:
        if not (found := _BUNDLE.match(line)):
            continue
        depth = found[2].count(">")
        while len(open_loops) > (depth - 1 if found[1] == "LB" else depth):
            bundles, products = open_loops.pop()
            closed.append((len(open_loops) + 1, products, bundles))
        open_loops += [[0, 0] for _ in range(depth - len(open_loops))]
        for loop in open_loops:
            loop[0] += 1
            loop[1] += line.count("= vmatmul")
        spills += line.count("_spill]")
    depth, most, _ = max((loop for loop in closed if loop[1]), default=(0, 0, 0))
    deepest = [loop for loop in closed if loop[0] == depth and 3 * loop[1] >= most]
    depth, products, bundles = min(deepest, key=lambda loop: loop[2], default=(0, 0, 0))
    if tiles > 1:
        after = closed[closed.index((depth, products, bundles)) :]
        around = next(loop[2] for loop in after if loop[0] == depth - 1)
        bundles = around + (tiles - 1) * bundles
    return bundles, spills


def main() -> None:
    """Compile the point given as JSON."""
    point = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LIBTPU_INIT_ARGS"] = flags(folder, estimate=point["known"])
        from benchmarks import tpu_calls
        from torch_paged.backends.tpu import aot

        function, arguments = tpu_calls.build(point)
        program = aot.compile_for(point["chip"], aot.export_for(point["chip"], function, arguments))
        tokens, tiles = tpu_calls.tokens_and_tiles(point)
        metrics = {**read(folder, program.kernels, tiles), "tokens_per_block": tokens}
    print(json.dumps({**metrics, "accessed_bytes": program.accessed_bytes, "temp_bytes": program.temp_bytes}))


if __name__ == "__main__":
    main()
