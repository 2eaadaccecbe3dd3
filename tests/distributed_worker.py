"""Runs two steps on fixed rollouts in however many processes, once for each gate, and writes what comes out."""

import argparse
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl import DistillationTrainer

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd.view import RolloutPages
from trl_opsd.tiny import TinyConfig, make_model, problems, row
from trl_opsd.tiny.task import CONCISE_TEMPLATE
from trl_opsd.tiny.tokenizer import make_tokenizer


parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path)
parser.add_argument("--per_device", type=int)
parser.add_argument("--accumulation", type=int)
parser.add_argument(
    "--kept",
    nargs="+",
    help="gates: for each prompt of a batch the round in which its rollout passes, 0 is never. With an s in front the "
    "same batch comes again, and what is not solved is skipped. With a t in front all pass, and it says for each prompt "
    "whether the teacher is right in its context; with an n, whether its divergence is finite",
)
parser.add_argument("--max_tokens", type=int, help="budget of a micro-batch")
args = parser.parse_args()

tokenizer = make_tokenizer()
size = TinyConfig(hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, intermediate_size=48)
rows = [row(problem) for problem in problems(TinyConfig(), "train", 16, seed=0)]
index = {example["prompt"][0]["content"]: i % 8 for i, example in enumerate(rows)}
texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5", "0", "1 a:+2=3 b:*4=5 c:+1=6", "3 a:*1=3", "4 b:-2=2"]
completions = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


asked = Counter()
HELD = ("kl", "token_ids", "token_kl")
calls = []  # prompts of each, of this process


def generate(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
    """The completion of the prompt, longer by a token for each round in which it has been asked for before."""
    prompts = [tokenizer.decode(ids).split("\n")[1].removesuffix("<|im_end|>") for ids in prompt_ids]
    if self.args.max_generation_rounds > 1:
        asked.update(set(gather_object(prompts)))  # by whichever process
        calls.append(len(prompts))
    more = tokenizer("5")["input_ids"]
    return [more * (asked[prompt] - 1) + completions[index[prompt]] for prompt in prompts]


def train(case: str) -> dict:
    asked.clear()
    calls.clear()
    skip, gated, kept = case.startswith("s"), case.startswith("t"), case.lstrip("stn")
    wrong = [ids for ids, digit in zip(completions, kept, strict=True) if case.startswith("n") and digit == "0"]

    def write(*_, input_ids, attention_mask, **kwargs):
        """The teacher's: two 5 where it is right, else 4, three tokens in all."""
        prompts = [tokenizer.decode(ids).split("\n")[1].removesuffix("<|im_end|>") for ids in input_ids]
        prompts = [prompt.removesuffix(" concise") for prompt in prompts]
        calls.append(len(prompts))
        reply = {"1": "55", "0": "44"}
        replies = [[*tokenizer(reply[kept[index[prompt]]])["input_ids"], tokenizer.eos_token_id] for prompt in prompts]
        return torch.cat([input_ids, torch.tensor(replies)], dim=1)

    def spoiled(self, model, input_ids, *arguments, **kwargs):
        states = hidden(self, model, input_ids, *arguments, **kwargs)
        if not states.requires_grad:
            return states
        rows = [[token for token in row if token != tokenizer.pad_token_id] for row in input_ids.tolist()]
        spoilt = [any(row[-len(ids) :] == ids for ids in wrong) for row in rows]
        return torch.cat([torch.nan * row if bad else row for row, bad in zip(states.split(1), spoilt, strict=True)])

    def verifier(prompts, completion_ids, log_extra, **kwargs):
        log_extra("ids", [str(ids) for ids in completion_ids])
        rows = [index[prompt[0]["content"]] for prompt in prompts]
        if case.startswith("n"):
            return [1.0] * len(prompts)
        if gated:
            return [float(tokenizer.decode(ids[:2]) != "44") for ids in completion_ids]
        rounds = [1 + len(ids) - len(completions[row]) for row, ids in zip(rows, completion_ids, strict=True)]
        return [float(0 < int(kept[row]) <= number) for row, number in zip(rows, rounds, strict=True)]

    config = OPSDConfig(
        output_dir=str(args.output.with_suffix("") / case),
        log_completions=True,
        num_completions_to_print=3,
        per_device_train_batch_size=args.per_device,
        gradient_accumulation_steps=args.accumulation,
        max_tokens_per_microbatch=args.max_tokens,
        teacher_prompt_template=CONCISE_TEMPLATE,
        max_completion_length=64,
        teacher_gate=0.5 if gated else None,
        teacher_gate_rollouts=3 if gated else None,
        max_generation_rounds=max(1, int(max(kept))),
        min_pass_rate=0.01 if skip else None,
        pass_rate_rollouts=1,
        shuffle_dataset=False,
        max_steps=2,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = OPSDTrainer(
        model=make_model(size, tokenizer, seed=0),
        args=config,
        train_dataset=Dataset.from_list(rows[:8] if skip else rows),
        processing_class=tokenizer,
        reward_funcs=verifier,
    )
    gathered = []

    class Look(RolloutPages):
        """The page, and how much of the rollouts has come to each process for it."""

        def on_log(self, *arguments, **kwargs):
            super().on_log(*arguments, **kwargs)
            rollouts = trainer.rollout_log.gathered("train")
            sizes = [len(rollouts), *(sum(getattr(r, name) is not None for r in rollouts) for name in HELD)]
            gathered.append(gather_object([sizes]))

    trainer.add_callback(Look(trainer))
    hidden = OPSDTrainer._get_last_hidden_state
    with (
        mock.patch("trl_opsd.opsd.trainer.generate_as", write),
        mock.patch.object(OPSDTrainer, "_get_last_hidden_state", spoiled if wrong else hidden),
    ):
        trainer.train()
    return {
        "gathered": gathered,
        "num_processes": trainer.accelerator.num_processes,
        "is_main": trainer.accelerator.is_main_process,
        "wrapper": type(trainer.model_wrapped).__name__,
        "pass_rates": trainer.rollouts.pass_rates.state_dict() if skip else None,
        "calls": list(calls),
        "teacher_gate": trainer.teacher_gate.state_dict() if gated else {},
        "logs": trainer.state.log_history[:2],
        "in_a_row": gather_object([trainer.faults._in_a_row]),
        "weights": trainer.accelerator.unwrap_model(trainer.model_wrapped).state_dict(),
    }


with mock.patch.object(DistillationTrainer, "_generate_single_turn", generate):
    results = [train(kept) for kept in args.kept]
if results[0]["is_main"]:
    torch.save(results, args.output)
