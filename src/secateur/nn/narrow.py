"""Attention whose queries and keys, and whose values, have head sizes of their own.

    q = self.q_proj(x).view(*shape, -1, self.head_dim)
    v = self.v_proj(x).view(*shape, -1, self.head_dim)

is rewritten so that each projection is split by the size of its own heads (`qk_size`, `vo_size`); the attention scale
stays the one that the dense module set. Rotary tables that the module is handed (`position_embeddings`) are gathered at
the dimensions that are left, `rotary_index`. Whether a class works so is decided by comparing with the masked module.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.nn.reforward import Rewriter, rewritten_methods

QK, VO, INDEX = "qk_size", "vo_size", "rotary_index"
_RESHAPES = {"reshape", "view"}


@dataclass(frozen=True)
class Narrowing:
    """How an attention module is given head sizes of its own.

    Attributes:
        module: dotted path.
        projections: pairs of a child that projects and the attribute with the size of its heads.
        size: of a head in the dense module.
        tables: keyword arguments that hold rotary tables, [.., size] each.
    """

    module: str
    projections: tuple[tuple[str, str], ...]
    size: int
    tables: tuple[str, ...] = ()


def narrow_(root: nn.Module, how: Narrowing) -> bool:
    """Give a module a subclass with a `qk_size` and a `vo_size`, dense at first; False if its code has no room for it.

    Args:
        root: holds the module that `how` names, which is changed in place: its class, the two sizes, and a buffer
            `rotary_index` [size] if it is handed tables.
    """
    module = root.get_submodule(how.module)
    cls, sizes = type(module), dict(how.projections)
    if hasattr(module, QK):
        return True
    if not set(sizes.values()) <= {QK, VO}:
        return False
    methods = rewritten_methods(cls, lambda function: _Splits(function, sizes))
    if not methods:
        return False
    body: dict[str, Any] = dict(methods)
    setattr(module, QK, how.size)
    setattr(module, VO, how.size)
    if how.tables:
        device = next(module.parameters()).device
        module.register_buffer(INDEX, torch.arange(how.size, device=device))
        body["forward"] = _gathering(methods.get("forward", cls.forward), how)
    module.__class__ = type(f"Narrow{cls.__name__}", (cls,), body)
    return True


def _gathering(inner: Any, how: Narrowing) -> Any:
    def forward(self, *args, **kwargs):
        def pick(value: Any) -> Any:
            fits = isinstance(value, Tensor) and value.shape[-1:] == (how.size,)
            return value.index_select(-1, getattr(self, INDEX)) if fits else value

        kwargs |= {name: tree_map(pick, kwargs[name]) for name in how.tables if name in kwargs}
        return inner(self, *args, **kwargs)

    return forward


class _Splits(Rewriter):
    """Splits into heads what projections give by the size of their own heads."""

    def __init__(self, function: ast.FunctionDef, sizes: dict[str, str]) -> None:
        self.sizes = sizes
        self.names: dict[str, str] = {}
        for node in ast.walk(function):  # q = self.q_proj(x), split in a later statement
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                size = self._size(node.value)
                if size and not any(_reshapes(n) for n in ast.walk(node.value)):
                    self.names[node.targets[0].id] = size

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not (_reshapes(node) and isinstance(node.func, ast.Attribute) and node.args):
            return node
        receiver = node.func.value
        if any(_reshapes(n) for n in ast.walk(receiver)):
            return node
        size = self.names.get(receiver.id) if isinstance(receiver, ast.Name) else self._size(receiver)
        if size is None:
            return node
        last = ast.Attribute(ast.Name("self", ast.Load()), size, ast.Load())
        shape = node.args
        if len(shape) == 1 and isinstance(shape[0], (ast.Tuple, ast.List)):
            shape = shape[0].elts
        if len(shape) == 1:  # a shape made elsewhere
            whole = shape[0].value if isinstance(shape[0], ast.Starred) else shape[0]
            most = ast.Subscript(whole, ast.Slice(upper=ast.UnaryOp(ast.USub(), ast.Constant(1))), ast.Load())
            node.args = [ast.Starred(most, ast.Load()), last]
        else:
            node.args = [*shape[:-1], last]
        self.changed = True
        return node

    def _size(self, node: ast.expr) -> str | None:
        """The size that goes with the projection called inside an expression."""
        called = (n.func for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute))
        owned = (f.attr for f in called if isinstance(f.value, ast.Name) and f.value.id == "self")
        return next((self.sizes[name] for name in owned if name in self.sizes), None)


def _reshapes(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _RESHAPES
