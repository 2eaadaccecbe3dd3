from typing import TYPE_CHECKING

from trl._lazy_module import _LazyModule


_import_structure = {
    "alarms": ["AlarmCallback"],
    "config": ["OPSDConfig"],
    "trainer": ["OPSDTrainer"],
    "view": ["RolloutPages"],
}

if TYPE_CHECKING:
    from .alarms import AlarmCallback
    from .config import OPSDConfig
    from .trainer import OPSDTrainer
    from .view import RolloutPages
else:
    import sys

    sys.modules[__name__] = _LazyModule(__name__, __file__, _import_structure, module_spec=__spec__)
