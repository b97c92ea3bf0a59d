"""Tiny random models of the families that the transformers integration serves, and a ragged batch for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 256
WINDOW_TOKENS = 8
PROMPT_COLUMNS = 17
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=WINDOW_TOKENS)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**COMMON, sliding_window=WINDOW_TOKENS, attn_logit_softcapping=2.0, query_pre_attn_scalar=16)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **COMMON,
            sliding_window=WINDOW_TOKENS,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=ALTERNATING,
        )
    ),
}


def make_model(family: str) -> Any:
    """Make a model whose weights are large enough for its tokens to depend on what it attends to."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
            elif "sinks" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.set_attn_implementation("eager")  # the one dense implementation that knows caps and sinks
    return model


def as_reference(model: Any) -> Any:
    """Turn a model into one that computes in float64, experts included where they can be told apart."""
    model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def ragged_batch() -> dict[str, Tensor]:
    """Return ids and mask of three left-padded prompts of 12, 17 and 6 tokens."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(2, VOCAB_SIZE, (3, PROMPT_COLUMNS), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    mask[2, :11] = 0
    return {"input_ids": input_ids * mask, "attention_mask": mask}
