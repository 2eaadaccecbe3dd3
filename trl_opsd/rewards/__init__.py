"""Verifiers: plain TRL reward functions, so each also works in TRL's own trainers and scripts."""

from .load import load_reward_funcs, required_columns
from .math import extract_answer, math_reward


__all__ = ["extract_answer", "load_reward_funcs", "math_reward", "required_columns"]
