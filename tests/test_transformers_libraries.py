"""What people put around a model: adapters, pipelines, autocast, weights in int8."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import as_reference, make_model, positions, ragged_batch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from torch_paged.integrations.transformers import PagedCache, patch_model, patch_report, unpatch_model
from torch_paged.integrations.transformers.versions import MASKS_TAKE_POSITIONS
from torch_paged.testing.compare import assert_close

CHECKPOINT = Path(__file__).parent.parent / "examples" / "checkpoints" / "stdlib-llama-2m"
FAMILIES = ("llama", "gemma2", "deepseek_v3")

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries


def generate(model: Any) -> Any:
    """Return greedy generation from the ragged batch."""
    return model.generate(**ragged_batch(), max_new_tokens=16, do_sample=False, return_dict_in_generate=True)


def assert_patching_changes_no_token(model: Any) -> None:
    """Assert that a model generates the same tokens patched, and takes its own cache again when unpatched."""
    expected = generate(model)
    assert patch_model(model, block_size=4) is model
    assert patch_report(model) is not None
    actual = generate(model)
    assert isinstance(actual.past_key_values, PagedCache)
    assert torch.equal(actual.sequences, expected.sequences)
    assert patch_report(unpatch_model(model)) is None
    assert not isinstance(generate(model).past_key_values, PagedCache)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: make test-transformers has it")
    layers = ["q_proj", "q_b_proj", "v_proj", "kv_b_proj", "o_proj"]
    config = peft.LoraConfig(r=4, target_modules=layers, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    assert_patching_changes_no_token(peft.get_peft_model(make_model(family), config).eval())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_torch_compile_returns(family: str) -> None:
    assert_patching_changes_no_token(torch.compile(make_model(family), backend="eager"))


@pytest.mark.skipif(MASKS_TAKE_POSITIONS, reason="this transformers has positions traced into the mask function")
@pytest.mark.parametrize("part", ["forward", "in place"])
def test_compiled_parts_that_may_break_the_graph(part: str) -> None:
    torch._dynamo.reset()
    model = make_model("llama", num_hidden_layers=1)
    if part == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.compile(backend="eager")
    assert_patching_changes_no_token(model)


def test_lora_under_torch_compile() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: make test-transformers has it")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model("llama"), config).eval()
    assert_patching_changes_no_token(torch.compile(model, backend="eager"))
    patch_model(model)
    inner = model.get_base_model()
    assert model.config is inner.config


def test_a_patched_model_under_torch_compile_decodes_by_hand() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model: Any = torch.compile(make_model("llama"), backend="eager", fullgraph=True)
    expected = generate(model).sequences[1:2]
    inner = model._orig_mod
    assert patch_model(model) is model
    cache = PagedCache(model.config, max_cache_length=64)
    with torch.no_grad():
        tokens = [inner(ragged_batch()["input_ids"][1:2], past_key_values=cache).logits[:, -1:].argmax(-1)]
        for _ in range(15):
            cache.prepare(1, 1)
            tokens.append(model(tokens[-1], past_key_values=cache, **positions(cache)).logits.argmax(-1))
    assert torch.equal(torch.cat(tokens, 1), expected[:, -16:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_lora_is_trained_through_a_patched_model() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: make test-transformers has it")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(make_model("llama"), config)
    ids = ragged_batch()["input_ids"][1:2]

    def gradient() -> Tensor:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    plain = gradient()
    actual = gradient() if patch_model(model) is model else plain
    unpatch_model(model).double()
    assert_close(actual, gradient(), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_int8(family: str) -> None:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: make test-transformers has it"
    )
    model = make_model(family)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert_patching_changes_no_token(model)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_autocast(family: str) -> None:
    ids = ragged_batch()["input_ids"][1:2]

    def logits(model: Any, **options: Any) -> Tensor:
        with torch.no_grad():
            parts = [model(part, past_key_values=options.get("cache"), use_cache=True) for part in (ids[:, :9],)]
            cache = parts[0].past_key_values
            parts += [model(column, past_key_values=cache) for column in ids[:, 9:].split(1, 1)]
        return torch.cat([part.logits for part in parts], 1)

    model = make_model(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = logits(model)
        patch_model(model, block_size=4)
        actual = logits(model, cache=PagedCache(model.config, block_size=4))
        generate(model)
    expected = logits(as_reference(unpatch_model(model)))
    assert_close(actual, expected, plain)


def test_pipeline() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    prompts = ["def read(self, size):\n", "import os\n\nclass Path"]
    settings = {"max_new_tokens": 24, "do_sample": False, "batch_size": 2, "return_full_text": False}

    def texts() -> list[str]:
        made = pipeline("text-generation", model=model, tokenizer=tokenizer)
        return [outputs[0]["generated_text"] for outputs in made(prompts, **settings)]

    expected = texts()
    patch_model(model)
    assert texts() == expected
    assert all(expected)
