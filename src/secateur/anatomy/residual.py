"""The residual width as a group that can be cut: its norms, and the proof that the whole model runs with less of it.

A unit is one entry of the stream. Cutting it leaves what the dense model computes where everything that writes the
entry is zero, once each norm makes up for its mean over fewer entries (`StreamNorm.narrow_`). That needs norms that do
not subtract the mean. Slicing entries of the basis that training left is a poor cut; `secateur.rotate` makes a better
one, and only in a model so prepared is the group offered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.dims import Dim
from secateur.anatomy.groups import NOT_YET
from secateur.anatomy.masked import mask_
from secateur.anatomy.trace import Trace
from secateur.anatomy.types import Consumer, Kind, PrunableGroup
from secateur.anatomy.verify import TOLERANCE, compare, randomise_
from secateur.errors import reason
from secateur.nn.attention import explicit_attention
from secateur.nn.params import get_tensor
from secateur.nn.slicing import finish_, keep_mask, slice_tensors_
from secateur.nn.stream import Stream, StreamNorm, read_norm
from secateur.nn.trees import tensors_in

ROTATE = "the residual width is not cut by slicing alone; secateur.rotate prepares a model for it"


def with_streams(
    groups: dict[str, PrunableGroup],
    leaves: dict[str, Dim],
    trace: Trace,
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    *,
    proved: Collection[str] = (),
) -> dict[str, PrunableGroup]:
    """The groups, residual widths with their norms; if asked for, those that a cut model runs with are cuttable.

    Args:
        run: a forward pass of a copy of the model.
        proved: kinds of groups to prove.
    """
    out = {}
    for name, group in groups.items():
        if group.reason == NOT_YET[Kind.RESIDUAL]:
            leaf = trace.space.find(leaves[name])
            norms, why = _norms(group, leaf, trace, model)
            stream = Stream(norms, _scales(group, leaf, trace))
            group = replace(group, stream=stream, consumers=_untied(group, model), reason=why or ROTATE)
            if Kind.RESIDUAL in proved and not why:
                group = replace(group, reason=_prove(group, model, run))
        out[name] = group
    return out


def _norms(group: PrunableGroup, leaf: Dim, trace: Trace, model: nn.Module) -> tuple[tuple[StreamNorm, ...], str]:
    """The norms over the stream, or why it cannot be cut."""
    found: dict[str, StreamNorm] = {}
    called = {call.path: call for call in reversed(trace.calls)}
    for note in trace.space.notes().get(leaf, []):
        where = f"in {note.where} ({type(model.get_submodule(note.where)).__name__})"
        if note.kind in ("norm", "reduce"):
            call = called.get(note.where)
            own = call is not None and call.first and trace.space.find(call.first[-1]) is leaf
            norm = read_norm(model, note.where, group.size) if own else None
            if norm is None:
                return (), f"{note.text} couples all entries of the stream {where}"
            found[note.where] = replace(norm, readers=_readers(group, note.where, trace, model))
        elif note.kind == "output":
            return (), "the residual width is the model's output"
        elif note.kind in ("softmax", "indexed", "opaque"):
            return (), f"{note.text} addresses single entries of the stream {where}"
    if any(not torch.equal(s.units, torch.arange(group.size)) for s in group.slots):
        return (), "the residual width is only a part of some weight's axis"
    return tuple(found.values()), ""


def _readers(group: PrunableGroup, path: str, trace: Trace, model: nn.Module) -> tuple[str, ...]:
    """Weights of the modules that are called on just what a norm gives."""
    given = {node for call in trace.calls if call.path == path for node in call.outs}
    readers = {call.path for call in trace.calls if given & set(call.ins)}
    return tuple(
        s.name
        for s in group.slots
        if s.name.rpartition(".")[0] in readers
        and get_tensor(model, s.name).dim() > 1
        and (s.role == "consumer" or _names(group, model, s.name) > 1)
    )


def _names(group: PrunableGroup, model: nn.Module, name: str) -> int:
    """Under how many names the group holds a tensor."""
    return [id(get_tensor(model, s.name)) for s in group.slots].count(id(get_tensor(model, name)))


def _scales(group: PrunableGroup, leaf: Dim, trace: Trace) -> tuple[tuple[str, str], ...]:
    """Weights that write into the stream, with the LayerScale behind each."""
    names = {s.name for s in group.slots}
    return tuple(
        (weight, scale)
        for event in trace.contractions
        if event.branch is not None and trace.space.find(event.features) is leaf
        for weight in sorted(event.weights & names)
        for scale in event.branch.scales
    )


def _untied(group: PrunableGroup, model: nn.Module) -> tuple[Consumer, ...]:
    """Readers whose weight is theirs alone: a refit of one tied to the embedding would change the stream itself."""
    return tuple(c for c in group.consumers if _names(group, model, c.weight) == 1)


def narrow_stream_(root: nn.Module, group: PrunableGroup, left: int) -> None:
    """Make the norms of a stream of which so many entries are left compute what they did over all of them."""
    for norm in group.stream.norms:
        norm.narrow_(root, left / group.size)


def _prove(group: PrunableGroup, model: nn.Module, run: Callable[[nn.Module], Any]) -> str:
    """Empty if a randomised copy of the whole model gives, sliced, what it gives masked; else what went wrong."""
    if centred := [n.module for n in group.stream.norms if n.centred]:
        return f"{centred[0]} subtracts the stream's mean; prepare the model with secateur.rotate"
    keep = torch.randperm(group.size, generator=torch.Generator().manual_seed(0))
    keep = keep[: max(2, group.size * 2 // 3 // 2 * 2)].sort().values
    try:
        trial = _randomised(model)
        mask_(trial, [(group, keep)])
        reference = _outputs(trial, run)
        del trial  # one copy of the whole model at a time
        trial = _randomised(model)
        slice_stream_(trial, group, keep)
        out = _outputs(trial, run)
    except Exception as e:  # the model's own code refusing the width is an answer, not a crash
        return f"the model cannot run with a narrower residual stream: {reason(e)}"
    failure = compare(reference, out, TOLERANCE[torch.float32])
    return failure and f"a narrower residual stream changes the model: {failure}"


def _randomised(model: nn.Module) -> nn.Module:
    out = copy.deepcopy(model)
    randomise_(out)
    return out


def slice_stream_(root: nn.Module, group: PrunableGroup, keep: Tensor) -> None:
    """Cut one residual group by itself, in place."""
    narrow_stream_(root, group, len(keep))
    masks: dict[str, dict[int, Tensor]] = {}
    for slot in group.slots:
        masks.setdefault(slot.name, {})[slot.axis] = keep_mask(slot.units, keep, group.size)
    slice_tensors_(root, masks)
    finish_(root, masks, ())


def _outputs(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[Tensor]:
    with torch.no_grad(), explicit_attention(model), torch.random.fork_rng():
        torch.manual_seed(0)
        return [t.float() for t in tensors_in(run(model)) if t.is_floating_point()]
