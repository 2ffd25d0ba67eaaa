"""Which blocks of a stack can be removed, found by looking for what counts them and proved by running.

Masked is a block that hands the stream on as it is. A block can go if the model without it computes the very same; what
it makes beside the stream (a position bias for all that follow) must not be read by others.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.trace import ModuleCall, Trace
from secateur.anatomy.verify import compare
from secateur.errors import AnatomyError, reason
from secateur.nn.stack import Stack, remove_
from secateur.nn.standin import Returns, merged, returns_of
from secateur.nn.trees import tensors_in
from secateur.nn.weightless import is_weightless
from secateur.replay import absent

TOLERANCE = 1e-7  # the same operations on the same numbers: nothing is forgiven but a kernel's own noise
_COUNT = re.compile(r"layer|block|depth")
_NO_COUNT = re.compile(r"idx|ids?$|index|interval|every|shared|window|norm|scale|freq|start|first|last|drop|dense")
_LIST = re.compile(r"layer|block|type|pattern|window|rope")
_NO_LIST = re.compile(r"depths|sizes|dims|heads|indices|indexes|ids$")
_NUMBER = re.compile(r"(layer|block)_?(idx|id|index|number|num|no)$")
_CONFIG = re.compile(r"config|cfg|args|hparams|params$")


def find_stack(
    trace: Trace,
    model: nn.Module,
    forward: Callable[[nn.Module, Any], Any],
    example: Any,
    path: str,
    members: list[str],
) -> tuple[Stack, dict[int, str], str]:
    """What there is to know about a container of repeated blocks.

    Args:
        forward: how to call the model, in eval mode, on the example.
        members: paths of the blocks.

    Returns:
        The stack, why each block that cannot go must stay, and why none can (empty if one can).
    """
    names = tuple(m.rpartition(".")[2] for m in members)
    stack = Stack(path, names)
    if is_weightless(model):
        return stack, {}, "whole blocks are removed from models that are in memory"
    try:
        reference = _Runner(model, forward, example)
        stack = replace(stack, returns=_returns(model, stack, reference))
        fixed = {i: why for i, m in enumerate(members) if (why := _reader(trace, m))}
        free = [i for i in range(len(names)) if i not in fixed]
        if not free:
            return stack, fixed, next(iter(fixed.values()))
        stack, error = _fitting(model, stack, reference, free)
        if not error:
            return stack, fixed, ""
        for i in free:
            stack, why = _fitting(model, stack, reference, [i])
            if why:
                fixed[i] = why
            if len(fixed) == i + 1 > 2:
                return stack, fixed, why  # the first three cannot: neither will the others
        free = [i for i in free if i not in fixed]
        stack, error = _fitting(model, stack, reference, free) if free else (stack, error)
        return stack, fixed, error
    except Exception as e:  # any failure here means: cannot be proved, and the reason is reported
        return stack, {}, str(e) if isinstance(e, AnatomyError) else reason(e)


class _Runner:
    """Runs a model, or a variant of it, always on the same input; where it is told to do without a cache, again with
    one, whose layers must fit the blocks."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Any], example: Any) -> None:
        self.model, self.forward, self.example = model, forward, example

    def __call__(self, model: nn.Module) -> list[Tensor]:
        told: list[bool] = []

        def cached(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            told.append(kwargs.get("use_cache") is False)
            return args, {**kwargs, "use_cache": True} if told[-1] and len(told) > 1 else kwargs

        handle = model.register_forward_pre_hook(cached, with_kwargs=True)
        try:
            out = self._run(model)
            return out + self._run(model) if any(told) else out
        finally:
            handle.remove()

    def _run(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)  # a model may draw random numbers even in eval mode (masked autoencoders)
            out = self.forward(model, self.example)
        return [t for t in tensors_in(out) if t.is_floating_point()]


def _returns(model: nn.Module, stack: Stack, run: _Runner) -> Returns:
    """What the blocks return, seen in one run."""
    seen: list[Returns] = []
    handles = [
        model.get_submodule(m).register_forward_hook(
            lambda _m, args, kwargs, out: seen.append(returns_of(args, kwargs, out)), with_kwargs=True
        )
        for m in stack.members
    ]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    return merged(seen)


def _reader(trace: Trace, path: str) -> str:
    """Why a block must stay: it runs more than once, or what it makes beside the stream is read."""
    calls: list[ModuleCall] = [call for call in trace.calls if call.path == path]
    if len(calls) != 1:
        return f"it runs {len(calls)} times"
    (call,) = calls
    beside = zip(call.outs[1:], trace.live(call)[1:], strict=True)
    if any(live and node >= 0 and node not in call.ins for node, live in beside):
        return "it makes something beside the stream that later blocks read"
    return ""


def _fitting(model: nn.Module, stack: Stack, run: _Runner, free: Sequence[int]) -> tuple[Stack, str]:
    """The stack with what must follow when some of these blocks go, and what differs if nothing helps."""
    error = ""
    counts, lists, numbers = tuple(_counts(model, stack)), tuple(_lists(model, stack)), tuple(_numbers(model, stack))
    full = replace(stack, counts=counts, lists=lists, numbers=numbers)
    plain = replace(full, counts=(), lists=())
    for attempt in dict.fromkeys([full, plain, replace(plain, numbers=())]):
        failure = _difference(model, attempt, run, free)
        if not failure:
            return attempt, ""
        error = error or failure
    return stack, error


def _difference(model: nn.Module, stack: Stack, run: _Runner, free: Sequence[int]) -> str:
    """Empty if every other block, and then each of the others, can be left out."""
    for gone in (free[::2], free[1::2]):
        if not gone:
            continue
        keep = [i for i in range(len(stack.names)) if i not in gone]
        try:
            with absent([model.get_submodule(stack.members[i]) for i in gone], stack.returns):
                masked = run(model)
            small = sharing(model)
            remove_(small, stack, keep)
            failure = compare(masked, run(small), TOLERANCE)
        except Exception as e:  # the model's own code refusing is an answer, not a crash
            failure = reason(e)
        if failure:
            return f"the model without it is not the model in which it hands the stream on: {failure}"
    return ""


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model's structure that shares all its tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


# -- what counts, lists and numbers blocks ------------------------------------------------------------------------


def _counts(model: nn.Module, stack: Stack) -> Iterator[tuple[str, str]]:
    """Attributes that hold the number of the container's children, by name and value."""
    size = len(model.get_submodule(stack.path)._modules)
    for path, prefix, values in _holders(model, stack):
        found = [
            name
            for name, value in values.items()
            if type(value) is int and value == size and _COUNT.search(name) and not _NO_COUNT.search(name)
        ]
        # Of an encoder's and a decoder's count in one config, the container's path says which is meant.
        sides = [side for side in ("decoder", "encoder") if side in stack.path]
        sided = [n for n in found if any(side in n for side in sides)]
        yield from ((path, prefix + n) for n in sided or (n for n in found if "coder" not in n))


def _lists(model: nn.Module, stack: Stack) -> Iterator[tuple[str, str]]:
    """Attributes that list something for each of the container's children."""
    size = len(model.get_submodule(stack.path)._modules)
    for path, prefix, values in _holders(model, stack):
        for name, value in values.items():
            plain = isinstance(value, (list, tuple)) and all(isinstance(v, (bool, int, float, str)) for v in value)
            if plain and len(value) == size and _LIST.search(name) and not _NO_LIST.search(name):
                yield path, prefix + name


def _holders(model: nn.Module, stack: Stack) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What may count a container's children: it, its parent, and the configs of all modules above and inside it, each
    once. Given as path, prefix of names, attributes."""
    parts = stack.path.split(".") if stack.path else []
    above = [".".join(parts[:i]) for i in range(len(parts) + 1)]
    inside = [p for m in stack.members for p in (m, *(f"{m}.{n}" for n, _ in model.get_submodule(m).named_modules()))]
    seen: set[int] = set()
    direct = []
    for path in dict.fromkeys([*above, *(p.rstrip(".") for p in inside)]):
        module = model.get_submodule(path)
        if path in above[-2:]:  # the container, and the module whose code runs through it
            yield path, "", _public(module)
        for name, value in vars(module).items():
            if _is_config(name, value) and id(value) not in seen:
                seen.add(id(value))
                direct.append(value)
                yield path, f"{name}.", _public(value)
    for path in above:  # a config within a config, where it is a copy of one that a module uses
        for name, value in vars(model.get_submodule(path)).items():
            for inner, part in _public(value).items() if _is_config(name, value) else ():
                if (
                    _is_config(inner, part)
                    and id(part) not in seen
                    and any(_public(part) == _public(d) for d in direct)
                ):
                    seen.add(id(part))
                    yield path, f"{name}.{inner}.", _public(part)


def _is_config(name: str, value: Any) -> bool:
    if name.startswith("_") or not _CONFIG.search(name) or isinstance(value, (nn.Module, Tensor, type, dict)):
        return False
    return hasattr(value, "__dict__") and not callable(value)


def _public(holder: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(holder).items() if not name.startswith("_")}


def _numbers(model: nn.Module, stack: Stack) -> Iterator[tuple[str, str, int]]:
    """Attributes inside the children that hold the child's own position, perhaps plus an offset."""
    offsets: dict[tuple[str, str], set[int]] = {}
    for position, child in enumerate(model.get_submodule(stack.path)._modules.values()):
        for inside, module in child.named_modules() if child is not None else ():
            for name, value in vars(module).items():
                if type(value) is int and _NUMBER.search(name):
                    offsets.setdefault((inside, name), set()).add(value - position)
    yield from ((inside, name, *found) for (inside, name), found in offsets.items() if len(found) == 1)  # type: ignore[misc]
