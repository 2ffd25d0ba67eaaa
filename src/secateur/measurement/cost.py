"""Parameters and multiply-accumulates, counted.

MACs are read off a trace of one run (every product and convolution, attention's included), since the framework's own
counter sees nothing inside fused attention on a CPU.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.anatomy.trace import trace_model
from secateur.models import example_input, forward
from secateur.nn.attention import explicit_attention


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, example: Any = None) -> float:
    """Multiply-accumulates for one example (by default an image of the model's own size)."""
    example = example_input(model, 1) if example is None else example
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with explicit_attention(model):
            trace = trace_model(model, forward, example)
    finally:
        for module, mode in modes:
            module.training = mode
    return sum(e.macs for e in trace.contractions) / trace.batch
