"""Criteria: from statistics to one number per unit, higher = keep. One file a method."""

from secateur.criteria import (  # noqa: F401  (they register themselves)
    amp,
    amp_llm,
    angular,
    block_influence,
    cfsp,
    dgmr,
    flap,
    hfprune,
    leverage,
    llm_pruner,
    magnitude,
    modegpt,
    obs,
    order,
    random,
    sdmprune,
    taylor,
    variance,
    wanda,
)
from secateur.criteria.base import Criterion, GroupView, block_criterion, criteria, criterion
from secateur.criteria.score import Scores, score

__all__ = ["Criterion", "GroupView", "Scores", "block_criterion", "criteria", "criterion", "score"]
