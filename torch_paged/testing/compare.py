"""The tolerance rule, written once.

Attention: ``max error <= 2 x max error of plain PyTorch in the same dtype + 1 ulp of the dtype x max |reference| +
1e-6``, both errors against the reference in float64. Plain PyTorch is the reference with its matrix products in the
query dtype.
Of few results plain PyTorch's error may be small by luck: where the caller knows what the result would be of the sizes
of the values, one ulp of that is allowed in a half precision, which is what rounding every weight may cost.
Statistics: ``1e-4 + 1e-5 x |reference|``, plus one ulp of the largest logit where the products are in a half precision;
infinities exactly.
Two float64 computations: 1e-12. A quantised cache is read by the reference as it is stored. Whatever only moves or
rounds bytes must be the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_paged.contract import reference

_ATTENTION: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "paged_attention": reference.paged_attention_with_stats,
    "flash_attn_varlen": reference.flash_attn_varlen_with_stats,
}
_ROWS = ("query", "key", "value")
_HALF = (torch.bfloat16, torch.float16)


def oracle(op: str, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return out, lse and max_logits of an attention call, all in float64."""
    widened = {
        name: value.double() if name in _ROWS and value is not None else value for name, value in arguments.items()
    }
    return _ATTENTION[op](**widened, compute_dtype=torch.float64)


def plain_attention(op: str, arguments: dict[str, Any]) -> Tensor:
    """Return out of an attention call by plain PyTorch, its matrix products in the query dtype."""
    return _ATTENTION[op](**arguments, compute_dtype=arguments["query"].dtype)[0]


def assert_attention(
    op: str,
    arguments: dict[str, Any],
    out: Tensor,
    lse: Tensor | None = None,
    max_logits: Tensor | None = None,
) -> None:
    """Assert that the results of an attention call are those of the reference, within the rule.

    Args:
        op: ``"paged_attention"`` or ``"flash_attn_varlen"``.
        arguments: The arguments of the call, by schema name.
        out: (T, H, DV) what the backend returned.
        lse: (T, H) float32, or None when the call returned no statistics.
        max_logits: (T, H) float32, or None.

    Raises:
        AssertionError: A result is outside the rule, has another dtype or shape, or is not exactly 0 or -inf in a row
            that sees no key.
    """
    dtype = arguments["query"].dtype
    expected, expected_lse, expected_max = oracle(op, arguments)
    plain = plain_attention(op, arguments)
    assert out.dtype == dtype, f"out is {out.dtype}, the query is {dtype}"
    assert_close(out, expected, plain)
    empty = expected_max == float("-inf")
    assert (out[empty] == 0).all(), "a row that sees no key is not exactly 0"
    finite = expected_max[expected_max.isfinite()]
    logit = finite.abs().max().item() if finite.numel() else 0.0
    for name, actual, wanted in (("lse", lse, expected_lse), ("max_logits", max_logits, expected_max)):
        if actual is not None:
            assert actual.dtype == torch.float32, f"{name} is {actual.dtype}"
            assert_stats(actual, wanted, logit if dtype in _HALF else 0.0, dtype, name)


def assert_merged(arguments: dict[str, Any], out: Tensor, lse: Tensor) -> None:
    """Assert that ``merge_attention_states`` returned what the reference does, within the rule."""
    expected, expected_lse = reference.merge_attention_states(
        arguments["outs"].double(), arguments["lses"], arguments["sinks"], compute_dtype=torch.float64
    )
    plain, _ = reference.merge_attention_states(**arguments)
    assert out.dtype == arguments["outs"].dtype, f"out is {out.dtype}"
    assert lse.dtype == torch.float32, f"lse is {lse.dtype}"
    assert_close(out, expected, plain)
    assert_stats(lse, expected_lse)


def assert_close(actual: Tensor, expected: Tensor, plain: Tensor, sizes: Tensor | None = None) -> None:
    """Assert the rule for any result: ``expected`` is in float64, ``plain`` is plain PyTorch in ``actual.dtype``.

    ``sizes``: what ``expected`` would be of the values' sizes, for results of few rows.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert plain.dtype == actual.dtype, f"plain PyTorch ran in {plain.dtype}, the result is {actual.dtype}"
    if not actual.numel():
        return
    error = (actual.double() - expected).abs()
    ulp = torch.finfo(actual.dtype).eps * expected.abs().max()
    tolerance = (2 * (plain.double() - expected).abs().max() + ulp + 1e-6).expand_as(error)
    if sizes is not None and actual.dtype in _HALF:
        tolerance = tolerance.maximum(torch.finfo(actual.dtype).eps * sizes)
    worst = (error.nan_to_num(nan=float("inf")) - tolerance).argmax()
    assert error.flatten()[worst] <= tolerance.flatten()[worst], (
        f"error {error.flatten()[worst]:.3g} > tolerance {tolerance.flatten()[worst]:.3g} at "
        f"{tuple(int(i) for i in torch.unravel_index(worst, error.shape))}: "
        f"{actual.flatten()[worst]:.6g}, expected {expected.flatten()[worst]:.6g}"
    )


def assert_stats(
    actual: Tensor,
    expected: Tensor,
    largest_logit: float | Tensor = 0.0,
    dtype: torch.dtype = torch.float32,
    name: str = "lse",
) -> None:
    """Assert the rule for lse and max_logits; ``largest_logit`` may be one for each value."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    tolerance = 1e-4 + 1e-5 * expected.abs() + torch.finfo(dtype).eps * largest_logit
    error = (actual.double() - expected).abs()
    bad = ~((actual == expected) | (expected.isfinite() & (error <= tolerance)))
    assert not bad.any(), (
        f"{name}: {int(bad.sum())} values outside the rule, the first at {tuple(bad.nonzero()[0].tolist())}: "
        f"{actual[bad][0]:.6g}, expected {expected[bad][0]:.6g}"
    )


def assert_double_close(actual: Tensor, expected: Tensor) -> None:
    """Assert that two float64 computations agree but for the order of their sums."""
    assert actual.dtype == expected.dtype == torch.float64, f"dtypes {actual.dtype} and {expected.dtype}"
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def assert_same(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Assert equal dtype, shape and bits (a NaN equals a NaN with the same bits)."""
    assert actual.dtype == expected.dtype, f"{name} is {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    different = (_bits(actual) != _bits(expected)).nonzero()
    assert not different.numel(), (
        f"{name}: {len(different)} elements differ, the first at {tuple(different[0].tolist())}: "
        f"{actual[tuple(different[0])].item()}, expected {expected[tuple(different[0])].item()}"
    )


def _bits(x: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integers[x.element_size()])
