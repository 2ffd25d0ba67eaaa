"""Models without weights: built, and run for the shapes of what they compute, without holding a single weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from secateur.nn.trees import tensors_in

_META = torch.device("meta")
_UNSET = (torch.empty, Tensor.new_empty, torch.randn, torch.rand, torch.empty_like, torch.randn_like, torch.rand_like)


class _Unset(TorchFunctionMode):
    """What is made without values, or with random ones, has no memory: weights. What is computed is: tables."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _UNSET:
            kwargs["device"] = _META
        return func(*args, **kwargs)


@contextmanager
def unset_weights() -> Iterator[None]:
    """Within the context, models are built with parameters on the meta device and real computed buffers (rotary
    frequencies, position indices). Parameters that were computed after all are sent there by `empty_`."""
    with _Unset():
        yield


def empty_(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Send parameters to the meta device, in place; those that share a tensor go on sharing one.

    Args:
        names: of those to send; all by default.
    """
    wanted = None if names is None else set(names)
    sent: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, p in module._parameters.items():
            if p is None or (wanted is not None and (f"{path}.{leaf}" if path else leaf) not in wanted):
                continue
            if id(p) not in sent:
                sent[id(p)] = p if p.is_meta else nn.Parameter(p.detach().to(_META), requires_grad=p.requires_grad)
            module._parameters[leaf] = sent[id(p)]
    return model


class _KnownValues(TorchDispatchMode):
    """Runs what depends on a weight on the meta device, for its shape alone, and everything else for real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        unknown = any(t.is_meta for t in tensors_in((args, list(kwargs.values()))))
        if kwargs.get("device") is not None:  # code puts tensors where the activations are
            kwargs["device"] = _META if unknown else torch.device("cpu")
        if not unknown:
            return func(*args, **kwargs)
        twins: list[tuple[Tensor, Tensor]] = []

        def to_meta(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.is_meta:
                return value
            twins.append((value, torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)))
            return twins[-1][1]

        def back(value: Any) -> Any:  # an operation in place gives back what it was given
            return next((real for real, twin in twins if twin is value), value)

        return tree_map(back, func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs)))


def known_values(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which a model with weights on the meta device runs.

    What follows from the input's shape alone (positions, masks) has its values, so that code may look at them; what
    follows from a weight has only a shape. Nothing is changed for models that have weights.
    """
    return _KnownValues() if is_weightless(model) else nullcontext()


def is_weightless(model: nn.Module) -> bool:
    """Whether any parameter is on the meta device."""
    return any(p.is_meta for p in model.parameters())


@torch.no_grad()
def materialise_(module: nn.Module) -> nn.Module:
    """Give a module's parameters and buffers on the meta device memory (zeros), in place; ties within it are kept."""
    made: dict[int, Tensor] = {}

    def real(t: Tensor) -> Tensor:
        if id(t) not in made:
            made[id(t)] = torch.zeros_like(t, device="cpu")
        return made[id(t)]

    for part in module.modules():
        for leaf, p in part._parameters.items():
            if p is not None and p.is_meta:
                value = real(p)
                if not isinstance(value, nn.Parameter):
                    made[id(p)] = value = nn.Parameter(value, requires_grad=p.requires_grad)
                part._parameters[leaf] = value
        for leaf, b in part._buffers.items():
            if b is not None and b.is_meta:
                part._buffers[leaf] = real(b)
    return module
