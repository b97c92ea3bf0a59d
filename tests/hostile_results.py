"""Whether the results of a hostile call that only reads are the reference's, as far as float32 can tell."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_paged.contract import reference
from torch_paged.testing import assert_close, assert_same, assert_stats, oracle, plain_attention

_LARGEST_NUMBER = 2.0**126  # that a kernel may meet on its way, so that the difference of two is in float32's range
_LARGEST_LOGIT = 1e4  # beyond it float32 rounds logits so far that a weight says little


def assert_read(op: str, arguments: dict[str, Any], results: tuple[Tensor, ...]) -> str:
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
    return _assert_attention(op, arguments, results)


def _one_nan(x: Tensor) -> Tensor:
    """Return ``x`` with one kind of NaN, for which sign and payload say nothing."""
    return x if x.dtype.itemsize == 1 else x.masked_fill(x.isnan(), float("nan"))


def _assert_merged(arguments: dict[str, Any], results: tuple[Tensor, ...]) -> str:
    outs, lses, sinks = arguments["outs"].double(), arguments["lses"], arguments["sinks"]
    expected, lse = reference.merge_attention_states(outs, lses, sinks, compute_dtype=torch.float64)
    largest, without_sink = reference.merge_attention_states(outs.abs(), lses, compute_dtype=torch.float64)
    plain, _ = reference.merge_attention_states(**arguments)
    rows = _Rows(expected, lse, lses.amax(0).double(), plain, largest, without_sink)
    known = rows.known()
    return rows.compare(results, known, known, torch.zeros_like(lse))


def _assert_attention(op: str, arguments: dict[str, Any], results: tuple[Tensor, ...]) -> str:
    """Compare the rows in which no number leaves float32's range.

    Of rows with logits so large that their rounding decides on the weights, ``out`` is compared only where one key has
    all the weight in any case.
    """
    expected, lse, top = oracle(op, arguments)
    plain = plain_attention(op, arguments)
    largest, without_sink, _ = oracle(op, _two_sided(arguments, values=torch.abs) | {"sinks": None})
    rows = _Rows(expected, lse, top, plain, largest, without_sink)
    scale = arguments["softmax_scale"]
    scale = arguments["query"].size(-1) ** -0.5 if scale is None else abs(scale)
    products = _products(op, arguments)
    stored = products if arguments["kv_scales"] is None else _products(op, arguments, scaled=False)
    numbers = torch.maximum(torch.maximum(products, stored) * max(1.0, scale), top.abs())
    known = rows.known() & (rows.nothing | (numbers < _LARGEST_NUMBER))
    rounded = products * scale + top.abs()
    decided = (lse - top < 1e-12) & (4 * torch.finfo(plain.dtype).eps * rounded < 10)
    small = rows.nothing | (top.abs() <= _LARGEST_LOGIT)
    tops = top[known & small & ~rows.nothing].abs()
    usual = tops.max() if tops.numel() and plain.dtype != torch.float32 else torch.zeros(()).double()
    return rows.compare(results, known, known & (small | decided), torch.where(small, usual, rounded))


@dataclass(frozen=True)
class _Rows:
    """What rows (T, H) of out are to be.

    Attributes:
        out: in float64.
        lse: with the sinks.
        top: the largest logit, or lse of the parts: weights are e to what others are below it.
        plain: ``out`` by plain PyTorch.
        largest: what ``out`` would be of the values' sizes and without sinks.
        without_sink: lse without them.
    """

    out: Tensor
    lse: Tensor
    top: Tensor
    plain: Tensor
    largest: Tensor
    without_sink: Tensor

    @property
    def nothing(self) -> Tensor:
        """The rows that see no key."""
        return self.top == float("-inf")

    def _weighed(self, base: Tensor) -> Tensor:
        """Return sums of the values' sizes, each times e to what its logit is above ``base``."""
        sums = (self.without_sink - base).exp()[..., None] * self.largest
        return torch.where(self.nothing[..., None], 0.0, sums)

    def known(self) -> Tensor:
        """Return the rows whose sums are numbers of float32, and ``out`` one of its dtype."""
        rows = (self.out.abs() <= torch.finfo(self.plain.dtype).max).all(-1)
        rows &= (self._weighed(self.top) < _LARGEST_NUMBER).all(-1)
        # Beside keys a sink of NaN or inf spoils its rows.
        return rows & ~self.top.isnan() & (self.top != float("inf")) & ((self.lse < float("inf")) | self.nothing)

    def compare(self, results: tuple[Tensor, ...], known: Tensor, near: Tensor, logits: Tensor) -> str:
        """Compare the results.

        Args:
            results: out, and perhaps lse, and perhaps max_logits.
            known: the rows whose statistics are compared.
            near: the rows of these of which ``out`` is compared.
            logits: what the rounding of a row's statistics depends on.
        """
        near = near & self.plain.isfinite().all(-1)
        assert (results[0][known & self.nothing] == 0).all(), "out of rows without keys is not 0"
        assert results[0][known].isfinite().all(), "out is not finite"
        assert_close(results[0][near], self.out[near], self.plain[near], self._weighed(self.lse)[near])
        for name, actual, wanted in zip(("lse", "max_logits"), results[1:], (self.lse, self.top), strict=False):
            rows = known & ~wanted.isnan()  # a sink that is no number, where no key is
            assert_stats(actual[rows], wanted[rows], logits[rows], self.plain.dtype, name)
        return "matched" if bool(near.all()) else "safe"


def _products(op: str, arguments: dict[str, Any], scaled: bool = True) -> Tensor:
    """Return (T, H): the largest sum of the sizes of a row's products with a key that it sees."""
    options = {"softmax_scale": 1.0, "logits_soft_cap": 0.0, "alibi_slopes": None, "sinks": None}
    given = _two_sided(arguments, keys=torch.abs, scaled=scaled)
    return oracle(op, given | options | {"query": arguments["query"].abs()})[2]


def _two_sided(
    arguments: dict[str, Any],
    keys: Callable[[Tensor], Tensor] = torch.positive,
    values: Callable[[Tensor], Tensor] = torch.positive,
    scaled: bool = True,
) -> dict[str, Any]:
    """Return arguments with keys and values in float64 and apart, to which functions are applied."""
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
