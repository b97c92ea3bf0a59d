"""Patch models of many kinds with one line, see what became of their layers, and check their tokens.

The models are tiny and random, made from configs: nothing is downloaded. Each generates greedily, unpatched and
patched; exit status 1 when a token differs.

    python examples/05_patch_any_model.py
    python examples/05_patch_any_model.py gemma3 deepseek_v3
"""

import argparse
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from torch_paged.integrations.transformers import patch_model, patch_report, unpatch_model

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
OLD_NAMES = {"vocab_size": 256, "n_layer": 4, "n_head": 4, "hidden_size": 64, "eos_token_id": None, "pad_token_id": 0}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SIZES, **WINDOWS, "head_dim": 16}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**SIZES, **WINDOWS, "head_dim": 16, "num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**SIZES, **LATENT}),
    "bloom": ("BloomForCausalLM", "BloomConfig", OLD_NAMES),
}

console = Console(highlight=False)


def make_model(name: str) -> Any:
    """Make a random model whose tokens depend on what it attends to."""
    model_class, config_class, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Patch models of many kinds.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args(argv)
    if unknown := set(args.models) - set(MODELS):
        parser.error(f"MODEL must be one of {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    prompts = torch.randint(2, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompts)
    mask[0, :5] = mask[2, :11] = 0  # ragged, padded on the left
    inputs = {"input_ids": prompts * mask, "attention_mask": mask}
    settings = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "return_dict_in_generate": True}

    table = Table("model", "what patch_model did", "peak blocks", "tokens")
    all_equal = True
    for name in track(args.models or MODELS, "generating", console=console, transient=True):
        model = make_model(name)
        expected = model.generate(**inputs, **settings).sequences
        patch_model(model, block_size=4)
        result = model.generate(**inputs, **settings)
        equal = torch.equal(result.sequences, expected)
        all_equal &= equal
        peak = str(result.past_key_values.peak_blocks)
        table.add_row(name, str(patch_report(model)), peak, "equal" if equal else "different")
        unpatch_model(model)
    console.print(table)
    return 0 if all_equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
