"""Modules that one run does not reach, understood from a sibling that it does.

Of experts kept in a list, a router calls only those that the example's tokens chose. The others are of the same class
and shape, and run the same code when their turn comes: what was seen of one is copied to the others, with dimensions
of their own wherever the one seen has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from secateur.anatomy.dims import Dim, Form
from secateur.anatomy.trace import Contraction, Trace


def adopt_twins(trace: Trace, model: nn.Module) -> None:
    """Extend a trace to every module of a list that was never called, wherever a sibling of the same structure was."""
    called = {call.path for call in trace.calls}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        seen: dict[tuple, str] = {}
        for name, child in module.named_children():
            if f"{path}.{name}".lstrip(".") in called:
                seen.setdefault(_structure(child), f"{path}.{name}".lstrip("."))
        for name, child in reversed(list(module.named_children())):  # each copy lands right behind its source
            twin = f"{path}.{name}".lstrip(".")
            reached = any(p == twin or p.startswith(twin + ".") for p in called)
            if not reached and next(child.parameters(), None) is not None and _structure(child) in seen:
                _Copy(trace, seen[_structure(child)], twin).run()


def _structure(module: nn.Module) -> tuple:
    tree = tuple((n, type(m)) for n, m in module.named_modules())
    return tree, tuple((n, tuple(p.shape)) for n, p in module.named_parameters())


class _Copy:
    """What was seen of `source`, said of `twin`."""

    def __init__(self, trace: Trace, source: str, twin: str) -> None:
        self.trace, self.space, self.source, self.twin = trace, trace.space, source, twin
        inside = {n for n in trace.params if n.startswith(source + ".")}
        elsewhere = [axes for n, axes in trace.params.items() if n not in inside]
        shared = {leaf for axes in elsewhere for dim in axes for leaf in self.space.leaves(dim)}
        own = {leaf for n in inside for dim in trace.params[n] for leaf in self.space.leaves(dim)}
        self.copies = {leaf: self.space.new(leaf.size) for leaf in own - shared}

    def run(self) -> None:
        trace = self.trace
        for name in [n for n in trace.params if n.startswith(self.source + ".")]:
            trace.params[self._path(name)] = self._axes(trace.params[name])
        trace.contractions = self._beside(trace.contractions)
        for call in [c for c in trace.calls if self._inside(c.path)]:
            trace.calls.append(
                replace(
                    call,
                    path=self._path(call.path),
                    ins=tuple(-2 - n for n in call.ins),  # nodes that no other module sees
                    outs=tuple(-2 - n for n in call.outs),
                    in_axes=tuple(map(self._axes, call.in_axes)),
                    out_axes=tuple(map(self._axes, call.out_axes)),
                )
            )
        for path in [p for p in trace.shapes if self._inside(p)]:
            trace.shapes[self._path(path)] = [self._dim(d) for d in trace.shapes[path]]
        for leaf, notes in self.space.notes().items():
            for note in notes if leaf in self.copies else ():
                where = self._path(note.where) if self._inside(note.where) else note.where
                self.space.note(self.copies[leaf], replace(note, where=where))
        trace.twins.append(self.twin)

    def _beside(self, events: Sequence[Contraction]) -> list[Contraction]:
        """The contractions, each of the source's with its copy right behind; a copy costs nothing in this run."""
        out = []
        for event in events:
            out.append(event)
            if self._inside(event.module) and event.macs:
                out.append(
                    replace(
                        event,
                        module=self._path(event.module),
                        weights=frozenset(self._path(w) if self._inside(w) else w for w in event.weights),
                        summed=self._dim(event.summed),
                        features=self._dim(event.features),
                        batch=self._dim(event.batch),
                        inputs=self._dim(event.inputs),
                        dims=self._axes(event.dims),
                        macs=0,
                    )
                )
        return out

    def _inside(self, path: str) -> bool:
        return path == self.source or path.startswith(self.source + ".")

    def _path(self, path: str) -> str:
        return self.twin + path[len(self.source) :]

    def _axes(self, axes: Sequence[Dim]) -> tuple[Dim, ...]:
        return tuple(map(self._dim, axes))

    def _dim(self, dim: Dim) -> Dim:
        """The same expression with the source's own leaves replaced."""
        dim = self.space.find(dim)
        if dim.form is Form.LEAF:
            return self.copies.get(dim, dim)
        if not any(leaf in self.copies for leaf in self.space.leaves(dim)):
            return dim
        parts = [self._dim(part) for part in dim.parts]
        return self.space.merge(parts) if dim.form is Form.PRODUCT else self.space.concat(parts)
