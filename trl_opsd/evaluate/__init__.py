"""Accuracy and tokens of a checkpoint on any data set of the project's schema."""

from .config import EvaluateConfig
from .measure import evaluate


__all__ = ["EvaluateConfig", "evaluate"]
