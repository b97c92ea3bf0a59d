"""What a quantised cache costs in quality: perplexity of the demo's checkpoint, in bfloat16, on files it never saw.

    python -m benchmarks.cache_quality

All keys are read from the cache, a token's own too, as in decoding. The windows are the same for every cache.
"""

import argparse
import math
import runpy
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.native import ROOT
from torch_paged.integrations.transformers import PagedCache, patch_model

CACHES = {
    "bfloat16": None,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
WINDOW_TOKENS, BATCH = 256, 16


def model_and_windows(count: int) -> tuple[Any, Tensor]:
    """Return the demo's model, patched, and windows that lie evenly over its held-out files, shape (W, 257)."""
    sys.path.insert(0, str(ROOT / "examples"))
    demo = runpy.run_path(str(ROOT / "examples" / "02_generate.py"))
    sys.path.pop(0)
    model, tokenizer = demo["load"](demo["CHECKPOINT"], torch.bfloat16)
    ids: list[int] = []
    for text in demo["read_texts"](held_out=True):
        ids += [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    windows = torch.tensor(ids).unfold(0, WINDOW_TOKENS + 1, WINDOW_TOKENS)
    return patch_model(model), windows[:: max(1, len(windows) // count)][:count]


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, dtype: torch.dtype | None) -> tuple[float, int]:
    """Return the perplexity per token and the bytes of the cache of one batch."""
    total, num_bytes = 0.0, 0
    for batch in windows.split(BATCH):
        cache = PagedCache(model.config, dtype=dtype)
        logits = model(batch[:, :-1], past_key_values=cache).logits.float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        num_bytes = max(num_bytes, cache.peak_bytes)
    return math.exp(total / windows[:, 1:].numel()), num_bytes


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache_quality", description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=256, help="of 256 tokens")
    model, windows = model_and_windows(parser.parse_args(argv).windows)
    table = Table("cache", "perplexity per token", "beside bfloat16", "cache bytes of a batch")
    plain = perplexity(model, windows, None)[0]
    for name, dtype in CACHES.items():
        value, num_bytes = perplexity(model, windows, dtype)
        table.add_row(name, f"{value:.4f}", f"{value / plain - 1:+.2%}", f"{num_bytes:,}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
