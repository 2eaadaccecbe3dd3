"""
The table of completions: TRL's, with what is known of each rollout beside it.
"""

import importlib
import math
import os
import unicodedata
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from accelerate.utils import broadcast_object_list
from transformers.utils import is_rich_available
from trl.trainer.utils import print_prompt_completions_sample

from .batches import unpadded
from .rollouts import CollectedRollouts


# What a rollout holds of its tokens, if it is to be shown
TOKENS = ("token_ids", "prompt_ids", "teacher_prompt_ids")


@dataclass
class Rollout:
    """
    What is known of a rollout.

    Args:
        prompt (`str`):
            Prompt of the student, without special tokens.
        completion (`str`):
            What the student wrote, without special tokens.
        num_tokens (`int`):
            Tokens of it.
        kept (`bool`):
            Whether it is trained on.
        rewards (`dict[str, float]`, *optional*):
            Reward of each verifier (`rewards/{name}`), and what they add up to (`reward`).
        extra (`dict[str, Any]`, *optional*):
            What the verifiers logged of it with `log_extra`.
        correct (`bool`, *optional*):
            Whether it is correct. `None` without verifiers.
        kl (`float`, *optional*):
            Divergence before the clip, mean over its tokens, in nats. `None` where it was not measured.
        token_ids (`list[int]`, *optional*):
            Its tokens, if it is to be shown.
        prompt_ids (`list[int]`, *optional*):
            Those of the prompt, if it is to be shown.
        teacher_prompt_ids (`list[int]`, *optional*):
            Those of the teacher's prompt, if it is to be shown and the teacher has one of its own.
        token_kl (`list[float]`, *optional*):
            Divergence at each token, in nats; NaN where the token is not the student's own.
    """

    prompt: str
    completion: str
    num_tokens: int
    kept: bool
    rewards: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    correct: bool | None = None
    kl: float | None = None
    token_ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    teacher_prompt_ids: list[int] | None = None
    token_kl: list[float] | None = None


class RolloutLog:
    """
    Keeps, on each process, the rollouts since the last log.

    Args:
        trainer ([`OPSDTrainer`]):
            Trainer whose rollouts they are.
        num_shown (`int`, *optional*, defaults to `0`):
            Rollouts of a batch whose tokens are kept too.
        num_kept (`int`, *optional*):
            Number of rollouts from which on the oldest are forgotten. Defaults to those of a step on this process.
    """

    def __init__(self, trainer, num_shown: int = 0, num_kept: int | None = None):
        args = trainer.args
        self.args, self.tokenizer, self.accelerator = args, trainer._tokenizer, trainer.accelerator
        self.names = [*(f"rewards/{name}" for name in trainer.rollouts.verifier_names), "reward"]
        self.num_shown = num_shown
        self.num_kept = num_kept or args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.rollouts: dict[str, dict[int, Rollout]] = {"train": {}, "eval": {}}
        # Divergence at each token, by the number of the rollout. It may have been written by another process
        self.measured: dict[str, dict[int, list[float]]] = {"train": {}, "eval": {}}
        self.count = 0
        self._gathered: dict[str, list[Rollout]] = {}

    def add(self, mode: str, collected: CollectedRollouts) -> None:
        """
        Takes up the rollouts of a batch, and numbers them in `collected.batch["rollout"]`, of shape `(B,)`, so that what
        is measured of them later finds them wherever they have been shuffled to.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            collected ([`CollectedRollouts`]):
                Rollouts, whose batch has the teacher's prompts already.

        Raises:
            ValueError: If a verifier logged another number of values than there are rollouts.
        """
        batch = collected.batch
        ids = unpadded(batch["completion_ids"], batch["completion_mask"])
        prompt_ids = unpadded(batch["prompt_ids"], batch["prompt_mask"])
        kept = batch["kept"].tolist() if "kept" in batch else [True] * len(ids)
        rewards = [{}] * len(ids)
        if collected.rewards is not None:
            rewards = [dict(zip(self.names, row, strict=True)) for row in collected.rewards.tolist()]
        for column, values in collected.columns.items():
            if len(values) != len(ids):
                raise ValueError(
                    f"A reward function logged {len(values)} values of `{column}` with `log_extra` for a batch of "
                    f"{len(ids)} rollouts: log one for each."
                )
        prompts, completions = (
            self.tokenizer.batch_decode(texts, skip_special_tokens=True) for texts in (prompt_ids, ids)
        )
        rollouts = [
            Rollout(*row, extra={column: values[i] for column, values in collected.columns.items()})
            for i, row in enumerate(zip(prompts, completions, map(len, ids), kept, rewards, strict=True))
        ]
        if collected.correct is not None:
            for rollout, correct in zip(rollouts, collected.correct.tolist(), strict=True):
                rollout.correct = correct
        for i in sorted(range(len(ids)), key=lambda i: not kept[i])[: self.num_shown]:
            rollouts[i].token_ids, rollouts[i].prompt_ids = ids[i], prompt_ids[i]
            if "teacher_prompt_ids" in batch:
                rows = (batch[name][i : i + 1] for name in ("teacher_prompt_ids", "teacher_prompt_mask"))
                rollouts[i].teacher_prompt_ids = unpadded(*rows)[0]
        held = self.rollouts[mode]
        for old in list(held)[: max(0, len(held) + len(rollouts) - self.num_kept)]:
            del held[old]
        num_processes, process = self.accelerator.num_processes, self.accelerator.process_index
        numbers = [number * num_processes + process for number in range(self.count, self.count + len(rollouts))]
        self.count += len(rollouts)
        held.update(zip(numbers, rollouts, strict=True))
        batch["rollout"] = torch.tensor(numbers, device=batch["completion_ids"].device)

    def measure(self, mode: str, numbers: torch.Tensor, valid: torch.Tensor, kl: torch.Tensor) -> None:
        """
        Takes up what the loss measured.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            numbers (`torch.Tensor`):
                Numbers of the rollouts, of shape `(B,)`.
            valid (`torch.Tensor`):
                Which positions of the completions count, of shape `(B, C)`.
            kl (`torch.Tensor`):
                Divergence of each of those, in nats, of shape `(N,)`.
        """
        values = torch.full(valid.shape, torch.nan, device=valid.device)
        values[valid] = kl.detach().float()
        for number, row, counts in zip(numbers.tolist(), values.cpu(), valid.cpu(), strict=True):
            if not row[counts].isnan().all():  # where nothing counts, or nothing was finite
                self.measured[mode][number] = row[: counts.nonzero().max() + 1].tolist()
        for old in list(self.measured[mode])[: -self.num_kept]:
            del self.measured[mode][old]

    def own(self, mode: str) -> list[Rollout]:
        """
        Rollouts of this process, with what it has measured of them.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.

        Returns:
            `list[Rollout]`: In the order in which they were taken up.
        """
        rollouts, measured = self.rollouts[mode], self.measured[mode]
        for number in rollouts.keys() & measured.keys():
            rollouts[number].kl, rollouts[number].token_kl = _mean(measured[number]), measured[number]
        return list(rollouts.values())

    def gathered(self, mode: str) -> list[Rollout]:
        """
        Rollouts of all processes, with what has been measured of them, and of those to be shown their tokens. Called on
        every process.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.

        Returns:
            `list[Rollout]`: Those since the last log, in the main process. In the others there are none.
        """
        if mode not in self._gathered:
            self._gathered[mode] = self._gather(mode)
        return self._gathered[mode]

    def _gather(self, mode: str) -> list[Rollout]:
        held, measured = self.rollouts[mode], self.measured[mode]
        # Values of single tokens are much, and few are shown: of the rest the mean goes to the main process
        plain = {number: replace(rollout, **dict.fromkeys(TOKENS)) for number, rollout in held.items()}
        with_tokens = [number for number, rollout in held.items() if rollout.token_ids is not None]
        means = {number: _mean(values) for number, values in measured.items()}
        rollouts, shown = {}, []
        for part, numbers, kl in self._to_main((plain, with_tokens, means)):
            rollouts |= part
            shown += numbers
            means |= kl
        for number in rollouts.keys() & means.keys():
            rollouts[number].kl = means[number]
        shown = sorted(shown, key=lambda number: not rollouts[number].kept)[: self.num_shown]
        if self.num_shown == 0:
            return list(rollouts.values())
        [shown] = broadcast_object_list([shown])
        tokens = {number: {name: getattr(held[number], name) for name in TOKENS} for number in shown if number in held}
        values = {number: measured[number] for number in shown if number in measured}
        for part, token_kl in self._to_main((tokens, values)):
            for number, fields in part.items():
                rollouts[number] = replace(rollouts[number], **fields)
            values |= token_kl
        for number in shown if rollouts else ():
            rollouts[number].token_kl = values.get(number)
        return list(rollouts.values())

    def _to_main(self, value: Any) -> list[Any]:
        """Values of all processes, in the main one. In the others there are none."""
        if self.accelerator.num_processes == 1:
            return [value]
        is_main = self.accelerator.is_main_process
        received = [None] * self.accelerator.num_processes if is_main else None
        torch.distributed.gather_object(value, received)
        return received if is_main else []

    def clear(self, mode: str) -> None:
        """
        Forgets the rollouts.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
        """
        self.rollouts[mode].clear()
        self.measured[mode].clear()
        self._gathered.pop(mode, None)

    def write_table(self, mode: str, step: int) -> None:
        """
        Prints, saves and reports the table. Called on every process.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            step (`int`):
                Number of the optimizer step.
        """
        rollouts, args = self.gathered(mode), self.args
        if not rollouts:  # all of them are in the main process
            return
        measured = {
            "kept": [rollout.kept for rollout in rollouts],
            "tokens": [rollout.num_tokens for rollout in rollouts],
            "kl": [rollout.kl for rollout in rollouts],
        }
        rewards = {name: [rollout.rewards[name] for rollout in rollouts] for name in rollouts[0].rewards}
        columns = dict.fromkeys(name for rollout in rollouts for name in rollout.extra)
        extra = {name: [rollout.extra.get(name) for rollout in rollouts] for name in columns}
        prompts, completions = ([vars(rollout)[name] for rollout in rollouts] for name in ("prompt", "completion"))
        if is_rich_available():
            print_prompt_completions_sample(
                [visible(prompt) for prompt in prompts],
                [visible(completion) for completion in completions],
                rewards,
                None,
                step,
                args.num_completions_to_print,
                extra={
                    **{name: [visible(str(value)) for value in values] for name, values in extra.items()},
                    "kept": ["yes" if kept else "no" for kept in measured["kept"]],
                    "tokens": measured["tokens"],
                    "KL": ["" if kl is None else f"{kl:.3f}" for kl in measured["kl"]],
                },
            )
        table = {"prompt": prompts, "completion": completions, **extra, **rewards, **measured}
        table = pd.DataFrame({"step": step, **table})
        name = "completions" if mode == "train" else "eval_completions"
        path = os.path.join(args.output_dir, "completions", f"{name}_{step:05d}.parquet")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        table.to_parquet(f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
        if args.log_unique_prompts:
            table = table.drop_duplicates(subset=["prompt"])
        for backend in ("wandb", "trackio"):
            if backend in args.report_to:
                backend = importlib.import_module(backend)
                if backend.__name__ == "trackio" or backend.run is not None:
                    backend.log({name: backend.Table(dataframe=table)})


def _mean(values: list[float]) -> float:
    own = [value for value in values if not math.isnan(value)]
    return sum(own) / len(own)


def visible(text: str) -> str:
    """
    Text without characters that act instead of showing: controls, overrides of direction, lone surrogates.

    Args:
        text (`str`):
            Text of any origin.

    Returns:
        `str`: The same text with each of those as an escape such as `\\x1b`. Newlines, tabs and the joiners that some
        scripts are written with stay.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\n\t\u200c\u200d"
        else char
        for char in text
    )
