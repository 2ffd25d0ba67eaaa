"""How the axes of an operation's results follow from those of its arguments: one function per kind of operation."""

from secateur.anatomy.rules import index, linear, reduce, shape, spatial  # noqa: F401  (they register themselves)
from secateur.anatomy.rules.base import apply_rule

__all__ = ["apply_rule"]
