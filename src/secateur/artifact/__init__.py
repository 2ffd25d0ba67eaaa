"""Artifacts: models on disk."""

from secateur.artifact.load import load, load_model
from secateur.artifact.save import save

__all__ = ["load", "load_model", "save"]
