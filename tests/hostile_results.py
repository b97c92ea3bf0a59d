"""Whether the results of a hostile call that only reads are the reference's, as far as float32 can tell."""

from typing import Any

import torch
from torch import Tensor

from torch_paged.contract import reference
from torch_paged.testing import assert_close, assert_same, assert_stats, oracle, plain_attention

_LARGEST_NUMBER = 2.0**126  # that a kernel may meet on its way, so that the difference of two is in float32's range
_LARGEST_LOGIT = 1e4  # beyond it float32 rounds logits so far that a weight says little
_FLOAT32 = torch.finfo(torch.float32).eps


def assert_read(op: str, arguments: dict[str, Any], results: Any) -> str:
    """Compare the results with those of the reference.

    Returns:
        "matched", or "safe" where the contract or the rounding of float32 leave some rows open.

    Raises:
        AssertionError: they differ.
    """
    if op == "gather_cache":
        for actual, expected in zip(results, reference.gather_cache(**arguments), strict=True):
            assert_same(_one_nan(actual), _one_nan(expected))
        return "matched"
    if op == "merge_attention_states":
        return _assert_merged(arguments, results)
    scales = arguments["kv_scales"]
    if scales is not None and scales.dim() == 4 and bool((scales <= 0).any()):
        return "safe"  # the only scales that nothing checks: what such a one makes of its tokens is unspecified
    return _assert_attention(op, arguments, results if isinstance(results, tuple) else (results,))


def _one_nan(x: Tensor) -> Tensor:
    """Return ``x`` with one kind of NaN, for which sign and payload say nothing."""
    return x if x.dtype.itemsize == 1 else x.masked_fill(x.isnan(), float("nan"))


def _assert_merged(arguments: dict[str, Any], results: tuple[Tensor, ...]) -> str:
    outs, lses, sinks = arguments["outs"].double(), arguments["lses"], arguments["sinks"]
    expected, lse = reference.merge_attention_states(outs, lses, sinks, compute_dtype=torch.float64)
    sizes, _ = reference.merge_attention_states(outs.abs(), lses, sinks, compute_dtype=torch.float64)
    plain, _ = reference.merge_attention_states(**arguments)
    top = lses.amax(0)
    known = _known(results[0].dtype, expected, lse, top, sizes)
    near = known & plain.isfinite().all(-1)
    assert_close(results[0][near], expected[near], plain[near], _rounding(sizes[near], plain.dtype))
    _assert_finite(results, known, top)
    _assert_stats(results[1], lse, known)
    return "matched" if bool(near.all()) else "safe"


def _assert_attention(op: str, arguments: dict[str, Any], results: tuple[Tensor, ...]) -> str:
    """Compare the rows in which no number leaves float32's range.

    Of rows with logits so large that their rounding decides on the weights, ``out`` is compared only where one key has
    all the weight in any case.
    """
    expected, lse, top = oracle(op, arguments)
    plain = plain_attention(op, arguments)
    sizes = oracle(op, _two_sided(arguments, values=torch.abs))[0]
    products = _products(op, arguments)
    nothing = top == float("-inf")
    known = _known(plain.dtype, expected, lse, top, sizes)
    known &= nothing | (torch.maximum(products, top.abs()) < _LARGEST_NUMBER)
    numbers = (products + top.abs()).nan_to_num(neginf=0.0, posinf=0.0)
    decided = (lse - top < 1e-12) & (4 * _FLOAT32 * numbers < 10)
    near = known & plain.isfinite().all(-1) & (nothing | decided | (top.abs() <= _LARGEST_LOGIT))
    assert_close(results[0][near], expected[near], plain[near], _rounding(sizes[near], plain.dtype))
    _assert_finite(results, known, top)
    rounded = numbers if plain.dtype != torch.float32 else numbers.masked_fill(near, 0.0)
    for name, actual, wanted in zip(("lse", "max_logits"), results[1:], (lse, top), strict=False):
        _assert_stats(actual, wanted, known, rounded, plain.dtype, name)
    return "matched" if bool(near.all()) else "safe"


def _known(dtype: torch.dtype, expected: Tensor, lse: Tensor, top: Tensor, sizes: Tensor) -> Tensor:
    """Return the rows (T, H) whose sums are numbers of float32, and ``out`` one of its dtype.

    Args:
        dtype: of ``out``.
        expected: ``out`` in float64.
        lse: with the sinks.
        top: the largest logit, or lse of the parts: the weights are sums of e to what others are below it.
        sizes: what ``out`` would be of the values' sizes.
    """
    sums = (lse - top).exp()[..., None] * sizes
    sums = torch.where(top[..., None] == float("-inf"), 0.0, sums)
    rows = (expected.abs() <= torch.finfo(dtype).max).all(-1) & (sums < _LARGEST_NUMBER).all(-1)
    # Beside keys a sink of NaN or inf spoils its rows.
    return rows & ~top.isnan() & (top != float("inf")) & ((lse < float("inf")) | (top == float("-inf")))


def _assert_stats(
    actual: Tensor,
    expected: Tensor,
    rows: Tensor,
    numbers: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "lse",
) -> None:
    rows = rows & ~expected.isnan()  # a sink that is no number, where no key is
    assert_stats(actual[rows], expected[rows], 0.0 if numbers is None else numbers[rows], dtype, name)


def _assert_finite(results: tuple[Tensor, ...], rows: Tensor, top: Tensor) -> None:
    for name, result in zip(("out", "lse", "max_logits"), results, strict=False):
        assert result[rows & (top != float("-inf"))].isfinite().all(), f"{name} is not finite"


def _rounding(sizes: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return what rounding the weights to a half precision may cost, where plain PyTorch's error was small by luck."""
    return None if dtype == torch.float32 else torch.finfo(dtype).eps * sizes


def _products(op: str, arguments: dict[str, Any]) -> Tensor:
    """Return (T, H): the largest sum of sizes of a row's products with a key that it sees, scaled or not."""
    options = {"softmax_scale": 1.0, "logits_soft_cap": 0.0, "alibi_slopes": None, "sinks": None}
    sums = [
        oracle(op, _two_sided(arguments, keys=torch.abs, scaled=scaled) | options | {"query": arguments["query"].abs()})
        for scaled in (True, False)
    ]
    scale = arguments["softmax_scale"]
    return torch.maximum(sums[0][2], sums[1][2]) * max(1.0, 0.0 if scale is None else abs(scale))


def _two_sided(arguments: dict[str, Any], keys: Any = None, values: Any = None, scaled: bool = True) -> dict[str, Any]:
    """Return arguments with keys and values in float64 and apart, to which functions are applied."""
    keys, values = keys or torch.clone, values or torch.clone
    changed = dict(arguments, kv_scales=None)
    cache, scales = arguments["kv_cache"], arguments["kv_scales"]
    if cache is not None:
        wide = cache.double()
        if scales is not None and scaled:
            wide *= (scales if scales.dim() == 4 else scales.reshape(cache.size(0), 1, -1, 1))[..., None]
        changed["kv_cache"] = torch.stack([keys(wide[0]), values(wide[-1])])
    if arguments.get("key") is not None:
        key, value = arguments["key"], arguments["value"]
        changed |= {"key": keys(key.double()), "value": values((key if value is None else value).double())}
    return changed
