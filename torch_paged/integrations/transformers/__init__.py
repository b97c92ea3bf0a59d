"""Run transformers models on ``torch.ops.paged.*``.

``patch_model(model)`` is all that ``model.generate`` needs; ``generate_batch`` runs many ragged prompts without
padding. Without patching: load the model with ``attn_implementation="torch_paged"`` and pass
``past_key_values=PagedCache(model.config)``.
"""

from torch_paged.integrations.transformers.versions import LOWEST_VERSION

# isort: split

from torch_paged.integrations.transformers.attention import ATTENTION_NAME, register
from torch_paged.integrations.transformers.batch_generator import BatchGenerator, NewToken
from torch_paged.integrations.transformers.generate_batch import generate_batch
from torch_paged.integrations.transformers.layer_plan import PatchReport
from torch_paged.integrations.transformers.paged_cache import PagedCache
from torch_paged.integrations.transformers.patch import patch_model, patch_report, unpatch_model
from torch_paged.integrations.transformers.request import GenerationOutput, GenerationRequest

__all__ = [
    "ATTENTION_NAME",
    "LOWEST_VERSION",
    "BatchGenerator",
    "GenerationOutput",
    "GenerationRequest",
    "NewToken",
    "PagedCache",
    "PatchReport",
    "generate_batch",
    "patch_model",
    "patch_report",
    "unpatch_model",
]

register()
