"""Generate for many prompts of different lengths at once, without padding: settings of their own, streaming, faults.

The requests complete functions of Python's standard library. Some are greedy, some sample with a seed of their own, one
is streamed to the screen, one has a faulty logits processor. The tokens of each must be those that ``generate`` gives
for its prompt alone: exit status 1 when they differ.

    python examples/06_batch_generation.py
    python examples/06_batch_generation.py --requests 32 --max-new-tokens 64 --num-blocks 60
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from stdlib_source import is_held_out, stdlib_files
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessorList, TextStreamer

from torch_paged.integrations.transformers import GenerationOutput, GenerationRequest, generate_batch

CHECKPOINT = Path(__file__).parent / "checkpoints" / "stdlib-llama-2m"
FAULTY, STREAMED = 2, 5

console = Console(highlight=False)


def function_prompts(count: int) -> list[str]:
    """Return the first lines of functions from held-out files: more lines from one prompt to the next."""
    prompts: list[str] = []
    for name, path in stdlib_files():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        starts = [index for index, line in enumerate(lines) if line.lstrip().startswith("def ")]
        if is_held_out(name) and starts:
            start = starts[len(starts) // 2]
            prompts.append("".join(lines[start : start + 1 + len(prompts)]))
            if len(prompts) == count:
                break
    return prompts


def faulty_processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise KeyError("this processor never works")


def make_requests(tokenizer: Any, prompts: list[list[int]], new_tokens: int) -> list[GenerationRequest]:
    """Give every second request sampling settings and a seed, one a streamer and one a faulty processor."""
    requests = []
    for number, ids in enumerate(prompts):
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False)
        if number % 2:
            config = GenerationConfig(max_new_tokens=new_tokens, do_sample=True, temperature=0.8, top_p=0.9)
        requests.append(GenerationRequest(ids, config, seed=number))
    requests[STREAMED].streamer = TextStreamer(tokenizer)
    requests[FAULTY].logits_processor = LogitsProcessorList([faulty_processor])
    return requests


def generate_alone(model: Any, request: GenerationRequest) -> list[int]:
    """Return the new tokens of plain ``generate`` for one request."""
    torch.manual_seed(request.seed or 0)
    ids = torch.tensor([list(request.input_ids)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=request.generation_config)
    return out[0, ids.shape[1] :].tolist()


def show(tokenizer: Any, requests: list[GenerationRequest], outputs: list[GenerationOutput]) -> None:
    table = Table("request", "prompt", "new tokens", "preempted", "ends with")
    for number, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        config = request.generation_config
        assert config is not None
        end = repr(tokenizer.decode(output.generated_tokens)[-40:]) if output.error is None else repr(output.error)
        kind = "sampled" if config.do_sample else "greedy"
        table.add_row(
            f"{number} ({kind})",
            str(len(output.prompt_ids)),
            str(len(output.generated_tokens)),
            str(output.preemptions),
            end,
        )
    console.print(table, markup=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate for many prompts of different lengths at once.")
    parser.add_argument("--requests", type=int, default=12, help=f"at least {STREAMED + 1}")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, help="blocks of 16 tokens in the cache; few: requests are preempted")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, use_safetensors=True).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(CHECKPOINT)
    prompts = tokenizer(function_prompts(max(args.requests, STREAMED + 1)))["input_ids"]

    console.print(f"request {STREAMED}, as it comes:", style="bold")
    requests = make_requests(tokenizer, prompts, args.max_new_tokens)
    began = time.perf_counter()
    outputs = generate_batch(model, requests, num_blocks=args.num_blocks)
    seconds = time.perf_counter() - began
    show(tokenizer, requests, outputs)
    new_tokens = sum(len(output.generated_tokens) for output in outputs)
    console.print(f"{new_tokens} tokens in {seconds:.2f} s: {new_tokens / seconds:.0f} tokens/s")

    failed = [number for number, output in enumerate(outputs) if output.error is not None]
    well = [number for number in range(len(requests)) if number not in failed]
    equal = all(outputs[number].generated_tokens == generate_alone(model, requests[number]) for number in well)
    console.print(f"failed: {failed}; tokens of the others equal to generate(): {'yes' if equal else 'no'}")
    return 0 if equal and failed == [FAULTY] else 1


if __name__ == "__main__":
    raise SystemExit(main())
