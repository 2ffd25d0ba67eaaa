"""Losses whose gradient says which units matter; all but one need no labels.

Shapes: B batch, D features, C classes (of a language model: tokens of the vocabulary), T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from secateur.errors import DataError
from secateur.models.source import Features
from secateur.registry import Registry

_PART = 2**24  # logits that a loss works on at once


@dataclass(frozen=True)
class LossInput:
    """What a loss may look at.

    Attributes:
        features: of the batch.
        labels: [B], if the data has them; of a text its token ids [B, T].
        teacher: features of the uncut model, for losses that ask for it.
        seed: of this batch, the same on every rank.
    """

    features: Features
    labels: Tensor | None = None
    teacher: Features | None = None
    seed: int = 0


@dataclass(frozen=True)
class Loss:
    """A loss: the function (its value summed over the batch), and what it needs.

    Attributes:
        in_batch: it compares images with one another, so a batch of one says nothing; language models are compared
            token by token instead.
        sliver: it is flat at the uncut model, so a sliver is cut first and the uncut model is the teacher.
    """

    function: Callable[[LossInput], Tensor]
    in_batch: bool = False
    sliver: bool = False

    def __call__(self, given: LossInput) -> Tensor:
        return self.function(given)


losses: Registry[Loss] = Registry("loss")


def similarities(embedding: Tensor, inverse_temperature: float = 15.0) -> Tensor:
    """Log-softmax [B, B] of the cosine similarities within a batch, self included (AMP, arXiv 2603.08100)."""
    f_BD = F.normalize(embedding.float(), dim=-1)
    return (inverse_temperature * f_BD @ f_BD.T).log_softmax(-1)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum()


def _in_parts(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """A loss that adds up over positions, some rows at a time, each computed again in the backward pass: a language
    model's logits of all positions in float32, several times over, can be larger than the model."""
    rows = logits.flatten(0, -2)
    count = max(1, _PART // rows.shape[-1])
    if len(rows) <= count:
        return loss(logits)
    return torch.stack([checkpoint(loss, part, use_reentrant=False) for part in rows.split(count)]).sum()


def in_batch_entropy(given: LossInput) -> Tensor:
    """Entropy of the in-batch softmax over CLS similarities: the self-supervised loss of AMP."""
    if len(given.features.embedding) < 2:
        raise DataError("loss 'entropy' compares examples within a batch: give a batch size of at least 2")
    return _entropy(similarities(given.features.embedding))


def logits_entropy(given: LossInput) -> Tensor:
    """Entropy of the model's own prediction: of the class, or of every next token (HFPrune)."""
    if given.features.logits is None:
        raise DataError("loss 'logits-entropy' needs a model with a classifier; use 'entropy' or 'features'")
    return _in_parts(lambda x: _entropy(x.float().log_softmax(-1)), given.features.logits)


def random_projection(given: LossInput) -> Tensor:
    """A random direction of the normalised features: its squared gradient is the Fisher information of the features.

    For features f with Jacobian J and a random r with E[r r^T] = 1, the gradient g = J^T r has E[g g^T] = J^T J, so the
    error that a change makes to the features can be read off at every layer. The embedding and all patches together
    weigh the same. What a language model is for is its prediction: there the Fisher information of the next-token
    distribution is taken, the gradient of the cross-entropy with tokens drawn from it.
    """
    generator = torch.Generator().manual_seed(given.seed)
    logits = given.features.logits
    if logits is not None and logits.dim() == 3:
        flat = logits.float().flatten(0, 1)
        noise = torch.rand(flat.shape, generator=generator).to(flat.device).clamp_min_(1e-20)
        drawn = (flat.detach() - noise.log_().neg_().log_()).argmax(-1)  # Gumbel: a draw from the softmax
        return F.cross_entropy(flat, drawn, reduction="sum")

    def project(x: Tensor) -> Tensor:
        x = F.normalize(x.float(), dim=-1)
        return (x * torch.randn(x.shape, generator=generator).to(x.device)).sum()

    total = project(given.features.embedding)
    patches = given.features.patches
    if patches is not None:
        total = total + project(patches) / patches.shape[1] ** 0.5
    return total


def self_distillation(given: LossInput) -> Tensor:
    """KL from the uncut model's prediction (or in-batch similarities) to the slightly cut one's (SDMPrune)."""
    if given.teacher is None:
        raise DataError("loss 'kl' needs the uncut model as teacher")
    if given.features.logits is not None and given.teacher.logits is not None:
        student, teacher = (f.logits.float().log_softmax(-1) for f in (given.features, given.teacher))  # type: ignore[union-attr]
    else:
        student, teacher = similarities(given.features.embedding), similarities(given.teacher.embedding)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def cross_entropy(given: LossInput) -> Tensor:
    """The task's own loss, where labels are given; of a language model, the next token's."""
    logits = given.features.logits
    if logits is not None and logits.dim() == 3 and given.labels is not None:
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), given.labels[:, 1:].flatten(), reduction="sum")
    if given.labels is None or given.features.logits is None:
        raise DataError("loss 'cross-entropy' needs labels (a folder with one subfolder a class) and a classifier")
    classes = given.features.logits.shape[-1]
    if int(given.labels.max()) >= classes:
        raise DataError(f"label {int(given.labels.max())} does not exist: the classifier has {classes} classes")
    return F.cross_entropy(given.features.logits.float(), given.labels, reduction="sum")


losses.register("entropy")(Loss(in_batch_entropy, in_batch=True))
losses.register("logits-entropy")(Loss(logits_entropy))
losses.register("features")(Loss(random_projection))
losses.register("kl")(Loss(self_distillation, in_batch=True, sliver=True))
losses.register("cross-entropy")(Loss(cross_entropy))
