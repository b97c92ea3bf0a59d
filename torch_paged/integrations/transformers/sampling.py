"""How a request gets from logits to its next token, and when it ends: transformers' own processors and criteria."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from torch_paged.integrations.transformers.request import GenerationRequest

_ROWWISE = (
    EpsilonLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
"""Processors that look at each row of logits alone and at no ids."""
_UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


class Sampler:
    """Choose the tokens of one request.

    Args:
        model: that the request is for.
        request: settings, processors, criteria, seed.
        prompt_ids: its prompt.
        tokenizer: wanted by ``stop_strings``.
        generation_config: of the call; the request's own goes first.
        options: settings of the call that override its configuration.

    Raises:
        ValueError: settings that transformers refuses, or that leave no room for a new token.
        NotImplementedError: settings that need more than one sequence.
    """

    def __init__(
        self,
        model: Any,
        request: GenerationRequest,
        prompt_ids: Sequence[int],
        *,
        tokenizer: Any = None,
        generation_config: GenerationConfig | None = None,
        options: dict[str, Any],
    ) -> None:
        if request.generation_config is not None:
            generation_config, options = request.generation_config, {}
        num_prompt_tokens = len(prompt_ids)
        ids = torch.tensor([prompt_ids], device=model.device)
        config = _prepared_config(model, generation_config, options, ids)
        _check_supported(config)
        self.max_length: int = config.max_length
        if num_prompt_tokens >= self.max_length:
            raise ValueError(
                f"generate_batch: max_length must be > the prompt's {num_prompt_tokens} tokens, got {self.max_length}"
            )
        self._processors: Any = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=num_prompt_tokens,
            encoder_input_ids=ids,
            logits_processor=request.logits_processor or LogitsProcessorList(),
            device=model.device,
            model_kwargs={},
        )
        self._eos_token_ids: frozenset[int] = frozenset()
        self._criteria: list[StoppingCriteria] = []
        for criterion in model._get_stopping_criteria(
            generation_config=config,
            stopping_criteria=request.stopping_criteria or StoppingCriteriaList(),
            tokenizer=tokenizer,
        ):
            if type(criterion) is EosTokenCriteria:
                self._eos_token_ids |= set(criterion.eos_token_id.tolist())
            elif type(criterion) is MaxLengthCriteria:
                self.max_length = min(self.max_length, criterion.max_length)
            else:
                self._criteria.append(criterion)
        self._generator: torch.Generator | None = None
        if config.do_sample:
            seed = int(torch.randint(2**62, ())) if request.seed is None else request.seed
            self._generator = torch.Generator(model.device).manual_seed(seed)
        self.is_greedy = not config.do_sample and not self._processors
        self._length = num_prompt_tokens
        self._ids: Tensor | None = None  # (1, max_length), kept for those who read all tokens
        if self._processors or self._criteria:
            self._ids = ids.new_empty(1, self.max_length)
            self._ids[:, :num_prompt_tokens] = ids

    @property
    def settings(self) -> tuple[Any, ...] | None:
        """What is done to a row of logits before a token is drawn; None where that needs more than the row."""
        if self._generator is None or any(type(processor) not in _ROWWISE for processor in self._processors):
            return None
        return tuple((type(processor), *sorted(vars(processor).items())) for processor in self._processors)

    def choose(self, logits: Tensor) -> int:
        """Return the next token.

        Args:
            logits: (1, V) of the last token.
        """
        if self._generator is None:
            return int(self._scores(logits).argmax(-1))
        return self.draw(self.probabilities(logits))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return what a request that samples draws from.

        Args:
            logits: (n, V), of this request and of others with the same ``settings``.
        """
        return self._scores(logits).softmax(-1)

    def draw(self, probabilities: Tensor) -> int:
        """Return a token drawn from (1, V) probabilities with the request's own random numbers."""
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _scores(self, logits: Tensor) -> Tensor:
        scores = logits.to(torch.float32, copy=True)
        if self._ids is not None:
            scores = self._processors(self._ids[:, : self._length], scores)
        return scores

    def is_done(self, token: int) -> bool:
        """Take note of the new token and say whether it is the last one."""
        if self._ids is not None:
            self._ids[0, self._length] = token
        self._length += 1
        if self._length >= self.max_length or token in self._eos_token_ids:
            return True
        if not self._criteria or self._ids is None:
            return False
        ids = self._ids[:, : self._length]
        return any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in self._criteria)


def probabilities_of_alike(samplers: Sequence[Sampler], logits: Tensor) -> dict[int, Tensor]:
    """Return the (1, V) probabilities of the rows of (n, V) logits that share their ``settings`` with another row."""
    alike: dict[Any, list[int]] = {}
    for row, sampler in enumerate(samplers):
        settings = sampler.settings
        if settings is not None:
            alike.setdefault(settings, []).append(row)
    return {
        row: probabilities
        for rows in alike.values()
        if len(rows) > 1
        for row, probabilities in zip(rows, samplers[rows[0]].probabilities(logits[rows]).split(1), strict=True)
    }


def _prepared_config(
    model: Any, given: GenerationConfig | None, options: dict[str, Any], ids: Tensor
) -> GenerationConfig:
    default = GenerationConfig()
    sources = (options.get, _getter(given), _getter(model.generation_config))

    def is_default(name: str) -> bool:
        return all(source(name) in (None, getattr(default, name)) for source in sources)

    config, unknown = model._prepare_generation_config(given, **options)
    unknown = {name: value for name, value in unknown.items() if name not in _UNSUPPORTED_OUTPUTS}
    if unknown:
        raise ValueError(f"generate_batch: options must be of a GenerationConfig, got {', '.join(sorted(unknown))}")
    model._prepare_special_tokens(config, True, device=model.device)
    return model._prepare_generated_length(
        generation_config=config,
        has_default_max_length=is_default("max_length"),
        has_default_min_length=is_default("min_length"),
        model_input_name="input_ids",
        inputs_tensor=ids,
        input_ids_length=ids.shape[1],
    )


def _getter(config: GenerationConfig | None) -> Callable[[str], Any]:
    return lambda name: getattr(config, name, None)


def _check_supported(config: GenerationConfig) -> None:
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise NotImplementedError(f"generate_batch: {mode.value.replace('_', ' ')} is not supported; use generate()")
    if (config.num_return_sequences or 1) > 1:
        raise NotImplementedError(
            "generate_batch: num_return_sequences > 1 is not supported; make a request of each, prefixes are shared"
        )
    if config.guidance_scale not in (None, 1):
        raise NotImplementedError("generate_batch: guidance_scale is not supported; use generate()")
    for name in _UNSUPPORTED_OUTPUTS:
        if getattr(config, name, None):
            raise NotImplementedError(f"generate_batch: {name} is not supported; use generate()")
