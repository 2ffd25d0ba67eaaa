"""Anatomy: what a model is made of, found from its modules and its data flow."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.anatomy.types import CUT_KINDS, Anatomy, Consumer, Kind, PrunableGroup, Slot
from secateur.errors import AnatomyError

if TYPE_CHECKING:
    from secateur.anatomy.trace import Trace

__all__ = ["CUT_KINDS", "Anatomy", "Consumer", "Kind", "PrunableGroup", "Slot", "find_anatomy"]


def find_anatomy(
    model: nn.Module,
    example: Any,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    rotated: Collection[str] = (),
) -> Anatomy:
    """Find every PrunableGroup of a model by running it once, and prove on copies which can be cut.

    Args:
        model: any module; it is put in eval mode for the run and left as it was.
        example: an input, batch first; two examples are enough.
        forward: how to call the model on it; `model(example)` by default.
        rotated: kinds of groups that the model was prepared for (`secateur.rotate`); they are proved and cut as well.

    Raises:
        AnatomyError: the model cannot be run on the example.
    """
    from secateur.anatomy.blocks import block_groups, block_order, in_blocks, listed_experts, with_block_costs
    from secateur.anatomy.costs import cost_terms, with_costs
    from secateur.anatomy.groups import Builder
    from secateur.anatomy.headdims import renamed, with_head_dims
    from secateur.anatomy.residual import with_streams
    from secateur.anatomy.twins import adopt_twins
    from secateur.anatomy.verify import Verifier
    from secateur.nn.attention import explicit_attention
    from secateur.nn.slicing import drop_caches_
    from secateur.nn.trees import tensors_in
    from secateur.nn.weightless import is_weightless

    forward = forward or (lambda m, x: m(x))
    modes = [(m, m.training) for m in model.modules()]
    for module in model.modules():
        drop_caches_(module)  # what it holds would look like a constant, not like the parameters it was made from
    model.eval()
    try:
        with explicit_attention(model):
            trace = _trace(model, forward, example)
            adopt_twins(trace, model)
            builder = Builder(trace, model)
            groups = builder.build()
            leaves = builder.leaves
        groups = Verifier(model, forward, example, trace).prove(groups, leaves)
        if is_weightless(model):
            parts: dict[str, dict[str, str]] = {}
        else:
            groups = with_streams(groups, leaves, trace, model, lambda m: forward(m, example), proved=rotated)
            with explicit_attention(model):
                groups, parts = with_head_dims(
                    groups, leaves, trace, model, lambda m: forward(m, example), proved=rotated
                )
        stacks = block_groups(trace, model, forward, example)
    except (RuntimeError, ValueError, TypeError) as e:
        raise AnatomyError(
            f"{type(model).__name__} could not be run on an input of shape "
            f"{[tuple(t.shape) for t in tensors_in(example)]}: {str(e).splitlines()[0]}; give an example that fits"
        ) from e
    finally:
        for module, mode in modes:
            module.training = mode
    params, macs = cost_terms(trace, model, leaves)
    params = renamed(params, [name for name, _ in model.named_parameters()], parts)
    macs = renamed(macs, [event.module for event in trace.contractions], parts)
    groups = {n: with_costs(g, params, macs) for n, g in groups.items()}
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    params = in_blocks(params, [tied[id(p)] for p in model.parameters()], stacks)
    macs = in_blocks(macs, [[event.module] for event in trace.contractions], stacks)
    groups |= with_block_costs(stacks, params, macs)
    groups |= listed_experts(trace, model, macs)
    first = next(iter(tensors_in(example)), torch.empty(0))
    return Anatomy(
        groups=groups,
        params=sum(p.numel() for p in model.parameters()),
        macs=sum(t.amount for t in macs),
        param_terms=params,
        mac_terms=macs,
        input_shape=tuple(first.shape[1:]),
        blocks=block_order(trace, model),
    )


def _trace(model: nn.Module, forward: Callable[[nn.Module, Any], Any], example: Any) -> Trace:
    """The trace of a model in plain code, or in the implementation that was chosen, where there is no other."""
    from secateur.anatomy.trace import trace_model
    from secateur.nn.implementations import TRACED, has_other, implementation

    if has_other(model, TRACED):
        try:
            with implementation(model, TRACED):
                return trace_model(model, forward, example)
        except Exception:  # not every model has plain code; the failure of its own is the one to report
            pass
    return trace_model(model, forward, example)
