"""
The warm start: supervised fine-tuning until the chain is learned, then a few steps that teach it to slip.

The chain is learned in a jump that comes late and at a time that depends on the seed, so the first phase ends on
measured accuracy. It would leave nothing for reinforcement learning to do. The second phase therefore continues on
chains in which a step's result is wrong now and then: the model takes up that rate when it samples, and stays right
when it is greedy.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig, SFTTrainer

from .. import resuming
from ..cli import UserError, forget_batches
from ..decoding import generate
from ..results import write_results, write_text
from ..resuming import claim, find_checkpoint
from .model import make_model
from .task import TEMPLATES, Problem, TinyConfig, problems, row, sft_rows
from .tokenizer import make_tokenizer


def encode(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """
    Tokenizes rows of `prompt` and `completion` into `input_ids` and `labels`, the prompt's labels being -100.

    `SFTTrainer` would do the same, at many times the cost for rows as short as these.
    """
    prompts = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, tokenize=False
    )
    texts = [
        prompt + row["completion"][0]["content"] + tokenizer.eos_token
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    # What the template has not written is in no prompt of a rollout either
    prompt_ids, input_ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompts, texts))
    labels = [[-100] * len(p) + ids[len(p) :] for p, ids in zip(prompt_ids, input_ids, strict=True)]
    return Dataset.from_dict({"input_ids": input_ids, "labels": labels})


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Problem],
    mode: str,
    max_new_tokens: int,
    sample: bool = False,
) -> tuple[list[bool], list[int]]:
    """
    Whether each of `tasks` is answered right in one mode, and in how many tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        tasks (`list[Problem]`):
            What it is asked.
        mode (`str`):
            A key of `TEMPLATES`.
        max_new_tokens (`int`):
            Longest reply. One that hasn't ended by then is wrong.
        sample (`bool`, *optional*, defaults to `False`):
            Whether to sample at temperature 1 instead of taking the likeliest token.

    Returns:
        `tuple[list[bool], list[int]]`: For each task whether it was right, and the tokens with the end token.
    """
    chats = [[{"role": "user", "content": task.ask(mode)}] for task in tasks]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    training = model.training
    model.eval()
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    generated = generate(model, **inputs, do_sample=sample, max_new_tokens=max_new_tokens, **sampling)[
        :, inputs["input_ids"].shape[1] :
    ]
    model.train(training)
    ending = re.escape(tokenizer.eos_token)
    right = [
        re.search(rf"\\boxed\{{{re.escape(task.answer)}\}}{ending}", reply) is not None
        for task, reply in zip(tasks, tokenizer.batch_decode(generated), strict=True)
    ]
    ends = generated == tokenizer.eos_token_id  # with which other models than the tiny one pad, too
    return right, (((generated != tokenizer.pad_token_id) & ~ends).sum(1) + ends.any(1)).tolist()


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Problem],
    mode: str,
    max_new_tokens: int,
    sample: bool = False,
) -> dict:
    """
    Accuracy and mean length of the replies to `tasks` in one mode: of what [`answer`] returns.

    Returns:
        `dict`: `mode`, `decoding`, `n`, `accuracy` from 0 to 1, and `mean_tokens` with the end token.
    """
    return summary(mode, sample, *answer(model, tokenizer, tasks, mode, max_new_tokens, sample))


def summary(mode: str, sample: bool, right: list[bool], lengths: list[int]) -> dict:
    """The row of results of some replies."""
    return {
        "mode": mode,
        "decoding": "sampled" if sample else "greedy",
        "n": len(right),
        "accuracy": sum(right) / len(right),
        "mean_tokens": sum(lengths) / len(lengths),
    }


class StopAtAccuracy(TrainerCallback):
    """
    Ends training when greedy accuracy on validation problems reaches a target, in plain replies and, on those that they are
    taught on, in concise ones alike. Where checkpoints are written, the last step has one.

    Args:
        config ([`TinyConfig`]):
            Holds the target, and how often and on how many problems to measure.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        seed (`int`):
            Seed of the problems.
    """

    def __init__(self, config: TinyConfig, tokenizer: PreTrainedTokenizerBase, seed: int):
        self.config = config
        self.tokenizer = tokenizer
        self.tasks = problems(config, "validation", config.accuracy_problems, seed)
        self.max_new_tokens = config.max_reply_length + 48  # room for a reply that goes astray
        self.results: list[dict] = []

    @property
    def reached(self) -> bool:
        last = [result["accuracy"] for result in self.results[-2:]]
        return len(last) > 0 and min(last) >= self.config.target_accuracy

    def load(self, checkpoint: str) -> None:
        """Takes up what had been measured when a checkpoint was written."""
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        self.results = [entry for entry in state.log_history if "phase" in entry]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.config.accuracy_steps == 0 or state.global_step == state.max_steps:
            for mode in ("plain", "concise"):
                tasks = [task for task in self.tasks if self.config.teaches(mode, len(task.ops))]
                result = measure(model, self.tokenizer, tasks, mode, self.max_new_tokens)
                self.results.append({"phase": "chain", "step": state.global_step, **result})
                state.log_history.append(self.results[-1])  # kept with the checkpoint
            control.should_training_stop = self.reached
            control.should_save |= self.reached and args.save_strategy != "no"
        return control


class CountTokens(TrainerCallback):
    """
    Keeps with a checkpoint how many tokens have been trained on. TRL's trainer counts those of a resumed run from its beginning.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer.
    """

    def __init__(self, trainer: SFTTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._total_train_tokens = state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        state.num_input_tokens_seen = self._trainer._total_train_tokens


def train(
    model,
    tokenizer,
    rows: Iterator[dict],
    args: SFTConfig,
    callbacks: list | None = None,
    resume_from: str | None = None,
) -> SFTTrainer:
    """At most `args.max_steps` optimizer steps of [`~trl.SFTTrainer`], none of which sees a row again, in all that are resumed."""
    rows = list(islice(rows, args.max_steps * args.train_batch_size * args.gradient_accumulation_steps))
    dataset = encode(rows, tokenizer)
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=callbacks)
    trainer.add_callback(CountTokens(trainer))
    resuming.train(trainer, resume_from)
    return trainer


def check(config: TinyConfig, args: SFTConfig) -> None:
    """
    Checks what can be checked before training, and takes the output folder.

    Raises:
        ValueError: If `max_steps` is missing, the output folder exists or cannot be written, another run is writing there,
            there is more than one process, a checkpoint is named, or there are not enough problems.
    """
    if args.max_steps < 1:
        raise ValueError("`max_steps` is missing: give the most steps that learning the chain may take.")
    if Path(args.output_dir).exists():
        raise ValueError(f"`output_dir`: `{args.output_dir}` exists already: remove it, or choose another folder.")
    if str(args.resume_from_checkpoint).lower() not in ("none", "true", "false"):
        raise ValueError(
            f"`resume_from_checkpoint`: the warm start goes on from checkpoints of its own, and not from "
            f"`{args.resume_from_checkpoint}`: give `true`."
        )
    if args.world_size > 1:
        raise ValueError(f"The warm start runs in one process, not {args.world_size}: launch it with `python -m`.")
    claim(replace(args, output_dir=str(work_dir_of(args))))
    for split, size in (
        ("train", config.train_size),
        ("test", config.test_size),
        ("validation", config.accuracy_problems),
    ):
        problems(config, split, size, args.seed)


def work_dir_of(args: SFTConfig) -> Path:
    """The folder that everything is written into before it gets its name."""
    return Path(f"{args.output_dir}.partial")


def warm_start(config: TinyConfig, args: SFTConfig) -> list[dict]:
    """
    Trains the tiny reasoner and writes it, with the data of the later stages, to `args.output_dir`.

    The folder holds an ordinary checkpoint with its tokenizer, `data/train.jsonl` and `data/test.jsonl` in the data
    contract, and `sft.json` with what was measured. It appears whole or not at all. The seed decides the weights and
    the training rows; the test rows are the same for every seed. Interrupted, it goes on from its last whole checkpoint under
    `args.resume_from_checkpoint`, where there is one, and begins anew else.

    Args:
        config ([`TinyConfig`]):
            Task, architecture and warm start.
        args ([`~trl.SFTConfig`]):
            Training arguments. `max_steps` is the most steps that learning the chain may take.

    Returns:
        `list[dict]`: The measurements in `sft.json`: greedy accuracy while the chain is learned (`phase` is
        `"chain"`), and every mode, greedy and sampled, at the end (`"final"`).

    Raises:
        ValueError: If [`check`] finds a mistake.
        UserError: If the target accuracy is not reached within `max_steps`.
        SystemExit: With the status 143, after a checkpoint, if SIGTERM has ended it.
    """
    check(config, args)
    start = time.perf_counter()
    output_dir, work_dir = Path(args.output_dir), work_dir_of(args)
    goes_on = str(args.resume_from_checkpoint).lower() == "true"
    phases = {name: str(work_dir / name) for name in ("chain", "slips")}
    for left in work_dir.iterdir():  # of a run that was interrupted
        if not goes_on or left.name not in phases:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    set_seed(args.seed)
    tokenizer = make_tokenizer(max(8, config.max_ops))  # 8, so that small worlds have one vocabulary
    model = make_model(config, tokenizer, args.seed)

    stop = StopAtAccuracy(config, tokenizer, args.seed)
    resume_from = find_checkpoint(goes_on, phases["chain"])
    if resume_from is not None:
        stop.load(resume_from)
    if stop.reached:
        model = AutoModelForCausalLM.from_pretrained(resume_from)
    else:
        train(
            model,
            tokenizer,
            sft_rows(config, args.seed),
            replace(args, output_dir=phases["chain"]),
            [stop],
            resume_from,
        )
    if not stop.reached:
        plain, concise = (result["accuracy"] for result in stop.results[-2:])
        raise UserError(
            f"The accuracy after `max_steps` {args.max_steps} is {plain:.3f} plain and {concise:.3f} concise, and "
            f"`target_accuracy` is {config.target_accuracy}: raise `max_steps`, or lower the target for a weaker "
            "teacher."
        )
    if config.slip_steps:
        # The rate goes to zero, so that what was learned is whole again at the end
        args = replace(
            args,
            max_steps=config.slip_steps,
            lr_scheduler_type="linear",
            warmup_steps=0,
            output_dir=phases["slips"],
        )
        rows = sft_rows(config, args.seed + 1, config.slip_probability)
        train(model, tokenizer, rows, args, resume_from=find_checkpoint(goes_on, phases["slips"]))

    rows = stop.results
    wall_s = time.perf_counter() - start
    set_seed(args.seed)
    for decoding in ("greedy", "sampled"):
        for mode in TEMPLATES:
            result = measure(model, tokenizer, stop.tasks, mode, stop.max_new_tokens, sample=decoding == "sampled")
            rows.append({"phase": "final", "step": rows[-1]["step"], **result, "wall_s": wall_s})

    model.save_pretrained(work_dir)
    forget_batches(tokenizer)
    tokenizer.save_pretrained(work_dir)
    for split, size in (("train", config.train_size), ("test", config.test_size)):
        seed = args.seed if split == "train" else 0
        tasks = problems(config, split, size, seed)
        write_text(work_dir / "data" / f"{split}.jsonl", "".join(json.dumps(row(task)) + "\n" for task in tasks))
    write_results(work_dir / "sft.json", rows, {**asdict(config), **args.to_dict(), "output_dir": str(output_dir)})
    for folder in phases.values():
        shutil.rmtree(folder, ignore_errors=True)
    os.replace(work_dir, output_dir)
    return rows
