from .alarms import AlarmCallback
from .config import OPSDConfig
from .trainer import OPSDTrainer
from .view import RolloutPages


__all__ = ["AlarmCallback", "OPSDConfig", "OPSDTrainer", "RolloutPages"]
