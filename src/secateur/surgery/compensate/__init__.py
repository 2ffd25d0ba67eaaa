"""Compensators: one file a method."""

from secateur.surgery.compensate import affine, mean, none, ridge, sequential  # noqa: F401  (they register themselves)
from secateur.surgery.compensate.base import Compensator, compensator, compensators

__all__ = ["Compensator", "compensator", "compensators"]
