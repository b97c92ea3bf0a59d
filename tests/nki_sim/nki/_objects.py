"""Classes inside kernels (nki.language.NKIObject, language guide)."""

import copy
import inspect
from typing import Any


class NKIObject:
    """Base of classes that kernels use: an __init__ from annotated names, __post_init__, attributes set at any time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = [name for base in reversed(type(self).__mro__) for name in inspect.get_annotations(base)]
        names = list(dict.fromkeys(names))
        if len(args) > len(names):
            raise TypeError(f"{type(self).__name__} takes {len(names)} values, got {len(args)}")
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in given:
            if name not in names:
                raise TypeError(f"{type(self).__name__} has no field {name}")
        for name in names:
            if name not in given and not hasattr(type(self), name):
                raise TypeError(f"{type(self).__name__} needs {name}")
            setattr(self, name, given[name] if name in given else copy.copy(getattr(type(self), name)))
        post_init = getattr(self, "__post_init__", None)
        if post_init:
            post_init()
