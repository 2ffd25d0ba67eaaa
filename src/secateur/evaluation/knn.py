"""kNN accuracy of frozen features, the protocol of DINO (arXiv 2104.14294).

Embeddings are L2-normalised; the k nearest training images vote for their class with weight exp(similarity / 0.07).

Shapes: N training images, M test images, D features, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data import Batches
from secateur.errors import DataError
from secateur.models import features
from secateur.progress import track


@torch.no_grad()
def embed(model: nn.Module, data: Batches, what: str = "Embedding") -> tuple[Tensor, Tensor]:
    """Normalised embeddings [N, D] and labels [N] of labelled images.

    Raises:
        DataError: the images have no labels, or none could be read.
    """
    rows, labels = [], []
    device = next(model.parameters()).device
    for batch, label in track(data.labelled(), what, len(data)):
        if label is None:
            raise DataError("kNN needs labels: give a folder with one subfolder of images a class")
        rows.append(F.normalize(features(model, batch.to(device)).embedding.float(), dim=-1).cpu())
        labels.append(label)
    if not rows:
        raise DataError("no labelled image could be read")
    return torch.cat(rows), torch.cat(labels)


def knn_top1(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], k: int = 20, temperature: float = 0.07
) -> float:
    """Share of test embeddings given their own class by the k nearest training embeddings.

    Args:
        train: embeddings [N, D], normalised, and labels [N].
        test: embeddings [M, D], normalised, and labels [M].
    """
    (train_ND, train_N), (test_MD, test_M) = train, test
    classes = int(max(train_N.max(), test_M.max())) + 1
    similarity, index = (test_MD @ train_ND.T).topk(min(k, len(train_N)), dim=1)
    votes_MC = torch.zeros(len(test_M), classes)
    votes_MC.scatter_add_(1, train_N[index], (similarity / temperature).exp())
    return float((votes_MC.argmax(1) == test_M).float().mean())


def knn(model: nn.Module, train: Batches, test: Batches, k: int = 20) -> float:
    """kNN top-1 of a model's embeddings on a labelled test set."""
    return knn_top1(embed(model, train, "Embedding train"), embed(model, test, "Embedding test"), k)
