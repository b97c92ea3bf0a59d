"""Merging attention over parts of the keys into attention over their union."""

from torch import Tensor

from torch_paged.backends import Arguments
from torch_paged.backends.neuron.launch import Launch
from torch_paged.backends.neuron.merge_states_kernel import merge_states

PARTITIONS = 128
LANES = 2048
"""Of a partition: enough bytes for a descriptor."""


def merge_attention_states(launch: Launch, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return out (T, H, D) in the dtype of ``outs`` and lse (T, H) float32."""
    outs, lses, sinks = arguments["outs"], arguments["lses"], arguments["sinks"]
    num_parts, num_tokens, num_heads, width = outs.shape
    if num_tokens == 0:
        return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
    num_rows = num_tokens * num_heads
    each = 1
    while 2 * each * width <= LANES and each * PARTITIONS * launch.cores < num_rows:
        each *= 2
    out, lse = launch(
        merge_states,
        outs.reshape(-1, width).contiguous(),
        lses.reshape(-1, 1).contiguous(),
        None if sinks is None else sinks.expand(num_tokens, num_heads).reshape(-1, 1),
        num_parts,
        each,
    )
    return out.reshape(num_tokens, num_heads, width), lse.reshape(num_tokens, num_heads)
