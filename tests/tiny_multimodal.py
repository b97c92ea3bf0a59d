"""Tiny random encoder-decoders and vision-language models, with an input for each."""

import inspect
from typing import Any

import torch
import transformers
from tiny_models import ALTERNATING, COMMON, IDS, VOCAB_SIZE, WINDOW, enlarge_weights, ragged_batch
from torch import Tensor

IMAGE_ID = 250
TEXT = {name: value for name, value in COMMON.items() if name != "head_dim"}
SEQ2SEQ: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "decoder_start_token_id": 2, "tie_word_embeddings": False, **IDS}
LAYERS = {
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
ROPE_IN_SECTIONS: dict[str, Any] = (
    {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    if hasattr(transformers, "PreTrainedConfig")
    else {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 64,
}

ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "T5",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "tie_word_embeddings": True,  # newer versions tie them in any case
        },
    ),
    "bart": ("Bart", {**LAYERS, "max_position_embeddings": 128, "forced_eos_token_id": None, "scale_embedding": True}),
    "whisper": (
        "Whisper",
        {
            **LAYERS,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}

VISION_LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_conditional": (
        "Gemma3",
        {
            "text_config": {**COMMON, **WINDOW, **ALTERNATING, "query_pre_attn_scalar": 16},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_ID,
        },
    ),
    "paligemma": (
        "PaliGemma",
        {
            "text_config": {**COMMON, "model_type": "gemma"},
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "image_token_index": IMAGE_ID,
            "projection_dim": 64,
            "hidden_size": 64,
        },
    ),
    "paligemma2": (
        "PaliGemma",
        {
            "text_config": {**COMMON, **WINDOW, "model_type": "gemma2", "query_pre_attn_scalar": 16},
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "image_token_index": IMAGE_ID,
            "projection_dim": 64,
            "hidden_size": 64,
        },
    ),
    "llava": (
        "Llava",
        {
            "text_config": {**COMMON, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": IMAGE_ID,
            "vision_feature_layer": -1,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": {
                **TEXT,
                **ROPE_IN_SECTIONS,
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "patch_size": 7,
                "spatial_merge_size": 2,
                "temporal_patch_size": 1,
                "out_hidden_size": 64,
                "window_size": 28,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": IMAGE_ID,
            "vision_start_token_id": 251,
            "vision_end_token_id": 252,
            "video_token_id": 253,
        },
    ),
}


def make_encoder_decoder(family: str, factor: float = 1.0) -> Any:
    """Make an encoder-decoder whose tokens depend on what it attends to; ``factor`` makes its weights smaller."""
    name, options = ENCODER_DECODERS[family]
    return _make(name, {**SEQ2SEQ, **options}, factor * {"t5": 1.5, "bart": 0.7, "whisper": 3.0}[family])


def make_vision_language(family: str, factor: float = 1.0) -> Any:
    """Make a vision-language model whose tokens depend on what it attends to; ``factor`` makes its weights smaller."""
    name, options = VISION_LANGUAGE[family]
    return _make(name, {**options, "tie_word_embeddings": False}, factor * 2.0)


def _make(name: str, options: dict[str, Any], scale: float) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    enlarge_weights(model, scale)
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    return model


def encoder_inputs(family: str) -> dict[str, Tensor]:
    """Return what the encoder reads: ragged ids, or features for whisper."""
    if family != "whisper":
        return ragged_batch()
    features = torch.randn((3, 8, 40), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return {"input_features": features, "attention_mask": torch.ones((3, 40), dtype=torch.long)}


def image_inputs(family: str) -> dict[str, Tensor]:
    """Return two prompts of 8 and 11 tokens with an image in each, left-padded."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = 4 if family in ("gemma3_conditional", "qwen2_5_vl") else 16
    rows = []
    for length in (8, 11):
        text = torch.randint(10, 200, (length,), generator=generator)
        text[3] = 251  # what comes before an image in some of these models
        image = torch.full((num_tokens,), IMAGE_ID)
        rows.append(torch.cat([torch.zeros(11 - length, dtype=torch.long), text[:4], image, text[4:]]))
    ids = torch.stack(rows)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    pixels = torch.randn((2, 3, 28, 28), generator=generator, dtype=torch.float32)
    if family == "qwen2_5_vl":
        patches = pixels.reshape(2, 3, 4, 7, 4, 7).permute(0, 2, 4, 1, 3, 5).reshape(32, 147)
        if "mm_token_type_ids" in inspect.signature(transformers.Qwen2_5_VLForConditionalGeneration.forward).parameters:
            inputs["mm_token_type_ids"] = (ids == IMAGE_ID).long()
        return {**inputs, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    if family == "gemma3_conditional":
        inputs["token_type_ids"] = (ids == IMAGE_ID).long()
    elif family.startswith("paligemma"):
        inputs["token_type_ids"] = torch.zeros_like(ids)  # all of the prompt sees itself
    return {**inputs, "pixel_values": pixels}


def row_alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return the inputs of one of two rows, without its padding."""
    real = inputs["attention_mask"][row].bool()
    columns = len(real)
    return {
        name: value[row : row + 1, real] if value.shape[-1] == columns and value.ndim == 2 else value.chunk(2)[row]
        for name, value in inputs.items()
    }
