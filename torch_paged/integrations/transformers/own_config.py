"""A config for one model alone: models that are made from one config share it, and with it their attention."""

import copy
from typing import Any

from torch import nn

from torch_paged.integrations.transformers.versions import PreTrainedConfig


def take_own_config(model: Any, holder: nn.Module) -> None:
    """Give a model a copy of its config, with the sub-configs in it.

    Args:
        model: the model.
        holder: the model or what is around it: all modules in it that refer to the config get the copy.
    """
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in holder.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])
