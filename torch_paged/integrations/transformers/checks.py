"""Checks of what a user hands to the integration."""

from typing import Any

from transformers import PreTrainedModel


def check_sizes(function: str, **sizes: Any) -> None:
    """Raise ValueError unless each of the named sizes is an int from 1 on."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
            raise ValueError(f"{function}: {name} must be an int >= 1, got {size!r}")


def check_model(function: str, model: Any) -> None:
    """Raise ValueError unless this is a model of transformers, or a wrapper of one."""
    if not isinstance(inside(model), PreTrainedModel):
        raise ValueError(f"{function}: model must be a transformers PreTrainedModel, got {type(model).__name__}")


def check_rows(rows: list[int], num_rows: int) -> None:
    """Raise ValueError unless a cache of so many rows has all of these."""
    for row in rows:
        if not 0 <= row < num_rows:
            raise ValueError(f"PagedCache: rows must be in [0, {num_rows}), got {row}")


def inside(model: Any) -> Any:
    """Return the model inside of what ``torch.compile`` and adapters of peft put around it, else the model itself."""
    found = getattr(model, "_orig_mod", None)
    if found is None and hasattr(model, "get_base_model"):
        found = model.get_base_model()
    return model if found is None else inside(found)
