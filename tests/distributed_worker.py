"""Runs two steps on fixed rollouts in however many processes, once for each gate, and writes what comes out."""

import argparse
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from trl import DistillationTrainer

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.tiny import TinyConfig, make_model, problems, row
from trl_opsd.tiny.task import CONCISE_TEMPLATE
from trl_opsd.tiny.tokenizer import make_tokenizer


parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path)
parser.add_argument("--per_device", type=int)
parser.add_argument("--accumulation", type=int)
parser.add_argument("--kept", nargs="+", help="gates: one character for each prompt of a batch, 1 is kept")
args = parser.parse_args()

tokenizer = make_tokenizer()
size = TinyConfig(hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, intermediate_size=48)
rows = [row(problem) for problem in problems(TinyConfig(), "train", 16, seed=0)]
index = {example["prompt"][0]["content"]: i % 8 for i, example in enumerate(rows)}
texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5", "0", "1 a:+2=3 b:*4=5 c:+1=6", "3 a:*1=3", "4 b:-2=2"]
completions = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


def generate(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
    prompts = [tokenizer.decode(ids).split("\n")[1].removesuffix("<|im_end|>") for ids in prompt_ids]
    return [list(completions[index[prompt]]) for prompt in prompts]


def train(kept: str) -> dict:
    def verifier(prompts, completions, **kwargs):
        return [float(kept[index[prompt[0]["content"]]]) for prompt in prompts]

    config = OPSDConfig(
        output_dir=str(args.output.with_suffix("")),
        per_device_train_batch_size=args.per_device,
        gradient_accumulation_steps=args.accumulation,
        teacher_prompt_template=CONCISE_TEMPLATE,
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
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reward_funcs=verifier,
    )
    trainer.train()
    return {
        "num_processes": trainer.accelerator.num_processes,
        "is_main": trainer.accelerator.is_main_process,
        "wrapper": type(trainer.model_wrapped).__name__,
        "logs": trainer.state.log_history[:2],
        "weights": trainer.accelerator.unwrap_model(trainer.model_wrapped).state_dict(),
    }


with mock.patch.object(DistillationTrainer, "_generate_single_turn", generate):
    results = [train(kept) for kept in args.kept]
if results[0]["is_main"]:
    torch.save(results, args.output)
