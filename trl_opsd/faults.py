"""Rollouts that nothing can be learned from, because what is measured of them, or their gradient, is not finite."""

import json
import os

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase


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
        measured (`str`):
            What is measured of a rollout and has to be finite, for the messages.
        error (`type[RuntimeError]`):
            What is raised where nothing can be learned any more.
        num_iterations (`int`, *optional*, defaults to `1`):
            Steps that are made on each batch of rollouts, in all of which a bad one comes back.
    """

    def __init__(
        self,
        folder: str,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        measured: str,
        error: type[RuntimeError],
        num_iterations: int = 1,
    ):
        self.file = os.path.join(folder, "left_out.jsonl")
        self._tokenizer, self._accelerator, self._measured, self._error = tokenizer, accelerator, measured, error
        self._in_a_row, self._bound = 0, IN_A_ROW * num_iterations
        self.start_step()

    def start_step(self) -> None:
        """Forgets what the step at hand has added, of which nothing is written before it ends."""
        self._batches: list[tuple[dict[str, torch.Tensor], list[bool]]] = []  # and which rollouts are finite
        self._any_finite = self._any_missing = self._any_left_out = False

    def add(self, batch: dict[str, torch.Tensor], finite: torch.Tensor) -> bool:
        """
        Takes up a micro-batch. Called on every process, all of which know afterwards what any of them has left out.

        Args:
            batch (`dict[str, torch.Tensor]`):
                Micro-batch, of `B` rollouts: `prompt_ids` and `prompt_mask` of shape `(B, P)`, `completion_ids` and
                `completion_mask` of shape `(B, C)`.
            finite (`torch.Tensor`):
                Which of them are finite, `bool`, of shape `(B,)`.

        Returns:
            `bool`: Whether a rollout is not finite, of any process.
        """
        batch = {name: batch[name] for name in batch if name.startswith(("prompt_", "completion_"))}
        self._batches.append((batch, finite.tolist()))
        counts = batch["completion_mask"].any(dim=1)
        flags = torch.stack([(finite & counts).any(), (~finite & counts).any(), ~finite.all()])
        any_finite, any_missing, any_left_out = self._accelerator.gather(flags[None]).any(dim=0).tolist()
        self._any_finite |= any_finite
        self._any_missing |= any_missing
        self._any_left_out |= any_left_out
        return any_left_out

    def check_any(self, step: int) -> None:
        """
        Checks that there is a rollout to learn from.

        Args:
            step (`int`):
                Number of the optimizer step, for the message.

        Raises:
            `error`: If none that there was in the step is finite, on every process alike.
        """
        if self._any_missing and not self._any_finite:
            self._write_left_out(step)
            raise self._error(
                f"The {self._measured} of step {step} is nan or infinite on every rollout: the weights of a model are not "
                "finite, or its logits overflow. Nothing was updated in this step."
            )

    def end_step(self, norm: float | torch.Tensor | None, step: int) -> bool:
        """
        Called when all gradients of a step are there, on every process.

        Args:
            norm (`float` or `torch.Tensor`, *optional*):
                Norm of the gradient, over all processes, unless it is for another to look at it.
            step (`int`):
                Number of the optimizer step.

        Returns:
            `bool`: Whether the step is left out.

        Raises:
            `error`: If there was no rollout to learn from, or if something has been left out of too many steps in a row.
        """
        self.check_any(step)
        self._write_left_out(step)
        is_finite = norm is None or bool(torch.as_tensor(norm).isfinite())
        if not is_finite:
            logger.warning(f"The gradient of step {step} is not finite: the step is not taken.")
            if not self._any_left_out:
                for batch, finite in self._batches:
                    self._write(batch, finite, step, "the gradient of its step is not finite")
        self._in_a_row = self._in_a_row + 1 if self._any_left_out or not is_finite else 0
        self.start_step()
        if self._in_a_row >= self._bound:
            raise self._error(
                f"Something was not finite in each of {self._bound} steps in a row, the last of them step {step}: see "
                f"`{self.file}`, lower `learning_rate`, or go back to a checkpoint before."
            )
        return not is_finite

    def _write_left_out(self, step: int) -> None:
        for batch, finite in self._batches:
            self._write(batch, [not is_finite for is_finite in finite], step, f"its {self._measured} is not finite")

    def _write(self, batch: dict[str, torch.Tensor], rows: list[bool], step: int, why: str) -> None:
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        lines = []
        for prompt, seen, completion, counts, is_chosen in zip(*(batch[name] for name in names), rows, strict=True):
            if is_chosen:
                prompt, ids = self._tokenizer.decode(prompt[seen.bool()]), completion[counts.bool()].tolist()
                lines.append({"step": step, "why": why, "prompt": prompt, "completion_ids": ids})
        if not lines:
            return
        os.makedirs(os.path.dirname(self.file) or ".", exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        logger.warning(
            f"Step {step} leaves {len(lines)} rollouts out ({why}), the first of them on the prompt "
            f"{lines[0]['prompt'][:200]!r}: they are in `{self.file}`.",
            main_process_only=False,
        )


def finite_rows(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """
    Which rollouts are finite.

    Args:
        values (`torch.Tensor`):
            What is measured of each token that counts, of shape `(N,)`, or one number for all of them.
        valid (`torch.Tensor`):
            Which positions of the completions those are, `bool`, of shape `(B, C)`.

    Returns:
        `torch.Tensor`: `bool`, of shape `(B,)`. One number that is not finite speaks for all of them.
    """
    wrong = torch.zeros_like(valid)
    wrong[valid] = ~values.isfinite().expand(int(valid.sum()))
    return ~wrong.any(dim=1)
