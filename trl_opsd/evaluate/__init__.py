"""Accuracy, tokens, latency, throughput and memory of checkpoints, on benchmarks and on any data set of the schema."""

from .config import EvaluateConfig
from .pipeline import evaluate


__all__ = ["EvaluateConfig", "evaluate"]
