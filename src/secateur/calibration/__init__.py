"""Calibration: one streaming pass over the data, forward and (for losses) backward, that keeps sums."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy import Anatomy
from secateur.calibration.checkpointing import checkpointed
from secateur.calibration.collect import Collector, sliver_cut
from secateur.calibration.distributed import add_over_ranks, merge_over_ranks, rank_and_world
from secateur.calibration.losses import Loss, LossInput, losses
from secateur.calibration.moments import MomentWatch
from secateur.calibration.statistics import LayerSums, Statistics, TaylorSums
from secateur.calibration.stream import StreamSums, StreamWatch
from secateur.calibration.weights import WeightSums, WeightWatch
from secateur.data import batches
from secateur.errors import AnatomyError, DataError
from secateur.fingerprint import fingerprint
from secateur.models import Features, TextSpec, features, source_of
from secateur.nn.attention import explicit_attention
from secateur.progress import track

__all__ = ["LayerSums", "Statistics", "StreamSums", "TaylorSums", "WeightSums", "calibrate", "losses"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def calibrate(
    model: nn.Module,
    data: Any,
    anatomy: Anatomy,
    *,
    loss: str | Sequence[str] = "features",
    weighting: str | None = "features",
    power: float = 0.5,
    covariance: bool = True,
    weights: str | Sequence[str] = (),
    projected: bool = False,
    batch_size: int | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    checkpointing: bool = False,
    broken: float = 0.1,
    seed: int = 0,
    window: int = 256,
    stride: int | None = None,
    moments: Collection[str] = (),
) -> Statistics:
    """Run the data through a model once and keep the sums that criteria, allocators and compensators need.

    Under torchrun or `accelerate launch` every process takes a share of the batches and all end with the same sums.

    Args:
        model: the dense model, unchanged.
        data: anything `secateur.data.batches` reads.
        anatomy: of this model.
        loss: names of losses to run backward ("entropy", "features", "logits-entropy", "kl", "cross-entropy"); an
            empty sequence for a forward pass only.
        weighting: the loss whose gradient says how much each position matters in the covariances; None for equal
            weights. Ignored unless it is among `loss`.
        power: how strongly; 0 is equal weights, 1 is the gradient energy itself.
        covariance: collect outer products (N x N per layer); without them only diagonal criteria can be used.
        weights: losses, among `loss`, for which weight x gradient is summed too (LLM-Pruner, SDMPrune); as dear as the
            weights' part of a training step.
        projected: collect what every head adds to its layer's output (AMP for language models).
        batch_size: images (16) or windows of text (4) per batch; losses that compare images within a batch need at
            least two.
        limit: use only so many images or windows.
        dtype: "float32" or "bfloat16" arithmetic; sums are float32 always.
        checkpointing: recompute activations in the backward pass, block by block.
        broken: largest share of unreadable images, or lines of text, to put up with.
        window, stride: of text, see `secateur.data.batches`.
        moments: kinds of groups whose second moments `secateur.rotate` will need ("residual", "vo_dim").

    Raises:
        DataError: too few images, or a loss that this data or model cannot serve.
        AnatomyError: the model gives NaN, or has no group that could be observed.
    """
    names = (loss,) if isinstance(loss, str) else tuple(loss)
    weighed = (weights,) if isinstance(weights, str) else tuple(weights)
    if missing := sorted(set(weighed) - set(names)):
        raise DataError(f"weights= names loss '{missing[0]}', which is not run; give it in loss= too")
    chosen = {name: losses.get(name) for name in names}
    weighting = weighting if weighting in chosen else None
    spec = source_of(model).input
    reader = batches(data, spec, size=batch_size, limit=limit, seed=seed, broken=broken, window=window, stride=stride)
    in_batch = any(x.in_batch for x in chosen.values()) and not isinstance(spec, TextSpec)
    if in_batch and min(reader.size, len(reader.items)) < 2:
        raise DataError(
            f"loss '{', '.join(names)}' compares images within a batch: give at least 2 images and batch_size 2"
        )
    if dtype not in DTYPES:
        raise DataError(f"dtype '{dtype}' is not known; use {' or '.join(DTYPES)}")
    rank, world = rank_and_world()
    reader = reader.shard(rank, world) if world > 1 else reader
    first = next((n for n, x in chosen.items() if not x.sliver), None)
    collector = Collector(
        model,
        anatomy,
        covariance=covariance,
        weighting=weighting,
        power=power,
        losses=names,
        again=first if checkpointing else None,
        projected=projected,
    )
    if not collector.watches and not anatomy.removable:
        raise AnatomyError("the model has no group whose units can be observed; see `secateur inspect` for the reasons")
    device = next(model.parameters()).device
    watch, kept = StreamWatch(model, anatomy.blocks), MomentWatch(model, anatomy, moments)
    weight_watch = WeightWatch(model, anatomy, weighed, lambda: collector.phase)
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        stack.enter_context(_graph_from_embeddings(model))
        stack.enter_context(explicit_attention(model))
        stack.enter_context(collector.watching())
        stack.enter_context(weight_watch.watching())
        if checkpointing:
            stack.enter_context(checkpointed(model, anatomy.blocks))
        for i, (images, labels) in enumerate(track(reader.labelled(), "Calibrating", len(reader))):
            step_seed = seed * 1_000_003 + rank + i * world
            with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
                _one_batch(model, anatomy, collector, (watch, kept), chosen, images.to(device), labels, step_seed)
    statistics = collector.statistics
    statistics.weights, statistics.joint = weight_watch.sums, weight_watch.joint
    statistics.stream = watch.sums if anatomy.blocks else None
    statistics.moments = kept.sums
    statistics.skipped = dict(reader.skipped)
    if world > 1:
        statistics.reduce_(add_over_ranks)
        statistics.skipped = merge_over_ranks(statistics.skipped)
    if statistics.images == 0:
        raise DataError("no image could be read")
    statistics.meta = {
        "fingerprint": fingerprint(model),
        "weighting": weighting,
        "power": power,
        "dtype": dtype,
        "batch_size": reader.size,
        "seed": seed,
        "losses": list(names),
    }
    return statistics


def _one_batch(
    model: nn.Module,
    anatomy: Anatomy,
    collector: Collector,
    watches: tuple[StreamWatch | MomentWatch, ...],
    chosen: dict[str, Loss],
    images: Tensor,
    labels: Tensor | None,
    seed: int,
) -> None:
    collector.images = images.shape[0]
    collector.statistics.images += images.shape[0]
    spec = source_of(model).input
    text = isinstance(spec, TextSpec)
    labels = images if isinstance(spec, TextSpec) and spec.causal else labels
    usable = {n: x for n, x in chosen.items() if text or not (x.in_batch and images.shape[0] < 2)}
    plain = {n: x for n, x in usable.items() if not x.sliver}
    collector.phase = "forward"
    images = images if text else images.requires_grad_(bool(plain))
    with torch.set_grad_enabled(bool(plain)), ExitStack() as stack:
        for watch in watches:
            stack.enter_context(watch.watching())
        seen = features(model, images)
    _check(seen.embedding)
    for k, (name, loss) in enumerate(plain.items()):
        collector.phase = name
        value = loss(LossInput(seen, labels, None, seed))
        value.backward(retain_graph=k + 1 < len(plain))  # only the images and the hooks see it: weights are frozen
    teacher = Features(*(None if t is None else t.detach() for t in (seen.embedding, seen.patches, seen.logits)))  # type: ignore[arg-type]
    for name, loss in usable.items():
        if loss.sliver:
            _sliver_step(model, anatomy, collector, name, loss, LossInput(seen, labels, teacher, seed), images)


def _sliver_step(
    model: nn.Module, anatomy: Anatomy, collector: Collector, name: str, loss: Loss, given: LossInput, images: Tensor
) -> None:
    """A second run with a sliver cut, compared with the first: only its gradients are collected."""
    collector.phase = f"student of {name}"
    images = images.detach().requires_grad_(images.is_floating_point())
    with sliver_cut(model, anatomy):
        student = features(model, images)
        collector.phase = name
        loss(replace(given, features=student)).backward()


def _check(embedding: Tensor) -> None:
    if not torch.isfinite(embedding).all():
        raise AnatomyError(
            "the model's output is not finite (NaN or infinity); check its weights, or use float32 instead of bfloat16"
        )


@contextmanager
def _graph_from_embeddings(model: nn.Module) -> Iterator[None]:
    """Token ids have no gradient: within the context the graph begins at what embeddings make of them."""

    def begin(_module: nn.Module, _args: Any, out: Any) -> None:
        if torch.is_grad_enabled() and isinstance(out, Tensor) and not out.requires_grad:
            out.requires_grad_(True)

    handles = [m.register_forward_hook(begin) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients of weights, then everything as it was."""
    modes = [(m, m.training) for m in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for p, _ in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, grad in wanted:
            p.requires_grad_(grad)
        for module, mode in modes:
            module.training = mode
