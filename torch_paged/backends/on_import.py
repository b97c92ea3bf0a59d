"""Wait for a package without importing it: an action that runs as soon as something else has imported it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_import(package: str, action: Callable[[], None]) -> None:
    """Run an action after a package has been imported: now, where it is imported already, else when it is."""
    if package in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(package, action))


class _Watch(MetaPathFinder):
    """Finds nothing itself; has the real loader of one package run an action in the end."""

    def __init__(self, package: str, action: Callable[[], None]) -> None:
        self._package = package
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._package:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            sys.meta_path.remove(self)
            execute(module)
            self._action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
