"""Methods of one instance, which leave its class as it is."""

import functools
from collections.abc import Callable
from typing import Any


def bind(function: Callable[..., Any], instance: Any, name: str) -> None:
    """Let ``instance.name(...)`` call ``function(instance, ...)``.

    Unlike a bound method of another name, this is copied and pickled together with the instance.
    """
    setattr(instance, name, functools.partial(function, instance))
