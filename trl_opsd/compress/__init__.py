from .chain import Stage, run_chain
from .config import CompressConfig


__all__ = ["CompressConfig", "Stage", "run_chain"]
