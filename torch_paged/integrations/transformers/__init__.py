"""Run transformers models on ``torch.ops.paged.*``.

``patch_model(model)`` is all that ``model.generate`` needs. Without patching: load the model with
``attn_implementation="torch_paged"`` and pass ``past_key_values=PagedCache(model.config)``.
"""

from torch_paged.integrations.transformers.versions import LOWEST_VERSION

# isort: split

from torch_paged.integrations.transformers.attention import ATTENTION_NAME, register
from torch_paged.integrations.transformers.layer_plan import PatchReport
from torch_paged.integrations.transformers.paged_cache import PagedCache
from torch_paged.integrations.transformers.patch import patch_model, patch_report, unpatch_model

__all__ = [
    "ATTENTION_NAME",
    "LOWEST_VERSION",
    "PagedCache",
    "PatchReport",
    "patch_model",
    "patch_report",
    "unpatch_model",
]

register()
