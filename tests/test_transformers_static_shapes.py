"""Models on devices that compile each shape: the same results from padded forwards, with the CPU for such a device."""

from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, make_model, ragged_batch
from torch import Tensor

from torch_paged.integrations.transformers import PagedCache, patch_model, static_sizes

COLUMNS = 5
"""Padded to eight."""


@pytest.fixture(autouse=True)
def cpu_compiles_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_sizes, "_DEVICES", ("cpu",))


def forward(model: Any, **options: Any) -> Any:
    """Return what a forward of a prompt returns: of the model as it is, or into a paged cache if it is patched."""
    ids = torch.randint(2, VOCAB_SIZE, (1, COLUMNS), generator=torch.Generator().manual_seed(1))
    if hasattr(model, "_torch_paged_static_hooks"):
        options["past_key_values"] = PagedCache(model.config)
    with torch.no_grad():
        return model(ids, **options)


@pytest.mark.parametrize("keep", [0, 1, 2, COLUMNS, COLUMNS + 2])
@pytest.mark.parametrize("as_dict", [True, False])
def test_logits_are_those_of_the_prompt(keep: int, as_dict: bool) -> None:
    expected = forward(make_model("llama"), logits_to_keep=keep).logits
    found = forward(patch_model(make_model("llama")), logits_to_keep=keep, return_dict=as_dict)
    logits: Tensor = found.logits if as_dict else found[0]
    torch.testing.assert_close(logits, expected)


def test_generate_gives_the_tokens_of_the_model_as_it_was() -> None:
    batch = ragged_batch()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = make_model("llama").generate(**batch, **options)
    assert patch_model(make_model("llama")).generate(**batch, **options).tolist() == expected.tolist()


def test_what_would_hold_padding_is_refused() -> None:
    model = patch_model(make_model("llama"))
    with pytest.raises(NotImplementedError, match=r"^output_hidden_states: not supported with a PagedCache on device"):
        forward(model, output_hidden_states=True)
    with pytest.raises(NotImplementedError, match=r"^labels: not supported with a PagedCache on device 'cpu'$"):
        forward(model, labels=torch.zeros((1, COLUMNS), dtype=torch.int64))
    model.config.output_hidden_states = True
    with pytest.raises(NotImplementedError, match=r"^output_hidden_states: "):
        forward(model)
    forward(model, output_hidden_states=False)
