"""The steps from products to weights, on values."""

import jax.numpy as jnp
import numpy as np
import pytest

from torch_paged.backends.tpu.logits import NOTHING, statistics, weighted_sum

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_that_are_not_finite_reach_the_rows_that_see_them(dtype: jnp.dtype) -> None:
    values = jnp.array([[1, 1, 1, 1, 1], [INF, -INF, NAN, 2, INF], [3, 3, 3, 3, -INF]], dtype)
    seen = jnp.array([[True, False, True], [True, True, False], [True, True, True]])
    sums = weighted_sum(jnp.where(seen, 0.5, 0.0).astype(dtype), seen, values)
    expected = [[2, 2, 2, 2, -INF], [INF, -INF, NAN, 1.5, INF], [INF, -INF, NAN, 3, NAN]]
    np.testing.assert_array_equal(sums, np.array(expected, np.float32))


def test_a_thousand_values_that_are_no_numbers_stay_none() -> None:
    values = jnp.full((2048, 128), NAN, jnp.bfloat16)
    seen = jnp.ones((8, 2048), bool).at[0].set(False)
    sums = weighted_sum(jnp.where(seen, 1.0, 0.0).astype(jnp.bfloat16), seen, values)
    assert not sums[0].any()
    assert jnp.isnan(sums[1:]).all()


@pytest.mark.parametrize("sink", [-INF, 0.5])
def test_a_row_without_keys_has_a_factor_of_zero_or_one_that_is_finite(sink: float) -> None:
    factor, lse, max_logits = statistics(jnp.zeros((8, 1)), jnp.full((8, 1), NOTHING), jnp.full((8, 1), sink))
    assert jnp.isfinite(factor).all()
    assert (lse == sink).all()
    assert (max_logits == -INF).all()


def test_a_sink_of_minus_infinity_is_none() -> None:
    total, maximum = jnp.full((8, 1), 3.0), jnp.full((8, 1), 2.0)
    for actual, expected in zip(
        statistics(total, maximum, jnp.full((8, 1), -INF)), statistics(total, maximum), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
