"""The ways to generate that the matrix of models runs, each on an unpatched and on a patched model."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flow_models import BLOCK_SIZE, NEW_TOKENS, EncoderDecoders, Models, NotApplicable
from tiny_models import VOCAB_SIZE
from torch import Tensor

from torch_paged.integrations.transformers import PagedCache

LEAST_DISTINCT_TOKENS = 8

Result = dict[str, Tensor]


def greedy(models: Models) -> Result:
    """Generate greedily, with the logits of every step."""
    out = models.generate(output_logits=True, max_new_tokens=24)
    new = out.sequences[:, models.columns :]
    assert min(len(set(row.tolist())) for row in new) >= LEAST_DISTINCT_TOKENS, "the model repeats itself"
    return {"tokens": out.sequences, "logits": torch.stack(out.logits, 1)}


def alone(models: Models, result: Result) -> Tensor:
    """Return the logits of new tokens, each row without padding in one forward."""
    steps = result["logits"].shape[1]
    return torch.stack([models.alone(row, tokens, steps) for row, tokens in enumerate(result["tokens"])])


def sampling(models: Models) -> Result:
    """Sample two rows of each prompt."""
    torch.manual_seed(7)
    return models.tokens(do_sample=True, top_k=20, num_return_sequences=2)


def chunked_prefill(models: Models) -> Result:
    """Generate from a prompt in three chunks."""
    if isinstance(models, EncoderDecoders):
        raise NotApplicable("transformers cuts the mask of the encoder with the prompt of the decoder")
    return models.tokens(prefill_chunk_size=6)


def second_turn(models: Models) -> Result:
    """Continue the cache that a first call returned."""
    first = models.generate()
    return models.tokens(**models.next_turn(first.sequences), past_key_values=first.past_key_values)


def written_by_hand(models: Models) -> Result:
    """Prefill, in two chunks where a prompt can be cut, and decode, with a 2-D mask."""
    cache, ids, seen = models.cache(), models.ids, models.mask
    first = models.first_columns
    logits = [models.forward(ids[:, :first], seen[:, :first], past_key_values=cache)[:, -1:]]
    if first < ids.shape[1]:
        logits = [models.forward(ids[:, first:], seen, past_key_values=cache)[:, -1:]]
    for _ in range(6):
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        logits.append(models.forward(logits[-1].argmax(-1), seen, past_key_values=cache))
    steps = torch.cat(logits, 1)
    return {"tokens": torch.cat([ids, steps.argmax(-1)], 1), "logits": steps}


def from_embeddings(models: Models) -> Result:
    """Generate from embeddings."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    return {"tokens": models.model.generate(**models.embedded(), **options)}


def training(models: Models) -> Result:
    """Find the loss and its gradient without a cache."""
    models.model.zero_grad()
    loss = models.model(**models.labelled(), use_cache=False).loss
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in models.model.parameters() if parameter.grad is not None]
    return {"loss": loss.detach(), "gradient": torch.cat(gradients)}


def fork(models: Models) -> Result:
    """Copy a cache after the prompt, and continue both in turns."""
    cache = models.cache()
    logits = [models.forward(models.ids, past_key_values=cache)]
    other = copy.deepcopy(cache)
    for token in range(20, 26):
        logits.append(models.forward(torch.full((len(models.ids), 1), token), past_key_values=cache))
        logits.append(models.forward(torch.full((len(models.ids), 1), token + 40), past_key_values=other))
    return {"logits": torch.cat(logits, 1)}


def teacher_forced(models: Models, **options: Any) -> Result:
    """Return the logits of a prompt, then of given tokens one by one."""
    cache = models.cache(**options)
    logits = [models.forward(models.ids, past_key_values=cache)]
    logits += [
        models.forward(torch.full((len(models.ids), 1), token), past_key_values=cache) for token in range(20, 26)
    ]
    return {"logits": torch.cat(logits, 1)}


def sized_once(models: Models) -> Result:
    """Generate with a cache that is sized for all that it will hold, and never grows."""
    length = models.columns + NEW_TOKENS
    cache: Any = models.cache(max_cache_length=length)
    result = models.tokens(past_key_values=cache)
    paged = getattr(cache, "self_attention_cache", cache)
    if isinstance(paged, PagedCache):
        blocks = len(models.ids) * -(-length // BLOCK_SIZE)
        assert all(group.num_blocks <= blocks for group in paged.groups.values()), "the pool grew"
    return result


@dataclass(frozen=True)
class Flow:
    """One way to use a model.

    Attributes:
        title: the head of its column.
        run: what it returns is compared: integers must be equal, other numbers follow the tolerance rule.
        dtype: of the models.
        expected: the logits that a result should have, by the model in float64. None: ``run`` on that model.
    """

    title: str
    run: Callable[[Models], Result]
    dtype: torch.dtype = torch.float32
    expected: Callable[[Models, Result], Tensor] | None = None


FLOWS = (
    Flow("greedy", greedy, expected=alone),
    Flow("sampling", sampling),
    Flow("beams", lambda models: models.tokens(num_beams=3)),
    Flow("beams returned", lambda models: models.tokens(num_beams=4, num_return_sequences=2)),
    Flow("chunked prefill", chunked_prefill),
    Flow("assisted", lambda models: models.tokens(**models.one_prompt(), assistant_model=models.assistant)),
    Flow(
        "prompt lookup",
        lambda models: models.tokens(**models.one_prompt(), prompt_lookup_num_tokens=3, eos_token_id=VOCAB_SIZE),
    ),
    Flow("second turn", second_turn),
    Flow("no cache", lambda models: models.tokens(use_cache=False)),
    Flow("own loop", written_by_hand, expected=alone),
    Flow("embeddings", from_embeddings),
    Flow("training", training),
    Flow("fork", fork),
    Flow("sized once", sized_once),
    Flow("float16", teacher_forced, torch.float16),
    Flow("bfloat16", teacher_forced, torch.bfloat16),
)
