"""Verifiers: plain TRL reward functions, so each also works in TRL's own trainers and scripts."""

from .code import code_reward, extract_program
from .format import format_reward, length_reward
from .load import check_references, load_reward_funcs, required_columns
from .logic import logic_reward
from .math import extract_answer, math_reward
from .reasoning_gym import reasoning_gym_reward


__all__ = [
    "check_references",
    "code_reward",
    "extract_answer",
    "extract_program",
    "format_reward",
    "length_reward",
    "load_reward_funcs",
    "logic_reward",
    "math_reward",
    "reasoning_gym_reward",
    "required_columns",
]
