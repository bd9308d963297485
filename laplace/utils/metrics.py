"""Forwarding address of ``laplace.tuning.metrics``."""

from laplace.tuning.metrics import RunningNLLMetric

__all__ = ["RunningNLLMetric"]
