"""Tiny random models of the families that the transformers integration serves, and a ragged batch for them."""

from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, cache_utils, masking_utils

from torch_paged.integrations.transformers import PagedCache
from torch_paged.integrations.transformers.versions import MASKS_TAKE_POSITIONS

VOCAB_SIZE = 256
WINDOW_TOKENS = 8
CHUNK_TOKENS = 8
PROMPT_COLUMNS = 17
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    **IDS,
}
OLD_NAMES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_layer": 4, "n_head": 4, "tie_word_embeddings": False, **IDS}
FALCON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
    **IDS,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
WINDOW = {"sliding_window": WINDOW_TOKENS}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED_KEYS = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 16}


def _without(names: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names.split()}


_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", COMMON),
    "qwen2": ("Qwen2", "ForCausalLM", _without("head_dim", COMMON)),
    "qwen3": ("Qwen3", "ForCausalLM", COMMON),
    "qwen3_moe": ("Qwen3Moe", "ForCausalLM", {**COMMON, **EXPERTS}),
    "mistral": ("Mistral", "ForCausalLM", {**COMMON, **WINDOW}),
    "mixtral": ("Mixtral", "ForCausalLM", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": (
        "Gemma2",
        "ForCausalLM",
        {**COMMON, **WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3": ("Gemma3", "ForCausalLM", {**COMMON, **WINDOW, **ALTERNATING, "query_pre_attn_scalar": 16}),
    "gemma3n": (
        "Gemma3n",
        "ForCausalLM",
        {
            **COMMON,
            **WINDOW,
            **ALTERNATING,
            **SHARED_KEYS,
            "altup_num_inputs": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4": ("Gemma4", "ForCausalLM", {**COMMON, **WINDOW, **ALTERNATING, **SHARED_KEYS, "global_head_dim": 32}),
    "gpt_oss": (
        "GptOss",
        "ForCausalLM",
        {**COMMON, **WINDOW, **ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4": (
        "Llama4",
        "ForCausalLM",
        {
            **COMMON,
            "intermediate_size": 64,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": CHUNK_TOKENS,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "no_rope_layers": [1, 1, 1, 0],
            "attn_temperature_tuning": True,
        },
    ),
    "phi3": ("Phi3", "ForCausalLM", {**_without("head_dim", COMMON), **WINDOW}),
    "gpt2": ("GPT2", "LMHeadModel", {**OLD_NAMES, "n_embd": 64, "n_positions": 512}),
    "bloom": ("Bloom", "ForCausalLM", {**OLD_NAMES, "hidden_size": 64}),
    "falcon": (
        "Falcon",
        "ForCausalLM",
        {**FALCON, "num_kv_heads": 2, "alibi": False, "new_decoder_architecture": True},
    ),
    "falcon_alibi": (
        "Falcon",
        "ForCausalLM",
        {**FALCON, "alibi": True, "new_decoder_architecture": False, "multi_query": False},
    ),
    "mpt": (
        "Mpt",
        "ForCausalLM",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 64,
            "n_layers": 4,
            "n_heads": 4,
            "max_seq_len": 512,
            "use_cache": True,
            **IDS,
        },
    ),
    "gptj": ("GPTJ", "ForCausalLM", {**OLD_NAMES, "n_embd": 64, "n_positions": 512, "rotary_dim": 8}),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", _without("num_key_value_heads head_dim", COMMON)),
    "opt": (
        "OPT",
        "ForCausalLM",
        {
            **_without("intermediate_size num_key_value_heads head_dim", COMMON),
            "ffn_dim": 96,
            "word_embed_proj_dim": 64,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        "ForCausalLM",
        {
            **_without("head_dim", COMMON),
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
        },
    ),
    "olmo3": ("Olmo3", "ForCausalLM", {**_without("head_dim", COMMON), **WINDOW}),
    "cohere2": ("Cohere2", "ForCausalLM", {**COMMON, **WINDOW, **ALTERNATING}),
    "qwen3_next": (
        "Qwen3Next",
        "ForCausalLM",
        {
            **COMMON,
            **EXPERTS,
            "shared_expert_intermediate_size": 32,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
}

if not hasattr(cache_utils, "LinearAttentionLayer"):
    del _FAMILIES["qwen3_next"]  # keeps a cache of its own kind, which patch_model refuses

FAMILIES = {family: parts for family, parts in _FAMILIES.items() if hasattr(transformers, parts[0] + parts[1])}
"""Of each family here the name and the ending of its classes, and the options of its config."""

CONTINUES_LINEAR_ATTENTION = hasattr(masking_utils, "create_recurrent_attention_mask")
"""Older versions forget the state of linear attention where several tokens follow, and read their padding."""

TEXT_CONFIGS = ("Gemma3", "Gemma3n", "Gemma4", "Llama4")
GATHERED = ("bloom", "falcon", "falcon_alibi", "gptj", "mpt")
"""Families whose attention does not go through transformers' interface."""

PLAIN = ("llama", "qwen3", "mistral", "gemma2", "gpt_oss")
"""Families that stand for the others where a flow does not depend on the kind of layer."""


def make_model(family: str, **changes: Any) -> Any:
    """Make a model whose weights are large enough for its tokens to depend on what it attends to.

    Args:
        family: a name of ``FAMILIES``.
        changes: other values of options that the family's config has.
    """
    name, ending, options = FAMILIES[family]
    options = {key: changes.get(key, value) for key, value in options.items()}
    config_name = f"{name}TextConfig" if name in TEXT_CONFIGS else f"{name}Config"
    torch.manual_seed(0)
    model = getattr(transformers, name + ending)(getattr(transformers, config_name)(**options)).eval()
    enlarge_weights(model, 2.5 if family in GATHERED else 1.5)
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")  # the one dense implementation that knows caps and sinks
    return model


def enlarge_weights(model: Any, scale: float = 1.5) -> None:
    """Give a model random weights that make its tokens depend on what it attends to."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / parameter.shape[-1] ** 0.5)
            elif "sinks" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def as_reference(model: Any) -> Any:
    """Turn a model into one that computes in float64, experts included where they can be told apart."""
    model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    else:
        for module in model.modules():
            if type(module).__name__ == "DeepseekV3TopkRouter":  # which weighs experts in float32
                module.register_forward_hook(lambda _, __, out: (out[0], out[1].double()))
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are their ids in two hexadecimal digits, but for the padding."""
    vocab = {"<pad>" if token == 0 else f"{token:02x}": token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def positions(cache: PagedCache) -> dict[str, Tensor]:
    """Return what a compiled forward is told where transformers counts positions outside the model."""
    return {"cache_position": cache.columns_tensor.clone()[None]} if MASKS_TAKE_POSITIONS else {}


def ragged_batch() -> dict[str, Tensor]:
    """Return ids and mask of three left-padded prompts of 12, 17 and 6 tokens."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(2, VOCAB_SIZE, (3, PROMPT_COLUMNS), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    mask[2, :11] = 0
    return {"input_ids": input_ids * mask, "attention_mask": mask}
