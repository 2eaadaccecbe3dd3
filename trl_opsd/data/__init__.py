"""Where prompts come from: named sources, generated tasks and local files, in one schema."""

from .decontaminate import decontaminate
from .gym import generate_prompts
from .prompts import check_columns, load_prompts
from .sources import SOURCES, Source


__all__ = ["SOURCES", "Source", "check_columns", "decontaminate", "generate_prompts", "load_prompts"]
