"""Tensors that torch negates lazily: read as what they stand for, refused where they would be written."""

import pytest
import torch
from torch import Tensor

from torch_paged.testing import assert_same
from torch_paged.testing.bad_input import BASE_OPS, BASES
from torch_paged.testing.cases import build

WRITTEN = {"write": "kv_cache", "write, int8": "kv_cache", "quantize": "kv_scales", "copy": "kv_cache"}
READ = {"write": "key", "write, int8": "kv_scales", "quantize": "value", "decode": "query"}


def negated(x: Tensor) -> Tensor:
    """Return the same values as a view with the negative bit."""
    return torch._neg_view(-x)


@pytest.mark.parametrize(("base", "name"), WRITTEN.items())
def test_what_is_written_must_not_be_negated(base: str, name: str) -> None:
    arguments = build(BASES[base], 0)
    arguments[name] = torch._neg_view(arguments[name])
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(ValueError, match=rf"^{BASE_OPS[base]}: {name} must not be a negated view"):
        getattr(torch.ops.paged, BASE_OPS[base])(**arguments)
    for key, value in before.items():
        assert_same(arguments[key].resolve_neg(), value.resolve_neg())


@pytest.mark.parametrize(("base", "name"), READ.items())
def test_what_is_read_may_be_negated(base: str, name: str) -> None:
    plain, lazy = build(BASES[base], 0), build(BASES[base], 0)
    lazy[name] = negated(lazy[name])
    assert lazy[name].is_neg()
    expected = getattr(torch.ops.paged, BASE_OPS[base])(**plain)
    result = getattr(torch.ops.paged, BASE_OPS[base])(**lazy)
    if expected is not None:
        assert_same(result, expected)
    for key in ("kv_cache", "kv_scales"):
        if isinstance(plain.get(key), Tensor):
            assert_same(lazy[key].resolve_neg(), plain[key])
