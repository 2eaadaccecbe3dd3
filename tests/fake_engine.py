"""TRL's own engine class over an `LLM` that remembers what is asked of it, and refuses what a sleeping one cannot do."""

import os
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import trl.generation.vllm_generation as module
from fake_vllm import fake_vllm


class FakeLLM:
    """
    Args:
        write (`Callable`):
            Completion, as token ids, of a prompt, as token ids.

    Attributes:
        calls (`list[str]`):
            `wake weights`, `push`, `wake kv_cache`, `generate <prompts>`, `sleep`, in their order.
        weights (`dict[str, torch.Tensor]`):
            What was pushed last, and is not forgotten.
        wrote_with (`dict[str, torch.Tensor]`):
            What the last completions were written with.
        stop_token_ids (`list[int]`, *optional*):
            What they were to end in.
    """

    def __init__(self, write):
        self.write, self.calls, self.weights = write, [], {}
        self.is_awake = {"weights": True, "kv_cache": True}
        model = SimpleNamespace(load_weights=self.load_weights)
        runner = SimpleNamespace(model=model)
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        )

    def load_weights(self, named):
        assert self.is_awake["weights"]
        if self.calls[-1:] != ["push"]:
            self.calls.append("push")
            self.weights = {}
        self.weights |= {name: value.detach().clone() for name, value in named}

    def reset_prefix_cache(self):
        pass

    def wake_up(self, tags):
        for tag in tags:
            self.is_awake[tag] = True
            self.calls.append(f"wake {tag}")

    def sleep(self, level):
        assert level == 2
        self.is_awake = dict.fromkeys(self.is_awake, False)
        self.weights = {}  # the second level forgets them
        self.calls.append("sleep")

    def generate(self, prompts, sampling_params, use_tqdm):
        assert all(self.is_awake.values()) and self.weights
        self.calls.append(f"generate {len(prompts)}")
        self.wrote_with = self.weights
        self.stop_token_ids = getattr(sampling_params, "stop_token_ids", None)
        written = [self.write(prompt["prompt_token_ids"]) for prompt in prompts]
        logprobs = [
            None if sampling_params.logprobs is None else [{id: SimpleNamespace(rank=1, logprob=-1.0)} for id in ids]
            for ids in written
        ]
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[SimpleNamespace(token_ids=list(ids), logprobs=values)],
            )
            for prompt, ids, values in zip(prompts, written, logprobs, strict=True)
        ]


@contextmanager
def fake_engine(write):
    """Inside, trainers that are built with `use_vllm` get such an engine."""
    with (
        mock.patch.dict(os.environ),  # where TRL leaves the rank for the engine
        mock.patch.object(module, "LLM", lambda **kwargs: FakeLLM(write), create=True),
        mock.patch.object(module, "SamplingParams", lambda **kwargs: SimpleNamespace(**kwargs), create=True),
        mock.patch.object(module, "is_vllm_available", lambda: True),
        mock.patch.object(module, "empty_cache", lambda: None),
        fake_vllm(),
        mock.patch("trl.trainer.distillation_trainer.is_vllm_available", lambda: True),
    ):
        yield


def spread_adapter(model):
    """An adapter that changes the model visibly."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
