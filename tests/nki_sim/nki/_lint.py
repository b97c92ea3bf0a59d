"""The part of Python that the compiler takes (language guide; release notes 0.3.0 to 0.7.0).

The kernel's source and that of every function of the kernel's modules that it names is checked. Up to 0.6 the compiler
parses the source, from 0.7 on it traces the running function: what either refuses, or what no document shows, fails.
"""

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from nki._errors import PACKAGE, NkiValidationError
from nki._objects import NKIObject

FORBIDDEN: dict[type[ast.AST], str] = {
    ast.Lambda: "a lambda",
    ast.GeneratorExp: "a generator expression",
    ast.SetComp: "a set comprehension",
    ast.DictComp: "a dict comprehension",
    ast.ListComp: "a list comprehension",
    ast.Set: "a set",
    ast.Try: "try",
    ast.Raise: "raise",
    ast.Global: "global",
    ast.Nonlocal: "nonlocal",
    ast.Import: "import in a body",
    ast.ImportFrom: "import in a body",
    ast.Yield: "yield",
    ast.YieldFrom: "yield",
    ast.Await: "await",
    ast.AsyncFunctionDef: "async def",
    ast.AsyncFor: "async for",
    ast.AsyncWith: "async with",
    ast.NamedExpr: "an assignment expression",
    ast.ClassDef: "a class in a body",
    ast.Match: "match",
    ast.Delete: "del",
    ast.Starred: "unpacking with a star",
    ast.Is: "is (write ==)",
    ast.IsNot: "is not (write !=)",
}
OUTSIDE = ("numpy", "torch", "jax", "ml_dtypes", "random", "time", "os")
_passed: set[Any] = set()  # code objects of kernels
LOOPS = ("fori_loop", "while_loop")


def lint(kernel: Callable[..., Any]) -> None:
    """Fail where the kernel or a function that it uses leaves the subset."""
    code = getattr(kernel, "__code__", None)
    if code in _passed:
        return
    seen: set[Any] = set()
    waiting: list[Any] = [kernel]
    while waiting:
        function = waiting.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in seen or code.co_filename.startswith(PACKAGE):
            continue
        seen.add(code)
        waiting.extend(_Linter(function, outermost=function is kernel).check())
    _passed.add(code)


class _Linter:
    def __init__(self, function: Callable[..., Any], outermost: bool) -> None:
        self.function = function
        self.outermost = outermost
        self.globals = inspect.unwrap(function).__globals__

    def check(self) -> list[Any]:
        """Check one function and give those that it names."""
        try:
            lines, self.first = inspect.getsourcelines(self.function)
        except (OSError, TypeError):
            self.first = self.function.__code__.co_firstlineno
            self._fail(None, "have its source in a file")
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
        if not isinstance(tree, ast.FunctionDef):
            self._fail(tree, "be a function made by def")
            return []
        if self.function.__closure__:
            names = ", ".join(self.function.__code__.co_freevars)
            self._fail(tree, "use globals and arguments only", f"{names} of an enclosing function")
        self._signature(tree)
        self._globals(tree)
        bodies = self._loop_bodies(tree)
        for node in _inside(tree):
            self._node(node)
            if isinstance(node, ast.FunctionDef):
                self._nested(node, tree, node in bodies)
        return list(self._named(tree))

    def _fail(self, node: Any, rule: str, got: str = "other code") -> None:
        file = Path(self.function.__code__.co_filename).name
        line = self.first + (getattr(node, "lineno", 1) - 1)
        raise NkiValidationError(f"{self.function.__name__}: source must {rule}, got {got} ({file}:{line})")

    def _signature(self, tree: ast.FunctionDef) -> None:
        arguments = tree.args
        if arguments.kwonlyargs:
            self._fail(tree, "have no keyword-only parameters", arguments.kwonlyargs[0].arg)
        if arguments.vararg or arguments.kwarg:
            self._fail(tree, "have no *args or **kwargs", tree.name)
        for default in arguments.defaults:
            if isinstance(default, (ast.List, ast.Dict)):
                self._fail(default, "have no list or dict as default", ast.unparse(default))
        for decorator in tree.decorator_list:
            jit = "jit" in ast.unparse(decorator)
            if not jit:
                self._fail(tree, "have no decorators but nki.jit", ast.unparse(decorator))
            if not self.outermost:
                self._fail(tree, "be decorated with nki.jit on the outermost function only", tree.name)

    def _node(self, node: ast.AST) -> None:
        what = FORBIDDEN.get(type(node))
        parts = [node, *node.ops] if isinstance(node, ast.Compare) else [node]
        for part in parts:
            what = what or FORBIDDEN.get(type(part))
        if what:
            self._fail(node, "stay within the compiler's subset of Python", what)
        if isinstance(node, ast.With):
            for item in node.items:
                if "no_reorder" not in ast.unparse(item.context_expr):
                    self._fail(node, "use `with` for nl.no_reorder only", ast.unparse(item.context_expr))
        if isinstance(node, ast.Dict):
            for key in node.keys:
                if not (key is None or (isinstance(key, ast.Constant) and isinstance(key.value, str))):
                    self._fail(node, "have strings as keys of dicts", ast.unparse(key or node))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = self.globals.get(node.value.id)
            if isinstance(owner, types.ModuleType) and owner.__name__.partition(".")[0] in OUTSIDE:
                self._fail(node, "use nki.language instead of other libraries", ast.unparse(node))
        if isinstance(node, ast.keyword) and node.arg is None:
            self._fail(node.value, "name the keywords of a call", ast.unparse(node.value))
        if isinstance(node, (ast.For, ast.While)) and node.orelse:
            self._fail(node, "stay within the compiler's subset of Python", "else of a loop")

    def _globals(self, tree: ast.FunctionDef) -> None:
        """Kernels are cached by their arguments, so that what may change elsewhere is out of bounds (0.3.0)."""
        own = _bound(tree)
        for node in _inside(tree):
            if isinstance(node, ast.Name) and node.id not in own:
                value = self.globals.get(node.id)
                if isinstance(value, (list, dict, set)):
                    self._fail(node, "read no global that may change", f"{type(value).__name__} {node.id}")

    def _loop_bodies(self, tree: ast.FunctionDef) -> list[ast.FunctionDef]:
        """Give the nested functions that a dynamic loop runs."""
        names = set()
        for node in ast.walk(tree):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, (ast.Attribute, ast.Name)):
                name = called.attr if isinstance(called, ast.Attribute) else called.id
                if name in LOOPS and isinstance(node, ast.Call):
                    given = [*node.args, *(keyword.value for keyword in node.keywords)]
                    names |= {part.id for part in given if isinstance(part, ast.Name)}
        return [node for node in _inside(tree) if isinstance(node, ast.FunctionDef) and node.name in names]

    def _nested(self, node: ast.FunctionDef, tree: ast.FunctionDef, is_body: bool) -> None:
        self._signature_of_nested(node)
        own = _bound(node)
        if not is_body:
            outer = _bound(tree) - {tree.name}
            captured = sorted({n.id for n in _inside(node) if isinstance(n, ast.Name) and n.id in outer - own})
            if captured:
                self._fail(node, "capture variables in bodies of dynamic loops only", f"{node.name} with {captured[0]}")
            return
        for part in _inside(node):
            if isinstance(part, (ast.Attribute, ast.Subscript)) and isinstance(part.ctx, ast.Store):
                target: ast.AST = part.value
                while isinstance(target, (ast.Attribute, ast.Subscript)):
                    target = target.value
                if isinstance(target, ast.Name) and target.id not in own:
                    self._fail(part, "leave outer Python values as they are in the body of a dynamic loop", target.id)

    def _signature_of_nested(self, node: ast.FunctionDef) -> None:
        if node.args.kwonlyargs or node.args.vararg or node.args.kwarg:
            self._fail(node, "have no keyword-only parameters, *args or **kwargs", node.name)

    def _named(self, tree: ast.FunctionDef) -> Iterator[Any]:
        for node in ast.walk(tree):
            found = None
            if isinstance(node, ast.Name):
                found = self.globals.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = self.globals.get(node.value.id)
                found = getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
            found = inspect.unwrap(found) if callable(found) and not isinstance(found, type) else found
            if isinstance(found, type):
                yield from self._class(node, found)
            elif isinstance(found, types.FunctionType):
                yield found

    def _class(self, node: ast.AST, found: type) -> Iterator[Any]:
        """Check a class of the kernel's own and give its methods."""
        source = getattr(sys.modules.get(found.__module__), "__file__", None)
        if source is None or source.startswith(PACKAGE) or issubclass(found, Enum):
            return
        if found.__bases__ != (NKIObject,):
            bases = ", ".join(base.__name__ for base in found.__bases__)
            self._fail(node, "use classes that inherit nl.NKIObject alone", f"{found.__name__}({bases})")
        for method in vars(found).values():
            if isinstance(method, types.FunctionType) and method.__code__.co_filename == source:
                yield method


def _inside(tree: ast.FunctionDef) -> Iterator[ast.AST]:
    """Walk the body: neither decorators nor annotations."""
    for statement in tree.body:
        yield from _walk(statement)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from _walk(part)


def _bound(tree: ast.FunctionDef) -> set[str]:
    """Give the names that a function binds, those of functions inside it apart."""
    names = {argument.arg for argument in [*tree.args.posonlyargs, *tree.args.args]}
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        else:
            waiting.extend(ast.iter_child_nodes(node))
    return names
