"""One way to call the ops for all backends, so that a test is written once."""

from dataclasses import dataclass
from typing import Any

import torch

from torch_paged import dispatch
from torch_paged.contract import reference
from torch_paged.contract.schema import NAMESPACE
from torch_paged.testing.batches import take_sequences
from torch_paged.testing.cases import AttentionCase, build
from torch_paged.testing.compare import assert_attention, assert_same


@dataclass(frozen=True)
class Backend:
    """A way to call the ops by schema name: through the dispatcher, or the reference functions directly."""

    name: str
    device: torch.device
    direct: bool = False

    def __call__(self, op: str, arguments: dict[str, Any], stats: bool = False) -> Any:
        """Run an op; with ``stats`` its ``with_stats`` overload."""
        if self.direct:
            return getattr(reference, op + ("_with_stats" if stats else ""))(**arguments)
        packet = getattr(getattr(torch.ops, NAMESPACE), op)
        on_device = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        return (packet.with_stats if stats else packet.default)(**on_device)

    def check(self, case: AttentionCase, seed: int = 0) -> None:
        """Assert that a case gives what the reference gives, with and without statistics."""
        arguments = build(case, seed)
        out, lse, max_logits = self(case.op, arguments, stats=True)
        assert_attention(case.op, arguments, out, lse, max_logits)
        assert_same(self(case.op, arguments), out, "out without statistics")

    def check_batch_invariance(self, case: AttentionCase) -> None:
        """Assert that each sequence gives equal bits alone, in any batch and order, on one thread and on two."""
        arguments = build(case)
        results = self(case.op, arguments, stats=True)
        assert_attention(case.op, arguments, *results)
        everything = list(range(case.num_seqs))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for order in (everything, everything[::-1], everything[1:3], *([seq] for seq in everything)):
                taken, rows = take_sequences(arguments, order)
                again = self(case.op, taken, stats=True)
                for name, actual, expected in zip(("out", "lse", "max_logits"), again, results, strict=True):
                    assert_same(actual, expected[rows], f"{name} of sequences {order} on {threads} threads")


REFERENCE = Backend("direct", torch.device("cpu"), direct=True)
"""The reference functions themselves."""


def backends_here() -> list[Backend]:
    """Return a ``Backend`` for each device type that is served in this process.

    Where none is, the CPU is still listed: its ops then raise, so tests fail instead of collecting nothing.
    """
    return [Backend(name, torch.device(device)) for device, name in (dispatch.served() or {"cpu": "cpu"}).items()]
