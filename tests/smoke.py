"""Use an installed torch_paged once, without pytest: ``python smoke.py`` from outside the source tree."""

import sys
from pathlib import Path
from typing import Any

import torch

import torch_paged
from torch_paged import collect_env
from torch_paged.testing.compare import assert_attention, assert_same


def main() -> None:
    """Write, attend and compare with the reference; check that eager, compile and the registration agree."""
    source = Path(__file__).resolve().parents[1]
    if source in Path(torch_paged.__file__).resolve().parents and ".venv" not in torch_paged.__file__:
        sys.exit(f"smoke: torch_paged comes from the source tree ({torch_paged.__file__}), not from an install")
    print(collect_env.report())
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        kv_cache = torch.full((2, 8, 2, 4, 64), float("nan"), dtype=dtype)
        rows = torch.randn(9, 2, 64, generator=generator).to(dtype)
        slots = torch.tensor([*range(20, 24), *range(4, 8), 28])
        torch_paged.reshape_and_cache(rows, rows.flip(0), kv_cache, slots)
        query = torch.randn(1, 8, 64, generator=generator).to(dtype)
        tables, lengths = torch.tensor([[5, 1, 7]], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
        arguments: dict[str, Any] = {
            "query": query,
            "kv_cache": kv_cache,
            "block_tables": tables,
            "context_lens": lengths,
        }
        out = torch_paged.paged_attention(**arguments)
        assert_attention("paged_attention", arguments, out)
        torch.library.opcheck(torch.ops.paged.paged_attention.default, tuple(arguments.values()))
        compiled = torch.compile(torch_paged.paged_attention, fullgraph=True, backend="aot_eager")
        assert_same(compiled(**arguments), out)
    try:
        torch_paged.reshape_and_cache(rows, rows, kv_cache, slots + 100)
    except ValueError as error:
        print(f"a bad slot: {error}")
    else:
        sys.exit("smoke: a slot out of range was accepted")
    print(f"smoke test passed with torch {torch.__version__}")


if __name__ == "__main__":
    main()
