"""Methods of one instance, which leave its class as it is, and those that the instance had of its own."""

import functools
from collections.abc import Callable
from typing import Any

_FORMER = "_torch_paged_former_methods"


def bind(function: Callable[..., Any], instance: Any, name: str) -> None:
    """Let ``instance.name(...)`` call ``function(instance, ...)``, until ``unbind``.

    Unlike a bound method of another name, this is copied and pickled together with the instance.
    """
    if name in vars(instance):
        vars(instance).setdefault(_FORMER, {})[name] = vars(instance)[name]
    setattr(instance, name, functools.partial(function, instance))


def unbind(function: Callable[..., Any], instance: Any, name: str) -> None:
    """Take back ``bind``; a method that the instance was given since then stays."""
    former = vars(instance).get(_FORMER, {})
    has_former, method = name in former, former.pop(name, None)
    if not former:
        vars(instance).pop(_FORMER, None)
    if getattr(vars(instance).get(name), "func", None) is function:
        delattr(instance, name)
        if has_former:
            setattr(instance, name, method)


def call_bound(instance: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the method that ``bind`` replaced: the instance's own, else its class's."""
    former = vars(instance).get(_FORMER, {})
    if name in former:
        return former[name](*args, **kwargs)
    return getattr(type(instance), name)(instance, *args, **kwargs)
