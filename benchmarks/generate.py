"""Tokens per second of the demo's checkpoint: transformers as it is, and with its attention through the ops."""

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
from torch_paged.integrations.transformers import patch_model
from torch_paged.testing import assert_same


def works(settings: Settings) -> Iterator[Callable[[], Work]]:
    """Yield every case of the benchmark, unbuilt."""
    yield lambda: work(settings)


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


def compile_config() -> Any:
    """Return the settings with which transformers compiles its decode step on a CPU too."""
    config = transformers.CompileConfig(fullgraph=True, mode="default", dynamic=False)
    vars(config)["_compile_all_devices"] = True
    return config
