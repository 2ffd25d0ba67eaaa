"""The end of a model, from the hidden states after its last block: for comparing two models whose blocks are gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from secateur.data import Batches
from secateur.evaluation import Fidelity, fidelity
from secateur.nn.trees import tensors_in
from secateur.streaming.model import Streamed
from secateur.streaming.walk import Walk, shaped, standing_in_all, templates_of


def compare(source: Streamed, small: nn.Module, data: Batches, walk: Walk, cut: str) -> Fidelity:
    """Fidelity of a cut model to the dense one, from the hidden states of both after their last blocks.

    Args:
        source: the dense model; what is in none of its blocks is loaded for the time, and serves both.
        small: the cut skeleton, which differs in its blocks alone.
        data: that was walked.
        walk: after the last block.
        cut: name of the cut model's hidden states.
    """
    rest = source.outside(walk.blocks)
    with source.filled(rest), ExitStack() as stack:
        for name in rest:
            path, _, leaf = name.rpartition(".")
            ours, theirs = small.get_submodule(path), source.model.get_submodule(path)
            kind = "_buffers" if leaf in ours._buffers else "_parameters"
            stack.callback(getattr(ours, kind).__setitem__, leaf, getattr(ours, kind)[leaf])
            getattr(ours, kind)[leaf] = getattr(theirs, kind)[leaf]
        templates = templates_of(source.model, walk.blocks, next(iter(data)))
        stack.enter_context(_answered(source.model, walk, walk.name, templates))
        stack.enter_context(_answered(small, walk, cut, templates))
        return fidelity(small, source.model, data)


@contextmanager
def _answered(model: nn.Module, walk: Walk, name: str, templates: dict[str, Any]) -> Iterator[None]:
    """Within the context, blocks do nothing, and the last one answers with the hidden states of one batch after the
    other, in the order of the walk."""
    left = iter(walk)

    def answer(path: str, *args: Any, **kwargs: Any) -> Any:
        last = path == walk.blocks[-1]
        hidden = walk.states.get((name, next(left))) if last else next(tensors_in((args, kwargs)))
        return shaped(templates[path], hidden)

    with standing_in_all(model, walk.blocks, answer):
        yield
