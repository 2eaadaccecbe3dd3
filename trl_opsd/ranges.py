"""
The ranges of the numbers that command lines take.

Most are fields of TRL's and transformers' configurations, which take any number and fail where it is used, after a model
has been loaded. They are checked by name, before anything is imported: one name means the same in every stage.
"""

import math
from typing import Any


_AT_LEAST_ONE = "at least 1"
_AT_LEAST_ZERO = "at least 0"
_ABOVE_ZERO = "above 0"
_SHARE = "from 0 to 1"

RANGES: dict[str, str] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "num_generations",
            "num_iterations",
            "steps_per_generation",
            "max_completion_length",
            "max_generation_rounds",
            "keep_shortest",
            "max_tokens_per_microbatch",
            "pad_to_multiple_of",
            "teacher_sync_steps",
            "pass_rate_rollouts",
            "qat_group_size",
            "lora_r",
            "lora_alpha",
            "ddp_timeout",
            "vllm_tensor_parallel_size",
            "vllm_max_model_length",
            "vllm_server_port",
            "num_samples",
            "batch_size",
            "calibration_samples",
            "conversion_prompts",
            "conversion_tokens",
            "modulus",
            "train_size",
            "test_size",
            "hidden_size",
            "num_layers",
            "num_processes",
            "prompt_tokens",
            "num_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "accuracy_steps",
            "accuracy_problems",
            "vocab_size",
            "max_samples",
            "serving_requests",
            "cold_start_steps",
            "updates",
        ),
        _AT_LEAST_ONE,
    ),
    **dict.fromkeys(
        (
            "learning_rate",
            "weight_decay",
            "adam_epsilon",
            "max_grad_norm",
            "warmup_steps",
            "probe_prompts",
            "seed",
            "data_seed",
            "dataloader_num_workers",
            "bank_rollouts_per_prompt",
            "epsilon",
            "slip_steps",
            "off_policy_steps",
        ),
        _AT_LEAST_ZERO,
    ),
    **dict.fromkeys(
        ("temperature", "kl_clip", "logging_steps", "save_steps", "eval_steps", "gpu_memory"), _ABOVE_ZERO
    ),
    **dict.fromkeys(
        (
            "min_p",
            "lora_dropout",
            "min_pass_rate",
            "max_pass_rate",
            "teacher_update_rate",
            "vllm_gpu_memory_utilization",
            "adam_beta1",
            "adam_beta2",
        ),
        _SHARE,
    ),
    "top_p": "above 0 and at most 1",
    "max_steps": "at least 1, or -1 for as many as the epochs have",
    "num_train_epochs": _ABOVE_ZERO,
}

_HOLDS = {
    _AT_LEAST_ONE: lambda value: value >= 1,
    _AT_LEAST_ZERO: lambda value: value >= 0,
    _ABOVE_ZERO: lambda value: value > 0,
    _SHARE: lambda value: 0 <= value <= 1,
    RANGES["top_p"]: lambda value: 0 < value <= 1,
    RANGES["max_steps"]: lambda value: value >= 1 or value == -1,
}


def check_range(name: str, value: Any, where: str = "") -> None:
    """
    Checks the number that an option was given.

    Args:
        name (`str`):
            Name of the option. One that has no range takes any value.
        value (`Any`):
            What it was given. Anything but a number is left to the option's type.
        where (`str`, *optional*):
            Where it was given, for the message.

    Raises:
        ValueError: If the number is not finite, or outside of its range.
    """
    if name not in RANGES or isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value) or not _HOLDS[RANGES[name]](value):
        raise ValueError(f"`{name}`{where} must be {RANGES[name]}, and is {value}.")
