"""The programs that torch_xla would run on a TPU, compiled by libtpu without one: the cache stays where it is."""

from pathlib import Path

import pytest

pytest.importorskip("torch_xla")

from xla_programs import lowered_for_tpu

from torch_paged.backends.tpu.aot import compile_for

LAYERS, NUM_BLOCKS = 3, 8192
CACHE_BYTES = 2 * NUM_BLOCKS * 2 * 16 * 128 * 2
FEW_BYTES = 2**20
"""Temporaries of a step, of queries and outputs: a fusion that did not write in place would need a cache's size."""

STEP = f"""
def step(query, key, caches, slots, tables, lens):
    for factor, kv_cache in enumerate(caches, 1):
        torch_paged.reshape_and_cache(query[:, :2] * factor, key, kv_cache, slots)
        query = query + torch_paged.paged_attention(query, kv_cache, tables, lens)
    return query

options = dict(dtype=torch.bfloat16, device="xla")
query, key = torch.zeros(3, 8, 128, **options), torch.zeros(3, 2, 128, **options)
caches = [torch.zeros(2, {NUM_BLOCKS}, 2, 16, 128, **options) for _ in range({LAYERS})]
tables = torch.arange(12, dtype=torch.int32).reshape(3, 4).to("xla")
lens, slots = torch.full((3,), 5, dtype=torch.int32).to("xla"), torch.tensor([4, 68, 132]).to("xla")
torch_xla.sync()
"""
WAYS = {
    "lazy": "with torch.no_grad(): out = step(query, key, caches, slots, tables, lens); torch_xla.sync(wait=True)",
    "openxla": """
with torch.no_grad():
    torch.compile(step, backend="openxla", fullgraph=True)(query, key, caches, slots, tables, lens)
""",
}


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_step_updates_all_caches_in_place(way: str, chip: str, tmp_path: Path) -> None:
    program = compile_for(chip, lowered_for_tpu(STEP + WAYS[way], chip, tmp_path))
    assert program.alias_bytes == LAYERS * CACHE_BYTES
    assert program.temp_bytes < FEW_BYTES
    assert len(program.kernels) == LAYERS
    assert [operation.opcode for operation in program.whole(CACHE_BYTES)] == ["fusion"] * LAYERS


def test_a_cache_that_is_not_donated_is_seen_as_a_copy(tmp_path: Path) -> None:
    undonated = "import torch_xla; torch_xla._XLAC._set_buffer_donation = lambda tensor, donate: True\n"
    module = lowered_for_tpu(undonated + STEP + WAYS["openxla"], "v5e", tmp_path)
    program = compile_for("v5e", module)
    assert program.alias_bytes == 0
    assert program.whole(CACHE_BYTES)


HUGGINGFACE = """
from transformers import LlamaConfig, LlamaForCausalLM
from torch_paged.integrations.transformers import PagedCache, patch_model
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16, dtype=torch.bfloat16)
model = patch_model(LlamaForCausalLM(config).eval().to("xla", torch.bfloat16))
cache = PagedCache(model.config, max_cache_length=16 * 8192, device="xla")
for_tpu = bridge_torch_xla.target
bridge_torch_xla.target = lambda device: ("cpu", "v5e")
with torch.no_grad():
    model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    bridge_torch_xla.target = for_tpu
    model(torch.tensor([[8]]), past_key_values=cache)
"""


def test_a_step_of_a_patched_model_updates_its_caches_in_place(tmp_path: Path) -> None:
    program = compile_for("v5e", lowered_for_tpu(HUGGINGFACE, "v5e", tmp_path))
    assert program.alias_bytes == 2 * CACHE_BYTES
    assert program.temp_bytes < FEW_BYTES
    assert len(program.kernels) == 2
    assert [operation.opcode for operation in program.whole(CACHE_BYTES)] == ["fusion"] * 2
