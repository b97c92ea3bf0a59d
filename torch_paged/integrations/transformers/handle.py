"""What a cache layer returns in the place of keys and values: its whole packed tensor, known by an attribute.

A copy, a view or a slice of it has no such attribute, so that a model which changes its keys is noticed.
"""

HANDLE_ATTRIBUTE = "_torch_paged_layer"
LOST_HANDLE = (
    "attention: key must be the handle that PagedCache.update() returned, got a copy or a view of it; "
    "{} changes keys after the cache update: call patch_model(model, gather=True)"
)
