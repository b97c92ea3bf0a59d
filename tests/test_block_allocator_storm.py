"""A short storm on block allocators; ``make storm-allocator`` is a million operations."""

from collections import Counter

from allocator_storm import Storm

OUTCOMES = ("append, out of blocks", "truncate, refused", "evicted", "preempted", "fork", "blocks copied on write")


def test_every_invariant_holds_after_every_operation() -> None:
    counts: Counter[str] = Counter()
    for seed in range(5):
        storm = Storm(seed)
        storm.run(1500)
        counts += storm.counts
    assert all(counts[outcome] >= 10 for outcome in OUTCOMES), counts
