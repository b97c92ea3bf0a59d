"""Columns and tokens: transformers counts the padding of a batch, a paged cache does not keep it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ColumnMap:
    """Where the tokens of each row lie in the padded rectangle that transformers' masks describe.

    Dimensions:
        B rows, C columns.

    Attributes:
        num_columns: C.
        starts: (B,) int32, the column of a row's first token, where its tokens fill the columns up to the last.
            None: they do not in some row.
        positions: (B, C) int64, the position of the token in a column, -1 at padding. None where ``starts`` is given.
        padded: whether there is a column without a token.
    """

    num_columns: int
    starts: Tensor | None
    positions: Tensor | None
    padded: bool

    def all_positions(self) -> Tensor:
        """Return (B, C) int64, the position of the token in each column, below 0 at padding."""
        if self.starts is None:
            assert self.positions is not None
            return self.positions
        return torch.arange(self.num_columns, device=self.starts.device) - self.starts[:, None]

    def hides_tokens(self, mask: Tensor) -> bool:
        """Say whether a (B, C) bool mask hides a column that holds a token."""
        return bool((~mask & (self.all_positions() >= 0)).any())

    def shows_padding(self, mask: Tensor) -> bool:
        """Say whether a (B, C) bool mask shows a column that holds no token."""
        return bool((mask & (self.all_positions() < 0)).any())

    def in_columns(self, rows: Tensor) -> Tensor:
        """Move (B, KH, L, D) from token order to column order, zeros at padding."""
        if self.positions is None:
            return rows
        index = self.positions.clamp(min=0)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
        return rows.gather(2, index).masked_fill(self.positions[:, None, :, None] < 0, 0)

    def mask_of_tokens(self, mask: Tensor) -> Tensor:
        """Move a (B, X, Q, C) mask from columns to positions; what lies behind a row's last token is arbitrary."""
        if not self.padded:
            return mask
        if self.starts is not None:
            index = torch.arange(self.num_columns, device=mask.device) + self.starts.long()[:, None]
        else:
            assert self.positions is not None
            index = (self.positions < 0).long().argsort(dim=1, stable=True)
        index = index.clamp(max=self.num_columns - 1)[:, None, None, :]
        return mask.gather(3, index.expand(-1, mask.shape[1], mask.shape[2], -1))


def column_map(rows: Sequence[bytes | bytearray], device: torch.device) -> ColumnMap:
    """Make the map of rows that hold 1 for a column with a token and 0 for padding."""
    num_columns = len(rows[0])
    counts = [row.count(1) for row in rows]
    padded = any(count < num_columns for count in counts)
    starts = [num_columns - count for count in counts]
    if all(row.count(1, start) == count for row, start, count in zip(rows, starts, counts, strict=True)):
        return ColumnMap(num_columns, torch.tensor(starts, dtype=torch.int32, device=device), None, padded)
    real = torch.tensor([list(row) for row in rows], device=device)
    return ColumnMap(num_columns, None, torch.where(real == 1, real.cumsum(1) - 1, -1), padded)


def real_columns(mask: Tensor | None, new_tokens: int) -> list[list[bool]] | None:
    """Return which of the last columns hold tokens, None when all do."""
    if mask is None:
        return None
    real = mask[:, -new_tokens:].bool()
    return None if bool(real.all()) else real.tolist()


def padded_before_all_tokens(lengths: list[int], real: list[list[bool]]) -> bool:
    """Say whether counting back from a row's last token gives every padding column a position below 0."""
    return all(all(row) or (length == 0 and row == sorted(row)) for length, row in zip(lengths, real, strict=True))


def query_positions(lengths: list[int], real: list[list[bool]]) -> list[int]:
    """Return the position of each new column's token; padding stands at the new token before it, -1 without one.

    Its key is not kept, but where a prompt ends with padding its logits are the first that are read. In a row of
    padding alone it stands behind the last token, so that it sees no key which a window has forgotten.
    """
    positions = []
    for length, row in zip(lengths, real, strict=True):
        position = length if length and not any(row) else -1
        for is_real in row:
            if is_real:
                position = length
                length += 1
            positions.append(position)
    return positions
