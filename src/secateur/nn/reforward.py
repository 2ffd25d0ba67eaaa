"""Forwards that compute their attention width from the input's, rewritten so that the two may differ.

    B, N, C = x.shape
    q = self.q(x).reshape(B, N, self.num_heads, C // self.num_heads)
    ...
    x = (attn @ v).transpose(1, 2).reshape(B, N, C)

is correct only while heads x head size equals the input width. The rewrite lets the reshape find the size by itself
(`-1`) and keeps the head size the constant that it was. It changes nothing on the dense model; whether it is right on
a cut one is decided by comparing with the masked model, never assumed.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from collections.abc import Callable
from types import FunctionType

from torch import nn

_RESHAPES = {"reshape", "view"}


def reforward_(module: nn.Module, heads: dict[str, int]) -> bool:
    """Give a module a subclass whose methods no longer tie its inner width to its input's.

    Args:
        module: the attention module, changed in place (its class, nothing else).
        heads: attributes that count heads, with their dense values (`{"num_heads": 6}`).

    Returns:
        Whether anything was rewritten.
    """
    methods = rewritten_methods(type(module), lambda function: _Rewriter(_shape_names(function), heads))
    if not methods:
        return False
    module.__class__ = type(f"Widthfree{type(module).__name__}", (type(module),), dict(methods))
    return True


class Rewriter(ast.NodeTransformer):
    """Changes a function's source; `changed` says whether it did."""

    changed = False


def rewritten_methods(cls: type, rewriter: Callable[[ast.FunctionDef], Rewriter]) -> dict[str, FunctionType]:
    """New versions of those methods of a class that a rewriter changes, by name."""
    methods: dict[str, FunctionType] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, function in vars(base).items():
            if isinstance(function, FunctionType) and name not in methods and not name.startswith("__"):
                new = _rewrite(function, base, rewriter)
                if new is not None:
                    methods[name] = new
    return methods


def _rewrite(method: FunctionType, cls: type, make: Callable[[ast.FunctionDef], Rewriter]) -> FunctionType | None:
    """The method as a rewriter changes it, or None if it does not."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    rewriter = make(function)
    rewriter.visit(tree)
    if not rewriter.changed:
        return None
    ast.fix_missing_locations(tree)
    # `super()` without arguments needs a __class__ cell: the defining class, passed in.
    body = textwrap.indent(ast.unparse(tree), "    ")
    text = f"def make(__class__):\n{body}\n    return {function.name}\n"
    filename = f"<rewritten {cls.__module__}.{cls.__qualname__}.{function.name}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    scope: dict[str, FunctionType] = {}
    exec(compile(text, filename, "exec"), method.__globals__, scope)  # the installed library's own source
    return scope["make"](cls)


def _shape_names(function: ast.FunctionDef) -> set[str]:
    """Names bound by unpacking a shape, the batch (the first) left out."""
    names: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and _is_shape(node.value):
            for target in node.targets:
                if isinstance(target, ast.Tuple):
                    names.update(e.id for e in target.elts[1:] if isinstance(e, ast.Name))
    return names


def _is_shape(node: ast.expr) -> bool:
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr == "size"
    return isinstance(node, ast.Attribute) and node.attr == "shape"


def _is_minus_one(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and ast.unparse(node) == "-1"


class _Rewriter(Rewriter):
    def __init__(self, names: set[str], heads: dict[str, int]) -> None:
        self.names, self.heads = names, heads

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """`C // self.num_heads` is the head size: keep it what it was."""
        if isinstance(node.op, (ast.FloorDiv, ast.Div)) and self._names_width(node.left):
            frozen = ast.unparse(node)
            node.right = _Freeze(self.heads).visit(node.right)
            self.changed |= ast.unparse(node) != frozen
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`.reshape(B, N, C)` and `.view(B, C, H, W)`: let the size be found."""
        self.generic_visit(node)
        if not (isinstance(node.func, ast.Attribute) and node.func.attr in _RESHAPES):
            return node
        args = node.args
        if len(args) == 1 and isinstance(args[0], (ast.Tuple, ast.List)):
            args = args[0].elts
        if len(args) < 2 or any(map(_is_minus_one, args)):
            return node
        for i in (len(args) - 1, 1):
            if isinstance(args[i], ast.Name) and self._names_width(args[i]):
                args[i] = ast.UnaryOp(ast.USub(), ast.Constant(1))
                self.changed = True
                break
        return node

    def _names_width(self, node: ast.expr) -> bool:
        return any(isinstance(n, ast.Name) and n.id in self.names for n in ast.walk(node))


class _Freeze(ast.NodeTransformer):
    def __init__(self, heads: dict[str, int]) -> None:
        self.heads = heads

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in self.heads:
            return ast.Constant(self.heads[node.attr])
        return node
