"""Tokens per second of whole models: transformers as it is, and with its attention through the ops."""

import functools
import logging
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.native import ROOT
from benchmarks.timing import Call
from benchmarks.work import OURS, Settings, Work
from torch_paged.integrations.transformers import generate_batch, patch_model
from torch_paged.testing import assert_same

RAGGED = "ragged prompts"
PADDED = "generate"
STATIC = "generate, static cache"
CONTINUOUS = "transformers generate_batch"
BATCH_TOKENS, PAGE_TOKENS = 512, 256
"""Of transformers' generate_batch: the best settings of those tried (16 to 512 tokens a page, 128 to 1024 a batch)."""
LENGTHS: dict[str, Callable[[int, float], float]] = {
    "mostly short": lambda longest, share: 16 * (longest / 16) ** share,
    "evenly spread": lambda longest, share: 16 + (longest - 16) * share,
}
"""How the lengths of the prompts lie between 16 and the longest: evenly by their logarithm, or by themselves."""


def works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Yield every case of the benchmark, unbuilt."""
    yield lambda: work(settings)
    for spread in LENGTHS:
        yield functools.partial(ragged_work, settings, spread)


def work(settings: Settings) -> Work:
    """Build the runs; each generates the same tokens greedily, in float32."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sys.path.insert(0, str(ROOT / "examples"))
    demo = runpy.run_path(str(ROOT / "examples" / "02_generate.py"))
    sys.path.pop(0)
    new_tokens = {"full": 96, "quick": 32, "tiny": 4}[settings.size]
    with torch.inference_mode(False):
        plain, tokenizer = demo["load"](demo["CHECKPOINT"], torch.float32)
        paged = patch_model(demo["load"](demo["CHECKPOINT"], torch.float32)[0])
    inputs = tokenizer(demo["held_out_prompts"](), return_tensors="pt", padding=True, return_token_type_ids=False)

    def run(model: Any, **options: Any) -> Call:
        lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

        def call(_: int) -> Tensor:
            with torch.inference_mode(False):
                return model.generate(**inputs, **lengths, do_sample=False, num_beams=1, **options)

        return call

    calls = {OURS: run(paged), "unpatched": run(plain)}
    if settings.size != "tiny":
        calls[f"{OURS} compiled"] = run(paged, compile_config=compile_config())
        calls["unpatched compiled"] = run(plain, compile_config=compile_config(), cache_implementation="static")
    expected = calls["unpatched"](0)

    def check(name: str, tokens: Any) -> None:
        assert_same(tokens, expected, f"tokens of {name}")

    columns = {
        "dtype": "float32",
        "batch": len(inputs["input_ids"]),
        "context": new_tokens,
        "block_size": 16,
        "heads": plain.config.num_attention_heads,
        "kv_heads": plain.config.num_key_value_heads,
        "head_dim": plain.config.head_dim,
    }
    return Work("generate", "generate", f"generate_{new_tokens}_tokens", columns, calls, 2, check)


def ragged_work(settings: Settings, spread: str) -> Work:
    """Build the runs of one batch of ragged prompts, greedy and in float32, on a llama of 29 million parameters."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    num_prompts, longest, new_tokens, layers = {
        "full": (16, 700, 48, 8),
        "quick": (8, 300, 16, 8),
        "tiny": (3, 20, 3, 2),
    }[settings.size]
    lengths = [round(LENGTHS[spread](longest, number / (num_prompts - 1))) for number in range(num_prompts)]
    random.Random(settings.seed).shuffle(lengths)
    generator = torch.Generator().manual_seed(settings.seed)
    prompts = [torch.randint(2, 8000, (length,), generator=generator).tolist() for length in lengths]
    plain, paged = ragged_model(layers), patch_model(ragged_model(layers))
    input_ids = torch.zeros(num_prompts, longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}

    def padded(model: Any, **more: Any) -> Call:
        def call(_: int) -> list[list[int]]:
            with torch.inference_mode(False):
                return model.generate(input_ids, attention_mask=mask, **options, **more)[:, longest:].tolist()

        return call

    def packed(_: int) -> list[list[int]]:
        with torch.inference_mode(False):
            outputs = generate_batch(paged, prompts, progress_bar=False, **options)
        return [output.generated_tokens for output in outputs]

    config = transformers.ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=num_prompts * (-(-(longest + new_tokens) // PAGE_TOKENS) + 1),
        max_batch_tokens=BATCH_TOKENS,
    )

    def continuous(_: int) -> list[list[int]]:
        generation_config = transformers.GenerationConfig(**options, eos_token_id=-1)
        with torch.inference_mode(False):
            outputs = plain.generate_batch(prompts, generation_config, config, warmup=False)
        return [outputs[f"req_{number}"].generated_tokens for number in range(num_prompts)]

    calls = {
        OURS: packed,
        PADDED: padded(plain),
        STATIC: padded(plain, cache_implementation="static"),
        f"patched {PADDED}": padded(paged),
        CONTINUOUS: continuous,
    }
    expected = calls[PADDED](0)

    def check(name: str, tokens: Any) -> None:
        different = sum(row != wanted for row, wanted in zip(tokens, expected, strict=True))
        assert different <= num_prompts // 16, f"{different} of {num_prompts} prompts get other tokens with {name}"

    columns = {
        "dtype": "float32",
        "batch": num_prompts,
        "context": new_tokens,
        "block_size": 16,
        "heads": plain.config.num_attention_heads,
        "kv_heads": plain.config.num_key_value_heads,
        "head_dim": plain.config.head_dim,
    }
    case = f"{num_prompts}_prompts_to_{longest}_{spread.replace(' ', '_')}"
    return Work("generate", RAGGED, case, columns, calls, 1, check, threads=(max(settings.threads),), variant=spread)


def ragged_model(layers: int) -> Any:
    """Make the model of the ragged batch, with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def compile_config() -> Any:
    """Return the settings with which transformers compiles its decode step on a CPU too."""
    config = transformers.CompileConfig(fullgraph=True, mode="default", dynamic=False)
    vars(config)["_compile_all_devices"] = True
    return config
