"""A patched model on torch_xla's device: the tokens of the CPU, from a bounded number of programs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

torch_xla = pytest.importorskip("torch_xla")

from torch_xla.debug import metrics  # noqa: E402

from torch_paged.integrations.transformers import generate_batch, patch_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": None,
}
NEW_TOKENS = 6


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def mistral() -> Any:
    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)).eval()


def prompts(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    ids = torch.randint(1, SIZES["vocab_size"], mask.shape, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


def compilations() -> int:
    return int(metrics.counter_value("UncachedCompile") or 0)


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}], ids=["greedy", "beams", "sampled"]
)
def test_tokens_are_those_of_the_cpu(make: Callable[[], Any], options: dict[str, Any]) -> None:
    inputs = prompts(7, 3)
    expected_of, model = patch_model(make()), patch_model(make().to("xla"))
    results = []
    for generating, device in ((expected_of, "cpu"), (model, "xla")):
        torch.manual_seed(5)
        on_device = {name: x.to(device) for name, x in inputs.items()}
        tokens = generating.generate(**on_device, max_new_tokens=NEW_TOKENS, **({"do_sample": False} | options))
        assert tokens.device.type == device
        results.append(tokens.cpu())
    assert results[0].tolist() == results[1].tolist()


def test_the_number_of_programs_is_bounded() -> None:
    model = patch_model(llama().to("xla"))

    def generate(*lengths: int, new_tokens: int) -> int:
        before = compilations()
        inputs = prompts(*lengths, seed=sum(lengths))
        tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        assert tokens.shape == (len(lengths), max(lengths) + new_tokens)
        return compilations() - before

    assert generate(11, 9, new_tokens=12) <= 4
    assert generate(9, 14, new_tokens=10) == 0
    assert generate(13, 16, new_tokens=14) == 0
    assert 0 < generate(17, 20, new_tokens=3) <= 4


def test_what_would_compile_at_every_step_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="each shape is compiled: the keys of LlamaForCausalLM are gathered"):
        patch_model(llama().to("xla"), gather=True)
    with pytest.raises(NotImplementedError, match="prefix_reuse is not supported: device 'xla' compiles each shape"):
        patch_model(llama().to("xla"), prefix_reuse=True)
    with pytest.raises(NotImplementedError, match="generate_batch: device 'xla' compiles each shape"):
        generate_batch(patch_model(llama().to("xla")), [[3, 4]], max_new_tokens=2)
    model = patch_model(llama()).to("xla")
    with pytest.raises(RuntimeError, match="was moved to 'xla' since; call patch_model"):
        model.generate(**prompts(3), max_new_tokens=2)
