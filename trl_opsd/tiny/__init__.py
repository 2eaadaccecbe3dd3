"""The embedded default: a whole reasoning model small enough for one CPU core. No hub, no GPU, everything seeded."""

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


__all__ = [
    "ANSWER_TEMPLATE",
    "BRIEF_TEMPLATE",
    "CONCISE_TEMPLATE",
    "SOLUTION_TEMPLATE",
    "TEMPLATES",
    "Problem",
    "TinyConfig",
    "make_model",
    "make_tokenizer",
    "problems",
    "row",
    "sft_rows",
    "warm_start",
]
