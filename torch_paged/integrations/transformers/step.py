"""What one forward does to the sequences of a cache: lengths and positions, the same for all layers."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """The metadata of one forward, besides the block tables and slots of each group of layers.

    Dimensions:
        B sequences, T query tokens of all of them.

    Attributes:
        cu_seqlens_q: (B + 1,) int32, where each sequence's query tokens begin.
        context_lens: (B,) int32, tokens of each sequence once this forward's are written.
        max_seqlen_q: the most query tokens of one sequence.
        one_token_each: whether every sequence has exactly one query token, its last.
        query_positions: (T,) int32, at padding that of the new token before. None: a sequence's query tokens are its
            last ones.
    """

    cu_seqlens_q: Tensor
    context_lens: Tensor
    max_seqlen_q: int
    one_token_each: bool
    query_positions: Tensor | None = None
