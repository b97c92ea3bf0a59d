"""Generate for a list of prompts: the function that most users want."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging

from torch_paged.integrations.transformers.attention import ATTENTION_NAME
from torch_paged.integrations.transformers.batch_generator import BatchGenerator
from torch_paged.integrations.transformers.checks import check_model
from torch_paged.integrations.transformers.patch import patch_model, patch_report, unpatch_model
from torch_paged.integrations.transformers.request import GenerationOutput, GenerationRequest


def generate_batch(
    model: Any,
    inputs: Sequence[GenerationRequest | Sequence[int] | Tensor],
    generation_config: GenerationConfig | None = None,
    *,
    num_blocks: int | None = None,
    block_size: int = 16,
    max_batch_tokens: int = 1024,
    max_requests_per_batch: int = 64,
    prefix_reuse: bool = True,
    tokenizer: Any = None,
    progress_bar: bool = True,
    **options: Any,
) -> list[GenerationOutput]:
    """Generate for many prompts of any lengths at once, without padding.

    Every step is one forward over packed tokens: one token of each request that decodes, and chunks of the prompts that
    wait. A request gives the tokens that ``generate`` gives for its prompt alone; what goes wrong with one request ends
    that request only. ``BatchGenerator`` does the same for requests that arrive over time.

    Args:
        model: a decoder-only model whose layers can all be paged. An unpatched one is patched during the call.
        inputs: prompts as (L,) token ids, or ``GenerationRequest`` where one has settings of its own.
        generation_config: settings of the requests without own ones. None: the model's.
        num_blocks: blocks of the cache; requests that do not fit wait. None: as many as the running requests need.
        block_size: tokens in a block.
        max_batch_tokens: tokens of one step, at the most.
        max_requests_per_batch: requests that run at once, at the most.
        prefix_reuse: True to compute what prompts begin with alike only once.
        tokenizer: wanted by ``stop_strings``.
        progress_bar: False for none; there is none either where stderr is not a terminal.
        options: single settings, such as ``max_new_tokens``, that go before ``generation_config``.

    Returns:
        One ``GenerationOutput`` for each prompt, in their order. Look at ``error`` of each.

    Raises:
        ValueError: a size below 1, or something else than a model of transformers.
        NotImplementedError: a model that the paged cache cannot serve.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from torch_paged.integrations.transformers import generate_batch
        >>> config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=1, eos_token_id=None)
        >>> model = LlamaForCausalLM(config).eval()
        >>> outputs = generate_batch(model, [[5, 6, 7], [8], []], max_new_tokens=4)
        >>> [len(output.generated_tokens) for output in outputs]
        [4, 4, 0]
        >>> outputs[2].error
        ValueError('generate_batch: a prompt must have at least 1 token, got none')
    """
    check_model("generate_batch", model)
    with _patched(model):
        batch = BatchGenerator(
            model,
            num_blocks=num_blocks,
            block_size=block_size,
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=max_requests_per_batch,
            prefix_reuse=prefix_reuse,
            tokenizer=tokenizer,
        )
        numbers = [batch.add_request(request, generation_config, **options) for request in inputs]
        with _bar(len(numbers), progress_bar) as bar:
            _run(batch, bar)
    return [batch.outputs[number] for number in numbers]


def _run(batch: BatchGenerator, bar: Any) -> None:
    began, num_tokens, ended = time.monotonic(), 0, 0
    while True:
        ended_before, ended = ended, len(batch.outputs) - batch.num_waiting - batch.num_running
        bar.update(ended - ended_before)
        if not batch.has_unfinished:
            return
        num_tokens += len(batch.step())
        rate = num_tokens / (time.monotonic() - began)
        bar.set_postfix_str(f"{batch.num_running} running, {rate:.0f} tokens/s", refresh=False)


def _bar(num_requests: int, wanted: bool) -> Any:
    return logging.tqdm(total=num_requests, unit="request", disable=None if wanted else True)


@contextlib.contextmanager
def _patched(model: Any) -> Iterator[None]:
    by_hand = model.config.get_text_config(decoder=True)._attn_implementation == ATTENTION_NAME
    if by_hand or patch_report(model) is not None:
        yield
        return
    patch_model(model)
    try:
        yield
    finally:
        unpatch_model(model)
