"""The demo's model with every attention call on NKI's simulator: the tokens of the unpatched model."""

import os

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


def test_the_demos_model_gives_the_tokens_of_the_unpatched_one() -> None:
    path = os.pathsep.join(map(str, (SOURCE, SOURCE / "tests" / "nki_sim")))
    checkpoint = SOURCE / "examples" / "checkpoints" / "stdlib-llama-2m"
    done = run_python(
        CODE, str(checkpoint), PYTHONPATH=path, TORCH_PAGED_NKI_SIM="1", NEURON_PLATFORM_TARGET_OVERRIDE="trn2"
    )
    tokens, kernels = done.stdout.splitlines()
    assert tokens == "neuron True 4"
    assert kernels.startswith("True True True ")
