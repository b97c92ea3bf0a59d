"""A short storm of requests; ``make storm-requests`` is ten minutes of them."""

import pytest
from request_storm import Storm


@pytest.mark.parametrize(("family", "seed"), [("llama", 1), ("gemma2", 2)])
def test_every_request_gets_its_own_tokens(family: str, seed: int) -> None:
    storm = Storm(family, seed)
    storm.run(requests=25)
    assert storm.counts["ended"] >= 5
    assert all(storm.counts[name] for name in ("cancelled", "interrupts", "forwards that failed")), storm.counts
    assert storm.counts["ties"] == 0
