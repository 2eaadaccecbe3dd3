"""The small reasoner: five million parameters, English, arithmetic from reasoning-gym. No hub, no GPU, everything seeded."""

from typing import TYPE_CHECKING

from trl._lazy_module import _LazyModule


_import_structure = {
    "sft": ["warm_start"],
    "task": ["CONCISE_TEMPLATE", "SIBLING_TEMPLATE", "SOLUTION_TEMPLATE", "TEMPLATES", "Problem", "SmallConfig"],
    "tokenizer": ["make_tokenizer"],
}

if TYPE_CHECKING:
    from .sft import warm_start
    from .task import CONCISE_TEMPLATE, SIBLING_TEMPLATE, SOLUTION_TEMPLATE, TEMPLATES, Problem, SmallConfig
    from .tokenizer import make_tokenizer
else:
    import sys

    sys.modules[__name__] = _LazyModule(__name__, __file__, _import_structure, module_spec=__spec__)
