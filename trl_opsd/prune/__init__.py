"""
Stage 2: a smaller student out of the teacher, in depth and in width, as an ordinary checkpoint.

Why own code: what exists does other things. NVIDIA Model-Optimizer's Minitron pruning runs on Megatron-Core models on
GPUs, and its Puzzletron makes layers of different shapes, which ordinary checkpoints cannot hold; Torch-Pruning traces
a graph, leaves the configuration to the user and knows neither exact parameter budgets nor tied heads; LLM Compressor
makes weights sparse, not smaller. What is left to do is a table of axes and index selection.
"""

from typing import TYPE_CHECKING

from trl._lazy_module import _LazyModule


_import_structure = {
    "config": ["PruneConfig"],
    "importance": ["Statistics", "choose_layers", "choose_units", "collect"],
    "shapes": ["ModelShape", "Sizes"],
    "slicing": ["Units", "slice_model"],
}

if TYPE_CHECKING:
    from .config import PruneConfig
    from .importance import Statistics, choose_layers, choose_units, collect
    from .shapes import ModelShape, Sizes
    from .slicing import Units, slice_model
else:
    import sys

    sys.modules[__name__] = _LazyModule(__name__, __file__, _import_structure, module_spec=__spec__)
