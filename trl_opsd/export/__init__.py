"""
From a checkpoint to what an engine serves: converted, quantised, and checked in that engine.

Why own code: converters are libraries' and are called as they are, each in an environment of its own. What none of them
does is to look whether what came out still is the model.
"""

from typing import TYPE_CHECKING

from trl._lazy_module import _LazyModule


_import_structure = {
    "check": ["Answer", "Reference"],
    "config": ["ExportConfig"],
    "formats": ["ARTEFACTS", "Artefact"],
}

if TYPE_CHECKING:
    from .check import Answer, Reference
    from .config import ExportConfig
    from .formats import ARTEFACTS, Artefact
else:
    import sys

    sys.modules[__name__] = _LazyModule(__name__, __file__, _import_structure, module_spec=__spec__)
