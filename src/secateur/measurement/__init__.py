"""Measurement: what was gained."""

from secateur.measurement.cost import macs, parameters
from secateur.measurement.latency import Timing, latency

__all__ = ["Timing", "latency", "macs", "parameters"]
