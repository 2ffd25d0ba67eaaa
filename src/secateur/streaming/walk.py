"""Batches on their way through a stack of blocks: where they are now, and how each block is to be called.

The model's own forward is run once a batch with stand-ins for all blocks, so that it makes masks and positions itself
and says what it calls each block with; after that the blocks are called one by one.

Shapes: B examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from secateur.calibration import DTYPES
from secateur.data import Batches
from secateur.errors import AnatomyError
from secateur.models import forward
from secateur.nn.attention import explicit_attention
from secateur.nn.trees import tensors_in
from secateur.nn.weightless import known_values
from secateur.replay import Spool, Stop, standing_in

_KNOWN = 8  # different masks or positions of one shape that are looked for among those of earlier batches


@dataclass(frozen=True)
class Call:
    """Arguments of one block for one batch; the hidden states, at position `hidden`, are put in when it is made."""

    leaves: tuple[Any, ...]
    spec: TreeSpec
    hidden: int

    def make(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after the block."""
        leaves = list(self.leaves)
        leaves[self.hidden] = hidden
        args, kwargs = tree_unflatten(leaves, self.spec)
        return next(tensors_in(block(*args, **kwargs)))


class States:
    """Hidden states by key, in memory as far as there is room, on disk beyond that.

    Args:
        room: bytes.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._held: dict[Any, Tensor] = {}
        self._spool = Spool()

    def put(self, key: Any, value: Tensor) -> None:
        self.drop(key)
        if value.nbytes <= self.room:
            self.room -= value.nbytes
            self._held[key] = value
        else:
            self._spool.put(key, value)

    def get(self, key: Any) -> Tensor:
        return self._held[key] if key in self._held else self._spool.get(key)

    def drop(self, key: Any) -> None:
        if key in self._held:
            self.room += self._held.pop(key).nbytes
        self._spool.drop(key)


class Walk:
    """All batches of some data, before the first block.

    Args:
        model: with everything filled that runs before the blocks; only this constructor runs it.
        blocks: their paths, in order.
        data: read once.
        states: where hidden states are kept, under (name, index of the batch).
        name: of the walk.
        dtype: "float32" or "bfloat16", of the arithmetic.

    Raises:
        AnatomyError: the model does something between its blocks, so that they cannot be taken one by one.
    """

    def __init__(
        self, model: nn.Module, blocks: tuple[str, ...], data: Batches, states: States, name: str, dtype: str
    ) -> None:
        self.model, self.blocks, self.states, self.name, self.dtype = model, blocks, states, name, dtype
        self.sizes: list[int] = []
        self._calls: list[list[Call]] = []
        self._known: dict[tuple, list[Tensor]] = {}
        templates = templates_of(model, blocks, next(iter(data)))
        with self._running():
            for index, batch in enumerate(data):
                self.sizes.append(batch.shape[0])
                self._calls.append(self._record(index, batch, templates))

    @contextmanager
    def _running(self) -> Iterator[None]:
        narrow = self.dtype != "float32"
        arithmetic = torch.autocast("cpu", DTYPES[self.dtype]) if narrow else nullcontext()
        with torch.no_grad(), explicit_attention(self.model), arithmetic:
            yield

    def _record(self, index: int, batch: Any, templates: dict[str, Any]) -> list[Call]:
        calls: list[Call] = []
        given: list[Tensor] = []  # what each stand-in answered

        def answer(path: str, *args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            at = next(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
            hidden = leaves[at]
            if not given:
                self.states.put((self.name, index), hidden)
            plain = path == self.blocks[len(calls)] and (not given or hidden is given[-1])
            if not plain or any(x is y for i, x in enumerate(leaves) if i != at for y in given):
                raise AnatomyError(
                    f"{type(self.model).__name__} does more between its blocks than hand on hidden states (at "
                    f"'{path}'), so they cannot be taken one by one; compress it without a budget"
                )
            kept = tuple(None if i == at else self._once(x) for i, x in enumerate(leaves))
            calls.append(Call(kept, spec, at))
            if len(calls) == len(self.blocks):
                raise Stop
            given.append(hidden.view_as(hidden))
            return shaped(templates[path], given[-1])

        with standing_in_all(self.model, self.blocks, answer), suppress(Stop):
            forward(self.model, batch)
        if len(calls) != len(self.blocks):
            raise AnatomyError(
                f"only {len(calls)} of {len(self.blocks)} blocks ran; compress this model without a budget"
            )
        return calls

    def _once(self, value: Any) -> Any:
        """The same tensor for equal ones: masks and positions rarely differ from batch to batch."""
        if not isinstance(value, Tensor):
            return value
        alike = self._known.setdefault((tuple(value.shape), value.dtype), [])
        known = next((t for t in alike if t is value or torch.equal(t, value)), None)
        if known is None and len(alike) < _KNOWN:
            alike.append(value)
        return value if known is None else known

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.sizes)))

    def step(self, block: int, index: int, module: nn.Module, *, name: str | None = None) -> Tensor:
        """Hidden states of a batch after a block; nothing is kept.

        Args:
            module: the block itself, dense or cut.
            name: of the hidden states to start from; the walk's own by default.
        """
        with self._running():
            return self._calls[index][block].make(module, self.states.get((name or self.name, index)))

    def advance(self, block: int, module: nn.Module, *, name: str | None = None) -> None:
        """Send all batches through a block."""
        for index in self:
            self.states.put((name or self.name, index), self.step(block, index, module, name=name))


def templates_of(model: nn.Module, blocks: tuple[str, ...], batch: Any) -> dict[str, Any]:
    """What each block returns, tensors left out, from a run for shapes alone."""
    out: dict[str, Any] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _m, _a, tree, path=path: out.__setitem__(
                path, tree_map(lambda t: None if isinstance(t, Tensor) else t, tree)
            )
        )
        for path in blocks
    ]
    try:
        with torch.no_grad(), explicit_attention(model), known_values(model):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return out


def shaped(template: Any, hidden: Tensor) -> Any:
    """What a block would return around these hidden states."""
    return type(template)([hidden, *template[1:]]) if isinstance(template, (tuple, list)) else hidden


@contextmanager
def standing_in_all(model: nn.Module, blocks: tuple[str, ...], answer: Callable[..., Any]) -> Iterator[None]:
    """Within the context, every block is answered by `answer(path, *args, **kwargs)`."""
    with ExitStack() as stack:
        for path in blocks:
            stack.enter_context(
                standing_in(model.get_submodule(path), lambda *a, path=path, **k: answer(path, *a, **k))
            )
        yield
