"""Stage 1: reinforcement learning with verifiable rewards makes a reasoning model accurate."""

from typing import TYPE_CHECKING

from trl._lazy_module import _LazyModule


_import_structure = {
    "config": ["RLVRConfig"],
    "trainer": ["RLVRTrainer"],
}

if TYPE_CHECKING:
    from .config import RLVRConfig
    from .trainer import RLVRTrainer
else:
    import sys

    sys.modules[__name__] = _LazyModule(__name__, __file__, _import_structure, module_spec=__spec__)
