"""Blocks by reference count: in use, kept for reuse by content (least recently used goes first), or free."""

from collections import OrderedDict


class OutOfBlocks(RuntimeError):
    """Raised when a call needs more blocks than are free. The call changed nothing.

    Attributes:
        needed: blocks that the call needs.
        available: blocks that it could have had.
    """

    def __init__(self, needed: int, available: int, num_blocks: int) -> None:
        super().__init__(
            f"append: needs {needed} blocks, {available} of {num_blocks} are free; "
            "free a sequence or make a larger cache"
        )
        self.needed = needed
        self.available = available


class BlockPool:
    """Reference counts of ``num_blocks`` blocks, and an index of full blocks by the digest of what they hold.

    A published block that nobody uses is kept: found again by its digest until its memory is wanted.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that ``take`` can give: free and kept ones."""
        return len(self._free) + len(self._kept)

    def grow(self, num_blocks: int) -> None:
        """Add free blocks, up to ``num_blocks`` in all."""
        self._free[:0] = range(num_blocks - 1, self.num_blocks - 1, -1)
        self.references += [0] * (num_blocks - self.num_blocks)
        self.num_blocks = num_blocks

    def take(self) -> int:
        """Return a block with one reference; a kept one is forgotten only when no free one is left."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            self.unpublish(block)
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block that is in use or kept."""
        self._kept.pop(block, None)
        self.references[block] += 1

    def release(self, block: int) -> bool:
        """Drop a reference; return True when it was the last one."""
        self.references[block] -= 1
        if self.references[block]:
            return False
        if block in self._digest_of:
            self._kept[block] = None
        else:
            self._free.append(block)
        return True

    def publish(self, block: int, digest: bytes) -> None:
        """Make a block in use findable by what it holds; the first block with a digest stays the one that is found."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def unpublish(self, block: int) -> None:
        """Forget what a block holds, because it is about to be overwritten."""
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def find(self, digest: bytes) -> int | None:
        """Return the block, in use or kept, that holds this content."""
        return self._block_of.get(digest)
