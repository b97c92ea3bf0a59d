"""What becomes of each layer of a model: paged, gathered, or kept as transformers makes it."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from torch_paged.integrations.transformers.versions import PreTrainedConfig

Way = Literal["paged", "latent", "gathered"]

_KEPT = tuple(
    getattr(cache_utils, name) for name in ("LinearAttentionLayer", "DummyLayer") if hasattr(cache_utils, name)
)


class Reach(NamedTuple):
    """Which keys a query sees: all before it, those in a window, or those in its chunk."""

    window: int | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        if self.window is not None:
            return f"window {self.window}"
        return "full attention" if self.chunk is None else f"chunk {self.chunk}"


@dataclass(frozen=True)
class PatchReport:
    """What ``patch_model`` did, layer by layer.

    Attributes:
        model: the model's class name.
        way: how the attention layers read the cache: ``"paged"`` (the ops read the blocks), ``"latent"`` (the same on
            compressed keys, absorbed), ``"gathered"`` (the model's own attention reads dense copies).
        layers: for each cache layer its reach, or the name of the class of transformers that is kept.
        reason: why the layers are gathered; empty where they are not.
    """

    model: str
    way: Way
    layers: tuple[Reach | str, ...]
    reason: str = ""

    def __str__(self) -> str:
        parts = [
            f"{count} kept ({layer})" if isinstance(layer, str) else f"{count} {self.way} ({layer})"
            for layer, count in Counter(self.layers).items()
        ]
        text = f"{self.model}: layers: {', '.join(parts)}"
        return f"{text}; gathered because {self.reason}" if self.reason else text


def plan_layers(config: PreTrainedConfig) -> list[Reach | Any]:
    """Return for each cache layer its reach, or transformers' own layer where it holds no keys to page.

    Raises:
        NotImplementedError: a layer of another kind, or no layer that can be paged.
    """
    layer_types = getattr(config, "layer_types", None)
    no_windows = getattr(config, "sliding_window", None) is None
    plan: list[Reach | Any] = []
    # T5 and Bart count those of the encoder otherwise
    num_layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
    for index, layer in enumerate(DynamicCache(config=config).layers[:num_layers]):
        if type(layer) is DynamicLayer:
            plan.append(Reach())
        elif type(layer) is DynamicSlidingWindowLayer:
            chunked = layer_types[index] == "chunked_attention" if layer_types else no_windows
            size = layer.sliding_window
            plan.append(Reach(chunk=size) if chunked else Reach(window=size))
        elif type(layer) in _KEPT:
            plan.append(layer)
        else:
            raise NotImplementedError(
                f"PagedCache: layer {index} of {config.model_type} keeps its keys in a {type(layer).__name__}, "
                "which is not supported; use the model unpatched"
            )
    if not any(isinstance(layer, Reach) for layer in plan):
        raise NotImplementedError(
            f"PagedCache: no layer of {config.model_type} has keys to page; use the model unpatched"
        )
    return plan
