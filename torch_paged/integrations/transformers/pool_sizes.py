"""How many blocks and bytes a cache uses."""

from torch_paged.integrations.transformers.block_group import BlockGroup
from torch_paged.integrations.transformers.layer_plan import Reach
from torch_paged.integrations.transformers.paged_layer import PagedLayer


class PoolSizes:
    """The sizes of a cache's pools, those that its forks use included."""

    groups: dict[Reach, BlockGroup]
    paged_layers: list[PagedLayer]

    @property
    def blocks_in_use(self) -> int:
        """Blocks that hold tokens now, over all groups of layers."""
        return sum(group.blocks_in_use for group in self.groups.values())

    @property
    def peak_blocks(self) -> int:
        """The most blocks that held tokens at once, over all groups of layers."""
        return sum(group.peak_blocks for group in self.groups.values())

    @property
    def pool_bytes(self) -> int:
        """Bytes of all layers' tensors."""
        return sum(_bytes(layer) for layer in self.paged_layers)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the blocks that held tokens at the peak, over all layers."""
        return sum(_bytes(layer) // layer.group.num_blocks * layer.group.peak_blocks for layer in self.paged_layers)


def _bytes(layer: PagedLayer) -> int:
    if not layer.is_initialized:
        return 0
    return layer.kv_cache.nbytes + (0 if layer.kv_scales is None else layer.kv_scales.nbytes)
