"""
The probe: student and teacher-in-context, measured before any training.

The gain of distillation follows the gap between the two (https://huggingface.co/papers/2605.30070), so what the probe
finds says whether training can help, at the price of a few rollouts.
"""

import math
from itertools import islice
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import parse_flag_from_env

from .completions import RolloutLog
from .config import OPSDConfig
from .view import num_shown, write_page


logger = get_logger(__name__)

# Parts of a trace, from its beginning to its end, that the divergence is averaged over
NUM_PARTS = 4


def check_probe(args: OPSDConfig) -> None:
    """
    Checks that there can be a probe, before any model is loaded.

    Args:
        args ([`OPSDConfig`]):
            Configuration of the training.

    Raises:
        ValueError: Under FSDP or DeepSpeed, whether the arguments or `accelerate launch` say so.
    """
    is_fsdp = args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if is_fsdp or args.deepspeed_plugin is not None:
        raise ValueError(
            f"The probe runs before training, when {'FSDP' if is_fsdp else 'DeepSpeed'} has not prepared the model: set "
            "`probe_prompts: 0`, and probe in one process first (`probe_only: true`)."
        )


def probe(trainer, num_prompts: int, page: str | None = None) -> dict[str, Any]:
    """
    Measures the student on its own prompt, the student in the teacher's context (the prompt-only baseline, which costs
    nothing), and how the teacher scores the student's rollouts. The trainer, its random numbers and its logs are as
    they were afterwards.

    Args:
        trainer ([`OPSDTrainer`]):
            Trainer, before training. Not under FSDP or DeepSpeed, which prepare the model when training starts.
        num_prompts (`int`):
            Number of prompts of the training set, one rollout each.
        page (`str`, *optional*):
            HTML file to write, which shows a few of the student's rollouts with every token coloured by its divergence.

    Returns:
        `dict[str, Any]`: For `student` and `prompt_only` (`None` without a context of its own): `correct`, a share
        (`None` without a verifier), `tokens` (mean) and `truncated` (share). For the teacher: `kl` in nats and
        `top1_agreement`, means over the tokens, and `kl_by_part`, the mean of each quarter of the traces; `None` where
        there is no finite number. `warnings`:
        sentences that say why training is unlikely to help.

    Raises:
        ValueError: Under FSDP or DeepSpeed.
    """
    check_probe(trainer.args)
    rows = list(islice(iter(trainer.train_dataset.shuffle(seed=trainer.args.seed)), num_prompts))
    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    was_training = trainer.model.training
    trainer.model.eval()
    own_log, log = trainer.rollout_log, RolloutLog(trainer, num_shown(trainer.args), num_kept=num_prompts)
    prompts = trainer.teacher_prompts
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            trainer.rollout_log = log
            batches, student = _roll_out(trainer, rows)
            trainer.rollout_log = None
            in_context = None
            if prompts is not None and prompts.context is not None and not prompts.takes_sibling:
                contexts = [{**row, "prompt": prompts.prompt(row)} for row in rows]
                with trainer._chat_template_kwargs(trainer.teacher_chat_template_kwargs):
                    in_context = _roll_out(trainer, contexts)[1]
            teacher = _score(trainer, batches, log)
    finally:
        trainer.rollout_log = own_log
        trainer.model.train(was_training)
        trainer._metrics["eval"].clear()
    result = {"num_prompts": len(rows), "student": student, "prompt_only": in_context, "teacher": teacher}
    result["warnings"] = _warnings(result)
    for warning in result["warnings"]:
        logger.warning(warning)
    if page is not None and trainer.accelerator.is_main_process:
        write_page(page, log.own("eval"), log, "Probe")
    return result


def _roll_out(trainer, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    metrics = trainer._metrics["eval"]
    size = trainer.args.per_device_eval_batch_size
    batches, counts = [], []
    metrics.clear()
    for start in range(0, len(rows), size):
        batches.append(trainer._generate_and_score_completions(rows[start : start + size]))
        counts.append(len(rows[start : start + size]))

    def mean(name: str) -> float | None:
        if name not in metrics:
            return None
        return sum(value * count for value, count in zip(metrics[name], counts, strict=True)) / sum(counts)

    return batches, {
        "correct": mean("opsd/correct"),
        "tokens": mean("completions/mean_length"),
        "truncated": mean("completions/clipped_ratio"),
    }


def _score(trainer, batches: list[dict[str, Any]], log: RolloutLog) -> dict[str, Any]:
    kl, agreement, parts = [], [], []
    for batch in batches:
        tokens, valid = trainer._compute_divergence(trainer.model, batch)
        position = valid.cumsum(dim=1) - 1
        length = valid.sum(dim=1, keepdim=True)
        parts.append((position * NUM_PARTS // length.clamp(min=1))[valid])
        kl.append(tokens.divergence if tokens.unclipped is None else tokens.unclipped)
        if not trainer.args.use_liger_kernel:
            log.measure("eval", batch["rollout"], valid, kl[-1])
        agreement.append(
            torch.full_like(kl[-1], torch.nan) if tokens.top1_agreement is None else tokens.top1_agreement
        )
    kl, agreement, parts = torch.cat(kl), torch.cat(agreement), torch.cat(parts)

    def mean(values: torch.Tensor) -> float | None:
        value = values.mean().item()  # NaN of no tokens, of what the backend does not measure, of broken weights
        return value if math.isfinite(value) else None

    return {
        "kl": mean(kl),
        "top1_agreement": mean(agreement),
        "kl_by_part": [mean(kl[parts == part]) for part in range(NUM_PARTS)],
    }


def _warnings(result: dict[str, Any]) -> list[str]:
    student, in_context, kl = result["student"], result["prompt_only"], result["teacher"]["kl"]
    warnings = []
    if kl is None:
        warnings.append("The divergence is not finite: the teacher's weights may not have been loaded.")
    elif kl < 1e-6:
        warnings.append(f"The teacher gives what the student gives ({kl:.1e} nats per token): nothing can be learned.")
    if in_context is None:
        return warnings
    if student["correct"] is not None and in_context["correct"] < student["correct"]:
        # The standard error of a difference of two shares of this many rollouts
        error = sum(
            share * (1 - share) / result["num_prompts"] for share in (student["correct"], in_context["correct"])
        )
        if student["correct"] - in_context["correct"] > 2 * error**0.5:
            warnings.append(
                f"The context makes the teacher worse: {in_context['correct']:.0%} correct in it, {student['correct']:.0%} "
                "without. Training is unlikely to keep the accuracy."
            )
    if in_context["tokens"] > 0.95 * student["tokens"]:
        warnings.append(
            f"The context makes the answers no shorter: {in_context['tokens']:.0f} tokens in it, "
            f"{student['tokens']:.0f} without. Training is unlikely to shorten them."
        )
    return warnings
