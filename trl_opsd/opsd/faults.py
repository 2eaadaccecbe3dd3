"""Rollouts that nothing can be learned from, because their loss or their gradient is not finite."""

import json
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase

from .batches import unpadded
from .metrics import OPSDAlarm


logger = get_logger(__name__)

# Steps in a row that something is left out of, from which on it is not the rollouts
IN_A_ROW = 10


class Faults:
    """
    What is left out of the training of this process, written to `left_out.jsonl` in the output folder: a line for each
    rollout, with the step, why, the prompt as the model reads it, and the token ids of the completion.

    Args:
        folder (`str`):
            Output folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
    """

    def __init__(self, folder: str, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator):
        self.file = os.path.join(folder, "left_out.jsonl")
        self._tokenizer, self._accelerator = tokenizer, accelerator
        self._in_a_row = 0
        self._start_step()

    def _start_step(self) -> None:
        self._batches: list[dict[str, torch.Tensor]] = []
        self._any_finite = self._any_left_out = False

    def add(self, batch: dict[str, torch.Tensor], finite: torch.Tensor, step: int) -> bool:
        """
        Takes up a micro-batch. Called on every process, all of which know afterwards what any of them has left out.

        Args:
            batch (`dict[str, torch.Tensor]`):
                Micro-batch, of `B` rollouts.
            finite (`torch.Tensor`):
                Whose divergence is finite, `bool`, of shape `(B,)`.
            step (`int`):
                Number of the optimizer step.

        Returns:
            `bool`: Whether the divergence of a rollout is not finite, of any process.
        """
        self._batches.append({name: batch[name] for name in batch if name.startswith(("prompt_", "completion_"))})
        counts = batch["completion_mask"].any(dim=1)
        flags = torch.stack([(finite & counts).any(), ~finite.all()])
        any_finite, any_left_out = self._accelerator.gather(flags[None]).any(dim=0).tolist()
        self._any_finite |= any_finite
        self._any_left_out |= any_left_out
        if any_left_out and not finite.all():
            self._write(self._batches[-1], (~finite).tolist(), step, "its divergence is not finite")
        return any_left_out

    def check_any(self, step: int) -> None:
        """
        Checks that there is a rollout to learn from.

        Args:
            step (`int`):
                Number of the optimizer step, for the message.

        Raises:
            OPSDAlarm: If the divergence of none that there was in the step is finite, on every process alike.
        """
        if self._any_left_out and not self._any_finite:
            raise OPSDAlarm(
                f"The divergence of step {step} is nan or infinite on every rollout: the weights of the teacher or of the "
                "student are not finite, or their logits overflow. Nothing was updated in this step."
            )

    def end_step(self, norm: float | None, step: int) -> bool:
        """
        Called when all gradients of a step are there, on every process.

        Args:
            norm (`float`, *optional*):
                Norm of the gradient, over all processes, unless it is for another to look at it.
            step (`int`):
                Number of the optimizer step.

        Returns:
            `bool`: Whether the step is left out.

        Raises:
            OPSDAlarm: If there was no rollout to learn from, or if something has been left out of too many steps in a row.
        """
        self.check_any(step)
        is_finite = norm is None or bool(torch.as_tensor(norm).isfinite())
        if not is_finite:
            logger.warning(f"The gradient of step {step} is not finite: the step is not taken.")
            if not self._any_left_out:
                for batch in self._batches:
                    rows = [True] * len(batch["prompt_ids"])
                    self._write(batch, rows, step, "the gradient of its step is not finite")
        self._in_a_row = self._in_a_row + 1 if self._any_left_out or not is_finite else 0
        self._start_step()
        if self._in_a_row >= IN_A_ROW:
            raise OPSDAlarm(
                f"Something was not finite in each of {IN_A_ROW} steps in a row, the last of them step {step}: see "
                f"`{self.file}`, lower `learning_rate`, or go back to a checkpoint before."
            )
        return not is_finite

    def _write(self, batch: dict[str, torch.Tensor], rows: list[bool], step: int, why: str) -> None:
        prompts = unpadded(batch["prompt_ids"], batch["prompt_mask"])
        completions = unpadded(batch["completion_ids"], batch["completion_mask"])
        lines: list[dict[str, Any]] = [
            {"step": step, "why": why, "prompt": self._tokenizer.decode(prompt), "completion_ids": completion}
            for prompt, completion, is_chosen in zip(prompts, completions, rows, strict=True)
            if is_chosen
        ]
        os.makedirs(os.path.dirname(self.file) or ".", exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        logger.warning(
            f"Step {step} leaves {len(lines)} rollouts out ({why}), the first of them on the prompt "
            f"{lines[0]['prompt'][:200]!r}: they are in `{self.file}`.",
            main_process_only=False,
        )


def finite_rows(divergence: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """
    Which rollouts have a divergence that is finite.

    Args:
        divergence (`torch.Tensor`):
            Divergence of each token that counts, of shape `(N,)`, or one number for all of them.
        valid (`torch.Tensor`):
            Which positions of the completions those are, `bool`, of shape `(B, C)`.

    Returns:
        `torch.Tensor`: `bool`, of shape `(B,)`. One number that is not finite speaks for all of them.
    """
    wrong = torch.zeros_like(valid)
    wrong[valid] = ~divergence.isfinite().expand(int(valid.sum()))
    return ~wrong.any(dim=1)
