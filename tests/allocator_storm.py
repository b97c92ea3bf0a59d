"""A storm of random operations on the block allocator, a million of them by ``make storm-allocator``.

What must hold is known from a model that shares no code with the allocator. All that decides a key (the salt and every
token up to it) is one number, a node of a tree; the model writes these numbers to slots as a step would write keys. So
whatever is wrongly shared, copied, reused, found or handed out twice is a slot with another number.
"""

import argparse
import pickle
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from rich.console import Console
from rich.progress import track
from rich.table import Table

from torch_paged.cache import BlockAllocator, OutOfBlocks

SALTS = (b"", b"adapter")
EMPTY = -1
"""What a slot holds that was not written."""


@dataclass
class Model:
    """What a sequence holds, how many of its tokens have ids, and how many of its blocks were published."""

    root: int
    nodes: list[int] = field(default_factory=list)
    known: int = 0
    published_blocks: int = 0


def check_owners(allocator: BlockAllocator, seqs: Iterable[int]) -> list[int]:
    """Check that what no sequence holds is free, and return how many sequences hold each block."""
    uses = [0] * allocator.num_blocks
    for seq in seqs:
        live = [block for block in allocator.block_table(seq) if block >= 0]
        assert len(set(live)) == len(live), "a block twice in one table"
        for block in live:
            uses[block] += 1
    pool = allocator._pool
    assert pool.references == uses, "wrong reference counts"
    unused = [block for block, count in enumerate(uses) if not count]
    assert sorted([*pool._free, *pool._kept]) == unused, "free and used blocks are not all blocks"
    assert allocator.num_free_blocks == len(unused)
    return uses


class Storm:
    """Random operations on one allocator, each followed by a check of all that must hold.

    Args:
        seed: decides the pool, the options and the operations.

    Attributes:
        counts: how often each operation was done, and each outcome seen.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.allocator = BlockAllocator(
            self.draw.randrange(4, 80),
            self.draw.choice([1, 2, 3, 4, 8]),
            sliding_window=self.draw.choice([None, None, 1, 5, 16]),
            attention_chunk=self.draw.choice([None, None, None, 6, 16]),
            prefix_reuse=self.draw.random() < 0.75,
        )
        self.most_blocks = 2 * self.allocator.num_blocks
        self.most_sequences = self.draw.randrange(2, 16)
        self.starts = [[self.draw.randrange(3) for _ in range(40)] for _ in range(5)]
        self.models: dict[int, Model] = {}
        self.memory = [[EMPTY] * self.size for _ in range(self.allocator.num_blocks)]
        self.idle_since = dict.fromkeys(range(self.allocator.num_blocks), 0)
        self.uses = [0] * self.allocator.num_blocks
        self.index: dict[bytes, int] = {}
        self.meaning: dict[bytes, int] = {}  # of a digest: the node of the last token of its block
        self.tree: dict[tuple[int, object], int] = {}
        self.operations = 0

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.allocator.block_size

    def run(self, operations: int) -> None:
        """Do at least so many operations, then free everything."""
        actions = {self.start: 4, self.step: 10, self.fork: 2, self.end: 3, self.cut: 2, self.grow: 0.02, self.err: 1}
        while self.operations < operations:
            [action] = self.draw.choices(list(actions), list(actions.values()))
            action()
            self.check_contents()
        for seq in list(self.models):
            self.free(seq)
        assert self.allocator.num_free_blocks == self.allocator.num_blocks, "blocks are lost"

    def start(self) -> None:
        """Allocate, and most often read the whole prompt; where there are many sequences, end some first."""
        while len(self.models) >= self.most_sequences:
            self.end()
        salt = self.draw.choice(SALTS)
        prompt = self.draw.choice(self.starts)[: self.draw.randrange(41)]
        prompt = prompt + [self.draw.randrange(3) for _ in range(self.draw.randrange(4))]
        root = self.node(EMPTY, salt)
        nodes = self.path(root, prompt)
        expected = 0
        if self.allocator.prefix_reuse:
            findable = {self.meaning[digest]: block for digest, block in self.index.items()}
            while expected + self.size < len(prompt) and nodes[expected + self.size - 1] in findable:
                expected += self.size
        seq = self.allocator.allocate(prompt, salt=salt)
        assert seq not in self.models
        self.models[seq] = Model(root, nodes[:expected], expected, expected // self.size)
        assert self.allocator.context_len(seq) == expected, "not the longest findable start of the prompt"
        self.counts["blocks found by their content"] += expected // self.size
        self.did("allocate")
        if self.draw.random() < 0.8:
            self.finish_step({seq: slots} if (slots := self.append(seq, prompt[expected:])) else {})

    def step(self) -> None:
        """Append to several sequences before anything is copied or written; where blocks run out, one may go."""
        slots: dict[int, list[int]] = {}
        for seq in self.draw.sample(sorted(self.models), min(len(self.models), self.draw.randrange(1, 6))):
            if seq not in self.models:
                continue
            tokens: int | list[int] = [self.draw.randrange(3) for _ in range(self.draw.choice([0, 1, 1, 1, 2, 7]))]
            if self.draw.random() < 0.1:
                tokens = self.draw.randrange(4)
            while (new := self.append(seq, tokens)) is None and self.draw.random() < 0.7:
                victim = self.draw.choice(sorted(self.models))
                self.free(victim)
                slots.pop(victim, None)
                self.counts["preempted"] += 1
                if victim == seq:
                    break
            if new:
                slots[seq] = new
        self.finish_step(slots)

    def fork(self) -> None:
        """Fork one sequence."""
        if self.models and len(self.models) < self.most_sequences:
            seq = self.draw.choice(sorted(self.models))
            parent, child = self.models[seq], self.allocator.fork(seq)
            self.models[child] = Model(parent.root, list(parent.nodes), parent.known, parent.published_blocks)
            self.did("fork")

    def end(self) -> None:
        """Free one sequence."""
        if self.models:
            self.free(self.draw.choice(sorted(self.models)))

    def cut(self) -> None:
        """Truncate one sequence, where what remains is still there."""
        if not self.models:
            return
        seq = self.draw.choice(sorted(self.models))
        model, table, before = self.models[seq], self.allocator.block_table(seq), self.state()
        length = max(0, len(model.nodes) - self.draw.choice([0, 1, 2, 5, 10, 100]))
        wanted = table[self.first_visible(length) // self.size : -(-length // self.size)]
        try:
            self.allocator.truncate(seq, length)
        except ValueError:
            assert EMPTY in wanted, "a truncation to what is there was refused"
            assert self.state() == before, "a refused truncation changed something"
            self.did("truncate, refused")
            return
        assert EMPTY not in wanted, "a truncation left a window whose blocks are gone"
        del model.nodes[length:]
        model.known = min(model.known, length)
        model.published_blocks = min(model.published_blocks, length // self.size)
        self.did("truncate")

    def grow(self) -> None:
        """Add blocks, up to twice as many as there were."""
        more = min(self.draw.randrange(3), self.most_blocks - self.allocator.num_blocks)
        self.allocator.grow(self.allocator.num_blocks + more)
        for block in range(len(self.memory), self.allocator.num_blocks):
            self.memory.append([EMPTY] * self.size)
            self.uses.append(0)
            self.idle_since[block] = self.operations
        self.did("grow")

    def err(self) -> None:
        """Make a call that must be refused."""
        seq = self.draw.choice(sorted(self.models)) if self.models else 0
        calls = {
            "append": (seq, -1),
            "truncate": (seq, 10**6),
            "batch": ([seq], [10**6]),
            "fork": (-1,),
            "free": (10**9,),
            "publish": (-1,),
            "allocate": ([1, "2"],),
            "grow": (self.allocator.num_blocks - 1,),
        }
        name, before = self.draw.choice(list(calls)), self.state()
        with pytest.raises(ValueError, match=f"^{name}: "):
            getattr(self.allocator, name)(*calls[name])
        assert self.state() == before, f"{name} was refused and changed something"
        self.did("refused call")

    def append(self, seq: int, tokens: int | list[int]) -> list[int] | None:
        """Append where the blocks suffice, and return the slots; None where they do not, which must change nothing."""
        model, table, free = self.models[seq], self.allocator.block_table(seq), self.uses.count(0)
        ids = None if isinstance(tokens, int) else tokens
        count = tokens if isinstance(tokens, int) else len(tokens)
        length = len(model.nodes)
        hidden = self.first_visible(length) // self.size if count else 0
        freed = sum(block >= 0 and self.uses[block] == 1 for block in table[:hidden])
        copies = bool(count and length % self.size and self.uses[table[-1]] > 1)
        needed = -(-(length + count) // self.size) - len(table) + copies
        assert self.allocator.blocks_needed(seq, count) == max(0, needed - freed)
        before = self.state()
        try:
            slots = self.allocator.append(seq, tokens)
        except OutOfBlocks:
            assert needed > free + freed, "there were blocks"
            assert self.state() == before, "an append without blocks changed something"
            self.did("append, out of blocks")
            return None
        assert needed <= free + freed, "there were no blocks"
        after = self.allocator.block_table(seq)
        assert set(after[:hidden]) <= {EMPTY}, "a block behind the window is kept"
        places = [after[(length + i) // self.size] * self.size + (length + i) % self.size for i in range(count)]
        assert slots == places, "slots that the table does not lead to"
        if ids is not None and model.known == length:
            model.known += count
        start = model.nodes[-1] if model.nodes else model.root
        model.nodes += self.path(start, [object()] * count if ids is None else ids)
        self.counts["blocks behind a window"] += hidden - table[:hidden].count(EMPTY)
        self.did("append", overwritten=after[length // self.size] if count and length % self.size else None)
        return slots

    def free(self, seq: int) -> None:
        """Free a sequence."""
        self.allocator.free(seq)
        del self.models[seq]
        self.did("free")

    def finish_step(self, slots: dict[int, list[int]]) -> None:
        """Copy blocks, write the new tokens, and publish some."""
        source, destination = (ids.tolist() for ids in self.allocator.take_copies())
        assert len(set(destination)) == len(destination), "two copies into one block"
        copied = [list(self.memory[block]) for block in source]
        for block, content in zip(destination, copied, strict=True):
            self.memory[block] = content
        self.counts["blocks copied on write"] += len(source)
        all_slots = [slot for new in slots.values() for slot in new]
        assert len(set(all_slots)) == len(all_slots), "a slot for two tokens"
        for seq, new in slots.items():
            nodes = self.models[seq].nodes
            assert self.allocator.batch([seq], [len(new)]).slot_mapping.tolist() == new
            for slot, node in zip(new, nodes[len(nodes) - len(new) :], strict=True):
                self.memory[slot // self.size][slot % self.size] = node
        for seq in slots:
            if self.draw.random() < 0.8:
                self.publish(seq)

    def publish(self, seq: int) -> None:
        """Publish a sequence; its full blocks of known ids can then be found."""
        self.allocator.publish(seq)
        self.did("publish")
        if not self.allocator.prefix_reuse:
            assert not self.index
            return
        model, table = self.models[seq], self.allocator.block_table(seq)
        findable = {self.meaning[digest] for digest in self.index}
        for block in range(model.published_blocks, model.known // self.size):
            assert table[block] < 0 or model.nodes[(block + 1) * self.size - 1] in findable, "a block is not found"
        model.published_blocks = max(model.published_blocks, model.known // self.size)

    def did(self, operation: str, overwritten: int | None = None) -> None:
        """Count an operation, and check whose the blocks are.

        Args:
            operation: what was done.
            overwritten: a block that is no longer what it was published to be, because a sequence goes on in it.
        """
        self.operations += 1
        self.counts[operation] += 1
        uses = check_owners(self.allocator, self.models)
        unused = [block for block, count in enumerate(uses) if not count]
        pool = self.allocator._pool
        index = dict(pool._block_of)
        assert {block: digest for digest, block in index.items()} == pool._digest_of
        assert len(pool._digest_of) == len(index), "a block found by two digests"
        for block in unused:
            if self.uses[block]:
                self.idle_since[block] = self.operations
        self.check_evictions(index, unused, overwritten)
        for digest in index.keys() - self.index.keys():
            content = self.memory[index[digest]][-1]
            assert self.meaning.setdefault(digest, content) == content, "a digest that means two contents"
        self.uses, self.index = uses, index

    def check_evictions(self, index: dict[bytes, int], unused: list[int], overwritten: int | None) -> None:
        """Check that published blocks are forgotten for want of others only, those that nobody used for longest."""
        lost = {block for digest, block in self.index.items() if digest not in index} - {overwritten}
        if not lost:
            return
        self.counts["evicted"] += len(lost)
        published = set(index.values())
        assert set(unused) <= published, "a published block was forgotten though a free one was left"
        newest = max(self.idle_since[block] if not self.uses[block] else self.operations for block in lost)
        assert all(newest <= self.idle_since[block] for block in unused), "not the least recently used was forgotten"

    def check_contents(self) -> None:
        """Check that tables and digests lead to what was written, and that no two digests mean the same."""
        for seq, model in self.models.items():
            table, length = self.allocator.block_table(seq), len(model.nodes)
            assert self.allocator.context_len(seq) == length
            assert len(table) == -(-length // self.size)
            first = self.first_visible(length)
            for number in range(first // self.size, len(table)):
                begin = number * self.size
                wanted = model.nodes[max(begin, first) : begin + self.size]
                offset = max(begin, first) - begin
                found = self.memory[table[number]][offset : offset + len(wanted)] if table[number] >= 0 else None
                assert found == wanted, f"sequence {seq} has other keys in block {number}"
        for digest, block in self.index.items():
            content = self.memory[block]
            assert content[-1] == self.meaning[digest], "a digest leads to another content"
            assert EMPTY not in content, "a digest leads to a block that is not full"
        assert len({self.meaning[digest] for digest in self.index}) == len(self.index), "a content has two digests"

    def first_visible(self, position: int) -> int:
        """Return the first key that a query at a position, or a later one, sees."""
        window, chunk = self.allocator.sliding_window, self.allocator.attention_chunk
        behind_window = position - window + 1 if window is not None else 0
        return max(0, behind_window, position - position % chunk if chunk is not None else 0)

    def path(self, node: int, tokens: list[object] | list[int]) -> list[int]:
        """Return the nodes of tokens that follow a node."""
        nodes = []
        for token in tokens:
            node = self.node(node, token)
            nodes.append(node)
        return nodes

    def node(self, parent: int, token: object) -> int:
        """Return the number of a token with all that comes before it."""
        return self.tree.setdefault((parent, token), len(self.tree))

    def state(self) -> bytes:
        """Return all that the allocator knows."""
        return pickle.dumps(self.allocator)


def main() -> None:
    """Storm many allocators; print what was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=10**6)
    parser.add_argument("--each", type=int, default=20_000, help="operations on one allocator")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    total, began = 0, time.monotonic()
    storms = -(-arguments.operations // arguments.each)
    for seed in track(range(arguments.seed, arguments.seed + storms), "allocators"):
        storm = Storm(seed)
        try:
            storm.run(arguments.each)
        except AssertionError as error:
            raise SystemExit(f"seed {seed}, operation {storm.operations}: {error}") from error
        counts += storm.counts
        total += storm.operations
    table = Table("operation or outcome", "times")
    for name, count in counts.most_common():
        table.add_row(name, f"{count:,}")
    console = Console()
    console.print(table)
    seconds = time.monotonic() - began
    console.print(f"{total:,} operations on {storms} allocators in {seconds:.0f} s, every invariant held after each")


if __name__ == "__main__":
    main()
