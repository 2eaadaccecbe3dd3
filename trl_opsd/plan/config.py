"""Arguments of the plan, beside those of the recipe that is planned."""

from dataclasses import dataclass, field


@dataclass
class PlanArguments:
    r"""
    Arguments of `python -m trl_opsd.plan`, beside those of `trl_opsd.opsd`.

    Args:
        accelerate_config (`str`, *optional*):
            Configuration of accelerate that the training is launched with, one of `recipes/accelerate_configs`. Without it
            every process holds everything.
        num_processes (`int`, *optional*):
            Number of GPUs. Defaults to that of `accelerate_config`, else to 1.
        prompt_tokens (`int`, *optional*):
            Tokens of the longest prompt, the teacher's context included. Defaults to what `vllm_max_model_length` leaves
            beside the completion, else to 512.
        gpu_memory (`float`, *optional*):
            Memory of a GPU, in GiB. Defaults to that of the GPU that is there, else to 79.2, an H100's.
    """

    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of accelerate that the training is launched with. Without it every process holds "
            "everything."
        },
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "Number of GPUs. Defaults to that of `accelerate_config`, else to 1."}
    )
    prompt_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the longest prompt, the teacher's context included. Defaults to what "
            "`vllm_max_model_length` leaves beside the completion, else to 512."
        },
    )
    gpu_memory: float | None = field(
        default=None,
        metadata={
            "help": "Memory of a GPU, in GiB. Defaults to that of the GPU that is there, else to 79.2, an H100's."
        },
    )
