"""Where the sources make errors: every ``raise``, every error that is handed over, every reason, every check in C++."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from error_table import PACKAGE, ROOT, SETUP, Said

UNREACHABLE = {
    "Unreadable('libtpu made asynchronous operations that this jaxlib cannot read')": "a tool of the tests raises it",
    "Refused(_first_words(str(error)))": "a tool of the tests raises it",
    "SystemExit(0 if dispatch.failure() is None else 1)": "the exit status of a program",
    "RuntimeError(f'{function}: the interpreter found a race: {printed.getvalue()}')": "a kernel's fault",
    "return f'TORCH_PAGED_CPU_ISA must name kernels that this machine runs, got {asked!r}'": "reports only: C++ raises",
}
"""Errors that no input of a user raises, and why."""

_REASONS = {"_unsupported", "why_off", "missing", "wrong_generation", "wrong_setting", "chip_refusal", "no_backend"}
"""Functions that return why something cannot be, which then is a part of an error."""
_CPP_COMMENT = re.compile(r"//.*")
_CPP_CALL = re.compile(r'\b(?:fail\(|throw\s)((?:"(?:[^"\\]|\\.)*"|[^";])*);')
_CPP_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Source:
    """A place in the sources that makes an error.

    Attributes:
        file: below the repository.
        lines: first and last.
        code: the expression.
        is_raised: it stands in a ``raise``.
        text: a pattern that what it says contains; empty where the text is made elsewhere.
    """

    file: str
    lines: tuple[int, int]
    code: str
    is_raised: bool
    text: str

    def is_provoked(self, said: Iterable[Said]) -> bool:
        """Return whether one of the provoked errors came from here."""
        first, last = self.lines
        if self.is_raised:
            return any(one.file == self.file and first <= one.line <= last for one in said)
        return any(re.search(self.text, one.text) for one in said)


def python_sources(package: Path = PACKAGE) -> Iterator[Source]:
    """Yield every error that the package and its build make; of ``testing``, only those of ``check_backend``."""
    for path in sorted(package.rglob("*.py")):
        if "testing" not in path.relative_to(package).parts or path.name == "suite.py":
            yield from _of_file(path)
    if package == PACKAGE:
        yield from _of_file(SETUP)


def _of_file(path: Path) -> Iterator[Source]:
    file = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    tree = ast.parse(path.read_text())
    raised = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised.add(node.exc)
            yield Source(file, (node.lineno, node.end_lineno or node.lineno), ast.unparse(node.exc), True, "")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in raised and _is_error(node):
            text = max(map(_pattern, node.args), key=len)
            yield Source(file, (node.lineno, node.lineno), ast.unparse(node), False, text)
        if isinstance(node, ast.FunctionDef) and node.name in _REASONS:
            for returned in (part for part in ast.walk(node) if isinstance(part, ast.Return)):
                for text in _texts(returned.value):
                    yield Source(file, (returned.lineno, returned.lineno), ast.unparse(returned), False, text)


def _is_error(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id.endswith("Error") and bool(node.args)


def _texts(node: ast.expr | None) -> Iterator[str]:
    """Yield patterns of the texts that an expression is made of, those of more than one word."""
    if isinstance(node, ast.Tuple | ast.BoolOp | ast.IfExp):
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                yield from _texts(part)
    elif isinstance(node, ast.JoinedStr | ast.Constant) and " " in (pattern := _pattern(node)):
        yield pattern


def _pattern(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return re.escape(str(node.value)) if isinstance(node.value, str) else ".*"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_pattern, node.values))
    return "(?s:.*)"


def cpp_texts(folder: Path = ROOT / "csrc_shims") -> Iterator[tuple[str, str]]:
    """Yield the texts in every check and every ``throw`` of the C++ sources, each with its file."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".h", ".cpp") and "tests" not in path.parts:
            for call in _CPP_CALL.findall(_CPP_COMMENT.sub("", path.read_text())):
                yield from ((path.name, text) for text in _CPP_STRING.findall(call) if " " in text.strip())
