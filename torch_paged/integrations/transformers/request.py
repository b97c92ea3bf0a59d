"""What a user asks of ``generate_batch``, and what comes back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from torch_paged.cache.batch import is_int


@dataclass(eq=False)
class GenerationRequest:
    """One prompt with settings of its own.

    Args:
        input_ids: (L,) token ids of the prompt, without padding.
        generation_config: settings of this request alone. None: those of the call.
        logits_processor: applied after the processors that the settings ask for, as in ``generate``.
        stopping_criteria: checked after those that the settings ask for; each gets ids of shape (1, L).
        streamer: gets the prompt, then every token as soon as it is known; its errors end this request only.
        seed: of the random numbers of this request alone, so that its tokens do not depend on the others. None: drawn
            from torch's default generator when the request is added.
    """

    input_ids: Sequence[int] | Tensor
    generation_config: GenerationConfig | None = None
    logits_processor: LogitsProcessorList | None = None
    stopping_criteria: StoppingCriteriaList | None = None
    streamer: BaseStreamer | None = None
    seed: int | None = None
    is_cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """End the request before its next token; any thread may call it."""
        self.is_cancelled = True


@dataclass(eq=False)
class GenerationOutput:
    """What became of a request.

    Attributes:
        prompt_ids: the prompt.
        generated_tokens: the new tokens, an end-of-sequence token included; what there was when it failed.
        is_finished: whether the request has ended, in whatever way.
        is_cancelled: whether ``cancel`` ended it.
        error: what ended it, None if it ended well.
        reused_tokens: prompt tokens that were in the cache already and were not computed.
        preemptions: how often its blocks went to an older request; it was computed again later.
    """

    prompt_ids: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    is_finished: bool = False
    is_cancelled: bool = False
    error: Exception | None = None
    reused_tokens: int = 0
    preemptions: int = 0

    @property
    def sequence(self) -> list[int]:
        """Prompt and new tokens."""
        return self.prompt_ids + self.generated_tokens


def check_settings(request: GenerationRequest, generation_config: Any) -> None:
    """Raise ValueError where a setting of a request, or the configuration of its call, is of a wrong kind."""
    for name, kind, value in (
        ("generation_config", GenerationConfig, generation_config),
        ("generation_config", GenerationConfig, request.generation_config),
        ("logits_processor", list, request.logits_processor),
        ("stopping_criteria", list, request.stopping_criteria),
    ):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"generate_batch: {name} must be a {kind.__name__}, got {value!r}")
    if request.streamer is not None and not (hasattr(request.streamer, "put") and hasattr(request.streamer, "end")):
        raise ValueError(f"generate_batch: streamer must have put() and end(), got {request.streamer!r}")
    if request.seed is not None and not (is_int(request.seed) and -(2**63) <= request.seed < 2**64):
        raise ValueError(f"generate_batch: seed must be an int of 64 bits, got {request.seed!r}")


def list_of_ids(prompt: Any) -> list[Any]:
    """Return the ids of a prompt.

    Raises:
        ValueError: it holds none, because it is no list.
    """
    try:
        return list(prompt.tolist() if isinstance(prompt, Tensor) else prompt)
    except TypeError:
        raise ValueError(f"generate_batch: a prompt must be a list of token ids, got {prompt!r}") from None
