"""Accuracy, tokens, latency, throughput and memory of checkpoints, on benchmarks and on any data set of the schema."""

from typing import TYPE_CHECKING

from trl._lazy_module import _LazyModule


_import_structure = {
    "config": ["EvaluateConfig"],
    "pipeline": ["evaluate"],
}

if TYPE_CHECKING:
    from .config import EvaluateConfig
    from .pipeline import evaluate
else:
    import sys

    sys.modules[__name__] = _LazyModule(__name__, __file__, _import_structure, module_spec=__spec__)
