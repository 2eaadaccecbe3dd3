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

from .completions import Rollout, RolloutLog
from .config import OPSDConfig
from .context import takes_sibling
from .view import num_shown, write_page


logger = get_logger(__name__)

# Parts of a trace, from its beginning to its end, that the divergence is averaged over
NUM_PARTS = 4
# Different numbers in a column from which on prompts are grouped by thirds of them, and not by each
MANY_VALUES = 9


def check_probe(args: OPSDConfig) -> None:
    """
    Checks that there can be a probe, before any model is loaded.

    Args:
        args ([`OPSDConfig`]):
            Configuration of the training.

    Raises:
        ValueError: Under FSDP or DeepSpeed, whether the arguments or `accelerate launch` say so.
    """
    if args.uses_fsdp or args.deepspeed_plugin is not None:
        raise ValueError(
            f"The probe runs before training, when {'FSDP' if args.uses_fsdp else 'DeepSpeed'} has not prepared the model: set "
            "`probe_prompts: 0`, and probe in one process first (`probe_only: true`)."
        )


def probe(trainer, num_prompts: int, page: str | None = None, difficulty: str | None = None) -> dict[str, Any]:
    """
    Measures the student on its own prompt, the student in the teacher's context (the prompt-only baseline, which costs
    nothing), both by how hard the prompts are, and how the teacher scores the student's rollouts, in its context whatever a
    gate of the teacher's would choose. The trainer, its random numbers and its logs are as they were afterwards.

    Args:
        trainer ([`OPSDTrainer`]):
            Trainer, before training. Not under FSDP or DeepSpeed, which prepare the model when training starts.
        num_prompts (`int`):
            Number of prompts of the training set, one rollout each.
        page (`str`, *optional*):
            HTML file to write, which shows a few of the student's rollouts with every token coloured by its divergence.
        difficulty (`str`, *optional*):
            Column by whose values the prompts are grouped, in thirds where it has many numbers. Defaults to thirds by the
            length of the student's rollouts.

    Returns:
        `dict[str, Any]`: For `student` and `prompt_only` (in the first of several contexts, `None` without a context of its
        own): `correct`, a share (`None` without a verifier), `tokens` (mean) and `truncated` (share). `by_difficulty`: a
        dictionary for each group of prompts, with its name `group`, `num_prompts`, `correct` and `tokens` of the `student`,
        and the same in each of the `contexts`; none without a verifier. For the teacher: `kl` in nats and
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
    gate, trainer.teacher_gate = trainer.teacher_gate, None
    prompts = trainer.teacher_prompts
    contexts = [] if prompts is None else [context for context in prompts.contexts if not takes_sibling(context)]
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            trainer.rollout_log = log
            batches, student = _roll_out(trainer, rows)
            in_contexts, written = [], []
            for context in contexts:
                trainer.rollout_log = RolloutLog(trainer, num_kept=num_prompts)
                asked = [{**row, "prompt": prompts.prompt(row, context)} for row in rows]
                with trainer._chat_template_kwargs(trainer.teacher_chat_template_kwargs):
                    in_contexts.append(_roll_out(trainer, asked)[1])
                written.append(list(trainer.rollout_log.rollouts["eval"].values()))
            teacher = _score(trainer, batches, log)
    finally:
        trainer.rollout_log, trainer.teacher_gate = own_log, gate
        trainer.model.train(was_training)
        trainer._metrics["eval"].clear()
    result = {"num_prompts": len(rows), "student": student, "prompt_only": next(iter(in_contexts), None)}
    result["by_difficulty"] = _by_difficulty(rows, list(log.rollouts["eval"].values()), written, difficulty)
    result |= {"teacher": teacher}
    result["warnings"] = _warnings(result, is_gated=gate is not None)
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


def _by_difficulty(
    rows: list[dict[str, Any]], own: list[Rollout], in_contexts: list[list[Rollout]], column: str | None
) -> list[dict[str, Any]]:
    """What the rollouts are in each group of prompts, from the easiest on: those of the student, and in each context."""
    if not in_contexts or own[0].correct is None:
        return []
    values = [rollout.num_tokens for rollout in own] if column is None else [row[column] for row in rows]
    is_number = all(isinstance(value, int | float) for value in values)
    if column is None or (is_number and len(set(values)) >= MANY_VALUES):
        order = sorted(range(len(rows)), key=values.__getitem__)
        of_what = "of the student's rollouts" if column is None else f"of `{column}`"
        cuts = [len(rows) * part // 3 for part in range(4)]
        names = ("shortest", "middle", "longest") if column is None else ("lowest", "middle", "highest")
        groups = {
            f"{name} third {of_what}": order[start:end]
            for name, start, end in zip(names, cuts[:-1], cuts[1:], strict=True)
        }
    else:
        groups = {
            f"`{column}` {value}": [index for index, other in enumerate(values) if other == value]
            for value in sorted(set(values), key=None if is_number else str)
        }

    def measured(rollouts: list[Rollout], group: list[int]) -> dict[str, float]:
        chosen = [rollouts[index] for index in group]
        return {
            "correct": sum(rollout.correct for rollout in chosen) / len(chosen),
            "tokens": sum(rollout.num_tokens for rollout in chosen) / len(chosen),
        }

    return [
        {
            "group": name,
            "num_prompts": len(group),
            "student": measured(own, group),
            "contexts": [measured(rollouts, group) for rollouts in in_contexts],
        }
        for name, group in groups.items()
        if group
    ]


def _is_worse(student: dict[str, float], in_context: dict[str, float], number: int) -> bool:
    """Whether the share of correct rollouts is lower in the context by more than twice the error of so many of each."""
    error = sum(share * (1 - share) / number for share in (student["correct"], in_context["correct"])) ** 0.5
    return student["correct"] - in_context["correct"] > 2 * error


def _warnings(result: dict[str, Any], is_gated: bool = False) -> list[str]:
    student, in_context, kl = result["student"], result["prompt_only"], result["teacher"]["kl"]
    warnings = []
    if kl is None:
        warnings.append("The divergence is not finite: the teacher's weights may not have been loaded.")
    elif kl < 1e-6:
        warnings.append(f"The teacher gives what the student gives ({kl:.1e} nats per token): nothing can be learned.")
    if in_context is None:
        return warnings
    is_judged = student["correct"] is not None and not is_gated  # a gate leaves out where the teacher fails
    if is_judged and _is_worse(student, in_context, result["num_prompts"]):
        warnings.append(
            f"The context makes the teacher worse: {in_context['correct']:.0%} correct in it, {student['correct']:.0%} "
            "without. Training is unlikely to keep the accuracy."
        )
    groups = result["by_difficulty"] if is_judged else []
    for place in range(len(groups[0]["contexts"]) if len(groups) > 1 else 0):
        best, *_, worst = sorted(groups, key=lambda group: -group["contexts"][place]["correct"])
        hides = [
            _is_worse(group["student"], group["contexts"][place], group["num_prompts"]) for group in (best, worst)
        ]
        if hides == [False, True]:
            good, bad = (group["contexts"][place]["correct"] for group in (best, worst))
            warnings.append(
                f"In its context the teacher is right in {good:.0%} of the {best['group']}, and in {bad:.0%} of the "
                f"{worst['group']}, where the student is right in {worst['student']['correct']:.0%} without it: set "
                "`teacher_gate`, for instance to 0.5, which uses the context where the teacher is right in it."
            )
    if in_context["tokens"] > 0.95 * student["tokens"]:
        warnings.append(
            f"The context makes the answers no shorter: {in_context['tokens']:.0f} tokens in it, "
            f"{student['tokens']:.0f} without. Training is unlikely to shorten them."
        )
    return warnings
