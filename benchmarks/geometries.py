"""Published geometries with random weights in bfloat16: generate, unpatched and patched.

    python -m benchmarks.geometries [--geometry llama-3.2-1b] [--ways unpatched patched reference] [--out FOLDER]

Every way is a process of its own. All are given the same tokens, so their logits can be compared: the reference is the
same model, unpatched, in float32. Llama-3.2-1B takes about 3 GB of memory in bfloat16, and 8 GB as the reference.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.machine import PeakMemory
from benchmarks.native import ROOT
from torch_paged.integrations.transformers import patch_model

COMMON = {"max_position_embeddings": 8192, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": True}
GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
        },
    ),
    "qwen3-0.6b": (
        "Qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "tiny": (
        "Llama",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
    ),
}
WAYS = ("unpatched", "patched", "reference")


class GivenTokens(transformers.LogitsProcessor):
    """Lets every way write the same tokens, and notes the time of each."""

    def __init__(self, tokens: Tensor, prompt_tokens: int) -> None:
        self.tokens = tokens
        self.prompt_tokens = prompt_tokens
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave only the token that is due."""
        self.times.append(time.perf_counter())
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.tokens[input_ids.shape[1] - self.prompt_tokens]] = 0
        return forced


def make_model(geometry: str) -> Any:
    """Make the model with random weights in bfloat16."""
    name, options = GEOMETRIES[geometry]
    config = getattr(transformers, f"{name}Config")(**COMMON, **options, dtype=torch.bfloat16)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(before)


def measure(geometry: str, way: str, context: int, new_tokens: int) -> tuple[dict[str, Any], Tensor]:
    """Generate once, after a short run that warms up; return the figures and the logits of the new tokens."""
    transformers.logging.set_verbosity_error()
    model = make_model(geometry)
    if way == "reference":
        model.float()
    if way == "patched":
        patch_model(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, model.config.vocab_size, (1, context), generator=generator)
    prompt, tokens = ids[:, : context - new_tokens], ids[0, context - new_tokens :]

    def generate(inputs: Tensor, count: int) -> tuple[float, list[float], Tensor]:
        given = GivenTokens(tokens, inputs.shape[1])
        start = time.perf_counter()
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=[given],
        )
        return start, given.times, torch.cat(out.logits).float()

    generate(prompt[:, :16], 2)
    with PeakMemory() as memory:
        start, times, logits = generate(prompt, new_tokens)
    figures = {
        "prefill tokens/s": round(prompt.shape[1] / (times[0] - start), 1),
        "decode tokens/s": round((len(times) - 1) / (times[-1] - times[0]), 2),
        "peak MB": None if memory.num_bytes is None else round(memory.num_bytes / 1e6),
        "threads": torch.get_num_threads(),
        "context": context,
    }
    return figures, logits


def show(out: Path, geometry: str) -> Table:
    """Return the table of the ways that were measured."""
    table = Table(title=f"{geometry}, bfloat16, random weights")
    found = {way: out / f"{geometry}_{way}.json" for way in WAYS if (out / f"{geometry}_{way}.json").exists()}
    for head in (
        "way",
        "prefill tokens/s",
        "decode tokens/s",
        "peak MB",
        "largest logit error",
        "its root mean square",
    ):
        table.add_column(head, justify="left" if head == "way" else "right")
    logits = {way: load_file(path.with_suffix(".safetensors"))["logits"] for way, path in found.items()}
    reference = logits.get("reference")
    for way, path in found.items():
        figures = json.loads(path.read_text())
        errors = ["", ""]
        if reference is not None and way != "reference":
            error = logits[way] - reference
            errors = [f"{error.abs().max():.3g}", f"{error.pow(2).mean().sqrt():.3g}"]
        speeds = [str(figures[name]) for name in ("prefill tokens/s", "decode tokens/s", "peak MB")]
        table.add_row(f"{way}, {figures['threads']} threads, context {figures['context']}", *speeds, *errors)
    if reference is not None:
        table.caption = f"standard deviation of the reference's logits: {reference.std():.3g}"
    return table


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.geometries", description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=["llama-3.2-1b", "qwen3-0.6b"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--context", type=int, default=4096, help="tokens of the prompt and new ones")
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "latest" / "geometries")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for geometry in args.geometry:
        for way in args.ways:
            if args.here:
                figures, logits = measure(geometry, way, args.context, args.new_tokens)
                (args.out / f"{geometry}_{way}.json").write_text(json.dumps(figures))
                save_file({"logits": logits}, args.out / f"{geometry}_{way}.safetensors")
            else:
                command = [sys.executable, "-m", "benchmarks.geometries", "--here", "--geometry", geometry]
                command += ["--ways", way, "--context", str(args.context), "--new-tokens", str(args.new_tokens)]
                subprocess.run([*command, "--out", str(args.out)], check=True, cwd=ROOT)
        if not args.here:
            Console(width=None if sys.stdout.isatty() else 150).print(show(args.out, geometry))


if __name__ == "__main__":
    main()
