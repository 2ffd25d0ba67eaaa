"""Proof on the module itself that a group can be cut: a randomised copy, masked, against the same copy, sliced.

The trace says what a unit owns; this says that a module whose own code names the size runs at the smaller size and
gives the masked result. It also decides which attributes count the units. Modules with the same structure are proved
once; where no code names the size, only standard layers see it, and there is nothing to prove.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.anatomy.dims import Dim, Misaligned
from secateur.anatomy.edits import candidate_edits, head_counts, named_leaves
from secateur.anatomy.masked import mask_
from secateur.anatomy.trace import Trace
from secateur.anatomy.types import Kind, PrunableGroup
from secateur.errors import reason
from secateur.nn.attention import explicit_attention
from secateur.nn.implementations import CHOSEN, PLAIN, has_other, implementation
from secateur.nn.localconfig import get_size
from secateur.nn.reforward import reforward_
from secateur.nn.slicing import drop_caches_, finish_, keep_mask, slice_tensors_
from secateur.nn.trees import tensors_in

# Of the largest output. Where the module allows float64, only what it computes in float32 on its own is forgiven: a
# scale that follows the size (1 / sqrt(d)) can change so little that a looser bound would miss it.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}

LARGE = 1 << 28  # parameters of a module of which no copy in double precision is made: all experts of a layer
DIFFERS = "its output differs from the masked one"
ALIGNED = re.compile(r"stride|multiple|align|divisible")  # what kernels say to sizes that they do not take
KERNEL = 8  # kernels that want rows of a multiple of 16 bytes are content with multiples of 8 numbers


@dataclass(frozen=True)
class Run:
    """A module in one implementation and precision: how to call it, and what it gives when masked; or why neither."""

    keep: Tensor = field(default_factory=lambda: torch.zeros(0))
    call: Callable[[nn.Module], list[Tensor]] = lambda module: []
    dtype: torch.dtype = torch.float32
    reference: list[Tensor] = field(default_factory=list)
    error: str = ""


class Verifier:
    """Proves groups of one traced model.

    Args:
        model: the model, unchanged by verification.
        forward: how to call it.
        example: the traced input.
    """

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Any], example: Any, trace: Trace) -> None:
        self.model, self.forward, self.example, self.trace = model, forward, example, trace
        self.proved: dict[tuple, PrunableGroup] = {}
        self.choices = [CHOSEN, PLAIN] if has_other(model) else [CHOSEN]
        self.inputs: dict[tuple[int, str], tuple[tuple, dict]] = {}

    def prove(self, groups: dict[str, PrunableGroup], leaves: dict[str, Dim]) -> dict[str, PrunableGroup]:
        """The groups, those that can be cut with the edits that it takes, the others with the reason."""
        named = named_leaves(self.trace, self.model)
        signatures = {
            n: _signature(self.model, g)
            for n, g in groups.items()
            if g.cuttable and (g.kind is Kind.EXPERTS or self.trace.space.find(leaves[n]) in named)
        }
        # The first of each structure, one that ran if there is any.
        ran = sorted(signatures, key=lambda n: self._is_twin(groups[n].owner))
        firsts = {signatures[n]: n for n in reversed(ran)}
        self._capture({groups[n].owner for n in firsts.values()})
        self.proved = {sig: self._prove(groups[n], leaves[n]) for sig, n in firsts.items()}
        out = {n: _transfer(self.proved[signatures[n]], g) if n in signatures else g for n, g in groups.items()}
        self.inputs.clear()
        return _apart(self.model, self.trace, out, leaves)

    def _is_twin(self, path: str) -> bool:
        return any(path == twin or path.startswith(twin + ".") for twin in self.trace.twins)

    def _capture(self, owners: Iterable[str]) -> None:
        """Run the model once in every implementation and keep the inputs of the modules to be proved."""
        for number, choice in enumerate(self.choices):
            handles = []
            for path in owners:
                if not path:
                    continue

                def before(_module, args, kwargs, key=(number, path)):
                    if key not in self.inputs:
                        self.inputs[key] = _copy((args, kwargs))

                handles.append(self.model.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True))
            try:
                if handles:
                    with torch.no_grad(), explicit_attention(self.model), implementation(self.model, choice):
                        self.forward(self.model, self.example)
            except Exception:  # what runs in its own implementation alone is proved in that
                if not number:
                    raise
            finally:
                for handle in handles:
                    handle.remove()

    def _prove(self, group: PrunableGroup, leaf: Dim) -> PrunableGroup:
        """The group, proved for any count, else for multiples of `KERNEL`, else refused with the reason."""
        proved = self._search(group, leaf)
        if ALIGNED.search(proved.reason) and group.kind in (Kind.HIDDEN, Kind.CHANNELS) and group.size > KERNEL:
            rounded = self._search(replace(group, multiple=KERNEL), leaf)
            return proved if rounded.reason else rounded
        return proved

    def _search(self, group: PrunableGroup, leaf: Dim) -> PrunableGroup:
        local = _localise(group)
        runs = [
            self._reference(group, local, keep, number) for keep in _tests(group) for number in range(len(self.choices))
        ]
        if runs[0].error:
            return replace(group, reason=runs[0].error)
        runs = [run for run in runs if not run.error]
        tried: set[tuple] = set()
        error = ""
        for rewritten in (False, True):
            for edits in candidate_edits(self.trace, self.model, group, leaf):
                rewrites = self._rewrites(group) if rewritten else ()
                if (edits, rewrites) in tried or (rewritten and not rewrites):
                    continue
                tried.add((edits, rewrites))
                attempt = replace(group, edits=edits, rewritten=rewrites)
                failure = self._attempt(attempt, runs)
                if not failure:
                    return attempt
                error = error or failure  # of the most likely edits
        return replace(group, reason=self._why(group, leaf, error))

    def _why(self, group: PrunableGroup, leaf: Dim, error: str) -> str:
        """What a reader should know of a failed proof."""
        made = any(n.kind == "made" for n in self.trace.space.notes().get(self.trace.space.find(leaf), []))
        if made and error.startswith(DIFFERS):
            return (
                f"{self._class(group)} gives each unit a constant that depends on how many there are (ALiBi's slopes)"
            )
        hint = "; its code makes constants of their number, as ALiBi's slopes are" if made else ""
        return f"{self._class(group)} cannot run with fewer units: {error}{hint}"

    def _class(self, group: PrunableGroup) -> str:
        return type(self.model.get_submodule(group.owner)).__name__

    def _rewrites(self, group: PrunableGroup) -> tuple[tuple[str, tuple[tuple[str, int], ...]], ...]:
        """Modules of the owner that reshape the group's axis, with the head counts their code divides by."""
        paths = [p for p in self.trace.shapes if p == group.owner or p.startswith(group.owner + ".")]
        out = []
        for path in paths:
            heads = head_counts(self.model, path)
            if heads and reforward_(copy.copy(self.model.get_submodule(path)), heads):
                out.append((path, tuple(heads.items())))
        return tuple(out)

    def _module(self, group: PrunableGroup, dtype: torch.dtype) -> nn.Module:
        clone = copy.deepcopy(self.model.get_submodule(group.owner))
        randomise_(clone)
        return clone.to(dtype)

    def _reference(self, group: PrunableGroup, local: PrunableGroup, keep: Tensor, number: int) -> Run:
        """A run of the masked module in one implementation."""
        error, dead = "", self._dead(group)
        # Plain code in single precision: casts that do nothing there leave other strides behind.
        size = sum(p.numel() for p in self.model.get_submodule(group.owner).parameters())
        single = number or size > LARGE
        for dtype in (torch.float32,) if single else (torch.float64, torch.float32):
            if group.owner and (number, group.owner) not in self.inputs:
                return Run(error="its module was never called")
            args, kwargs = self.inputs[number, group.owner] if group.owner else ((self.example,), {})
            args, kwargs = tree_map(lambda t, dtype=dtype: _cast(t, dtype), (args, kwargs))

            def call(module: nn.Module, inputs=(args, kwargs)) -> list[Tensor]:
                args, kwargs = _copy(inputs)
                choice = implementation(module, self.choices[number])
                with torch.no_grad(), explicit_attention(module), choice, torch.random.fork_rng():
                    torch.manual_seed(0)  # a model may draw random numbers even in eval mode (masked autoencoders)
                    out = module(*args, **kwargs) if group.owner else self.forward(module, args[0])
                return [t for i, t in enumerate(tensors_in(out)) if t.is_floating_point() and i not in dead]

            try:
                module = self._module(group, dtype)
                mask_(module, [(local, keep)])
                return Run(keep, call, dtype, call(module))
            except Exception as e:  # any failure here means: cannot be proved, and the reason is reported
                error = reason(e)
        return Run(error=f"{self._class(group)} could not be run by itself: {error}")

    def _dead(self, group: PrunableGroup) -> set[int]:
        """Which tensors that the owner returns nothing ever reads (attention weights): they need not agree."""
        calls = [call for call in self.trace.calls if call.path == group.owner and group.owner]
        live = [self.trace.live(call) for call in calls]
        return {i for i in range(max(map(len, live), default=0)) if not any(i < len(x) and x[i] for x in live)}

    def _attempt(self, group: PrunableGroup, runs: list[Run]) -> str:
        """Empty if the cut module gives what the masked one gives in every run, else what differs."""
        for run in runs:
            try:
                module = self._module(group, run.dtype)
                cut_module_(module, _localise(group), run.keep)
                out = run.call(module)
            except Exception as e:  # the module's own code refusing the size is an answer, not a crash
                return reason(e)
            failure = compare(run.reference, out, TOLERANCE[run.dtype])
            if failure:
                return failure
        return ""


def _apart(
    model: nn.Module, trace: Trace, groups: dict[str, PrunableGroup], leaves: dict[str, Dim]
) -> dict[str, PrunableGroup]:
    """The groups, those refused that count in an attribute that an earlier one counts in, but not beside it.

    Several groups may count in one attribute side by side, each with its part of it, or as factors, if the code names
    an axis that is their product (query heads: key/value heads times heads for each).
    """
    out: dict[str, PrunableGroup] = {}
    counted: dict[tuple, list[tuple[str, int]]] = {}
    for name, group in groups.items():
        reason = group.reason
        for edit in group.edits if group.cuttable else ():
            place = (edit.module, edit.attr, edit.index)
            value = get_size(model.get_submodule(edit.module), edit.attr)
            value = value if edit.index is None else value[edit.index]
            others = counted.setdefault(place, [])
            beside = sum(n for _, n in others) + edit.per_unit * group.size <= value
            factors = all(_are_factors(trace, edit.module, value, leaves[name], leaves[other]) for other, _ in others)
            if not beside and not factors:
                reason = f"'{edit.attr}' counts these units as well as those of '{others[0][0]}'; cut those instead"
                break
        else:
            for edit in group.edits if group.cuttable else ():
                place = (edit.module, edit.attr, edit.index)
                counted.setdefault(place, []).append((name, edit.per_unit * group.size))
        out[name] = replace(group, reason=reason)
    return out


def _are_factors(trace: Trace, path: str, size: int, a: Dim, b: Dim) -> bool:
    """Whether a module's code names an axis of this size that is a product of which both leaves are factors."""
    for dim in trace.shapes.get(path, ()):
        if dim.size == size and trace.space.contains(dim, a) and trace.space.contains(dim, b):
            try:
                if bool(((trace.space.units(dim, a) >= 0) & (trace.space.units(dim, b) >= 0)).all()):
                    return True
            except Misaligned:
                continue
    return False


def compare(reference: list[Tensor], out: list[Tensor], tolerance: float) -> str:
    """Empty if two lists of outputs agree, else what differs."""
    if len(reference) != len(out) or any(a.shape != b.shape for a, b in zip(reference, out, strict=True)):
        return "its output changes shape"
    for a, b in zip(reference, out, strict=True):
        scale = a.abs().max().clamp_min(1e-12)
        worst = float((a - b).abs().max() / scale) if a.numel() else 0.0
        if not worst <= tolerance:
            return f"{DIFFERS} by {worst:.1e}"
    return ""


def cut_module_(root: nn.Module, group: PrunableGroup, keep: Tensor) -> None:
    """Remove, in place, every unit of one group that is not kept."""
    for path, heads in group.rewritten:
        reforward_(root.get_submodule(path), dict(heads))
    masks: dict[str, dict[int, Tensor]] = {}
    for slot in group.slots:
        masks.setdefault(slot.name, {})[slot.axis] = keep_mask(slot.units, keep, group.size)
    slice_tensors_(root, masks)
    removed = group.size - len(keep)
    finish_(root, masks, [(edit, removed) for edit in group.edits])


@torch.no_grad()
def randomise_(module: nn.Module) -> None:
    """Random parameters of ordinary size: zero-initialised layers and tiny LayerScales would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        if not p.is_floating_point() or not p.numel():
            continue
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            noise *= (p.numel() / p.shape[0]) ** -0.5
        elif name.rpartition(".")[2] in {"weight", "gamma", "scale"}:
            noise = 1 + 0.2 * noise
        else:
            noise *= 0.2
        p.copy_(noise)
    for name, b in module.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.1 * torch.randn(b.shape, generator=generator))
        elif name.endswith("running_var"):
            b.copy_(0.5 + torch.rand(b.shape, generator=generator))
    for part in module.modules():
        drop_caches_(part)


def _tests(group: PrunableGroup) -> list[Tensor]:
    """What to keep in a proof: about two thirds of the units, an odd number; where a count is the limit, that too."""
    size = group.size
    most = max(1, min(size - 1, -(-2 * size // 3)))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    if group.multiple > 1:
        return [order[: max(most - most % group.multiple, group.multiple)].sort().values]
    counts = {max(group.least, most - (most > 1 and most % 2 == 0))} | ({group.least} if group.least > 1 else set())
    return [order[:count].sort().values for count in counts]


def _localise(group: PrunableGroup) -> PrunableGroup:
    """The group with every path relative to its owner."""
    prefix = len(group.owner) + 1 if group.owner else 0
    return replace(
        group,
        owner="",
        slots=tuple(replace(s, name=s.name[prefix:]) for s in group.slots),
        edits=tuple(replace(e, module=e.module[prefix:]) for e in group.edits),
        rewritten=tuple((path[prefix:], heads) for path, heads in group.rewritten),
        norms=tuple(path[prefix:] for path in group.norms),
    )


def _transfer(known: PrunableGroup, group: PrunableGroup) -> PrunableGroup:
    """What was proved for one group, for another of the same structure."""
    local = _localise(known)
    prefix = f"{group.owner}." if group.owner else ""

    def move(path: str) -> str:
        return (prefix + path).rstrip(".")

    edits = tuple(replace(e, module=move(e.module)) for e in local.edits)
    return replace(
        group,
        edits=edits,
        reason=known.reason,
        rewritten=tuple((move(p), heads) for p, heads in local.rewritten),
        multiple=known.multiple,
    )


def _signature(model: nn.Module, group: PrunableGroup) -> tuple:
    owner = model.get_submodule(group.owner)
    local = _localise(group)
    tree = tuple((n, type(m)) for n, m in owner.named_modules())
    shapes = tuple((n, tuple(p.shape)) for n, p in owner.named_parameters())
    slots = tuple((s.name, s.axis, s.role) for s in local.slots)
    return (group.kind, group.size, tree, shapes, slots, local.norms, _settings(owner))


def _settings(owner: nn.Module) -> tuple:
    """Plain settings that steer a forward (window shifts, flags), for every module inside."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (a, v)
        for m in owner.modules()
        for a, v in sorted(vars(m).items())
        if isinstance(v, plain) and a not in ("training", "layer_idx", "layer_id", "block_idx", "drop_prob")
    )


def _copy(inputs: Any) -> Any:
    """Inputs that a run cannot change: a cache of keys and values among them would grow with every attempt."""
    try:
        return copy.deepcopy(inputs)
    except Exception:  # an object that cannot be copied is passed as it is
        return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, inputs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
