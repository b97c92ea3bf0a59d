"""An action that waits for a package: it runs once, after the import; a mere search for the package runs nothing."""

import importlib.util
import sys
from pathlib import Path

import pytest

from torch_paged.backends.on_import import on_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "awaited_package.py").write_text("import sys\nready = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "awaited_package", raising=False)
    return "awaited_package"


def test_the_action_runs_once_when_the_import_is_done(package: str) -> None:
    seen: list[bool] = []
    on_import(package, lambda: seen.append(sys.modules[package].ready))
    assert importlib.util.find_spec(package) is not None
    assert not seen
    finders = len(sys.meta_path)
    module = importlib.import_module(package)
    assert seen == [True]
    assert len(sys.meta_path) == finders - 1
    importlib.reload(module)
    assert seen == [True]


def test_it_runs_at_once_where_the_package_is_imported(package: str) -> None:
    importlib.import_module(package)
    seen: list[str] = []
    finders = list(sys.meta_path)
    on_import(package, lambda: seen.append(package))
    assert seen == [package]
    assert sys.meta_path == finders


def test_a_missing_package_stays_missing() -> None:
    finders = list(sys.meta_path)
    on_import("no_such_package", lambda: pytest.fail("it was never imported"))
    assert importlib.util.find_spec("no_such_package") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_package")
    sys.meta_path[:] = finders
