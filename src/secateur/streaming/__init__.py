"""Streaming: models that do not fit into memory, calibrated and cut one block at a time from their files."""

from secateur.streaming.budget import check_methods, parse_bytes
from secateur.streaming.compress import Job
from secateur.streaming.model import Streamed

__all__ = ["Job", "Streamed", "check_methods", "parse_bytes"]
