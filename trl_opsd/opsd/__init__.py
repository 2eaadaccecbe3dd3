from .config import OPSDConfig
from .trainer import OPSDTrainer


__all__ = ["OPSDConfig", "OPSDTrainer"]
