"""trl-opsd: the stage after RL. On-policy (self-)distillation as compression of reasoning models, on TRL."""

from typing import TYPE_CHECKING

from trl._lazy_module import _LazyModule


__version__ = "0.1.0"

_import_structure = {
    "opsd": ["OPSDConfig", "OPSDTrainer"],
    "rlvr": ["RLVRConfig", "RLVRTrainer"],
}

if TYPE_CHECKING:
    from .opsd import OPSDConfig, OPSDTrainer
    from .rlvr import RLVRConfig, RLVRTrainer
else:
    import sys

    sys.modules[__name__] = _LazyModule(
        __name__,
        __file__,
        _import_structure,
        module_spec=__spec__,
        extra_objects={"__version__": __version__},
    )
