"""Where prompts come from: named sources and local files, in one schema."""

from .prompts import check_columns, load_prompts
from .sources import SOURCES, Source


__all__ = ["SOURCES", "Source", "check_columns", "load_prompts"]
