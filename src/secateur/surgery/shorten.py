"""Fitting a cheap module to what a run of blocks does to the residual stream, without labels.

Source: LLM-Streamline (arXiv 2403.19135) puts one small network in the place of a contiguous run and trains it on the
stream after the run; "Learning to Be a Transformer" (arXiv 2407.04092) does so token by token. Here the affine part is
found in closed form: ridge regression of x_out - x_in on x_in from sums, each token counting by the inverse of its mean
square (a few tokens of a language model are a thousand times as large as the rest), each feature in units of its own
mean square, under the ridge with which either half of the data predicts the other best.

Shapes: B examples, T tokens, D width of the stream.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.anatomy.types import PrunableGroup
from secateur.data import Batches
from secateur.errors import DataError, PlanError
from secateur.models import forward
from secateur.nn.replacement import MlpReplacement, Replacement, Structure, plain_attributes, replacement
from secateur.nn.standin import stream_of
from secateur.nn.trees import tensors_in
from secateur.progress import track
from secateur.replay import Spool, Stop
from secateur.surgery.sequential import Moments


def fit(
    model: nn.Module,
    group: PrunableGroup,
    start: int,
    stop: int,
    data: Batches,
    *,
    how: str,
    steps: int,
    seconds: float,
) -> tuple[Structure, Replacement]:
    """The replacement for blocks `start` to `stop` of a stack, and what it is made from.

    Args:
        how, steps, seconds: see `secateur.shorten`.

    Raises:
        PlanError: the run is interrupted by a block of another class.
        DataError: the stream is no sequence of tokens.
    """
    assert group.stack is not None
    first, last = group.stack.members[start], group.stack.members[stop - 1]
    x_BTD, _ = next(streams(model, first, last, data))
    block = model.get_submodule(first)
    children = list(model.get_submodule(group.stack.path)._modules)
    position = children.index(group.stack.names[start])
    if children[position : position + stop - start] != list(group.stack.names[start:stop]):
        raise PlanError(f"a block of another class lies within {start}:{stop} of '{group.name}'; give a run beside it")
    layer = next((position + offset for *_, offset in group.stack.numbers), None)
    structure = Structure(how, x_BTD.shape[-1], group.stack.returns, plain_attributes(block), layer)
    module = replacement(structure)
    fit_linear_(module, model, first, last, data)
    if isinstance(module, MlpReplacement):
        module.to(next(block.parameters()).device)
        train_mlp_(module, model, first, last, data, steps=steps, seconds=seconds)
    return structure, module.to(next(block.parameters())).train(model.training)


def streams(model: nn.Module, first: str, last: str, data: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The stream before one block and after another, [B, T, D] float32, batch by batch.

    Raises:
        DataError: the stream is no sequence of tokens, or changes its shape.
    """
    device = next(model.parameters()).device
    for batch in data:
        found: list[Tensor] = []

        def before(_module: nn.Module, args: tuple, kwargs: dict, found: list[Tensor] = found) -> None:
            found.append(stream_of(args, kwargs).detach().float().clone())

        def after(_module: nn.Module, _args: tuple, out: object, found: list[Tensor] = found) -> None:
            found.append(next(tensors_in(out)).detach().float())
            raise Stop

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for handle in (
                model.get_submodule(first).register_forward_pre_hook(before, with_kwargs=True),
                model.get_submodule(last).register_forward_hook(after),
            ):
                stack.callback(handle.remove)
            stack.enter_context(suppress(Stop))
            forward(model, batch.to(device))
        shapes = [list(x.shape) for x in found]
        if len(found) != 2 or shapes[0] != shapes[1] or len(shapes[0]) != 3:
            raise DataError(f"a run is replaced where the stream is [batch, tokens, width] throughout, found {shapes}")
        yield found[0], found[1]


def relative(y_BTD: Tensor) -> Tensor:
    """[B, T]: the weight under which a token's squared error is relative to its own mean square."""
    mean_BT = y_BTD.square().mean(-1)
    return 1 / mean_BT.clamp_min(1e-12)


@torch.no_grad()
def fit_linear_(module: Replacement, model: nn.Module, first: str, last: str, data: Batches) -> None:
    """Set the affine part, in closed form; the data are read once."""
    width = module.linear.weight.shape[0]
    moments = Moments(width, width)
    for x_BTD, y_BTD in track(streams(model, first, last, data), "Fitting the run", len(data)):
        moments.add(x_BTD, y_BTD - x_BTD, relative(y_BTD))
    square_N = moments.moments[0].diagonal() + moments.moments[1].diagonal()
    inputs_N = square_N.clamp_min(1e-12 * float(square_N.max())).sqrt()
    outputs_D = ((moments.crosses[0] + moments.crosses[1]) / inputs_N[:, None]).norm(dim=0).clamp_min(1e-12)
    for i in range(2):
        moments.moments[i] = moments.moments[i] / inputs_N / inputs_N[:, None]
        moments.crosses[i] = moments.crosses[i] / inputs_N[:, None] / outputs_D
    step_ND, shift_D = moments.solve(True)
    module.linear.weight.copy_((step_ND / inputs_N[:-1, None] * outputs_D).T)
    module.linear.bias.copy_(shift_D / inputs_N[-1] * outputs_D)


def train_mlp_(
    module: MlpReplacement, model: nn.Module, first: str, last: str, data: Batches, *, steps: int, seconds: float
) -> None:
    """Train all of a replacement, beginning with its affine part as it is: Adam at 1e-4, squared error relative to each
    token's own square plus 1 - cosine. A fifth of the batches is held out; what does best on them, looked at after
    every round, stays, be it the beginning.

    Args:
        steps: batches to take.
        seconds: stop earlier after so many.
    """
    spool, count = Spool(), 0
    for x_BTD, y_BTD in track(streams(model, first, last, data), "Running the blocks", len(data)):
        spool.put(count, (x_BTD, y_BTD))
        count += 1
    used = max(1, count - max(1, count // 5))

    def loss_of(index: int) -> Tensor:
        x_BTD, y_BTD = (t.to(module.linear.weight.device) for t in spool.get(index))
        out_BTD = x_BTD + module.step(x_BTD)
        error_BT = (out_BTD - y_BTD).square().mean(-1) * relative(y_BTD)
        return (error_BT + 1 - F.cosine_similarity(out_BTD, y_BTD, dim=-1)).mean()

    def held_out() -> float:
        with torch.no_grad():
            return sum(float(loss_of(i)) for i in range(used, count))

    optimiser = torch.optim.Adam(module.parameters(), lr=1e-4)
    best, state = held_out(), copy.deepcopy(module.state_dict())
    end = time.monotonic() + seconds
    with torch.enable_grad():
        for i in track(range(steps), "Training"):
            loss = loss_of(i % used)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            over = i + 1 == steps or time.monotonic() > end
            if ((i + 1) % used == 0 or over) and (found := held_out()) < best:
                best, state = found, copy.deepcopy(module.state_dict())
            if over:
                break
    module.load_state_dict(state)
