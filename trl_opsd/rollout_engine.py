"""What the trainers of all stages need to know of the engine (vLLM) that writes their rollouts."""

import math
import os
import socket
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from transformers import PreTrainedModel
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from .cli import check_vllm


logger = get_logger(__name__)


class EngineError(RuntimeError):
    """The engine, or the server that it runs in, has ended or refused: the message is one sentence that says how."""


class RolloutEngine(VLLMGeneration):
    """
    The engine that writes the rollouts of a trainer.

    The only changes with respect to [`~trl.generation.vllm_generation.VLLMGeneration`] are:

    - It computes in the precision that the training computes in, where vLLM would take a float32 checkpoint in bfloat16.
      A server has a precision of its own, and one that differs is warned of.
    - Starting it leaves the random numbers to `seed`: vLLM draws from those of the process, and would begin with 0, 1, ...
      in every run.
    - With `end_at`, a rollout ends where the trainer says that it ends, in any of its end-of-sequence tokens. By itself it
      reads that from the files of the checkpoint, and knows nothing of a tokenizer or a generation configuration that the
      trainer was given instead.
    - Contexts can be entered around every push of the weights (`sync_within`).
    - In sleep mode it can be kept awake for several calls (`awake`).
    - One that no launcher has given a port takes any that is free. TRL chooses among four, long before it is listened at, so
      that runs that start together would collide.
    - On a CPU it does not compile, which takes longer than most runs there, and keeps its weights as they are: where the
      processor has kernels that want them packed, vLLM empties the originals, and no new weights could be written.
    - What fails in it is an [`EngineError`].
    - With `keeps_logprobs` it remembers the log-probabilities of what it writes, in `written`.

    Args:
        seed (`int`):
            Seed of the training.
        keeps_logprobs (`bool`):
            Whether to remember log-probabilities.
        kwargs:
            Those of [`~trl.generation.vllm_generation.VLLMGeneration`].

    Attributes:
        written (`dict[tuple[int, ...], list[float]]`):
            Log-probability of each token of a completion, in nats, by the token ids of prompt and completion; NaN for
            one that vLLM could not score. To be cleared by whoever reads it.
    """

    def __init__(self, *, seed: int, keeps_logprobs: bool, **kwargs):
        self._seed = seed
        self.keeps_logprobs = keeps_logprobs
        self.written: dict[tuple[int, ...], list[float]] = {}
        self._around_sync: tuple[Callable[[], AbstractContextManager], ...] = ()
        self._stays_awake = False
        if keeps_logprobs:
            kwargs["logprobs"] = 0  # of the token that was drawn, and of no other
        super().__init__(**kwargs)

    def _init_vllm(self) -> None:
        precision = str(training_precision(self.model, self.accelerator)).removeprefix("torch.")
        with engine_failure(f"The engine (vLLM, {self.mode}) that writes the rollouts did not start"):
            if self.mode == "colocate":
                if self.accelerator.num_processes == 1 and "MASTER_PORT" not in os.environ:
                    os.environ["MASTER_PORT"] = str(_free_port())
                with _started_with(dtype=precision):
                    super()._init_vllm()
                # As TRL has it: processes that share an engine draw the same, all others differ
                set_seed(self._seed + self.accelerator.process_index // self.tensor_parallel_size)
                return
            super()._init_vllm()
            if self.accelerator.is_main_process:
                served = self.vllm_client.get_server_info()["model_config"]["dtype"].removeprefix("torch.")
                if served != precision:
                    logger.warning(
                        f"The vLLM server computes in {served} and the training in {precision}: the rollouts are those of "
                        f"a slightly different model. Start the server with `--dtype {precision}`."
                    )

    def end_at(self, eos_token_ids: list[int]) -> None:
        """
        Args:
            eos_token_ids (`list[int]`):
                End-of-sequence tokens of the trainer, each of which ends a rollout from now on.
        """
        own = self.generation_kwargs
        self.generation_kwargs = {**own, "stop_token_ids": [*eos_token_ids, *(own.get("stop_token_ids") or ())]}

    def sync_within(self, *contexts: Callable[[], AbstractContextManager]) -> None:
        """
        Args:
            *contexts (`Callable`):
                Context managers that are entered around every push of the weights from now on, whoever asks for it: the
                trainer after a step, and the engine itself, whose sleep forgets them.
        """
        self._around_sync = contexts

    def sync_weights(self) -> None:
        with ExitStack() as stack:
            for context in self._around_sync:
                stack.enter_context(context())
            with engine_failure(
                f"The engine (vLLM, {self.mode}) that writes the rollouts did not take the new weights"
            ):
                super().sync_weights()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """
        Inside, an engine in sleep mode that has generated stays awake, and goes to sleep at the end. By itself it goes to
        sleep after each call, and because its sleep forgets the weights, a push of all of them precedes each one.
        """
        self._stays_awake = self.mode == "colocate" and self.enable_sleep_mode
        is_dead = False
        try:
            yield
        except EngineError:
            is_dead = True
            raise
        finally:
            if self._stays_awake and not self.enable_sleep_mode and not is_dead:
                self.enable_sleep_mode = True
                self.llm.sleep(level=2)
                self._llm_weights_sleeping = True
            self._stays_awake = False

    def _wake(self) -> None:
        if self._llm_weights_sleeping:
            self.sync_weights()
        self.llm.wake_up(tags=["kv_cache"])
        self.enable_sleep_mode = False  # to the base class it is an engine that is always awake

    def generate(self, prompts, *args, **kwargs) -> tuple:
        with engine_failure(f"The engine (vLLM, {self.mode}) that writes the rollouts failed"):
            if self._stays_awake and self.enable_sleep_mode:
                self._wake()
            outputs = super().generate(prompts, *args, **kwargs)
        if self.keeps_logprobs:
            for prompt, completion, logprobs in zip(prompts, *outputs[1:3], strict=True):
                # `None` stands for one that vLLM could not score
                own = [math.nan if values[0] is None else values[0] for values in logprobs]
                self.written[*prompt, *completion] = own
        return outputs

    def close(self) -> None:
        """Ends it, before the process group goes that it was started in."""
        if self.mode == "colocate":
            self.llm.llm_engine.engine_core.shutdown()


@contextmanager
def rollout_engine(trainer_module: ModuleType, seed: int, keeps_logprobs: bool = False) -> Iterator[None]:
    """
    Inside, a trainer of TRL that is constructed has a [`RolloutEngine`].

    Args:
        trainer_module (`ModuleType`):
            Module of TRL's trainer, which names the class of its engine.
        seed (`int`):
            Seed of the training.
        keeps_logprobs (`bool`, *optional*, defaults to `False`):
            Whether the engine remembers log-probabilities.
    """

    def build(**kwargs) -> RolloutEngine:
        return RolloutEngine(seed=seed, keeps_logprobs=keeps_logprobs, **kwargs)

    with _replaced(trainer_module, "VLLMGeneration", build):
        yield


def training_precision(model: PreTrainedModel, accelerator: Accelerator) -> torch.dtype:
    """
    What the products of a training step are computed in.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that is trained.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.

    Returns:
        `torch.dtype`: That of mixed precision, else that of the weights.
    """
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return mixed.get(accelerator.mixed_precision, model.dtype)


def check_engine(args: Any) -> None:
    """
    Checks that there can be an engine, before a model is loaded.

    Args:
        args ([`~trl.GRPOConfig`] or [`~trl.DistillationConfig`]):
            Configuration.

    Raises:
        ValueError: If vLLM is not installed, or is a version that is not supported, or where there is no GPU, for a server,
            which takes its weights from one, and for the sleep mode.
    """
    if not args.use_vllm:
        return
    check_vllm("`use_vllm` needs", ", or leave it out")
    if args.vllm_mode == "server" and args.device.type != "cuda":
        raise ValueError(
            f"`vllm_mode: server` sends the weights to the server by NCCL, from a GPU, and this training runs on "
            f"{args.device.type}: set `vllm_mode: colocate`."
        )
    if args.vllm_enable_sleep_mode and args.device.type == "cpu":
        raise ValueError(
            "`vllm_enable_sleep_mode` frees the memory of a GPU, and vLLM has none on a CPU: leave it out."
        )


@contextmanager
def engine_failure(what: str) -> Iterator[None]:
    """Turns what an engine raises in the block into an [`EngineError`] of one sentence that starts with `what`."""
    try:
        yield
    except Exception as error:
        said = textwrap.shorten(str(error) or "it said nothing", 300, placeholder=" ...")
        raise EngineError(f"{what}: {type(error).__name__}: {said.rstrip('.')}.") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


@contextmanager
def _started_with(**options) -> Iterator[None]:
    """Inside, vLLM starts with options that TRL has no way to pass (huggingface/trl#6816)."""
    from vllm.model_executor.layers import utils as layers
    from vllm.platforms import current_platform

    own, packed = vllm_generation.LLM, layers.dispatch_cpu_unquantized_gemm

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim != 2:
            return packed(layer, remove_weight)  # no linear layer, and not what empties its weight
        layer.cpu_linear = torch.nn.functional.linear

    def start(**kwargs) -> "LLM":  # noqa: F821
        return own(**kwargs, **options)

    with _replaced(vllm_generation, "LLM", start):
        if not current_platform.is_cpu():
            yield
            return
        options["enforce_eager"] = True
        with _replaced(layers, "dispatch_cpu_unquantized_gemm", plain):
            yield
