"""Evaluation: what was kept."""

from secateur.evaluation.fidelity import Fidelity, fidelity
from secateur.evaluation.knn import knn, knn_top1

__all__ = ["Fidelity", "fidelity", "knn", "knn_top1"]
