"""From a recipe to a table of gibibytes."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig
from trl import ModelConfig, get_peft_config

from ..cli import UserError, check_checkpoint, user_errors
from ..opsd import OPSDConfig
from .config import PlanArguments
from .memory import ADAMW, Training, cache_bytes, parts


GIB = 1 << 30
SHARDINGS = {"NO": "ddp", "MULTI_GPU": "ddp", "FSDP": "fsdp2"}


def read_launch(path: str | None, num_processes: int | None) -> tuple[str, int]:
    """What the processes share, and how many they are, by a configuration of accelerate."""
    if path is None:
        return "ddp", num_processes or 1
    if not Path(path).is_file():
        raise UserError(f"`accelerate_config`: there is no file `{path}`: check the path.")
    config = yaml.safe_load(Path(path).read_text())
    kind = config.get("distributed_type")
    if kind == "DEEPSPEED":
        stage = config.get("deepspeed_config", {}).get("zero_stage")
        if stage not in (2, 3):
            raise UserError(f"`{path}` has `zero_stage: {stage}`, and what is planned for is 2 or 3.")
        sharding = f"zero{stage}"
    elif kind in SHARDINGS:
        sharding = SHARDINGS[kind]
    else:
        raise UserError(
            f"`{path}` has `distributed_type: {kind}`, and what is planned for is NO, MULTI_GPU, FSDP or DEEPSPEED."
        )
    return sharding, num_processes or config.get("num_processes", 1)


def read_config(path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    """Configuration of a checkpoint, or of the one that an adapter, which training would merge into it, belongs to."""
    while (file := Path(path, "adapter_config.json")).is_file():
        path, revision = json.loads(file.read_text())["base_model_name_or_path"], None
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    if config.get_text_config() is not config:
        raise UserError(f"`{path}` is a model of several modalities, and only text models are planned for.")
    return config


def training_of(arguments: PlanArguments, args: OPSDConfig, model_args: ModelConfig) -> tuple[Training, int]:
    """What is trained, and how many tokens a prompt may have."""
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise UserError(
            "Quantised weights (`load_in_4bit`, `load_in_8bit`) are not planned for: leave them out, for an upper bound."
        )
    if args.optim not in ADAMW:
        raise UserError(f"`optim` is `{args.optim.value}`, and what is planned for is {', '.join(ADAMW)}.")
    sharding, processes = read_launch(arguments.accelerate_config, arguments.num_processes)
    student = read_config(model_args.model_name_or_path, model_args.model_revision, args.trust_remote_code)
    weights = args.resolve_teacher_weights(args.teacher_model_name_or_path)
    teacher = None
    if weights == "external":
        teacher = read_config(args.teacher_model_name_or_path, args.teacher_model_revision, args.trust_remote_code)
    elif weights != "live" and not model_args.use_peft:
        teacher = student

    def dtype_of(config: PreTrainedConfig, name: str | torch.dtype | None) -> torch.dtype:
        if name in (None, "auto"):
            name = config.dtype or torch.float32
        return name if isinstance(name, torch.dtype) else getattr(torch, name)

    dtype = dtype_of(student, model_args.dtype)
    teacher_dtype = (args.teacher_model_init_kwargs or {}).get("dtype", model_args.dtype)
    prompt = arguments.prompt_tokens
    if prompt is None:
        limit = args.vllm_max_model_length if args.use_vllm else None
        prompt = 512 if limit is None else limit - args.max_completion_length
    length = prompt + args.max_completion_length
    if args.max_tokens_per_microbatch is None:
        rows, several = args.per_device_train_batch_size, args.gradient_accumulation_steps > 1
    else:
        rows = max(1.0, args.max_tokens_per_microbatch / length)
        several = args.per_device_train_batch_size * args.gradient_accumulation_steps > rows
    training = Training(
        student=student,
        teacher=teacher,
        dtype=dtype,
        teacher_dtype=dtype if teacher is student else dtype_of(teacher or student, teacher_dtype),
        autocast=args.bf16 or args.fp16,  # two bytes either way
        peft_config=get_peft_config(model_args),
        gradient_checkpointing=args.gradient_checkpointing,
        rows=rows,
        length=length,
        completion=args.max_completion_length,
        several=several,
        optim=args.optim,
        sharding=sharding,
        processes=processes,
    )
    return training, prompt


def generation_of(args: OPSDConfig, training: Training, rows: int, prompt: int, capacity: float) -> tuple[str, float]:
    """What writes the rollouts, and the GiB that it takes beside weights, teacher and moments."""
    if args.use_vllm and args.vllm_mode == "server":
        return "a server's, on GPUs of its own", 0.0
    if args.use_vllm:
        return (
            f"`vllm_gpu_memory_utilization: {args.vllm_gpu_memory_utilization}`",
            args.vllm_gpu_memory_utilization * capacity,
        )
    itemsize = 2 if training.autocast else training.dtype.itemsize
    length = prompt + args.max_completion_length
    return f"cache of {rows} rollouts of {length:,} tokens", rows * length * cache_bytes(
        training.student, itemsize
    ) / GIB


def advice(training: Training, gib: dict[str, float], in_training: bool) -> str:
    """The setting to lower first."""
    if not in_training:
        return "lower `vllm_gpu_memory_utilization`, or without vLLM `per_device_train_batch_size`"
    names = {
        "activations": "set `gradient_checkpointing: true`"
        if not training.gradient_checkpointing
        else "lower `max_tokens_per_microbatch`",
        "loss": "lower `max_tokens_per_microbatch`",
    }
    largest = max(gib, key=gib.get)
    spread = "train an adapter (`use_peft: true`), or share the models out: `--accelerate_config recipes/accelerate_configs/fsdp2.yaml` with more GPUs"
    return f"most of it is {largest}: {names.get(largest, spread)}"


@dataclass
class Plan:
    """
    What a recipe asks for.

    Args:
        training ([`~trl_opsd.plan.memory.Training`]):
            What is trained.
        gib (`dict[str, float]`):
            What training holds, part by part, in GiB of a GPU.
        train, generate (`float`):
            The most while weights are trained, and while rollouts are written, in GiB.
        writer (`str`):
            What writes the rollouts, and whether it stays while weights are trained.
        capacity (`float`):
            GiB of a GPU.
    """

    training: Training
    gib: dict[str, float]
    train: float
    generate: float
    writer: str
    capacity: float

    @property
    def fits(self) -> bool:
        return max(self.train, self.generate) <= self.capacity


def plan(arguments: PlanArguments, args: OPSDConfig, model_args: ModelConfig) -> Plan:
    """
    Plans a recipe, by the configurations of its models.

    Args:
        arguments ([`~trl_opsd.plan.config.PlanArguments`]):
            The GPUs.
        args ([`~trl_opsd.opsd.OPSDConfig`]), model_args ([`~trl.ModelConfig`]):
            The recipe.

    Returns:
        [`Plan`]: The plan.

    Raises:
        UserError: If there is nothing that it could be planned by.
    """
    training, prompt = training_of(arguments, args, model_args)
    try:
        gib = {name: value / GIB for name, value in parts(training).items()}
    except ValueError as error:  # of a model class that there is none for
        raise UserError(f"`{model_args.model_name_or_path}` is not planned for: {error}") from None
    capacity = arguments.gpu_memory
    if capacity is None:
        capacity = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 79.2
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    writer, extra = generation_of(args, training, rows, prompt, capacity)
    # Gradients are gone while rollouts are written; an engine that does not sleep stays
    resting = gib["weights"] + gib["teacher"] + gib["moments"]
    stays = args.use_vllm and args.vllm_mode == "colocate" and not args.vllm_enable_sleep_mode
    writer += ", there in training too" if stays else ""
    train = sum(gib.values()) + (extra if stays else 0.0)
    return Plan(training, gib, train, resting + extra, writer, capacity)


def run(arguments: PlanArguments, args: OPSDConfig, model_args: ModelConfig) -> None:
    """Prints the plan."""
    with user_errors():
        check_checkpoint(model_args.model_name_or_path, "model_name_or_path", args.trust_remote_code)
        if args.teacher_model_name_or_path is not None:
            check_checkpoint(args.teacher_model_name_or_path, "teacher_model_name_or_path", args.trust_remote_code)
        found = plan(arguments, args, model_args)
    training = found.training
    print(
        f"{training.sharding} on {training.processes} of {found.capacity:.1f} GiB; a micro-batch holds {training.rows:.1f} "
        f"rollouts of {training.length:,} tokens"
    )
    for name, value in found.gib.items():
        print(f"{name:>14} {value:8.2f} GiB")
    for name, value in (("training", found.train), ("generation", found.generate)):
        over = value - found.capacity
        print(f"{name:>14} {value:8.2f} GiB: {'fits' if over <= 0 else f'{over:.1f} GiB too many'}")
    print(f"(rollouts: {found.writer})")
    if not found.fits:
        print(advice(training, found.gib, found.train > found.capacity))
        raise SystemExit(1)
