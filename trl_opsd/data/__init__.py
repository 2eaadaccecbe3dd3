"""Where prompts come from: named sources, generated tasks and local files, in one schema."""

from typing import TYPE_CHECKING

from trl._lazy_module import _LazyModule


_import_structure = {
    "contamination": ["decontaminate", "hold_out", "record_held_out"],
    "fit": ["check_fit", "check_texts", "load_tokenizer", "warn_of_strings", "write_rows"],
    "gym": ["generate_prompts"],
    "prompts": ["check_columns", "load_prompts"],
    "sources": ["SOURCES", "Source"],
}

if TYPE_CHECKING:
    from .contamination import decontaminate, hold_out, record_held_out
    from .fit import check_fit, check_texts, load_tokenizer, warn_of_strings, write_rows
    from .gym import generate_prompts
    from .prompts import check_columns, load_prompts
    from .sources import SOURCES, Source
else:
    import sys

    sys.modules[__name__] = _LazyModule(__name__, __file__, _import_structure, module_spec=__spec__)
