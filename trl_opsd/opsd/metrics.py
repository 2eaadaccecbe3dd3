"""What the loss measures at each token, and who is told of it before the weights move."""

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from .divergence import DivergenceOutput


class OPSDAlarm(RuntimeError):
    """Raised before the optimizer step that would ruin the student."""


class TokenMetrics:
    """
    Sums, over the trained tokens of this process since the last log, of what the loss measures at each of them.

    Attributes:
        num_tokens (`int`):
            Tokens.
    """

    NAMES = (
        "opsd/kl",
        "opsd/clip_fraction",
        "opsd/student_entropy",
        "opsd/teacher_entropy",
        "opsd/top1_agreement",
    )

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forgets what was measured."""
        self._sums = torch.zeros(1 + len(self.NAMES), dtype=torch.float64)

    @property
    def num_tokens(self) -> int:
        return int(self._sums[0])

    def add(self, tokens: DivergenceOutput) -> torch.Tensor:
        """
        Takes up what a forward pass measured.

        Args:
            tokens ([`DivergenceOutput`]):
                Divergence of each token, and what was measured beside it. One that is not finite is left out.

        Returns:
            `torch.Tensor`: Sum of the student's entropy over the tokens, a scalar.
        """
        measured = {
            "opsd/kl": tokens.divergence.detach() if tokens.unclipped is None else tokens.unclipped,
            "opsd/clip_fraction": tokens.clip_fraction,
            "opsd/student_entropy": tokens.student_entropy,
            "opsd/teacher_entropy": tokens.teacher_entropy,
            "opsd/top1_agreement": tokens.top1_agreement,
        }
        # What a backend does not measure is NaN, which `log` shows as missing
        nan = torch.full((), torch.nan, device=tokens.divergence.device)
        num_tokens = torch.full_like(nan, tokens.divergence.numel())
        sums = torch.stack([num_tokens, *(nan if values is None else values.sum() for values in measured.values())])
        self._sums += sums.cpu().double()
        return sums[1 + self.NAMES.index("opsd/student_entropy")]

    def means(self) -> dict[str, float]:
        """
        Returns:
            `dict[str, float]`: Mean of each over the tokens of this process, NaN where nothing was measured.
        """
        num_tokens, *sums = self._sums.tolist()
        return {name: total / max(num_tokens, 1) for name, total in zip(self.NAMES, sums, strict=True)}

    def gathered_means(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Means over the tokens of all processes, so that a batch with few of them weighs little. Called on every process.

        Args:
            accelerator ([`~accelerate.Accelerator`]):
                Accelerator.

        Returns:
            `dict[str, float]`: Mean of each. Empty where there was no token.
        """
        sums = accelerator.reduce(self._sums.to(accelerator.device, torch.float32)).tolist()
        if sums[0] == 0:
            return {}
        return {name: total / sums[0] for name, total in zip(self.NAMES, sums[1:], strict=True)}


class EngineMismatch:
    """
    How far the log-probabilities of the engine that wrote the rollouts are from the student's, over the trained tokens of
    this process since the last log: their mean and largest difference, and the KL divergence of the student from the
    engine, estimated on the tokens that the engine drew as the mean of `exp(d) - 1 - d`, where `d` is the student's minus
    the engine's ([k3](http://joschu.net/blog/kl-approx.html): without bias, and never negative).
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forgets what was measured."""
        self._sums, self._largest = torch.zeros(3), torch.zeros(())

    def add(self, engine: torch.Tensor, student: torch.Tensor) -> None:
        """
        Takes up what a forward pass found.

        Args:
            engine (`torch.Tensor`):
                Log-probabilities of the engine, in nats, of shape `(N,)`; NaN for tokens that it did not write.
            student (`torch.Tensor`):
                Those of the student, of the same shape.
        """
        difference = (student - engine)[~engine.isnan()].float().cpu()
        if len(difference) > 0:
            size, k3 = difference.abs(), difference.expm1() - difference
            self._sums += torch.stack([torch.tensor(float(len(size))), size.sum(), k3.sum()])
            self._largest = torch.maximum(self._largest, size.max())

    def gathered(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Over the tokens of all processes. Called on every process.

        Args:
            accelerator ([`~accelerate.Accelerator`]):
                Accelerator.

        Returns:
            `dict[str, float]`: Under the names that [`~trl.GRPOTrainer`] logs them by. Empty where there was no token.
        """
        num_tokens, size, kl = accelerator.reduce(self._sums.to(accelerator.device)).tolist()
        largest = accelerator.gather(self._largest.to(accelerator.device)).max().item()
        if num_tokens == 0:
            return {}
        return {
            "sampling/sampling_logp_difference/mean": size / num_tokens,
            "sampling/sampling_logp_difference/max": largest,
            "sampling/kl": kl / num_tokens,
        }


class DivergenceCallback(TrainerCallback):
    """
    A callback of [`OPSDTrainer`] that is also told of the divergence, before the backward pass: under DeepSpeed that is
    where the optimizer steps.
    """

    def on_divergence(self, args, state, control, metrics: TokenMetrics, **kwargs) -> None:
        """
        Called after the loss of every micro-batch in training.

        Args:
            metrics ([`TokenMetrics`]):
                What has been measured on this process since the last log.

        Raises:
            OPSDAlarm: To end the run with the weights as they are.
        """
