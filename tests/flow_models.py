"""The models of every row of the support table, with what ``generate`` and a forward of theirs are given."""

import inspect
from typing import Any

import torch
from tiny_models import CONTINUES_LINEAR_ATTENTION, FAMILIES, as_reference, make_model, ragged_batch
from tiny_multimodal import (
    ENCODER_DECODERS,
    IMAGE_ID,
    VISION_LANGUAGE,
    encoder_inputs,
    image_inputs,
    make_encoder_decoder,
    make_vision_language,
    row_alone,
)
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from torch_paged.integrations.transformers import PagedCache, patch_model, patch_report

BLOCK_SIZE = 4
NEW_TOKENS = 16
ROWS = (*FAMILIES, *ENCODER_DECODERS, *(family for family in VISION_LANGUAGE if family != "paligemma2"))
"""PaliGemma 2 has a test of its own: transformers 4.57 hides the wrong keys of it."""

Inputs = dict[str, Tensor]


class NotApplicable(Exception):
    """A flow has no meaning for a model: the reason is the note in the table."""


class Models:
    """A model that is all decoder, and its assistant, with the same weights each time.

    Args:
        family: a name of ``ROWS``.
        dtype: of the weights.
        patched: whether both are patched.
        reference: whether the weights are widened to float64, for a result to compare with.
    """

    def __init__(
        self, family: str, dtype: torch.dtype = torch.float32, *, patched: bool = False, reference: bool = False
    ) -> None:
        self.family = family
        self.model, self.assistant = (self.make(dtype).to(dtype) for _ in range(2))
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in self.assistant.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
        for model in (self.model, self.assistant):
            if patched:
                patch_model(model, block_size=BLOCK_SIZE)
            if reference:
                as_reference(model)

    def make(self, dtype: torch.dtype) -> Any:
        """Make the model; in half precision all its experts take part, for a rounding could choose other ones."""
        options = FAMILIES[self.family][2]
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        every = next((options[name] for name in names if name in options), 0)
        return make_model(self.family, **({} if dtype is torch.float32 else {"num_experts_per_tok": every}))

    @property
    def inputs(self) -> Inputs:
        """What ``generate`` is given: a ragged batch."""
        return {name: self._cast(value) for name, value in self._batch().items()}

    def _batch(self) -> Inputs:
        return ragged_batch()

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.model.dtype) if value.is_floating_point() else value

    def one_prompt(self) -> Inputs:
        """Return the row of the batch that has no padding."""
        return {name: value[1:2] for name, value in self.inputs.items()}

    def shorter(self) -> Inputs:
        """Return other prompts of another length."""
        return {name: value[:, 3:] for name, value in self.inputs.items()}

    @property
    def ids(self) -> Tensor:
        """The tokens (B, C) of the decoder that a first forward is given."""
        return self.inputs["input_ids"]

    @property
    def mask(self) -> Tensor:
        """Where they are no padding."""
        return self.inputs["attention_mask"]

    @property
    def first_columns(self) -> int:
        """Columns of the first of two forwards that prefill; all, where a model cannot take the prompt in two."""
        return self.columns if self.model._is_stateful and not CONTINUES_LINEAR_ATTENTION else 10

    @property
    def columns(self) -> int:
        """Columns of what ``generate`` returns that are no new tokens."""
        return self.ids.shape[1]

    def cache(self, **options: Any) -> Any:
        """Return an empty cache of the kind that the model uses; the options are those of a paged one."""
        if patch_report(self.model) is None:
            return DynamicCache(config=self.model.config)
        return PagedCache(self.model.config, block_size=BLOCK_SIZE, **options)

    def generate(self, **options: Any) -> Any:
        """Return the output of greedy generation from the batch, unless told otherwise."""
        settings = {**self.inputs, "max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
        given = {name: value for name, value in settings.items() if value is not None}
        return self.model.generate(**given, return_dict_in_generate=True)

    def tokens(self, **options: Any) -> Inputs:
        """Return the tokens of generation."""
        return {"tokens": self.generate(**options).sequences}

    def forward(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Return the logits of a forward without gradients, the positions counted by the mask."""
        if mask is not None and "position_ids" in inspect.signature(self.model.forward).parameters:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            return self.model(input_ids=ids, attention_mask=mask, **options).logits

    def alone(self, row: int, tokens: Tensor, steps: int) -> Tensor:
        """Return the logits that chose the last ``steps`` of a row's tokens: one forward without its padding."""
        real = torch.ones_like(tokens, dtype=torch.bool)
        real[: self.columns] = self.mask[row].bool()
        ids = tokens[real][None, :-1]
        return self.forward(ids, torch.ones_like(ids))[0, -steps:]  # gemma3n shares keys in a cache only

    def next_turn(self, tokens: Tensor) -> dict[str, Any]:
        """Return what ``generate`` is given to go on after its tokens."""
        ids = torch.cat([tokens, torch.tensor([[9, 8, 7]] * len(tokens))], 1)
        return {"input_ids": ids, "attention_mask": widened(self.mask, ids, 1)}

    def embedded(self) -> Inputs:
        """Return the batch with embeddings in the place of ids."""
        inputs = self.inputs
        return {"inputs_embeds": self.model.get_input_embeddings()(inputs.pop("input_ids")).detach(), **inputs}

    def labelled(self) -> Inputs:
        """Return a row to train on."""
        ids = self.one_prompt()["input_ids"]
        return {"input_ids": ids, "labels": ids}


def weights_for(dtype: torch.dtype) -> float:
    """Return a factor of the weights: in half precision large ones make too much of a rounding."""
    return 1.0 if dtype is torch.float32 else 0.75


def widened(columns: Tensor, like: Tensor, value: int) -> Tensor:
    """Return numbers of columns, with ``value`` for the further columns that ``like`` has."""
    return torch.cat([columns, torch.full_like(like[:, columns.shape[1] :], value)], 1)


class EncoderDecoders(Models):
    """A model whose encoder reads the ragged batch, or features; forwards are given the batch's ids as a beginning."""

    columns = 1  # type: ignore[assignment]

    def make(self, dtype: torch.dtype) -> Any:
        return make_encoder_decoder(self.family, weights_for(dtype))

    def _batch(self) -> Inputs:
        return encoder_inputs(self.family)

    def shorter(self) -> Inputs:
        return self.inputs if "input_features" in self.inputs else super().shorter()

    @property
    def ids(self) -> Tensor:
        return ragged_batch()["input_ids"]

    @property
    def mask(self) -> Tensor:
        return torch.ones_like(self.ids)

    def cache(self, **options: Any) -> Any:
        cross = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return EncoderDecoderCache(super().cache(**options), cross)

    def forward(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        options = {**self.inputs, "decoder_attention_mask": mask, **options}
        with torch.no_grad():
            return self.model(decoder_input_ids=ids, **options).logits

    def alone(self, row: int, tokens: Tensor, steps: int) -> Tensor:
        inputs = {name: value[row : row + 1] for name, value in self.inputs.items()}
        if "input_ids" in inputs:
            real = inputs["attention_mask"].bool()
            inputs = {name: value[real][None] for name, value in inputs.items()}
        return self.forward(tokens[None, :-1], use_cache=False, **inputs)[0, -steps:]

    def next_turn(self, tokens: Tensor) -> dict[str, Any]:
        return {"decoder_input_ids": super().next_turn(tokens)["input_ids"]}

    def embedded(self) -> Inputs:
        if "input_features" in self.inputs:
            raise NotApplicable("the encoder reads features")
        return super().embedded()

    def labelled(self) -> Inputs:
        return {**self.one_prompt(), "labels": self.ids[1:2]}


class VisionLanguage(Models):
    """A model whose prompts have an image each."""

    def make(self, dtype: torch.dtype) -> Any:
        return make_vision_language(self.family, weights_for(dtype))

    def _batch(self) -> Inputs:
        return image_inputs(self.family)

    def one_prompt(self) -> Inputs:
        return row_alone(self.inputs, 1)

    def shorter(self) -> Inputs:
        return {name: value[:, 3:] if self._of_columns(value) else value for name, value in self.inputs.items()}

    @property
    def first_columns(self) -> int:
        return self.columns  # a prompt with an image can see itself

    def _of_columns(self, value: Tensor) -> bool:
        return value.shape == self.ids.shape

    def forward(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        if bool((ids == IMAGE_ID).any()):
            of_images = {
                name: value for name, value in self.inputs.items() if name not in ("input_ids", "attention_mask")
            }
            options = {**of_images, **options}
        if mask is not None and (self.family != "qwen2_5_vl" or "pixel_values" not in options):
            options["position_ids"] = self._positions(mask)[..., -ids.shape[1] :]
        with torch.no_grad():
            return self.model(input_ids=ids, attention_mask=mask, **options).logits

    def _positions(self, mask: Tensor) -> Tensor:
        counted = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.family == "qwen2_5_vl":
            return (counted - 2).expand(3, -1, -1)  # after an image, whose 2 x 2 tokens take 2 positions
        return counted + (self.family == "paligemma")

    def alone(self, row: int, tokens: Tensor, steps: int) -> Tensor:
        out = self.generate(**row_alone(self.inputs, row), max_new_tokens=steps, output_logits=True)
        assert torch.equal(out.sequences[0, -steps:], tokens[-steps:]), "the row alone has other tokens"
        return torch.cat(out.logits)

    def next_turn(self, tokens: Tensor) -> dict[str, Any]:
        inputs = super().next_turn(tokens)
        for name, value in self.inputs.items():
            if name not in inputs:  # the images are in the cache
                inputs[name] = widened(value, inputs["input_ids"], 0) if self._of_columns(value) else None
        return inputs

    def labelled(self) -> Inputs:
        inputs = self.one_prompt()
        return {**inputs, "labels": inputs["input_ids"]}


def models_of(
    family: str, dtype: torch.dtype = torch.float32, *, patched: bool = False, reference: bool = False
) -> Models:
    """Make the models of a row of the table."""
    kind = EncoderDecoders if family in ENCODER_DECODERS else VisionLanguage if family in VISION_LANGUAGE else Models
    return kind(family, dtype, patched=patched, reference=reference)
