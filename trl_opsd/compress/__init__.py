from .chain import Stage, run_chain
from .config import CompressConfig
from .stages import plan_stages


__all__ = ["CompressConfig", "Stage", "plan_stages", "run_chain"]
