"""What ``docs/errors.md`` is made of: each error's text, cause and remedy, with calls that provoke it."""

import functools
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torch_paged"
SETUP = ROOT / "setup.py"
PAGE = ROOT / "docs" / "errors.md"
HEAD = """# Errors

Every error that the package and its build make, and some that torch and transformers make within our calls: each text,
why it is raised, what to do. Not listed is what else these two and Python raise: for an argument of a wrong type or
name that no rule here names, a value that transformers does not check, a device that is not there, and within the model
itself; nor are the errors of `torch_paged.testing` but `check_backend`, which are those of tests.

`<words>` stand for values. Search the page for a part of the text. Each entry is provoked by the tests, which also
write this page: `python -m pytest tests/test_errors.py --write-errors`. They search the sources, in Python and in C++,
for errors that are not listed.

`ValueError` is wrong input, and nothing was written. `NotImplementedError` is something that a backend or a model
cannot do. Within `torch.compile` the same text arrives inside a `TorchRuntimeError`. Which backends are on, and why the
others are off, says `python -m torch_paged.collect_env`.
"""
_ONE_WORD = ("op", "argument", "function")  # placeholders for a name; others may stand for anything


@dataclass(frozen=True)
class Said:
    """What a provoked call raised, and where: file and line of the package or of ``setup.py``."""

    kind: str
    text: str
    file: str
    line: int


@dataclass(frozen=True)
class Error:
    """One error of the page.

    Attributes:
        kind: the exception's name.
        text: what it says, ``<words>`` for values.
        cause: why it is raised.
        remedy: what to do.
        provoke: calls that raise it, each in its own way.
    """

    kind: str
    text: str
    cause: str
    remedy: str
    provoke: tuple[Callable[[], Any], ...]

    def matches(self, text: str) -> bool:
        """Return whether a text is this error's."""
        parts = re.split(r"<([a-z][^<>]*)>", self.text)
        pattern = "".join(
            re.escape(part) if index % 2 == 0 else r"[\w.()\[\]]+" if part in _ONE_WORD else "(?s:.+)"
            for index, part in enumerate(parts)
        )
        return re.fullmatch(pattern, text) is not None

    def said(self) -> list[Said]:
        """Return what every provoking call raised."""
        return [_said(provoke) for provoke in self.provoke]


@dataclass(frozen=True)
class Group:
    """A section of the page."""

    title: str
    errors: tuple[Error, ...]


def page(groups: Iterable[Group]) -> str:
    """Return the page."""
    sections = []
    for group in groups:
        entries = [
            f"- **{_code(error.text)}** ({error.kind})\n  *Cause:* {error.cause} *Remedy:* {error.remedy}"
            for error in group.errors
        ]
        sections.append("\n".join([f"## {group.title}", "", *entries, ""]))
    return HEAD + "\n" + "\n".join(sections)


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


@functools.cache
def _said(provoke: Callable[[], Any]) -> Said:
    """Call once what raises."""
    try:
        result = provoke()
    except Exception as error:
        return said_of(error)
    if isinstance(result, Exception):  # one that the library hands over instead of raising
        return said_of(result)
    raise AssertionError(f"nothing was raised by {provoke}")


def said_of(error: BaseException) -> Said:
    """Return what an exception says, and the last line of the package or of ``setup.py`` on its way."""
    where = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if PACKAGE in Path(frame.filename).parents or Path(frame.filename) == SETUP
    ]
    file, line = (str(Path(where[-1].filename).relative_to(ROOT)), where[-1].lineno or 0) if where else ("", 0)
    return Said(type(error).__name__, str(error), file, line)
