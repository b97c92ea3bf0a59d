"""Generate text with a HuggingFace model, unpatched and through ``torch.ops.paged.*``, and compare.

The prompts are Python functions from files that the checkpoint's training never saw. Greedy tokens must be equal: exit
status 1 when they differ, 2 when the model cannot be used. In bfloat16 and float16 they may differ from a rounding tie
on, a step where the unpatched model hardly tells its two best tokens apart, and it is then said; in float32 never.

    python examples/02_generate.py
    python examples/02_generate.py --model PATH --dtype bfloat16 --compile
"""

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from stdlib_source import held_out_prompts, read_texts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig
from transformers.generation.streamers import BaseStreamer

from torch_paged.integrations.transformers import PagedCache, patch_model, unpatch_model

CHECKPOINT = Path(__file__).parent / "checkpoints" / "stdlib-llama-2m"
CHECKPOINT_PERPLEXITY_BELOW = 16.0
MEASURED_RUNS = 5
PERPLEXITY_WINDOWS, WINDOW_TOKENS = 64, 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

HELP_DTYPE = "dtype to run in; in bfloat16 and float16 tokens may differ from a rounding tie on, in float32 never"

console = Console(highlight=False)


class UnusableModel(Exception):
    """The model cannot be loaded or patched; the message is the one sentence to print."""


@dataclass(frozen=True)
class Run:
    """One measured ``generate``: new tokens only, and what its cache holds."""

    name: str
    tokens: Tensor  # (B, new tokens)
    seconds: float
    cache_bytes: int
    cache_note: str

    @property
    def tokens_per_second(self) -> float:
        return self.tokens.numel() / self.seconds


class ProgressStreamer(BaseStreamer):
    """Moves a progress bar by one for each step of ``generate``; the prompt comes first and does not count."""

    def __init__(self, progress: Progress, description: str, steps: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=steps)
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self._progress.advance(self._task)
        self._prompt_seen = True

    def end(self) -> None:
        self._prompt_seen = False


def load(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load model and tokenizer from a folder.

    Raises:
        UnusableModel: no such folder, no causal language model in it, or no tokenizer.
    """
    if not (path / "config.json").is_file():
        raise UnusableModel(f"--model must be a folder with a HuggingFace checkpoint (config.json), got '{path}'")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, padding_side="left")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnusableModel(f"--model '{path}' cannot be loaded: {reason[0]}") from error
    model.eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def patch(model: Any) -> None:
    """Patch the model.

    Raises:
        UnusableModel: the paged cache cannot serve it.
    """
    try:
        patch_model(model)
    except (NotImplementedError, ValueError) as error:
        raise UnusableModel(str(error)) from error


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any) -> float:
    """Return the perplexity per token over windows that lie evenly over the held-out files."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    token_ids: list[int] = []
    for text in read_texts(held_out=True):
        token_ids += start + tokenizer.encode(text, add_special_tokens=False)
    windows = torch.tensor(token_ids).unfold(0, WINDOW_TOKENS + 1, WINDOW_TOKENS)
    windows = windows[:: max(1, len(windows) // PERPLEXITY_WINDOWS)][:PERPLEXITY_WINDOWS]
    total = 0.0
    for chunk in windows.split(8):
        logits = model(input_ids=chunk[:, :-1], use_cache=False).logits.float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / windows[:, 1:].numel())


def generate(name: str, model: Any, inputs: Any, new_tokens: int, *, compiled: bool, progress: Progress) -> Run:
    """Generate greedily with the same sizes a few times, the first to warm up; the time is the median of the others."""
    config = None
    if compiled:
        config = CompileConfig(fullgraph=True, mode="default", dynamic=False)
        vars(config)["_compile_all_devices"] = True  # without it transformers compiles on accelerators only
    seconds: list[float] = []
    for label in ("warm-up", *("measured",) * MEASURED_RUNS):
        streamer = ProgressStreamer(progress, f"{name}, {label}", new_tokens)
        started = time.perf_counter()
        result = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            compile_config=config,
            streamer=streamer,
            return_dict_in_generate=True,
        )
        seconds.append(time.perf_counter() - started)
    cache = result.past_key_values
    if isinstance(cache, PagedCache):
        cache_bytes, note = cache.peak_bytes, f"{cache.peak_blocks} blocks at the peak; pool {cache.pool_bytes:,} bytes"
    else:
        cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        note = "one padded rectangle for each layer"
    new_tokens_only = result.sequences[:, inputs["input_ids"].shape[1] :]
    return Run(name, new_tokens_only, statistics.median(seconds[1:]), cache_bytes, note)


@torch.no_grad()
def is_rounding_tie(model: Any, inputs: Any, expected: Tensor, row: int, step: int) -> bool:
    """Say whether the unpatched model itself hardly tells its two best tokens apart at this step of this row.

    In float32 a tie is a gap below 1e-4 of the logits' standard deviation; in a shorter dtype, 8 of its roundings.
    """
    real = inputs["attention_mask"][row].bool()
    prefix = torch.cat([inputs["input_ids"][row][real], expected[row, :step]])
    logits = model(input_ids=prefix[None], use_cache=False).logits[0, -1].float()
    best, second = logits.topk(2).values
    if model.dtype == torch.float32:
        allowed = 1e-4 * logits.std()
    else:
        allowed = 8 * torch.finfo(model.dtype).eps * logits.abs().max()
    return bool(best - second < allowed)


def compare(model: Any, inputs: Any, expected: Tensor, actual: Tensor) -> bool:
    """Print whether the tokens are equal, and return whether that will do; ``model`` is the unpatched one."""
    rows, steps = expected.shape
    if torch.equal(expected, actual):
        console.print(f"[bold green]tokens equal:[/] yes, {rows} rows of {steps} tokens")
        return True
    equal = True
    for row in range(rows):
        differing = (expected[row] != actual[row]).nonzero()
        if len(differing):
            step = int(differing[0])
            tie = is_rounding_tie(model, inputs, expected, row, step)
            equal &= tie and model.dtype != torch.float32
            why = "a rounding tie of the unpatched model" if tie else "not a rounding tie"
            console.print(f"row {row} differs from token {step} of {steps} on: {why}")
    console.print("[bold yellow]tokens equal:[/] but for ties" if equal else "[bold red]tokens equal: no[/]")
    return equal


def print_texts(tokenizer: Any, inputs: Any, tokens: Tensor) -> None:
    """Print each prompt, and in bold what the model wrote behind it."""
    for row, continuation in enumerate(tokens):
        real = inputs["attention_mask"][row].bool()
        prompt = tokenizer.decode(inputs["input_ids"][row][real], skip_special_tokens=True)
        console.rule(f"prompt {row}: {int(real.sum())} tokens", align="left")
        text = tokenizer.decode(continuation, skip_special_tokens=True)
        console.print(f"[dim]{escape(prompt)}[/][bold]{escape(text)}[/]", soft_wrap=True)
    console.rule()


def print_runs(runs: list[Run]) -> None:
    """Print speed and cache size of the runs side by side."""
    table = Table("", "tokens/s", "seconds", "cache bytes", "cache")
    for run in runs:
        table.add_row(
            run.name, f"{run.tokens_per_second:.1f}", f"{run.seconds:.2f}", f"{run.cache_bytes:,}", run.cache_note
        )
    console.print(table)


def demonstrate(args: argparse.Namespace) -> int:
    """Run the whole comparison and return the exit status."""
    model, tokenizer = load(args.model, DTYPES[args.dtype])
    patch(model)
    unpatch_model(model)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{args.model.name}: {type(model).__name__}, {parameters / 1e6:.1f} million parameters, {args.dtype}")

    value = perplexity(model, tokenizer)
    own = args.model.resolve() == CHECKPOINT.resolve()
    good = not own or value < CHECKPOINT_PERPLEXITY_BELOW
    bound = f" (stated bound: below {CHECKPOINT_PERPLEXITY_BELOW})" if own else ""
    console.print(f"validation perplexity per token, held-out standard library: {value:.2f}{bound}")

    inputs = tokenizer(held_out_prompts(), return_tensors="pt", padding=True, return_token_type_ids=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        dense = generate("unpatched", model, inputs, args.max_new_tokens, compiled=False, progress=progress)
        patch_model(model)
        name = "torch_paged, compiled" if args.compile else "torch_paged"
        paged = generate(name, model, inputs, args.max_new_tokens, compiled=args.compile, progress=progress)
    unpatch_model(model)

    print_texts(tokenizer, inputs, paged.tokens)
    print_runs([dense, paged])
    equal = compare(model, inputs, dense.tokens, paged.tokens)
    if not good:
        console.print("[bold red]the checkpoint's perplexity is above its stated bound[/]")
    return 0 if equal and good else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder of a HuggingFace checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=HELP_DTYPE)
    parser.add_argument("--max-new-tokens", type=int, default=96, help="tokens to generate for each prompt")
    parser.add_argument("--compile", action="store_true", help="compile the decode step (fullgraph, inductor)")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be >= 1, got {args.max_new_tokens}")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.compile:
        torch._dynamo.config.error_on_recompile = True
    try:
        return demonstrate(args)
    except UnusableModel as error:
        print(f"02_generate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
