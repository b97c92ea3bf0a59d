"""Patched models with every attention call on NKI's simulator: the tokens of the unpatched model."""

import os
from pathlib import Path

from stand_in_packages import install

from torch_paged.testing.processes import SOURCE, run_python

CODE = """
import sys
from collections import Counter
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from torch_paged import dispatch
from torch_paged.backends.neuron import bridge_simulator
from torch_paged.integrations.transformers import patch_model

torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
inputs = tokenizer(["def area(radius):", "import os"], return_tensors="pt", padding=True, return_token_type_ids=False)
greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
expected = model.generate(**inputs, **greedy)

ran = Counter()
run = bridge_simulator.run
def counted(kernel, cores, *arguments):
    ran[kernel.__name__] += 1
    return run(kernel, cores, *arguments)
bridge_simulator.run = counted
def refuse(*args, **kwargs):
    raise AssertionError("attention beside the kernels")
torch.nn.functional.scaled_dot_product_attention = refuse
tokens = patch_model(model).generate(**inputs, **greedy)
print(dispatch.served()["cpu"], torch.equal(tokens, expected), tokens.shape[1] - inputs["input_ids"].shape[1])
layers = model.config.num_hidden_layers
print(ran["attend_tiles"] == layers, ran["attend_chunks"] == 3 * layers, ran["write_tokens"] == 4 * layers, sorted(ran))
"""

ON_DEVICE = """
import neuron_stand_in, torch
from transformers import LlamaConfig, LlamaForCausalLM
from torch_paged.integrations.transformers import patch_model

torch.set_grad_enabled(False)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(1, 64, (2, 5)) * torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
greedy = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True}
expected = model.generate(**inputs, **greedy)
moved = patch_model(model.to("neuron"))
tokens = moved.generate(**{name: x.to("neuron") for name, x in inputs.items()}, **greedy)
print(tokens.device, torch.equal(tokens.cpu(), expected), len(neuron_stand_in.ran) >= 2 * 3 * 2)
"""
PATH = os.pathsep.join(map(str, (SOURCE, SOURCE / "tests", SOURCE / "tests" / "nki_sim")))


def test_the_demos_model_gives_the_tokens_of_the_unpatched_one() -> None:
    checkpoint = SOURCE / "examples" / "checkpoints" / "stdlib-llama-2m"
    done = run_python(
        CODE, str(checkpoint), PYTHONPATH=PATH, TORCH_PAGED_NKI_SIM="1", NEURON_PLATFORM_TARGET_OVERRIDE="trn2"
    )
    tokens, kernels = done.stdout.splitlines()
    assert tokens == "neuron True 4"
    assert kernels.startswith("True True True ")


def test_a_model_on_a_stand_in_device_gives_the_tokens_of_the_host(tmp_path: Path) -> None:
    source = "from neuron_stand_in import wrap_nki\n"
    install(tmp_path, "torch-neuronx", "2.13.3.0", module="torch_neuronx", source=source)
    path = f"{PATH}{os.pathsep}{tmp_path}"
    done = run_python(ON_DEVICE, PYTHONPATH=path, NEURON_PLATFORM_TARGET_OVERRIDE="trn2")
    assert done.stdout.strip() == "neuron:0 True True"
