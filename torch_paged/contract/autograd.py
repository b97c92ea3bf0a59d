"""No gradient is dropped silently: what needs a backward that the ops do not have raises and says what to do.

Ops that compute run in the forward and raise in ``backward``. Ops that write a cache raise at once, because what is
written in place could not carry a gradient. One hand-written kernel on the Autograd key costs less per call than
``torch.library.register_autograd``.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from torch_paged.contract.schema import NAMESPACE, SCHEMAS

_AFTER_AUTOGRAD = torch._C._after_autograd_keyset
_any_requires_grad = torch._C._any_requires_grad
_is_grad_enabled = torch.is_grad_enabled
_below_autograd = torch._C._AutoDispatchBelowAutograd


def register(library: torch.library.Library) -> None:
    """Register the autograd rule of every op."""
    for name in SCHEMAS:
        op, _, overload = name.partition(".")
        overloaded = getattr(getattr(getattr(torch.ops, NAMESPACE), op), overload or "default")
        arguments = overloaded._schema.arguments
        written = [i for i, argument in enumerate(arguments) if argument.is_write]
        kernel = _writing(op, overloaded, written) if written else _computing(op, overloaded)
        library.impl(name, kernel, "Autograd", with_keyset=True)


def _computing(op: str, overloaded: torch._ops.OpOverload) -> Callable[..., Any]:
    refusal = f"{op}: the op has no backward; run it under torch.no_grad() or detach its inputs, and train densely"
    redispatch = overloaded._handle.redispatch_boxed

    class WithoutBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            with _below_autograd():
                return redispatch(keyset & _AFTER_AUTOGRAD, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> NoReturn:
            raise NotImplementedError(refusal)

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        if _is_grad_enabled() and _any_requires_grad(*args):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(refusal)
            return WithoutBackward.apply(keyset, *args)
        with _below_autograd():
            return redispatch(keyset & _AFTER_AUTOGRAD, *args)

    return kernel


def _writing(op: str, overloaded: torch._ops.OpOverload, written: list[int]) -> Callable[..., None]:
    redispatch = overloaded._handle.redispatch_boxed

    def kernel(keyset: Any, *args: Any) -> None:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        if _is_grad_enabled() and _any_requires_grad(*args):
            raise NotImplementedError(
                f"{op}: the op has no backward and writes in place, so that no gradient could flow through the cache; "
                "run it under torch.no_grad() or detach its inputs"
            )
        with _below_autograd():
            redispatch(keyset & _AFTER_AUTOGRAD, *args)
        for i in written:  # so that autograd sees when a tensor that it saved was overwritten
            if i < len(args) and args[i] is not None and not args[i].is_inference():
                increment_version(args[i])

    return kernel


def _refuse_tangents(op: str, args: tuple[Any, ...]) -> None:
    for value in args:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{op}: the op has no forward-mode derivative; pass tensors without a tangent")
