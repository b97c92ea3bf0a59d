"""The ways to generate that the matrix of models runs, each on an unpatched and on a patched model."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import FAMILIES, PROMPT_COLUMNS, VOCAB_SIZE, as_reference, make_model, ragged_batch
from torch import Tensor
from transformers import DynamicCache

from torch_paged.integrations.transformers import PagedCache, patch_model, patch_report

BLOCK_SIZE = 4
NEW_TOKENS = 16
LEAST_DISTINCT_TOKENS = 8

Result = dict[str, Tensor]


class Models:
    """A family's model and its assistant, with the same weights each time.

    Args:
        family: a name of ``tiny_models.FAMILIES``.
        dtype: of the weights.
        patched: whether both are patched.
        reference: whether the weights are widened to float64, for a result to compare with.
    """

    def __init__(
        self, family: str, dtype: torch.dtype = torch.float32, *, patched: bool = False, reference: bool = False
    ) -> None:
        changes = {} if dtype is torch.float32 else every_expert(family)
        self.model = make_model(family, **changes).to(dtype)
        self.assistant = make_model(family, **changes).to(dtype)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in self.assistant.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
        for model in (self.model, self.assistant):
            if patched:
                patch_model(model, block_size=BLOCK_SIZE)
            if reference:
                as_reference(model)

    def cache(self, **options: Any) -> DynamicCache:
        """Return an empty cache of the kind that the model uses; the options are those of a paged one."""
        if patch_report(self.model) is None:
            return DynamicCache(config=self.model.config)
        return PagedCache(self.model.config, block_size=BLOCK_SIZE, **options)

    def generate(self, **options: Any) -> Any:
        """Return the output of greedy generation from the ragged batch, unless told otherwise."""
        settings = {**ragged_batch(), "max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
        return self.model.generate(**settings, return_dict_in_generate=True)

    def tokens(self, **options: Any) -> Result:
        """Return the tokens of generation."""
        return {"tokens": self.generate(**options).sequences}

    def forward(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Return the logits of a forward without gradients, the positions counted by the mask."""
        if mask is not None and "position_ids" in inspect.signature(self.model.forward).parameters:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            return self.model(input_ids=ids, attention_mask=mask, **options).logits


def every_expert(family: str) -> dict[str, int]:
    """Return what makes all experts of a family take part: in half precision a rounding could choose other ones."""
    options = FAMILIES[family][2]
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return {"num_experts_per_tok": next((options[name] for name in names if name in options), 0)}


def one_prompt() -> Result:
    """Return the row of the batch that has no padding."""
    return {name: value[1:2] for name, value in ragged_batch().items()}


def greedy(models: Models) -> Result:
    """Generate greedily, with the logits of every step."""
    out = models.generate(output_logits=True, max_new_tokens=24)
    new = out.sequences[:, PROMPT_COLUMNS:]
    assert min(len(set(row.tolist())) for row in new) >= LEAST_DISTINCT_TOKENS, "the model repeats itself"
    return {"tokens": out.sequences, "logits": torch.stack(out.logits, 1)}


def alone(models: Models, result: Result) -> Tensor:
    """Return the logits of new tokens, each row without padding and without a cache."""
    steps = result["logits"].shape[1]
    logits = []
    for ids, real in zip(result["tokens"], ragged_batch()["attention_mask"].bool(), strict=True):
        row = torch.cat([ids[:PROMPT_COLUMNS][real], ids[PROMPT_COLUMNS : PROMPT_COLUMNS + steps - 1]])[None]
        logits.append(models.forward(row, torch.ones_like(row), use_cache=False)[0, -steps:])
    return torch.stack(logits)


def sampling(models: Models) -> Result:
    """Sample two rows of each prompt."""
    torch.manual_seed(7)
    return models.tokens(do_sample=True, top_k=20, num_return_sequences=2)


def second_turn(models: Models) -> Result:
    """Continue the cache that a first call returned."""
    first = models.generate()
    ids = torch.cat([first.sequences, torch.tensor([[9, 8, 7]] * 3)], 1)
    mask = torch.ones_like(ids)
    mask[:, :PROMPT_COLUMNS] = ragged_batch()["attention_mask"]
    return models.tokens(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values)


def written_by_hand(models: Models) -> Result:
    """Prefill in two chunks and decode, with a 2-D mask."""
    cache, batch = models.cache(), ragged_batch()
    ids, seen = batch["input_ids"], batch["attention_mask"]
    models.forward(ids[:, :10], seen[:, :10], past_key_values=cache)
    logits = [models.forward(ids[:, 10:], seen, past_key_values=cache)[:, -1:]]
    for _ in range(6):
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        logits.append(models.forward(logits[-1].argmax(-1), seen, past_key_values=cache))
    steps = torch.cat(logits, 1)
    return {"tokens": torch.cat([ids, steps.argmax(-1)], 1), "logits": steps}


def from_embeddings(models: Models) -> Result:
    """Generate from embeddings."""
    batch = ragged_batch()
    embeddings = models.model.get_input_embeddings()(batch.pop("input_ids")).detach()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    return {"tokens": models.model.generate(inputs_embeds=embeddings, **batch, **options)}


def training(models: Models) -> Result:
    """Find the loss and its gradient without a cache."""
    ids = one_prompt()["input_ids"]
    models.model.zero_grad()
    loss = models.model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in models.model.parameters() if parameter.grad is not None]
    return {"loss": loss.detach(), "gradient": torch.cat(gradients)}


def fork(models: Models) -> Result:
    """Copy a cache after the prompt, and continue both in turns."""
    cache = models.cache()
    logits = [models.forward(ragged_batch()["input_ids"], past_key_values=cache)]
    other = copy.deepcopy(cache)
    for token in range(20, 26):
        logits.append(models.forward(torch.full((3, 1), token), past_key_values=cache))
        logits.append(models.forward(torch.full((3, 1), token + 40), past_key_values=other))
    return {"logits": torch.cat(logits, 1)}


def teacher_forced(models: Models, **options: Any) -> Result:
    """Return the logits of a prompt, then of given tokens one by one."""
    cache = models.cache(**options)
    logits = [models.forward(ragged_batch()["input_ids"], past_key_values=cache)]
    logits += [models.forward(torch.full((3, 1), token), past_key_values=cache) for token in range(20, 26)]
    return {"logits": torch.cat(logits, 1)}


def sized_once(models: Models) -> Result:
    """Generate with a cache that is sized for all that it will hold, and never grows."""
    cache: Any = models.cache(max_cache_length=PROMPT_COLUMNS + NEW_TOKENS)
    result = models.tokens(past_key_values=cache)
    if isinstance(cache, PagedCache):
        blocks = -(-(PROMPT_COLUMNS + NEW_TOKENS) // BLOCK_SIZE)
        assert all(group.num_blocks <= 3 * blocks for group in cache.groups.values()), "the pool grew"
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
    Flow("chunked prefill", lambda models: models.tokens(prefill_chunk_size=6)),
    Flow("assisted", lambda models: models.tokens(**one_prompt(), assistant_model=models.assistant)),
    Flow(
        "prompt lookup",
        lambda models: models.tokens(**one_prompt(), prompt_lookup_num_tokens=3, eos_token_id=VOCAB_SIZE),
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
