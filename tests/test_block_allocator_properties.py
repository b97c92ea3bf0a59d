"""The block allocator under random sequences of operations, against a dictionary that writes every key down.

A slot holds all that decides a key: the salt and all tokens up to it. So a block that is wrongly shared, copied, reused
or handed out twice shows as a wrong content, whatever the cause.
"""

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from torch_paged.cache import BlockAllocator, OutOfBlocks

Tokens = tuple[int, ...]
Content = tuple[bytes, Tokens]

prompts = st.lists(st.integers(0, 1), max_size=9)
tokens = st.one_of(st.integers(0, 5), st.lists(st.integers(0, 1), min_size=1, max_size=5))
salts = st.sampled_from([b"", b"", b"adapter"])
some_exist = precondition(lambda self: bool(self.model))


class AllocatorMachine(RuleBasedStateMachine):
    """Rules are what a scheduler does; ``step`` appends to several sequences before anything is copied or written."""

    @initialize(
        num_blocks=st.integers(2, 14),
        block_size=st.integers(1, 4),
        window=st.sampled_from([None, None, 1, 2, 3, 5]),
        chunk=st.sampled_from([None, None, None, 3, 4]),
        prefix_reuse=st.booleans(),
    )
    def start(
        self, num_blocks: int, block_size: int, window: int | None, chunk: int | None, prefix_reuse: bool
    ) -> None:
        self.allocator = BlockAllocator(
            num_blocks, block_size, sliding_window=window, attention_chunk=chunk, prefix_reuse=prefix_reuse
        )
        self.memory: dict[int, Content] = {}
        self.model: dict[int, Content] = {}
        self.appended_at: dict[int, int] = {}
        self.anonymous = 0

    @rule(prompt=prompts, salt=salts, whole=st.booleans())
    def allocate(self, prompt: list[int], salt: bytes, whole: bool) -> None:
        seq = self.allocator.allocate(prompt, salt=salt)
        reused = self.allocator.context_len(seq)
        assert reused % self.allocator.block_size == 0
        assert reused < max(1, len(prompt))
        self.model[seq] = salt, tuple(prompt[:reused])
        self.appended_at[seq] = 0
        if whole and (slots := self.append(seq, prompt[reused:])) is not None:
            self.copy_and_write({seq: slots})
            self.allocator.publish(seq)

    @some_exist
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        slots: dict[int, list[int]] = {}
        for seq in data.draw(st.lists(self.live(), min_size=1, max_size=4, unique=True)):
            if seq not in self.model:
                continue
            if (new_slots := self.append(seq, data.draw(tokens))) is not None:
                slots[seq] = new_slots
            elif data.draw(st.booleans()):
                victim = data.draw(self.live())  # what a scheduler does to make room
                self.free_now(victim)
                slots.pop(victim, None)
        self.copy_and_write(slots)
        for seq in slots:
            if data.draw(st.booleans()):
                self.allocator.publish(seq)

    @some_exist
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.free_now(data.draw(self.live()))

    @some_exist
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        seq = data.draw(self.live())
        child = self.allocator.fork(seq)
        self.model[child] = self.model[seq]
        self.appended_at[child] = self.appended_at[seq]

    @some_exist
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq = data.draw(self.live())
        salt, content = self.model[seq]
        length = data.draw(st.integers(0, len(content)))
        before = self.state()
        try:
            self.allocator.truncate(seq, length)
        except ValueError:
            assert length < self.appended_at[seq], "back to the length before the last append must work"
            assert self.state() == before
            return
        self.model[seq] = salt, content[:length]
        self.appended_at[seq] = min(self.appended_at[seq], length)

    @rule(more=st.integers(0, 2))
    def grow(self, more: int) -> None:
        self.allocator.grow(self.allocator.num_blocks + more)

    @some_exist
    @rule(data=st.data(), call=st.sampled_from(["append", "truncate", "batch", "fork", "free", "publish"]))
    def bad_call(self, data: st.DataObject, call: str) -> None:
        seq = data.draw(self.live())
        arguments: dict[str, Any] = {"append": (seq, -1), "truncate": (seq, 10**6), "batch": ([seq], [10**6])}
        before = self.state()
        with pytest.raises(ValueError, match=f"^{call}: "):
            getattr(self.allocator, call)(*arguments.get(call, (-1,)))
        assert self.state() == before

    @invariant()
    def references_are_right_and_nothing_leaks(self) -> None:
        uses = [0] * self.allocator.num_blocks
        for seq in self.model:
            live = [block for block in self.allocator.block_table(seq) if block >= 0]
            assert len(set(live)) == len(live), "a block twice in one table"
            for block in live:
                uses[block] += 1
        pool = self.allocator._pool
        assert pool.references == uses
        unused = {block for block, count in enumerate(uses) if count == 0}
        assert sorted([*pool._free, *pool._kept]) == sorted(unused)
        assert self.allocator.num_free_blocks == len(unused)
        assert set(pool._kept) <= set(pool._digest_of)
        assert {block: digest for digest, block in pool._block_of.items()} == pool._digest_of

    @invariant()
    def tables_lead_to_what_was_written(self) -> None:
        size = self.allocator.block_size
        for seq, (salt, content) in self.model.items():
            table = self.allocator.block_table(seq)
            assert self.allocator.context_len(seq) == len(content)
            assert len(table) == -(-len(content) // size)
            for position in range(self.first_visible(len(content)), len(content)):
                slot = table[position // size] * size + position % size
                assert self.memory.get(slot) == (salt, content[: position + 1])

    def teardown(self) -> None:
        if not hasattr(self, "allocator"):
            return
        for seq in list(self.model):
            self.free_now(seq)
        assert self.allocator.num_free_blocks == self.allocator.num_blocks
        last = self.allocator.allocate()
        capacity = self.allocator.num_blocks * self.allocator.block_size
        assert sorted(self.allocator.append(last, capacity)) == list(range(capacity))

    def live(self) -> st.SearchStrategy[int]:
        return st.sampled_from(sorted(self.model))

    def append(self, seq: int, what: int | list[int]) -> list[int] | None:
        salt, content = self.model[seq]
        count = what if isinstance(what, int) else len(what)
        needed, before = self.allocator.blocks_needed(seq, count), self.state()
        try:
            slots = self.allocator.append(seq, what)
        except OutOfBlocks:
            assert needed > before["_pool"]["available"]
            assert self.state() == before
            return None
        assert needed <= before["_pool"]["available"]
        assert len(set(slots)) == len(slots) == count
        new = tuple(what) if isinstance(what, list) else tuple(-1 - self.anonymous - i for i in range(count))
        self.anonymous += 0 if isinstance(what, list) else count
        self.model[seq] = salt, content + new
        if count:
            self.appended_at[seq] = len(content)
            freed = self.first_visible(len(content)) // self.allocator.block_size
            assert set(self.allocator.block_table(seq)[:freed]) <= {-1}, "a block behind the window was kept"
        return slots

    def copy_and_write(self, slots: dict[int, list[int]]) -> None:
        size = self.allocator.block_size
        src, dst = (tensor.tolist() for tensor in self.allocator.take_copies())
        assert len(set(dst)) == len(dst), "two copies into one block"
        read = dict(self.memory)
        for source, destination in zip(src, dst, strict=True):
            for offset in range(size):
                self.memory.pop(destination * size + offset, None)
                if source * size + offset in read:
                    self.memory[destination * size + offset] = read[source * size + offset]
        written: set[int] = set()
        for seq, new_slots in slots.items():
            salt, content = self.model[seq]
            first = len(content) - len(new_slots)
            assert written.isdisjoint(new_slots), "one slot for two tokens"
            written.update(new_slots)
            batch = self.allocator.batch([seq], [len(new_slots)])
            assert batch.slot_mapping.tolist() == new_slots
            for index, slot in enumerate(new_slots):
                self.memory[slot] = salt, content[: first + index + 1]

    def free_now(self, seq: int) -> None:
        self.allocator.free(seq)
        del self.model[seq]

    def first_visible(self, position: int) -> int:
        window, chunk = self.allocator.sliding_window, self.allocator.attention_chunk
        return max(
            0,
            position - window + 1 if window is not None else 0,
            position - position % chunk if chunk is not None else 0,
        )

    def state(self) -> dict[str, Any]:
        pool = {**vars(self.allocator._pool), "available": self.allocator._pool.available}
        return copy.deepcopy({**vars(self.allocator), "_pool": pool})


def test_any_sequence_of_operations() -> None:
    run_state_machine_as_test(
        AllocatorMachine,
        settings=settings(
            max_examples=200,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
