"""Stage 1: reinforcement learning with verifiable rewards makes a reasoning model accurate."""

from .config import RLVRConfig
from .trainer import RLVRTrainer


__all__ = ["RLVRConfig", "RLVRTrainer"]
