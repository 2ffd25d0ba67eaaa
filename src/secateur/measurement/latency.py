"""Wall time of models side by side: interleaved runs, so that a drifting machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.models import example_input, forward
from secateur.progress import track


@dataclass(frozen=True)
class Timing:
    """Time of one forward pass.

    Attributes:
        median_ms, low_ms, high_ms: median, 5th and 95th percentile, in milliseconds.
        images_per_second: batch size over the median.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    images_per_second: float


@torch.inference_mode()
def latency(
    models: Mapping[str, nn.Module], batch_size: int = 8, *, rounds: int = 15, warm_up: int = 3, example: Any = None
) -> dict[str, Timing]:
    """Time models in turn, A B A B ..., on the same input.

    Args:
        models: by name, all on one device.
        rounds: counted runs of each.
        example: an input; by default random images of the first model's size.
    """
    first = next(iter(models.values()))
    example = example_input(first, batch_size) if example is None else example
    times: dict[str, list[float]] = {name: [] for name in models}
    cuda = next(first.parameters()).is_cuda
    for model in models.values():
        model.eval()
    for round_ in track(range(warm_up + rounds), "Timing", ticking=False):
        for name, model in models.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            forward(model, example)
            if cuda:
                torch.cuda.synchronize()
            if round_ >= warm_up:
                times[name].append((time.perf_counter() - start) * 1000)
    out = {}
    for name, values in times.items():
        values = sorted(values)
        median = statistics.median(values)
        low, high = values[int(0.05 * (len(values) - 1))], values[round(0.95 * (len(values) - 1))]
        out[name] = Timing(median, low, high, batch_size / median * 1000)
    return out
