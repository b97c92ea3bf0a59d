"""One way to call the ops for all backends, so that a test is written once.

A cache is given to each backend as it wants it: head_dim padded to its multiple, with poison in the lanes that must
never be read, and contiguous; what an op wrote is then copied back. A call that the backend refuses must raise its
sentence; then there is nothing left to compare, and ``Refused`` ends the test.
"""

import importlib
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_paged import dispatch
from torch_paged.backends import BackendInfo, discover
from torch_paged.contract import reference
from torch_paged.contract.schema import NAMESPACE
from torch_paged.testing.batches import take_sequences
from torch_paged.testing.cache_cases import CopyCase, GatherCase, MergeCase, WriteCase
from torch_paged.testing.cases import AttentionCase, build
from torch_paged.testing.compare import assert_attention, assert_merged, assert_same
from torch_paged.testing.tensors import poison, storage_of

_DEVICE = "TORCH_PAGED_TEST_DEVICE"

Case = TypeVar("Case", AttentionCase, WriteCase, CopyCase, GatherCase, MergeCase)


class Refused(Exception):
    """A backend refused a call, in the words that it should."""


class NotRun(Exception):
    """A check cannot run here, for the reason that it says."""


@dataclass(frozen=True)
class Backend:
    """A way to call the ops by schema name: through the dispatcher, or by functions that stand in for it.

    A name that no folder of ``torch_paged.backends`` has is that of kernels from elsewhere: they get their arguments as
    the cases have them, and refuse a call by raising NotImplementedError.
    """

    name: str
    device: torch.device
    direct: bool = False
    kernels: Mapping[str, Callable[..., Any]] | None = field(default=None, compare=False)
    """Kernels to call in place of the dispatcher's, by schema name (``"paged_attention.with_stats"``)."""

    @property
    def info(self) -> BackendInfo | None:
        """What the dispatcher knows of it; None for the reference functions and for kernels from elsewhere."""
        return None if self.direct else discover().get(self.name)

    def __call__(self, op: str, arguments: dict[str, Any], stats: bool = False) -> Any:
        """Run an op; with ``stats`` its ``with_stats`` overload.

        Raises:
            Refused: the backend refused the call, and raised the sentence that says so.
        """
        if self.direct:
            return getattr(reference, op + ("_with_stats" if stats else ""))(**arguments)
        given = {name: self._place(name, value) for name, value in arguments.items()}
        reason = self._reason(op, given)
        if reason is not None:
            self._assert_refused(reason, op, given, stats)
            raise Refused(reason)
        before = {name: value.cpu().clone() for name, value in self._copied(arguments, given) if name == "kv_cache"}
        try:
            results = _on_host(self._run(op, given, stats))
        except NotImplementedError as error:
            if self.info is None:
                raise Refused(str(error)) from error
            raise
        after = {name: value.cpu() for name, value in self._copied(arguments, given)}
        for name in ("kv_cache", "kv_scales"):
            if name in after:
                arguments[name].copy_(after[name][..., : arguments[name].size(-1)])
        if "kv_cache" in before:
            _assert_lanes_behind(op, arguments, before["kv_cache"], after["kv_cache"])
        if op == "gather_cache":
            stored_dim = arguments["kv_cache"].size(-1)
            return tuple(dense[..., :stored_dim].contiguous() for dense in results)
        return results

    def _run(self, op: str, arguments: dict[str, Any], stats: bool) -> Any:
        overload = "with_stats" if stats else "default"
        if self.kernels is not None:
            return self.kernels[f"{op}.with_stats" if stats else op](**arguments)
        results = getattr(getattr(getattr(torch.ops, NAMESPACE), op), overload)(**arguments)
        if self.device.type == "xla":  # else each result that is read would be computed by a program of its own
            importlib.import_module("torch_xla").sync()
        return results

    def _assert_refused(self, reason: str, op: str, arguments: dict[str, Any], stats: bool) -> None:
        said = "nothing"
        try:
            self._run(op, arguments, stats)
        except NotImplementedError as error:
            said = str(error)
        assert said == reason, f"the call says {said}, refusal() says {reason}"

    def _place(self, name: str, value: Any) -> Any:
        """Return an argument as this backend wants it, on its device."""
        if not isinstance(value, Tensor):
            return value
        info = self.info
        if info is not None and name == "kv_cache" and value.dim() == 5:
            missing = -value.size(-1) % info.head_dim_multiple
            if missing:
                value = torch.cat([value, poison((*value.shape[:-1], missing), value.dtype)], -1)
            if info.contiguous_cache:
                value = value.contiguous()
        return value.to(self.device)

    @staticmethod
    def _copied(arguments: dict[str, Any], given: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that the op got in place of the caller's."""
        for name, value in given.items():
            if isinstance(value, Tensor) and value is not arguments[name]:
                yield name, value

    def served(self, case: Case) -> Case:
        """Return the case, or where it is refused, and was seen to be, the case nearest to it that is not.

        Raises:
            Refused: there is none.
        """
        reason = self._refusal(case)
        if reason is None:
            return case
        self._assert_refused(reason, case.op, self._placed(case), stats=False)
        for like in _alternatives(case):
            if self._refusal(like) is None:
                return like
        raise Refused(reason)

    def block_size(self, wanted: int) -> int:
        """Return a block size that this backend serves: the wanted one, or the next."""
        info = self.info
        if info is None:
            return wanted
        caches = (torch.empty((2, 1, 1, size, info.head_dim_multiple), device="meta") for size in (wanted, 8, 16))
        return next(x.size(3) for x in caches if info.refusal("gather_cache", {"kv_cache": x}) is None)

    def _refusal(self, case: Any) -> str | None:
        return None if self.info is None else self._reason(case.op, self._placed(case))

    def _reason(self, op: str, given: dict[str, Any]) -> str | None:
        return None if self.info is None else self.info.refusal(op, given)

    def _placed(self, case: Any) -> dict[str, Any]:
        return {name: self._place(name, value) for name, value in build(case).items()}

    def check(self, case: Case, seed: int = 0) -> None:
        """Assert that a case gives what the reference gives.

        Of attention, with statistics and, by the same bits, without. Interpreted, each way is a program to compile,
        which its compiler rounds in its own way: there every fourth case runs without statistics too, and is compared
        with the reference.
        """
        case = self.served(case)
        if isinstance(case, AttentionCase):
            self._check_attention(case, seed)
        elif isinstance(case, MergeCase):
            arguments = build(case, seed)
            assert_merged(arguments, *self("merge_attention_states", arguments))
        elif isinstance(case, GatherCase):
            self._check_gather(case, seed)
        else:
            self._check_writes(case, seed)

    def _check_attention(self, case: AttentionCase, seed: int) -> None:
        arguments = build(case, seed)
        out, lse, max_logits = self(case.op, arguments, stats=True)
        assert_attention(case.op, arguments, out, lse, max_logits)
        if not self.interprets(case):
            assert_same(self(case.op, arguments), out, "out without statistics")
        elif zlib.crc32(case.name.encode()) % 4 == 0:
            assert_attention(case.op, arguments, self(case.op, arguments))

    def _check_gather(self, case: GatherCase, seed: int) -> None:
        arguments = build(case, seed)
        results = self("gather_cache", arguments)
        for name, dense, wanted in zip(("key", "value"), results, REFERENCE("gather_cache", arguments), strict=True):
            assert_same(dense, wanted, name)
            assert dense.is_contiguous(), f"{name} is not contiguous"
            owns = dense.untyped_storage().data_ptr() != arguments["kv_cache"].untyped_storage().data_ptr()
            assert owns, f"{name} is a view of the cache"

    def _check_writes(self, case: WriteCase | CopyCase, seed: int) -> None:
        """Compare all memory below the cache and its scales; nothing else may be written."""
        before, arguments, expected = (build(case, seed) for _ in range(3))
        self(case.op, arguments)
        REFERENCE(case.op, expected)
        for name in arguments:
            wanted = expected if name in ("kv_cache", "kv_scales") else before
            if wanted[name] is not None:
                assert_same(storage_of(arguments[name]), storage_of(wanted[name]), name)

    def interprets(self, case: AttentionCase) -> bool:
        """Return whether its kernels are interpreted: each kind of call compiles a program first, for seconds."""
        arguments = self._placed(case)
        return self.info is not None and not self.info.variant(case.op, arguments, self.device.type).compiled

    def check_batch_invariance(self, case: AttentionCase) -> None:
        """Assert that each sequence gives equal bits alone, in any batch and order, on one thread and on two."""
        case = self.served(case)
        arguments = build(case)
        results = self(case.op, arguments, stats=True)
        assert_attention(case.op, arguments, *results)
        everything = list(range(case.num_seqs))
        for threads in (1, 2):
            with threads_of(threads):
                for order in (everything, everything[::-1], everything[1:3], *([seq] for seq in everything)):
                    taken, rows = take_sequences(arguments, order)
                    again = self(case.op, taken, stats=True)
                    for name, actual, expected in zip(("out", "lse", "max_logits"), again, results, strict=True):
                        assert_same(actual, expected[rows], f"{name} of sequences {order} on {threads} threads")


@contextmanager
def threads_of(threads: int) -> Iterator[None]:
    """Run a block on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on_host(results: Any) -> Any:
    if isinstance(results, Tensor):
        return results.cpu()
    return results if results is None else tuple(result.cpu() for result in results)


def _alternatives(case: Any) -> Iterator[Any]:
    """Yield cases like this one with blocks of 8 and 16, each with bfloat16 in place of float16 too."""
    halves = {name: torch.bfloat16 for name in ("dtype", "cache_dtype") if getattr(case, name, None) == torch.float16}
    sizes = [{}, {"block_size": 8}, {"block_size": 16}] if hasattr(case, "block_size") else [{}]
    for changes in sizes:
        yield replace(case, **changes)
        yield replace(case, **changes, **halves)


def _assert_lanes_behind(op: str, arguments: dict[str, Any], before: Tensor, after: Tensor) -> None:
    """Assert of the lanes behind the caller's: zero where a token was written, else what they were."""
    width = arguments["kv_cache"].size(-1)
    expected = before[..., width:]
    if "slot_mapping" in arguments:
        slots = arguments["slot_mapping"]
        slots = slots[slots >= 0].long()
        block_size = before.size(3)
        expected[:, slots // block_size, :, slots % block_size] = torch.zeros(()).to(before.dtype)
    assert_same(after[..., width:], expected, f"lanes of kv_cache from {width} on")


REFERENCE = Backend("direct", torch.device("cpu"), direct=True)
"""The reference functions themselves."""


def backends_here() -> list[Backend]:
    """Return a ``Backend`` for the device type that ``TORCH_PAGED_TEST_DEVICE`` names, by default the CPU.

    Where none serves it, it is still listed: its ops then raise, so tests fail instead of collecting nothing.
    """
    device = os.environ.get(_DEVICE, "cpu")
    if device == "xla":
        importlib.import_module("torch_xla")
    return [Backend(dispatch.served().get(device, device), torch.device(device))]


def tpu_device_type() -> str | None:
    """Return the device type of this machine's TPU; None without one, or where torch_xla and torch_tpu are missing."""
    if torch._C._get_privateuse1_backend_name() == "tpu":
        return "tpu"
    if importlib.util.find_spec("torch_xla") is None:
        return None
    return "xla" if importlib.import_module("torch_xla._internal.tpu").num_available_chips() else None
