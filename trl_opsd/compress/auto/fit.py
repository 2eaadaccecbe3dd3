"""What fits the devices: how many processes train, all weights or an adapter, and how much at once."""

import argparse
import os
import shlex
import shutil
import sys
from dataclasses import dataclass

import torch
from peft import LoraConfig

from ...cli import UserError
from ...plan.memory import Training, cache_bytes, empty_model, parts
from ...plan.run import GIB, read_config, read_launch
from ..auto_config import AutoConfig


# Of the adapter, where the weights themselves do not fit
LORA = {"use_peft": True, "lora_r": 64, "lora_alpha": 128, "lora_target_modules": ["all-linear"]}
# Share of a device that is planned with
USED = 0.9


@dataclass
class Launch:
    """
    How training is started.

    Args:
        sharding (`str`):
            What its processes share: `"ddp"`, nothing, or as [`~trl_opsd.plan.memory.Training`] has it.
        processes (`int`):
            How many they are.
        command (`list[str]`):
            Words before `-m`.
    """

    sharding: str
    processes: int
    command: list[str]

    @classmethod
    def of(cls, launcher: str | None) -> "Launch":
        """
        Reads a launcher; where there is none, all GPUs are used.

        Args:
            launcher (`str`, *optional*):
                Command line of `accelerate launch`, of `torchrun` or of anything else.

        Raises:
            UserError: If its command is not there, or it does not say how many processes it starts.
        """
        if launcher is None:
            count = torch.cuda.device_count()
            if count < 2:
                return cls("ddp", 1, [sys.executable])
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
            return cls("ddp", count, [*launch, "--num_processes", str(count)])
        words = shlex.split(launcher)
        if not words or shutil.which(words[0]) is None:
            raise UserError(f"`launcher`: there is no command `{words[0] if words else ''}`: check its name.")
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config_file", "--config-file")
        # Of accelerate and of torchrun
        parser.add_argument("--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node")
        given, _ = parser.parse_known_args(words)
        number = given.num_processes
        if number is not None and not (number.isdecimal() and int(number) > 0):
            raise UserError(f"`launcher` starts `{number}` processes, and that is to be a number, at least 1.")
        is_launch = any(word == "launch" or word.endswith(".launch") for word in words)
        if number is None and given.config_file is None and is_launch:
            raise UserError(
                "`launcher` does not say how many processes it starts, by which rollouts and memory are shared out: add "
                "`--num_processes N` or `--config_file FILE`."
            )
        return cls(*read_launch(given.config_file, None if number is None else int(number)), words)


@dataclass
class Fit:
    """
    What fits a device.

    Args:
        has_gpu (`bool`):
            Whether it is a GPU.
        parameters (`int`):
            Parameters of the model.
        capacity (`float`):
            GiB of a device.
        full (`dict[str, float]`):
            GiB that training all weights takes on a device, by what takes them.
        memory (`dict[str, float]`):
            The same of what is trained: all weights, or an adapter.
        has_adapter (`bool`):
            Whether it is an adapter.
        rollouts (`int`):
            Rollouts of an update that a process writes.
        max_tokens (`int`):
            Tokens of a micro-batch, with padding.
        batch_size (`int`):
            Completions that an evaluation writes at once.
    """

    has_gpu: bool
    parameters: int
    capacity: float
    full: dict[str, float]
    memory: dict[str, float]
    has_adapter: bool
    rollouts: int
    max_tokens: int
    batch_size: int

    @classmethod
    def of(cls, model: str, launch: Launch, arguments: AutoConfig) -> "Fit":
        """
        Reckons it from the sizes of a model alone, of which no weights are read.

        Args:
            model (`str`):
                Checkpoint.
            launch ([`Launch`]):
                How training is started.
            arguments ([`~trl_opsd.compress.auto_config.AutoConfig`]):
                Length and number of the rollouts, and the memory of a GPU where it is given.

        Raises:
            UserError: If not even an adapter fits.
        """
        has_gpu = torch.cuda.is_available()
        config = read_config(model, None, False)
        count = sum(p.numel() for p in empty_model(config, torch.float32).parameters())
        length = arguments.max_completion_length + (512 if has_gpu else 128)  # with a prompt
        max_tokens = max(length, 16384 if has_gpu else 4096)
        capacity = arguments.gpu_memory
        if capacity is None:
            capacity = (torch.cuda.get_device_properties(0).total_memory if has_gpu else _ram()) / GIB

        def planned(peft_config: LoraConfig | None) -> dict[str, float]:
            dtype = torch.bfloat16 if peft_config is not None and has_gpu else torch.float32
            training = Training(
                student=config,
                teacher=None if peft_config is not None else config,
                dtype=dtype,
                teacher_dtype=dtype,
                autocast=has_gpu,
                peft_config=peft_config,
                gradient_checkpointing=has_gpu,
                rows=max(1.0, max_tokens / length),
                length=length,
                completion=arguments.max_completion_length,
                several=True,
                sharding=launch.sharding,
                processes=launch.processes,
                device="cuda" if has_gpu else "cpu",
            )
            return {name: value / GIB for name, value in parts(training).items()}

        rollouts = max(1, arguments.rollouts // launch.processes)
        cache = length * cache_bytes(config, 2 if has_gpu else 4) / GIB  # of a rollout

        def most(memory: dict[str, float]) -> float:
            """While it trains, or while it writes rollouts."""
            resting = memory["weights"] + memory["teacher"] + memory["moments"]
            return max(sum(memory.values()), resting + rollouts * cache)

        full = planned(None)
        has_adapter = most(full) > USED * capacity
        memory = full
        if has_adapter:
            lora = LoraConfig(r=LORA["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM")
            memory = planned(lora)
            if most(memory) > USED * capacity:
                raise UserError(
                    f"An adapter on `{model}` takes {most(memory):.3g} GiB and of a device {USED * capacity:.3g} are used: "
                    "shard it over several with `--launcher 'accelerate launch --config_file "
                    "recipes/accelerate_configs/fsdp2.yaml'`, or lower `max_completion_length` or `rollouts`."
                )
        # An evaluation holds the weights in float32 at most
        batch_size = int(max(1, min(256, (USED * capacity - 4 * count / GIB) // cache)))
        return cls(has_gpu, count, capacity, full, memory, has_adapter, rollouts, max_tokens, batch_size)


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
