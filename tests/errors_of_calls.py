"""The errors of calls of the ops: what autograd, the dispatcher and too little memory refuse."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from error_table import Error, Group
from errors_of_ops import call
from torch.autograd import forward_ad

from torch_paged.testing.bad_input import BASES
from torch_paged.testing.cases import build
from torch_paged.testing.processes import run_python


def with_changes(base: str, op: str, **changes: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
    """Return a call of one of ``BASES`` with changed tensors."""

    def provoke() -> Any:
        arguments = build(BASES[base], 0)
        return call(op, arguments | {name: changed(arguments[name]) for name, changed in changes.items()})

    return provoke


def _backward() -> None:
    arguments = build(BASES["decode, no options"], 0)
    arguments["query"].requires_grad_()
    call("paged_attention", arguments).sum().backward()


def _write_with_gradient() -> None:
    with_changes("write", "reshape_and_cache", key=lambda key: key.requires_grad_())()


def _tangent() -> None:
    arguments = build(BASES["decode, no options"], 0)
    with forward_ad.dual_level():
        arguments["query"] = forward_ad.make_dual(arguments["query"], torch.ones_like(arguments["query"]))
        call("paged_attention", arguments)


def _transformed() -> None:
    arguments = build(BASES["decode, no options"], 0)
    torch.func.grad(lambda query: call("paged_attention", arguments | {"query": query}).sum())(arguments["query"])


def _too_large() -> None:
    call("gather_cache", build(BASES["gather"], 0) | {"max_len": 2**45})


def _wrong_type_for_overloads() -> None:
    torch.ops.paged.paged_attention(**build(BASES["decode, no options"], 0) | {"softmax_scale": "1"})


def _nested(layout: torch.layout) -> Callable[[], Any]:
    def provoke() -> None:
        rows = [torch.ones(2, 8), torch.ones(2, 8)]
        arguments = build(BASES["merge"], 0)
        call("merge_attention_states", arguments | {"outs": torch.nested.nested_tensor(rows, layout=layout)})

    return provoke


def _mapped_write() -> None:
    arguments = build(BASES["write"], 0)
    slots = arguments["slot_mapping"].expand(2, -1)
    torch.func.vmap(lambda mapped: call("reshape_and_cache", arguments | {"slot_mapping": mapped}))(slots)


_LITTLE_MEMORY = """
import resource, torch, torch_paged
one_row = torch.zeros(8).expand(2, 1, 64, 2**31 - 1, 8)
arguments = torch.zeros(1, 64, 8), one_row, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2**31 - 1]).int()
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    torch_paged.paged_attention(*arguments)
except MemoryError as error:
    print(error)
"""


def _no_workspace() -> Exception:
    """Attend to more keys than this process has memory for their partial results."""
    return MemoryError(run_python(_LITTLE_MEMORY).stdout.strip())


CALLS = Group(
    "Calls of the ops",
    (
        Error(
            "ValueError",
            "<op>: every tensor must be dense (torch.strided) and plain, got <kind>",
            "A tensor is sparse, quantised by torch, of MKL-DNN or of another kind without plain memory; or one that "
            "is written has the negative bit, as `x.conj().imag` has.",
            "Pass `tensor.to_dense()` or `tensor.resolve_neg()`.",
            (
                with_changes("copy", "copy_blocks", kv_cache=lambda cache: cache.to_sparse()),
                with_changes("copy", "copy_blocks", kv_cache=torch._neg_view),
                with_changes("decode", "paged_attention", query=lambda query: query.to_mkldnn()),
            ),
        ),
        Error(
            "NotImplementedError",
            "<op>: the op has no backward; run it under torch.no_grad() or detach its inputs, and train densely",
            "A gradient of an op was asked for; these are ops for inference.",
            "Run under `torch.no_grad()`, or train with dense attention.",
            (_backward, _transformed),
        ),
        Error(
            "NotImplementedError",
            "<op>: the op has no backward and writes in place, so that no gradient could flow through the cache; run "
            "it under torch.no_grad() or detach its inputs",
            "What is written to the cache requires a gradient.",
            "Run under `torch.no_grad()`.",
            (_write_with_gradient,),
        ),
        Error(
            "NotImplementedError",
            "<op>: the op has no forward-mode derivative; pass tensors without a tangent",
            "The call is inside `torch.func.jvp` or `forward_ad`.",
            "Take the op out of it.",
            (_tangent,),
        ),
        Error(
            "MemoryError",
            "torch_paged: out of memory",
            "The machine, or the limit of the process, has too little memory for what a kernel keeps during a call: "
            "its plan and partial results. Caches are unchanged.",
            "Ask for less: fewer tokens or sequences at a time.",
            (_no_workspace,),
        ),
        Error(
            "RuntimeError",
            "torch_paged: torch failed in <what>",
            "Torch could not allocate a result or a copy: the machine has too little memory. Caches are unchanged.",
            "Ask for less: a smaller `max_len`, fewer tokens at a time.",
            (_too_large,),
        ),
        Error(
            "NotImplementedError",
            "Could not run 'paged::<op>' with arguments from the '<kind>' backend.<more>",
            "Torch's own text: a tensor is nested.",
            "Pack the rows of all sequences into one tensor; `cu_seqlens_q` tells where each starts.",
            (_nested(torch.strided),),
        ),
        Error(
            "NotImplementedError",
            "paged.<op>.default",
            "Torch's own text: a tensor is nested, of the layout `torch.jagged`.",
            "Pass `tensor.values()`, and `tensor.offsets()` as `cu_seqlens_q`.",
            (_nested(torch.jagged),),
        ),
        Error(
            "RuntimeError",
            "Batching rule not implemented for paged::<op>; the fallback path doesn't work on out= or view ops.",
            "Torch's own text: an op that writes was called within `torch.vmap`.",
            "Make the batch a part of the tokens: one call writes any number of them.",
            (_mapped_write,),
        ),
        Error(
            "RuntimeError",
            "paged::<op>() Expected a value of type <type> for argument <name> but instead found type <type>.<more>",
            "Torch's own check of the call: an argument is of another Python type, or an int has more than 64 bits.",
            "Compare the call with the declaration that follows in the text.",
            (functools.partial(call, "merge_attention_states", {"outs": "text", "lses": torch.ones(1)}),),
        ),
        Error(
            "RuntimeError",
            "Overloaded torch operator invoked from Python failed to match any schema:<more>",
            "The same check of `torch.ops.paged.paged_attention` and `flash_attn_varlen`, which have two overloads.",
            "Compare the call with the declarations that follow, or call `torch_paged.paged_attention`.",
            (_wrong_type_for_overloads,),
        ),
    ),
)
