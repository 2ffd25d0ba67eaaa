"""How close a model's features are to the dense model's, without labels.

Shapes: N images, D features, P patches, C classes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data import Batches
from secateur.errors import DataError
from secateur.models import TextSpec, features
from secateur.progress import track


@dataclass(frozen=True)
class Fidelity:
    """Agreement of a cut model with the dense one on the same images, or windows of text.

    Attributes:
        cls_cosine: mean cosine of the embeddings.
        patch_cosine: mean cosine of the patch tokens; None if the model hides them.
        self_retrieval: share of images whose cut embedding is closest, among all dense embeddings, to their own.
        neighbours: share of images whose nearest other image is the same in both models.
        top1_agreement: share of images given the same class, or of tokens given the same successor; None without a
            classifier.
        images: N.
        kl: mean over tokens of the divergence of the cut language model's prediction from the dense one's, in nats.
        perplexity, dense_perplexity: per token, of causal language models on these windows.
    """

    cls_cosine: float
    patch_cosine: float | None
    self_retrieval: float
    neighbours: float
    top1_agreement: float | None
    images: int
    kl: float | None = None
    perplexity: float | None = None
    dense_perplexity: float | None = None

    @property
    def quality(self) -> float:
        """What a budget of quality bounds: the cosine of the embeddings; of causal language models, the dense model's
        perplexity over the cut one's."""
        if self.perplexity is not None and self.dense_perplexity is not None:
            return self.dense_perplexity / self.perplexity
        return self.cls_cosine

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@torch.no_grad()
def fidelity(cut: nn.Module, dense: nn.Module, data: Batches) -> Fidelity:
    """Run both models over the images, batch by batch, and compare; only embeddings are kept.

    Raises:
        DataError: fewer than two images could be read, or the features cannot be compared.
    """
    embeddings: dict[str, list[Tensor]] = {"cut": [], "dense": []}
    patches, agree, images, tokens = 0.0, 0.0, 0, 0
    logits, predicted = False, _Predicted(isinstance(data.spec, TextSpec) and data.spec.causal)
    device = next(p.device for p in dense.parameters() if not p.is_meta)
    with _eval(cut), _eval(dense):
        for batch in track(data, "Comparing", len(data)):
            batch = batch.to(device)
            a, b = features(cut, batch), features(dense, batch)
            embeddings["cut"].append(a.embedding.float().cpu())
            embeddings["dense"].append(b.embedding.float().cpu())
            images += batch.shape[0]
            if a.patches is not None and b.patches is not None and a.patches.shape == b.patches.shape:
                cosines = F.cosine_similarity(a.patches.float(), b.patches.float(), dim=-1)
                patches, tokens = patches + float(cosines.sum()), tokens + cosines.numel()
            if a.logits is not None and b.logits is not None:
                logits = True
                same = (a.logits.argmax(-1) == b.logits.argmax(-1)).float()
                agree += float(same.flatten(1).mean(1).sum() if same.dim() > 1 else same.sum())
                predicted.add(a.logits, b.logits, batch)
    if images < 2:
        raise DataError(f"fidelity needs at least 2 readable images, found {images}")
    a_ND, b_ND = (torch.cat(embeddings[k]) for k in ("cut", "dense"))
    if a_ND.shape != b_ND.shape:
        raise DataError(
            f"the models' features differ in length ({a_ND.shape[1]} and {b_ND.shape[1]}); compare a cut model with "
            "the dense one that it was cut from"
        )
    for name, rows in (("cut", a_ND), ("dense", b_ND)):
        if not torch.isfinite(rows).all():
            raise DataError(f"the {name} model's features are not finite (NaN or infinity); check its weights")
    return Fidelity(
        cls_cosine=float(F.cosine_similarity(a_ND, b_ND, dim=-1).mean()),
        patch_cosine=patches / tokens if tokens else None,
        self_retrieval=self_retrieval(a_ND, b_ND),
        neighbours=neighbour_agreement(a_ND, b_ND),
        top1_agreement=agree / images if logits else None,
        images=images,
        **predicted.figures(),
    )


class _Predicted:
    """Divergence and perplexities of language models, added up a window at a time."""

    def __init__(self, causal: bool) -> None:
        self.causal, self.kl, self.tokens = causal, 0.0, 0
        self.losses, self.scored = [0.0, 0.0], 0

    def add(self, cut_BTV: Tensor, dense_BTV: Tensor, ids_BT: Tensor) -> None:
        if cut_BTV.dim() != 3 or cut_BTV.shape != dense_BTV.shape:
            return
        for cut_TV, dense_TV, ids_T in zip(cut_BTV, dense_BTV, ids_BT, strict=True):
            a, b = cut_TV.float().log_softmax(-1), dense_TV.float().log_softmax(-1)
            self.kl += float(F.kl_div(a, b, reduction="sum", log_target=True))
            self.tokens += len(ids_T)
            if self.causal:
                self.scored += len(ids_T) - 1
                for i, log_p in enumerate((a, b)):
                    self.losses[i] += float(F.nll_loss(log_p[:-1], ids_T[1:], reduction="sum"))

    def figures(self) -> dict[str, float]:
        out = {"kl": self.kl / self.tokens} if self.tokens else {}
        if self.scored:
            cut, dense = (math.exp(min(loss / self.scored, 700)) for loss in self.losses)
            out |= {"perplexity": cut, "dense_perplexity": dense}
        return out


def self_retrieval(cut_ND: Tensor, dense_ND: Tensor) -> float:
    """Share of rows of `cut` whose nearest row of `dense` by cosine is their own."""
    similarity = F.normalize(cut_ND, dim=-1) @ F.normalize(dense_ND, dim=-1).T
    return float((similarity.argmax(1) == torch.arange(len(similarity))).float().mean())


def neighbour_agreement(cut_ND: Tensor, dense_ND: Tensor) -> float:
    """Share of rows whose nearest other row is the same in both sets."""

    def nearest(x: Tensor) -> Tensor:
        similarity = F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T
        return similarity.fill_diagonal_(-2).argmax(1)

    return float((nearest(cut_ND) == nearest(dense_ND)).float().mean())


class _eval:
    """Eval mode within a context, then as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = [(m, m.training) for m in model.modules()]
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes:
            module.training = mode
