"""Steps that are not taken, because their gradient is not finite."""

import json
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase


logger = get_logger(__name__)

# Steps in a row, from which on it is not the rollouts
IN_A_ROW = 10


class NotFinite(RuntimeError):
    """Nothing can be learned any more: the message is one sentence that says since when."""


class LeftOut:
    """
    The steps that are left out, written to `left_out.jsonl` in the output folder: a line for each rollout of one, with the
    step, why, the prompt as the model reads it, and the token ids of the completion.

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
        self._batches: list[tuple[dict[str, torch.Tensor], bool]] = []
        self._in_a_row = 0

    def add(self, batch: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        """
        Takes up a micro-batch.

        Args:
            batch (`dict[str, torch.Tensor]`):
                Micro-batch: ids and masks of prompts and completions.
            loss (`torch.Tensor`):
                Its loss.
        """
        self._batches.append((batch, bool(loss.isfinite())))

    def end_step(self, norm: float | torch.Tensor | None, step: int) -> bool:
        """
        Called when all gradients of a step are there, on every process.

        Args:
            norm (`float` or `torch.Tensor`, *optional*):
                Norm of the gradient, over all processes.
            step (`int`):
                Number of the optimizer step.

        Returns:
            `bool`: Whether the step is left out.

        Raises:
            NotFinite: If too many in a row are, on every process alike.
        """
        is_finite = norm is None or bool(torch.as_tensor(norm).isfinite())
        if not is_finite:
            # Those whose own loss is not finite, or all where it shows in the gradient alone
            wrong = [batch for batch, has_finite_loss in self._batches if not has_finite_loss]
            is_elsewhere = self._accelerator.gather(torch.tensor([bool(wrong)], device=self._accelerator.device)).any()
            rows = wrong if is_elsewhere else [batch for batch, _ in self._batches]
            self._write(rows, step)
        self._in_a_row = 0 if is_finite else self._in_a_row + 1
        self._batches = []
        if self._in_a_row >= IN_A_ROW:
            raise NotFinite(
                f"The gradient of each of {IN_A_ROW} steps in a row is not finite, the last of them step {step}, so that "
                f"nothing is learned: see `{self.file}`, lower `learning_rate`, or go back to a checkpoint before."
            )
        return not is_finite

    def _write(self, batches: list[dict[str, torch.Tensor]], step: int) -> None:
        lines: list[dict[str, Any]] = []
        for batch in batches:
            names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
            for prompt, prompt_mask, completion, mask in zip(*(batch[name] for name in names), strict=True):
                prompt = self._tokenizer.decode(prompt[prompt_mask.bool()])
                line = {"step": step, "why": "the gradient of its step is not finite", "prompt": prompt}
                lines.append({**line, "completion_ids": completion[mask.bool()].tolist()})
        os.makedirs(os.path.dirname(self.file) or ".", exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        logger.warning(
            f"The gradient of step {step} is not finite: the step is not taken. {len(lines)} rollouts of this process may be why: "
            f"`{self.file}`.",
            main_process_only=False,
        )
