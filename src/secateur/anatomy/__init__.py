"""Anatomy: what a model is made of, found from its modules and its data flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from secateur.anatomy.types import CUT_KINDS, Anatomy, Consumer, Kind, PrunableGroup, Slot
from secateur.errors import AnatomyError

__all__ = ["CUT_KINDS", "Anatomy", "Consumer", "Kind", "PrunableGroup", "Slot", "find_anatomy"]


def find_anatomy(model: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any] | None = None) -> Anatomy:
    """Find every PrunableGroup of a model by running it once, and prove on copies which can be cut.

    Args:
        model: any module; it is put in eval mode for the run and left as it was.
        example: an input, batch first; two examples are enough.
        forward: how to call the model on it; `model(example)` by default.

    Raises:
        AnatomyError: the model cannot be run on the example.
    """
    from secateur.anatomy.blocks import block_groups, block_order, in_blocks, with_block_costs
    from secateur.anatomy.costs import cost_terms, with_costs
    from secateur.anatomy.groups import Builder
    from secateur.anatomy.trace import trace_model
    from secateur.anatomy.verify import Verifier
    from secateur.nn.attention import explicit_attention
    from secateur.nn.slicing import drop_caches_
    from secateur.nn.trees import tensors_in

    forward = forward or (lambda m, x: m(x))
    modes = [(m, m.training) for m in model.modules()]
    for module in model.modules():
        drop_caches_(module)  # what it holds would look like a constant, not like the parameters it was made from
    model.eval()
    try:
        with explicit_attention(model):
            trace = trace_model(model, forward, example)
            builder = Builder(trace, model)
            groups = builder.build()
            leaves = builder.leaves
        groups = Verifier(model, forward, example, trace).prove(groups, leaves)
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
    groups = {n: with_costs(g, params, macs) for n, g in groups.items()}
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    params = in_blocks(params, [tied[id(p)] for p in model.parameters()], stacks)
    macs = in_blocks(macs, [[event.module] for event in trace.contractions], stacks)
    groups |= with_block_costs(stacks, params, macs)
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
