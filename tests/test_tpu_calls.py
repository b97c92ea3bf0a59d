"""How the arguments of an op become the call of a JAX function: arrays in order, static options, indices in 32 bits."""

from dataclasses import replace

import pytest
import torch

from torch_paged.backends.tpu import BACKEND
from torch_paged.backends.tpu.calls import jax_call, kernels
from torch_paged.contract.schema import SCHEMAS
from torch_paged.testing import AttentionCase, build


def test_there_is_a_kernel_for_every_op() -> None:
    assert set(kernels(BACKEND, lambda call: ())) == set(SCHEMAS)


def test_lengths_become_powers_of_two_and_the_scale_a_number() -> None:
    arguments = build(AttentionCase("ragged", query_lens=(3, 1, 17, 0), causal=True))
    call = jax_call("flash_attn_varlen.with_stats", arguments)
    assert (call.module, call.function, call.written) == ("varlen", "flash_attn_varlen", ())
    assert call.arrays[0] is arguments["query"]
    assert call.arrays[1:3] == (None, None)
    assert call.arrays[7] is arguments["context_lens"]
    assert call.options == {
        "softmax_scale": 0.125,
        "logits_soft_cap": 0.0,
        "sliding_window": None,
        "attention_chunk": None,
        "value_dim": None,
        "stats": True,
        "max_seqlen_q": 32,
        "max_seqlen_k": 128,
        "causal": True,
    }


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_slots_outside_the_cache_stay_outside_in_32_bits(dtype: torch.dtype) -> None:
    slots = torch.tensor([-1, 7, 2**31 - 1], dtype=dtype)
    if dtype == torch.int64:
        slots[2] = 2**32 + 3
    key, kv_cache = torch.zeros(3, 1, 8), torch.zeros(2, 4, 1, 2, 8)
    arguments = {"key": key, "value": key, "kv_cache": kv_cache, "slot_mapping": slots, "kv_scales": None}
    call = jax_call("reshape_and_cache", arguments)
    assert call.written == (2,)
    assert call.arrays[2] is kv_cache
    assert call.arrays[3] is not None
    assert call.arrays[3].dtype == torch.int32
    assert call.arrays[3].tolist() == [-1, 7, 8 if dtype == torch.int64 else 2**31 - 1]


@pytest.mark.parametrize("rank", [1, 4])
def test_only_scales_per_token_are_copied_with_their_blocks(rank: int) -> None:
    scales = torch.ones((2,) if rank == 1 else (2, 4, 1, 2))
    kv_cache, blocks = torch.zeros(2, 4, 1, 2, 8, dtype=torch.int8), torch.tensor([0, 1])
    arguments = {"kv_cache": kv_cache, "src_blocks": blocks, "dst_blocks": blocks, "kv_scales": scales}
    call = jax_call("copy_blocks", arguments)
    assert call.written == ((0, 3) if rank == 4 else (0,))
    assert (call.arrays[3] is scales) == (rank == 4)


def test_a_kernel_validates_and_asks_for_a_refusal_first() -> None:
    ran = []
    outs, lses = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1)

    def run(call: object) -> tuple[torch.Tensor, torch.Tensor]:
        ran.append(call)
        return outs[0], lses[0]

    merge = kernels(BACKEND, run)["merge_attention_states"]
    with pytest.raises(ValueError, match=r"^merge_attention_states: lses must"):
        merge(outs, lses[:, 1:])
    refusing = kernels(replace(BACKEND, refusal=lambda op, arguments: f"{op}: no"), run)["merge_attention_states"]
    with pytest.raises(NotImplementedError, match=r"^merge_attention_states: no$"):
        refusing(outs, lses)
    assert not ran
    assert len(merge(outs, lses=lses)) == 2
    assert len(ran) == 1
