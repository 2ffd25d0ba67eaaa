"""Running a model from the middle: blocks already passed are answered from disk.

A block of a repeated stack gives back what it takes in (same axes), so blocks before the last cached one can stand
aside and return their input: only the last cached output matters. That holds for plain stacks and for stages with
down-sampling in between; where a model reads earlier blocks again (U-shaped networks), `Prefix.check` finds out and
everything is computed from the start instead.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from secateur.nn.standin import Returns, handing_on
from secateur.nn.trees import tensors_in


class Stop(Exception):
    """Raised inside a forward to end it where enough has been seen."""


class Spool:
    """Trees of tensors by key, kept on disk; deleted with the object."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="secateur-")
        self._specs: dict[Any, tuple[list[Any], Any, Path]] = {}
        self._count = 0

    def put(self, key: Any, tree: Any) -> None:
        from safetensors.torch import save_file

        leaves, spec = tree_flatten(tree)
        # Always a new file: what was read under this key may still be mapped from the old one.
        path = Path(self._folder.name) / f"{self._count}.safetensors"
        self._count += 1
        self.drop(key)
        save_file({str(i): t.detach().contiguous() for i, t in enumerate(leaves) if isinstance(t, Tensor)}, path)
        self._specs[key] = ([None if isinstance(t, Tensor) else t for t in leaves], spec, path)

    def get(self, key: Any) -> Any:
        from safetensors.torch import load_file

        plain, spec, path = self._specs[key]
        tensors = load_file(path)
        return tree_unflatten([tensors.get(str(i), t) for i, t in enumerate(plain)], spec)

    def drop(self, key: Any) -> None:
        if key in self._specs:
            self._specs.pop(key)[2].unlink(missing_ok=True)

    def __contains__(self, key: Any) -> bool:
        return key in self._specs


class Prefix:
    """A model whose first blocks can be skipped.

    Args:
        model: in eval mode.
        blocks: paths of its blocks in order of execution.
        forward: how to call the model on a batch.
    """

    def __init__(self, model: nn.Module, blocks: tuple[str, ...], forward: Callable[[nn.Module, Any], Any]) -> None:
        self.model, self.blocks, self.forward = model, blocks, forward
        self.sound = bool(blocks)
        self._templates: dict[str, Any] = {}

    def check(self, batch: Any) -> bool:
        """Whether skipping gives the very output of a full run; remembered, and respected by `resumed`."""
        outs: dict[int, Any] = {}
        handles = [
            self.model.get_submodule(path).register_forward_hook(lambda _m, _a, out, i=i: outs.__setitem__(i, out))
            for i, path in enumerate(self.blocks)
        ]
        try:
            with torch.no_grad():
                full = list(tensors_in(self.forward(self.model, batch)))
        finally:
            for handle in handles:
                handle.remove()
        for i, path in enumerate(self.blocks):
            self._templates[path] = tree_map(lambda t: None if isinstance(t, Tensor) else t, outs.get(i))
        for index in {len(self.blocks) // 2, len(self.blocks)}:
            if not self.sound or index - 1 not in outs:
                break
            try:
                with torch.no_grad(), self.resumed(index, outs[index - 1]):
                    again = list(tensors_in(self.forward(self.model, batch)))
                self.sound = len(full) == len(again) and all(map(torch.equal, full, again))
            except (RuntimeError, TypeError, ValueError, IndexError):
                self.sound = False
        return self.sound

    @contextmanager
    def resumed(self, index: int, value: Any) -> Iterator[None]:
        """Within the context, blocks before `index` do not run; block `index - 1` answers `value`."""
        if not self.sound or index == 0:
            yield
            return
        with ExitStack() as stack:
            for i, path in enumerate(self.blocks[:index]):

                def answer(*args: Any, i: int = i, path: str = path, **kwargs: Any) -> Any:
                    if i == index - 1:
                        return value
                    given = next(tensors_in((args, kwargs)))
                    template = self._templates.get(path)
                    return given if not isinstance(template, (tuple, list)) else type(template)([given, *template[1:]])

                stack.enter_context(standing_in(self.model.get_submodule(path), answer))
            yield


class Lead:
    """What runs in a block before some layers start, computed once a batch and answered from disk after that.

    Only what those layers do may differ from run to run.

    Args:
        block: the block.
        until: the layers, inside it.
    """

    def __init__(self, block: nn.Module, until: Iterable[nn.Module]) -> None:
        inside = {m: path for path, m in block.named_modules() if path}
        self.until = [m for m in until if m in inside]
        self.watched = {path: m for m, path in inside.items() if next(m.parameters(), None) is not None}
        self._spool, self._known = Spool(), dict[Any, tuple[str, ...]]()

    @contextmanager
    def run(self, key: Any) -> Iterator[None]:
        """Around one forward on the batch of that key."""
        with self._answered(key) if key in self._known else self._remembered(key):
            yield

    @contextmanager
    def _remembered(self, key: Any) -> Iterator[None]:
        calls: dict[str, int] = {}
        started: list[bool] = []

        def see(path: str, out: Any) -> None:
            calls[path] = calls.get(path, 0) + 1
            if not started:
                self._spool.put((key, path), tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, out))

        handles = [m.register_forward_pre_hook(lambda _m, _a: started.append(True)) for m in self.until]
        handles += [
            m.register_forward_hook(lambda _m, _a, out, path=path: see(path, out)) for path, m in self.watched.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        once = [p for p, n in calls.items() if started and n == 1 and (key, p) in self._spool]
        inner = {p for p in once for q in once if p.startswith(q + ".")}
        self._known[key] = tuple(p for p in once if p not in inner)
        for path in set(calls) - set(self._known[key]):
            self._spool.drop((key, path))

    @contextmanager
    def _answered(self, key: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for path in self._known[key]:
                value = self._spool.get((key, path))
                stack.enter_context(standing_in(self.watched[path], lambda *_a, value=value, **_k: value))
            yield


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, a module answers with another forward; one it was given before comes back afterwards."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def absent(blocks: Iterable[nn.Module], returns: Returns) -> Iterator[None]:
    """Within the context, blocks hand the stream on as it is."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(standing_in(block, handing_on(returns)))
        yield


@contextmanager
def grabbed(module: nn.Module, side: str, index: int, found: list[Tensor], *, stop: bool = False) -> Iterator[None]:
    """Within the context, append the tensor a module takes in or gives out to `found` (and end the forward there).

    Args:
        side: "in" or "out".
        index: which of its tensor inputs or outputs.
        stop: raise `Stop` once it is seen.
    """

    def see(tree: Any) -> None:
        found.append(list(tensors_in(tree))[index])
        if stop:
            raise Stop

    if side == "in":
        handle = module.register_forward_pre_hook(lambda _m, args, kwargs: see((args, kwargs)), with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda _m, _a, out: see(out))
    try:
        yield
    finally:
        handle.remove()
