"""Compiled decode: one graph for every model whose layers are all paged, and no copy of the pool in its code."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, GATHERED, PROMPT_COLUMNS, make_model, positions, ragged_batch
from tiny_multimodal import image_inputs, make_vision_language
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig, cache_utils

from torch_paged.integrations.transformers import PagedCache, patch_model
from torch_paged.integrations.transformers.versions import draws_its_own_mask

BLOCK_SIZE = 4
STEPS = 60
MATRIX = pytest.mark.transformers_matrix
EXPERTS = ("gpt_oss", "deepseek_v3", "qwen3_moe", "mixtral")
EXPERTS_LOOP = "the experts of this version of transformers loop over a tensor, which does not compile"
ALL_PAGED = [family for family in FAMILIES if family not in (*GATHERED, "qwen3_next", "llama4")]
"""transformers does not compile llama4 in generate(); it is compiled by hand below."""

QUICK = [family for family in ("gemma2", "gemma4", "gpt_oss", "deepseek_v3") if family in ALL_PAGED]
OTHERS = [family for family in ALL_PAGED if family not in QUICK]


@pytest.fixture(autouse=True)
def no_recompile() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compile_config(backend: str) -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend=backend, mode="default", dynamic=False)
    vars(config)["_compile_all_devices"] = True
    return config


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=MATRIX) for name in OTHERS)])
def test_generate_compiles_once_for_any_prompt(family: str) -> None:
    model = make_model(family)
    if family in EXPERTS and not hasattr(model, "set_experts_implementation"):
        pytest.skip(EXPERTS_LOOP)
    batch = ragged_batch()
    longer = {name: torch.cat([rows, rows.flip(1)], 1) for name, rows in batch.items()}
    longer["attention_mask"][:, PROMPT_COLUMNS:] = 1
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}
    expected = [model.generate(**prompt, **options) for prompt in (batch, longer)]
    patch_model(model, block_size=BLOCK_SIZE)
    if draws_its_own_mask(model):
        pytest.skip("this version of transformers does not compile a model that draws its own mask")
    options["compile_config"] = compile_config("aot_eager")
    if family in ("gemma3n", "gemma4") and not hasattr(cache_utils, "DummyLayer"):
        with pytest.raises(Exception, match="key must be the handle"):  # the model moves the keys that layers share
            model.generate(**batch, **options)
        return
    for prompt, tokens in zip((batch, longer), expected, strict=True):
        assert torch.equal(model.generate(**prompt, **options), tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@MATRIX
@pytest.mark.parametrize("family", ["gemma3_conditional", "llava", "qwen2_5_vl"])
def test_generate_compiles_for_prompts_with_images(family: str) -> None:
    model, inputs = make_vision_language(family), image_inputs(family)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    expected = model.generate(**inputs, **options)
    patch_model(model, block_size=BLOCK_SIZE)
    options["compile_config"] = compile_config("aot_eager")
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def decode(step: Any, model: Any, steps: int, **of_cache: Any) -> Tensor:
    """Generate by hand, the prompt eagerly."""
    cache = PagedCache(model.config, block_size=BLOCK_SIZE, **of_cache)
    batch = ragged_batch()
    with torch.no_grad():
        ids = model(**batch, past_key_values=cache).logits[:, -1:].argmax(-1)
        out, lengths = [ids], batch["attention_mask"].sum(1, keepdim=True)
        for index in range(steps - 1):
            cache.prepare(3, 1)
            options = {"position_ids": lengths + index, "past_key_values": cache, **positions(cache)}
            out.append(step(input_ids=out[-1], **options).logits.argmax(-1))
    return torch.cat(out, 1)


def test_chunked_attention_compiles() -> None:
    model = patch_model(make_model("llama4"), block_size=BLOCK_SIZE)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(decode(compiled, model, 30), decode(model.forward, model, 30))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_pool_that_grows_needs_no_other_graph() -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(decode(compiled, model, 40), decode(model.forward, model, 40))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_quantised_cache_compiles() -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    options = {"dtype": torch.int8, "max_cache_length": 60}
    assert torch.equal(decode(compiled, model, 20, **options), decode(model.forward, model, 20, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@MATRIX
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own imports
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_the_generated_code_copies_no_pool(family: str) -> None:
    model = patch_model(make_model(family), block_size=BLOCK_SIZE)
    if family in EXPERTS and not hasattr(model, "set_experts_implementation"):
        pytest.skip(EXPERTS_LOOP)
    cache = PagedCache(model.config, max_cache_length=200, block_size=BLOCK_SIZE)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False)
    batch = ragged_batch()
    lengths = batch["attention_mask"].sum(1, keepdim=True)
    with torch.no_grad():
        ids = model(**batch, past_key_values=cache).logits[:, -1:].argmax(-1)
        cache.prepare(3, 1)
        options = {"position_ids": lengths, "past_key_values": cache, **positions(cache)}
        _, codes = run_and_get_code(compiled, input_ids=ids, **options)
    (code,) = codes
    body = re.sub(r"#.*", "", code[code.index("def call") :])
    layer = cache.paged_layers[0].kv_cache
    pool = rf"\({layer.shape[0]}, s\d+, {layer.shape[2]}, {layer.shape[3]}, {layer.shape[4]}\)"
    assert body.count("torch.ops.paged.reshape_and_cache") == len(cache.paged_layers)
    assert len(re.findall(rf"assert_size_stride\(\w+, {pool}", body)) >= 1
    assert not re.search(rf"empty_strided\w*\({pool}", body)
    assert not re.search(r"aten\.clone|aten\.copy|clone\(|copy_\(", body)
