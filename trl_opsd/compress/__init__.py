"""The whole chain in one command, stage by stage."""

from typing import TYPE_CHECKING

from trl._lazy_module import _LazyModule


_import_structure = {
    "chain": ["Stage", "run_chain"],
    "config": ["CompressConfig"],
    "stages": ["plan_stages"],
}

if TYPE_CHECKING:
    from .chain import Stage, run_chain
    from .config import CompressConfig
    from .stages import plan_stages
else:
    import sys

    sys.modules[__name__] = _LazyModule(__name__, __file__, _import_structure, module_spec=__spec__)
