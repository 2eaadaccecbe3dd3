"""
Generations of `RLVRTrainer` on fixed rollouts in however many processes, each of which writes what it would train on, and three
steps: in the first a rollout is not finite, in the second a gradient.
"""

import argparse
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_opsd import RLVRConfig, RLVRTrainer
from trl_opsd.rewards import math_reward
from trl_opsd.tiny import TinyConfig, make_model, problems, row
from trl_opsd.tiny.tokenizer import make_tokenizer


SIZE = 4  # rollouts of a group
tokenizer = make_tokenizer()
model_config = TinyConfig(hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, intermediate_size=48)
examples = [row(problem) for problem in problems(TinyConfig(), "train", 24, seed=0)]
by_prompt = {example["prompt"][0]["content"]: index for index, example in enumerate(examples)}


def is_right(prompt: int, rollout: int) -> bool:
    """Of five prompts two are solved always, one now and then, and two never."""
    return {0: True, 1: rollout % 2 == 0, 4: True}.get(prompt % 5, False)


def reply(prompt: int, rollout: int) -> str:
    """What a prompt's rollout of a group says: longer than the ones before it, and right or wrong."""
    answer = int(examples[prompt]["answer"]) + (not is_right(prompt, rollout))
    return f"{prompt % 10}{'=' * (rollout + prompt % 4)} \\boxed{{{answer % 7}}}"


def prompt_of(ids: list[int]) -> int:
    return by_prompt[tokenizer.decode(ids).split("\n")[1].removesuffix("<|im_end|>")]


def generate(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
    start = self.accelerator.process_index * len(prompt_ids)
    completions = []
    for index, ids in enumerate(prompt_ids, start=start):
        text = reply(prompt_of(ids), index % SIZE)
        # The last rollout of prompt 4 is right, and doesn't end
        end = [] if (prompt_of(ids), index % SIZE) == (4, 3) else [tokenizer.eos_token_id]
        completions.append(tokenizer(text)["input_ids"] + end)
    return completions, None


def make_trainer(folder: Path, rows: list[dict], **options) -> RLVRTrainer:
    config = RLVRConfig(
        output_dir=str(folder),
        **{
            "num_generations": SIZE,
            "max_completion_length": 32,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "shuffle_dataset": False,
            **options,
        },
    )
    return RLVRTrainer(
        model=make_model(model_config, tokenizer, seed=0),
        reward_funcs=[math_reward],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


class Spoil(torch.autograd.Function):
    """Something whose gradient is not finite."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found.append({name: value.clone() for name, value in model.state_dict().items()})


WRONG = tokenizer(reply(1, 2))["input_ids"] + [tokenizer.eos_token_id]
logps = GRPOTrainer._get_per_token_logps_and_entropies


def spoiled(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
    """What one rollout has in the first step is not finite where its tokens count, nor the gradient of the last process in the second."""
    found, *more = logps(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
    if torch.is_grad_enabled() and self.state.global_step == 0:
        counting = [
            ids[-logits_to_keep:][mask[-logits_to_keep:].bool()].tolist()
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        poison = torch.tensor([[torch.nan if ids == WRONG else 1.0] for ids in counting])
        found = found * poison
    if torch.is_grad_enabled() and self.state.global_step == 1 and self.accelerator.is_last_process:
        found = Spoil.apply(found)
    return found, *more


def faulty(folder: Path, per_device: int) -> dict:
    """Three steps, and what is known of each."""
    options = {"per_device_train_batch_size": per_device, "max_steps": 3, "logging_steps": 1, "optim": "sgd"}
    trainer = make_trainer(folder, examples, **options, learning_rate=1.0, lr_scheduler_type="constant")
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    weights = Weights()
    trainer.add_callback(weights)
    with (
        mock.patch.object(GRPOTrainer, "_generate_single_turn", generate),
        mock.patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", spoiled),
    ):
        trainer.train()
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "weights": [start, *weights.found],
        "norms": [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log],
        "entropy": [log["entropy"] for log in trainer.state.log_history if "entropy" in log],
    }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    parser.add_argument("--per_device", type=int)
    parser.add_argument("--rounds", type=int, nargs="+")
    args = parser.parse_args(args)
    results = []
    for rounds in args.rounds:
        folder = args.output / str(rounds)
        trainer = make_trainer(
            folder, examples, per_device_train_batch_size=args.per_device, max_generation_rounds=rounds
        )
        trainer.model.train()
        share = args.per_device
        start = trainer.accelerator.process_index * share
        batch = [examples[index // SIZE] for index in range(start, start + share)]
        with mock.patch.object(GRPOTrainer, "_generate_single_turn", generate):
            output = trainer._generate_and_score_completions(batch)
        results.append(
            {
                "num_processes": trainer.accelerator.num_processes,
                "output": output,
                "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
            }
        )
        process = trainer.accelerator.process_index
    results.append(faulty(args.output / "faulty", args.per_device))
    torch.save(results, args.output / f"process-{process}.pt")


if __name__ == "__main__":
    main()
