"""The conformance suite: what a backend, in this project or elsewhere, does with every line of the contract."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import torch_paged  # noqa: F401  (defines the ops)
from torch_paged import backends, dispatch
from torch_paged.contract.schema import SCHEMAS
from torch_paged.testing.backends import REFERENCE, Backend, NotRun, Refused, threads_of
from torch_paged.testing.named import ATTENTION_CASES, COPY_CASES, GATHER_CASES, MERGE_CASES, WRITE_CASES
from torch_paged.testing.semantics import CHECKS, LINES
from torch_paged.testing.tensors import poisoned_memory

PASSED, UNSUPPORTED, NOT_RUN, FAILED = "passed", "unsupported", "not run", "failed"


@dataclass(frozen=True)
class Outcome:
    """What came of one check for one dtype.

    Attributes:
        row: the line of the contract, or the op whose named cases these are.
        check: the check's name, or the case's.
        dtype: of the cache; for new keys alone and merging, of these.
        status: ``"passed"``, ``"unsupported"`` (refused in the backend's own words), ``"not run"`` or ``"failed"``.
        reason: why, unless it passed.
    """

    row: str
    check: str
    dtype: torch.dtype
    status: str
    reason: str = ""


def find_backend(
    name: str, kernels: Mapping[str, Callable[..., Any]] | None = None, device: str | None = None
) -> Backend:
    """Return the backend of this name, to be checked.

    Args:
        name: ``"cpu"``, ``"tpu"``, ``"neuron"``, any folder of ``torch_paged.backends``; ``"reference"``: the bare
            functions that say what the ops mean, without the checks of the ops; or, with ``kernels``, any other name.
        kernels: a function for each name in ``torch_paged.contract.schema.SCHEMAS`` that takes the op's arguments by
            name; what they cannot do they refuse by NotImplementedError.
        device: where tensors are handed to ``kernels``; None: ``"cpu"``.

    Raises:
        ValueError: no backend has this name, or it is off here, with the reason; or an op has no kernel, or the name of
            kernels is that of a backend, which would be judged by what that backend refuses.
    """
    known = backends.availability()
    if kernels is not None:
        if name in known:
            raise ValueError(f"check_backend: name must be none of {', '.join(known)} with kernels, got {name!r}")
        missing = [op for op in SCHEMAS if op not in kernels]
        if missing:
            raise ValueError(f"check_backend: kernels must have one for each op, got none for {', '.join(missing)}")
        return Backend(name, torch.device(device or "cpu"), kernels=kernels)
    if name == "reference":
        return REFERENCE
    if name not in known:
        raise ValueError(f"check_backend: name must be one of {', '.join(known)}, got {name!r}")
    served = [device_type for device_type, by in dispatch.served().items() if by == name]
    if not served:
        reason = known[name] or f"another backend serves its devices; set {dispatch.VARIABLE}={name}"
        raise ValueError(f"check_backend: backend {name!r} is off here: {reason}")
    return Backend(name, torch.device(served[0]))


def check_backend(
    name: str,
    kernels: Mapping[str, Callable[..., Any]] | None = None,
    device: str | None = None,
    cases: bool = False,
) -> Iterator[Outcome]:
    """Judge a backend by every line of the contract and every dtype, one outcome after the other.

    Args:
        name, kernels, device: as in ``find_backend``.
        cases: True: run the named cases of all ops as well, each for its own dtype.

    Returns:
        an iterator that runs a check for each outcome that is taken from it.

    Raises:
        ValueError: as ``find_backend``, before anything is checked.
    """
    return _outcomes(find_backend(name, kernels, device), cases)


def _outcomes(backend: Backend, cases: bool) -> Iterator[Outcome]:
    for check in CHECKS:
        if backend.direct and check.of_ops:
            continue
        row = f"{check.line:2d} {LINES[check.line]}"
        for dtype in check.dtypes:
            yield Outcome(row, check.name, dtype, *_status(partial(check.run, backend, dtype)))
    if not cases:
        return
    named: tuple[Any, ...] = (*ATTENTION_CASES, *WRITE_CASES, *COPY_CASES, *GATHER_CASES, *MERGE_CASES)
    for case in named:
        dtype = getattr(case, "cache_dtype", None) or case.dtype
        yield Outcome(f"cases of {case.op}", case.name, dtype, *_status(partial(backend.check, case)))


def _status(run: Callable[[], None]) -> tuple[str, str]:
    try:
        with poisoned_memory(), threads_of(1):
            run()
    except Refused as refusal:
        return UNSUPPORTED, str(refusal)
    except NotRun as reason:
        return NOT_RUN, str(reason)
    except Exception as error:  # a kernel may raise anything; the suite goes on
        said = str(error) if isinstance(error, AssertionError) else "".join(traceback.format_exception_only(error))
        return FAILED, said.strip()
    return PASSED, ""
