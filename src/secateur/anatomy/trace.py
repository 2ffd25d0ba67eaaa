"""Run a model once and write down what every axis of every tensor means.

The tracer sits below autograd and above the kernels (`TorchDispatchMode`), so it sees the same hundred or so aten
operations whatever the model's Python looks like. For each it applies a rule (package `rules`) that says how the
axes of the results follow from those of the arguments. An operation without a rule pins every axis that goes in:
unknown code makes dimensions uncuttable, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.anatomy.dims import Dim, Note, Space
from secateur.nn.trees import tensors_in

AT_THE_END = 1 << 62


@dataclass(frozen=True)
class Branch:
    """A tensor that is, up to a per-channel scale and a permutation of axes, the output of a contraction.

    Attributes:
        event: index into `Trace.contractions`.
        scales: names of the parameters multiplied on since (LayerScale).
        order: axes of this tensor in terms of the axes of the module's output; None until the module returned.
    """

    event: int
    scales: tuple[str, ...] = ()
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Info:
    """What is known about one tensor.

    Attributes:
        axes: one Dim per axis.
        act: whether it depends on the model's input.
        name: the registered parameter or buffer that it is, or is a view of.
        roots: parameters and buffers it was computed from, for tensors that do not depend on the input.
        node: number of the operation that computed it; views keep the number of what they view.
        past: bit set of the nodes it depends on.
        past_mixed: those of them that it depends on through at least one dense contraction.
        chosen: the parameter of which these are matrices that the data chose (experts of a token).
        points: the axis whose indices the values are (what top-k chose); None for all other tensors.
    """

    axes: tuple[Dim, ...]
    act: bool = False
    name: str | None = None
    roots: frozenset[str] = frozenset()
    node: int = -1
    past: int = 0
    past_mixed: int = 0
    branch: Branch | None = None
    chosen: str | None = None
    points: Dim | None = None


@dataclass
class Contraction:
    """A product that sums over an axis: a linear layer, a convolution, or attention's q @ k.

    Attributes:
        module: dotted path of the innermost module that was running.
        weights: names of the parameters on the weight side; empty where two activations meet.
        summed: the axis summed over.
        features: the axis that the weight side makes.
        batch: the axis that both sides share untouched (heads, or the groups of a convolution).
        inputs: the input's feature axis, groups included (what a hook on the module sees).
        macs: multiply-accumulates for the traced batch.
        dims: axes whose sizes multiply to `macs`, besides constants.
        dense: False for depthwise convolutions.
        spatial: whether it is a convolution with more than one kernel position.
        residual: index into `Trace.skips` of the addition that takes the result back into the stream.
        branch: how the result reached that addition.
    """

    module: str
    weights: frozenset[str]
    summed: Dim
    features: Dim
    batch: Dim
    inputs: Dim
    macs: int
    dims: tuple[Dim, ...]
    dense: bool = True
    spatial: bool = False
    residual: int | None = None
    branch: Branch | None = None


@dataclass(frozen=True)
class Skip:
    """An addition of a tensor to something computed from it: a residual connection."""

    node: int
    axes: tuple[Dim, ...]


@dataclass
class ModuleCall:
    """One call of a module: what went in and came out, by node.

    Attributes:
        ins: nodes of the tensor arguments, the first positional ones first.
        in_axes: their axes.
        outs: nodes of the tensors returned, -1 for those never seen.
        out_axes: their axes.
        left: number of the next operation when it returned.
    """

    path: str
    ins: tuple[int, ...]
    in_axes: tuple[tuple[Dim, ...], ...]
    outs: tuple[int, ...] = ()
    out_axes: tuple[tuple[Dim, ...], ...] = ()
    left: int = 0

    @property
    def first(self) -> tuple[Dim, ...]:
        """Axes of the first tensor argument."""
        return self.in_axes[0] if self.in_axes else ()

    @property
    def result(self) -> tuple[Dim, ...]:
        """Axes of the first tensor returned."""
        return self.out_axes[0] if self.out_axes else ()


@dataclass
class Trace:
    """Everything one run told.

    Attributes:
        space: the Dims and the notes about them.
        params: axes of every parameter and buffer, by name (tied names share Dims).
        contractions: in the order they ran.
        skips: residual additions, in order.
        calls: module calls in order of entry.
        shapes: for each module path, the axes whose sizes its code named: it reshaped, split, expanded, grouped.
        used: for each node that some operation read, the number of the last one; AT_THE_END if the model returned it.
        picks: axes of which the data chooses indices (experts), with how many it takes at most.
        foreign: axes of tensors that were neither arguments, parameters, buffers nor made during the run.
        batch: size of the traced batch.
        twins: modules that were never called, and are described from a sibling that was.
    """

    space: Space
    params: dict[str, tuple[Dim, ...]]
    contractions: list[Contraction] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    shapes: dict[str, list[Dim]] = field(default_factory=dict)
    used: dict[int, int] = field(default_factory=dict)
    picks: list[tuple[Dim, int]] = field(default_factory=list)
    foreign: list[tuple[Dim, ...]] = field(default_factory=list)
    batch: int = 1
    twins: list[str] = field(default_factory=list)

    def live(self, call: ModuleCall) -> tuple[bool, ...]:
        """For each tensor that a call returned, whether anything read it afterwards; attention weights often nobody."""
        return tuple(node < 0 or self.used.get(node, -1) >= call.left for node in call.outs)


class Tracer(TorchDispatchMode):
    """Dispatch mode that fills a `Trace`; use `trace_model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.space = Space()
        self.info: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.nodes = self.operations = 0
        self.stack: list[str] = [""]
        self.trace = Trace(self.space, {})
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            known = self.info.get(tensor)
            if known is None:
                axes = tuple(self.space.new(s) for s in tensor.shape)
                known = self.info[tensor] = Info(axes, name=name, roots=frozenset({name}))
            self.trace.params[name] = known.axes

    @property
    def where(self) -> str:
        return self.stack[-1]

    def look(self, tensor: Tensor) -> Info:
        """What is known about a tensor; one never seen before gets axes of its own."""
        known = self.info.get(tensor)
        if known is None:
            known = self.info[tensor] = Info(tuple(self.space.new(s) for s in tensor.shape))
            self.trace.foreign.append(known.axes)
        return known

    def read(self, tensors: Iterable[Tensor]) -> None:
        """The next operation reads these tensors."""
        self.trace.used.update((self.info[t].node, self.operations) for t in tensors if t in self.info)
        self.operations += 1

    def names(self, axes: Iterable[Dim]) -> None:
        """The running module's code named these sizes: its attributes may have to follow when they change."""
        self.trace.shapes.setdefault(self.where, []).extend(axes)

    def new_node(self) -> int:
        self.nodes += 1
        return self.nodes - 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from secateur.anatomy.rules import apply_rule

        out = func(*args, **(kwargs or {}))
        apply_rule(self, func, args, kwargs or {}, out)
        return out

    # -- module calls ---------------------------------------------------------------------------------------------

    def enter(self, path: str, args: Any) -> ModuleCall:
        self.stack.append(path)
        infos = [self.info[t] for t in tensors_in(args) if t in self.info]
        call = ModuleCall(path, tuple(i.node for i in infos), tuple(i.axes for i in infos))
        self.trace.calls.append(call)
        return call

    def leave(self, call: ModuleCall, out: Any) -> None:
        self.stack.pop()
        tensors = list(tensors_in(out))
        call.left = self.operations
        call.outs = tuple(self.info[t].node if t in self.info else -1 for t in tensors)
        call.out_axes = tuple(self.info[t].axes if t in self.info else () for t in tensors)
        for tensor in tensors:
            if tensor not in self.info:
                continue
            info = self.info[tensor]
            branch = info.branch
            if branch and branch.order is None and self.trace.contractions[branch.event].module == call.path:
                self.info[tensor] = replace(info, branch=replace(branch, order=tuple(range(tensor.dim()))))


# What Python calls when code asks a tensor for its size; `shape` is an attribute, which the stubs of torch do not know.
_SIZES = (Tensor.shape.__get__, Tensor.size, Tensor.numel, Tensor.__len__)  # type: ignore[attr-defined]


class _PythonReads(TorchFunctionMode):
    """Sees what Python takes from tensors without an operation that a dispatch mode would see: values, and sizes."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.tolist:
            self.tracer.read(args)
        elif func in _SIZES and args[0] in self.tracer.info:
            self.tracer.names(self.tracer.info[args[0]].axes)
        return func(*args, **(kwargs or {}))


@contextmanager
def _module_stack(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    handles = []
    for path, module in model.named_modules():
        calls: list[ModuleCall] = []

        def before(_m, args, kwargs, path=path, calls=calls):
            calls.append(tracer.enter(path, (args, kwargs)))

        def after(_m, _args, _kwargs, out, calls=calls):
            tracer.leave(calls.pop(), out)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace_model(model: nn.Module, forward: Callable[[nn.Module, Any], Any], example: Any) -> Trace:
    """Run `forward(model, example)` once, without gradients, and return what it told.

    Args:
        model: in eval mode; parameters may live on any device, the meta device included.
        forward: how to call the model.
        example: its input; the first axis of every tensor is the batch.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tracer = Tracer(model)
    inputs = list(tensors_in(example))
    for tensor in inputs:
        axes = tuple(tracer.space.new(s) for s in tensor.shape)
        for dim in axes:
            tracer.space.note(dim, Note("input", "", "the model's input"))
        node = tracer.new_node()
        tracer.info[tensor] = Info(axes, act=True, node=node, past=1 << node)
    tracer.trace.batch = inputs[0].shape[0] if inputs and inputs[0].dim() else 1
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _module_stack(tracer, model), _PythonReads(tracer), tracer:
        out = forward(model, example)
    for tensor in tensors_in(out):
        if tensor in tracer.info:
            tracer.trace.used[tracer.info[tensor].node] = AT_THE_END
            for dim in tracer.info[tensor].axes:
                tracer.space.note(dim, Note("output", "", "the model's output"))
    tracer.space.forget_unused(tracer.trace.used.keys())
    return tracer.trace
