"""Compute a prompt's beginning once for all requests that share it, within a batch and across batches.

Sixteen requests begin with the same text and end with a question of their own, as with a system prompt or few-shot
examples. Reused blocks are not computed again; the tokens must not change: exit status 1 when they do.

    python examples/07_shared_prefix.py
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from stdlib_source import held_out_prompts, read_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_paged.integrations.transformers import BatchGenerator, GenerationOutput, patch_model

CHECKPOINT = Path(__file__).parent / "checkpoints" / "stdlib-llama-2m"
REQUESTS, PREFIX_TOKENS = 16, 300

console = Console(highlight=False)


def run(batch: BatchGenerator, prompts: Sequence[list[int]], new_tokens: int) -> tuple[list[GenerationOutput], float]:
    """Run the prompts to their end and return what became of them, and the seconds."""
    began = time.perf_counter()
    numbers = [batch.add_request(prompt, max_new_tokens=new_tokens, do_sample=False) for prompt in prompts]
    for _ in batch:
        pass
    return [batch.outputs[number] for number in numbers], time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compute a common prefix once.")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, use_safetensors=True).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(CHECKPOINT)
    patch_model(model)
    prefix = tokenizer(read_texts(held_out=True)[0])["input_ids"][:PREFIX_TOKENS]
    endings = tokenizer(held_out_prompts())["input_ids"]
    prompts = [[*prefix, *endings[number % 4][: 8 + number]] for number in range(REQUESTS)]

    with_reuse = BatchGenerator(model, num_blocks=1000)
    runs = {
        "without reuse": run(BatchGenerator(model, num_blocks=1000, prefix_reuse=False), prompts, args.max_new_tokens),
        "first batch": run(with_reuse, prompts, args.max_new_tokens),
        "second batch": run(with_reuse, prompts, args.max_new_tokens),
    }
    table = Table("", "prompt tokens", "of them reused", "seconds")
    for name, (outputs, seconds) in runs.items():
        reused = sum(output.reused_tokens for output in outputs)
        table.add_row(name, str(sum(map(len, prompts))), str(reused), f"{seconds:.2f}")
    console.print(table)

    tokens = [[output.generated_tokens for output in outputs] for outputs, _ in runs.values()]
    equal = tokens[0] == tokens[1] == tokens[2]
    console.print(f"tokens equal: {'yes' if equal else 'no'}")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
