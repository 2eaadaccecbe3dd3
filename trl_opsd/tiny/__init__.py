"""The embedded default: a whole reasoning model small enough for one CPU core. No hub, no GPU, everything seeded."""

from typing import TYPE_CHECKING

from trl._lazy_module import _LazyModule


_import_structure = {
    "model": ["make_model"],
    "sft": ["warm_start"],
    "task": [
        "ANSWER_TEMPLATE",
        "BRIEF_TEMPLATE",
        "CONCISE_TEMPLATE",
        "SOLUTION_TEMPLATE",
        "TEMPLATES",
        "Problem",
        "TinyConfig",
        "problems",
        "row",
        "sft_rows",
    ],
    "tokenizer": ["make_tokenizer"],
}

if TYPE_CHECKING:
    from .model import make_model
    from .sft import warm_start
    from .task import (
        ANSWER_TEMPLATE,
        BRIEF_TEMPLATE,
        CONCISE_TEMPLATE,
        SOLUTION_TEMPLATE,
        TEMPLATES,
        Problem,
        TinyConfig,
        problems,
        row,
        sft_rows,
    )
    from .tokenizer import make_tokenizer
else:
    import sys

    sys.modules[__name__] = _LazyModule(__name__, __file__, _import_structure, module_spec=__spec__)
