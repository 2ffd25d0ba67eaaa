"""Criteria: from statistics to one number per unit, higher = keep. One file a method."""

from secateur.criteria import (  # noqa: F401  (they register themselves)
    amp,
    dgmr,
    leverage,
    magnitude,
    modegpt,
    obs,
    order,
    random,
    taylor,
    variance,
    wanda,
)
from secateur.criteria.base import Criterion, GroupView, criteria, criterion
from secateur.criteria.score import Scores, score

__all__ = ["Criterion", "GroupView", "Scores", "criteria", "criterion", "score"]
