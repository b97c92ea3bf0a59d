"""A patched model is copied, pickled, moved and changed as any other."""

import copy
import io
from typing import Any

import pytest
import torch
from tiny_models import make_model, ragged_batch
from torch import Tensor
from transformers import BartConfig, BartForCausalLM, DynamicCache

from torch_paged.integrations.transformers import PagedCache, generate_batch, patch_model, patch_report, unpatch_model

BLOCK_SIZE = 4


def generate(model: Any, **options: Any) -> Any:
    return model.generate(**ragged_batch(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True, **options)


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "bloom"])
@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
@pytest.mark.parametrize("prefix_reuse", [False, True])
def test_a_copy_is_patched_on_its_own(family: str, way: Any, prefix_reuse: bool) -> None:
    model = make_model(family)
    expected = generate(model).sequences
    prefix_reuse &= hasattr(type(model), "_prefill") and family != "bloom"
    patch_model(model, block_size=BLOCK_SIZE, prefix_reuse=prefix_reuse)
    generate(model)
    other = way(model)
    for one in (other, model):
        output = generate(one)
        assert torch.equal(output.sequences, expected)
        assert isinstance(output.past_key_values, PagedCache)
        assert patch_report(one) == patch_report(model)
    unpatch_model(model)
    assert torch.equal(generate(other).sequences, expected)
    unpatch_model(other)
    assert vars(other).keys() == vars(model).keys()
    assert not any("expand_kv" in vars(module) for module in other.modules())
    assert not other._forward_pre_hooks
    assert torch.equal(generate(other).sequences, expected)


@pytest.mark.parametrize("prefix_reuse", [False, True])
def test_a_wrong_option_leaves_the_model_as_it_is(prefix_reuse: bool) -> None:
    model = make_model("llama")
    before = set(vars(model))
    with pytest.raises(ValueError, match="dtype must be None, int8"):
        patch_model(model, dtype=torch.float16, prefix_reuse=prefix_reuse)
    assert set(vars(model)) == before
    assert not model._forward_pre_hooks
    assert model.config._attn_implementation == "eager"


needs_prefill = pytest.mark.skipif(
    not hasattr(type(make_model("llama")), "_prefill"), reason="this transformers has no prefill of its own"
)


@needs_prefill
def test_prefixes_are_of_one_dtype() -> None:
    model, plain = patch_model(make_model("llama"), prefix_reuse=True), make_model("llama")
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            plain.to(dtype)
            assert torch.equal(generate(model).sequences, generate(plain).sequences)
    with torch.autocast("cpu", torch.bfloat16):
        generate(model)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        generate(model)
    assert torch.equal(generate(model).sequences, generate(plain.float()).sequences)


def in_place(weight: Tensor) -> None:
    weight.mul_(-1)


def behind_its_version(weight: Tensor) -> None:
    weight.data.mul_(-1)


def as_an_array(weight: Tensor) -> None:
    weight.detach().numpy()[:] *= -1


def replaced(weight: Tensor) -> None:
    for _ in range(2):
        weight.data = weight.data * -1.2


@needs_prefill
@pytest.mark.parametrize("change", [in_place, behind_its_version, as_an_array, replaced])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changed_weights_are_not_taken_for_the_old_ones(change: Any, mode: Any) -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE, prefix_reuse=True)
    with mode():
        for _ in range(3):
            generate(model)
            change(model.model.layers[0].self_attn.v_proj.weight)
            actual = generate(model).sequences
            assert torch.equal(actual, generate(unpatch_model(copy.deepcopy(model))).sequences)


@needs_prefill
def test_a_changed_buffer_is_seen() -> None:
    model = patch_model(make_model("gemma3"), block_size=BLOCK_SIZE, prefix_reuse=True)
    generate(model)
    model.model.embed_tokens.embed_scale.mul_(1.5)
    actual = generate(model).sequences
    assert torch.equal(actual, generate(unpatch_model(model)).sequences)


def test_a_model_that_takes_no_positions_is_not_packed() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "d_model": 64,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 96,
    }
    torch.manual_seed(0)
    model = BartForCausalLM(BartConfig(**sizes, pad_token_id=0, eos_token_id=None, init_std=0.3)).eval()
    expected = generate(model).sequences
    assert torch.equal(generate(patch_model(model, block_size=BLOCK_SIZE)).sequences, expected)
    with pytest.raises(NotImplementedError, match="BartForCausalLM takes no position_ids"):
        generate_batch(model, [[3, 4]])


def of_one_config(count: int) -> tuple[Any, list[Any]]:
    """Return a config and models that share it, of equal weights."""
    config = make_model("gemma2").config
    models = [type(make_model("gemma2"))(config).eval() for _ in range(count)]
    for model in models:
        model.load_state_dict(make_model("gemma2").state_dict())
    return config, models


def test_models_of_one_config_are_patched_on_their_own() -> None:
    config, (first, second, third) = of_one_config(3)
    expected = generate(third).sequences
    patch_model(first, block_size=BLOCK_SIZE)
    assert config._attn_implementation == second.config._attn_implementation == "eager"
    assert type(generate(second).past_key_values) is DynamicCache
    patch_model(second, block_size=BLOCK_SIZE)
    unpatch_model(first)
    for model, cache in ((first, DynamicCache), (second, PagedCache), (third, DynamicCache)):
        output = generate(model)
        assert type(output.past_key_values) is cache
        assert torch.equal(output.sequences, expected)
    assert first.config._attn_implementation == "eager"
    assert first.config.to_dict() == config.to_dict()
    assert all(module.config is second.config for module in second.modules() if hasattr(module, "config"))


def test_a_cache_outlives_a_change_of_options() -> None:
    model = patch_model(make_model("llama"), block_size=BLOCK_SIZE)
    cache = PagedCache(model.config, block_size=BLOCK_SIZE)
    patch_model(model, dtype=torch.int8)
    assert model(ragged_batch()["input_ids"], past_key_values=cache).past_key_values is cache


def test_a_cache_of_the_config_before_patching_is_refused() -> None:
    config, (model,) = of_one_config(1)
    patch_model(model)
    with pytest.raises(ValueError, match=r"got 'eager'; call patch_model\(model\), and make the cache of model.config"):
        model(ragged_batch()["input_ids"], past_key_values=PagedCache(config))


def counted(model: Any, name: str) -> list[str]:
    """Give a model a method of its own, and return what it will add its calls to."""
    calls: list[str] = []
    method = getattr(model, name)

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return method(*args, **kwargs)

    setattr(model, name, own)
    return calls


@needs_prefill
@pytest.mark.parametrize("name", ["generate", "_prefill", "prepare_inputs_for_generation"])
def test_a_method_of_the_users_own_is_called(name: str) -> None:
    model = make_model("llama")
    expected = generate(model).sequences
    calls = counted(model, name)
    own = vars(model)[name]
    patch_model(model, block_size=BLOCK_SIZE, prefix_reuse=name == "generate")
    for _ in range(2):
        before = len(calls)
        assert torch.equal(generate(model).sequences, expected)
        assert len(calls) - before == (8 if name == "prepare_inputs_for_generation" else 1)
    assert vars(unpatch_model(model))[name] is own
    assert not any("torch_paged" in attribute for attribute in vars(model))


@needs_prefill
@pytest.mark.parametrize("name", ["generate", "_prefill", "prepare_inputs_for_generation"])
def test_a_method_that_a_patched_model_is_given_is_called_and_stays(name: str) -> None:
    model = make_model("llama")
    expected = generate(model).sequences
    patch_model(model, block_size=BLOCK_SIZE)
    vars(model).pop(name, None)
    calls = counted(model, name)
    own = vars(model)[name]
    assert torch.equal(generate(model).sequences, expected)
    assert calls
    assert vars(unpatch_model(model))[name] is own


@needs_prefill
@pytest.mark.parametrize("name", ["_prefill", "prepare_inputs_for_generation"])
def test_prefixes_are_not_kept_where_the_prefill_is_the_users(name: str) -> None:
    model = make_model("llama")
    counted(model, name)
    with pytest.raises(NotImplementedError, match=f"prefix_reuse is not supported: .* has a {name} of its own"):
        patch_model(model, prefix_reuse=True)


def test_a_cache_of_the_users_own_making_is_refused() -> None:
    model = make_model("llama")
    counted(model, "_prepare_cache_for_generation")
    with pytest.raises(NotImplementedError, match="has a _prepare_cache_for_generation of its own; delete it"):
        patch_model(model)
    assert patch_report(model) is None
