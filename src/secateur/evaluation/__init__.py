"""Evaluation: what was kept."""

from secateur.evaluation.fidelity import Fidelity, fidelity
from secateur.evaluation.knn import knn, knn_top1
from secateur.evaluation.perplexity import Perplexity, perplexity
from secateur.evaluation.tasks import tasks

__all__ = ["Fidelity", "Perplexity", "fidelity", "knn", "knn_top1", "perplexity", "tasks"]
