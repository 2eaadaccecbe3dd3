"""Alarms: what ruins a run, said with its number, and stopped where going on would ruin the model."""

import math
from pathlib import Path
from statistics import fmean, median

from accelerate.logging import get_logger
from transformers import TrainerCallback


logger = get_logger(__name__)

# Rollouts that a share or a mean is taken over: the standard error of a share of this many is 3 points at most, so an
# alarm is neither raised by chance nor much later than it could be
WINDOW = 256
# Logs that the divergence is compared with
RECENT = 20


def mean(values: list[float]) -> float:
    """The mean of those that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


class OPSDAlarm(RuntimeError):
    """Raised before the optimizer step that would ruin the student."""


class AlarmCallback(TrainerCallback):
    """
    Watches a run of [`OPSDTrainer`].

    | alarm | raised when | what happens |
    |---|---|---|
    | divergence not finite | in any step | [`OPSDAlarm`], before the optimizer step |
    | dead teacher | its entropy is within 1% of that of the uniform distribution | [`OPSDAlarm`], before the step |
    | nothing to learn | the divergence is zero | the run stops |
    | accuracy falls | the share of correct rollouts is `alarm_correct_drop` below that of the start | the run stops |
    | truncation | the share of truncated rollouts is above `alarm_truncated` | warning |
    | length collapse | the mean length is below `alarm_length_floor` times that of the start | warning |
    | spike | the divergence is `alarm_kl_spike` times its recent median | warning |

    Shares and lengths are means over the last 256 rollouts, and over the first 256 for the start. When accuracy falls,
    the run names its best checkpoint and keeps it through rotation: of those whose share of correct rollouts was not
    below the start by the margin, the one with the fewest tokens. A resumed run takes the start, and the checkpoints
    it had written, from its log.

    Args:
        trainer ([`OPSDTrainer`]):
            Trainer to watch. Its configuration has the thresholds; `None` switches one off.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        args = trainer.args
        self.window = math.ceil(
            WINDOW / (args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps)
        )
        # One entry for each step: share of correct rollouts, their mean length. NaN where there is none: without a
        # verifier nothing is known to be wrong, and what the data set holds is no rollout of the student's
        self.correct: list[float] = []
        self.lengths: list[float] = []
        self.kls: list[float] = []
        self.checkpoints: list[tuple[str, float, float]] = []
        self.stopped_by: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        last = 0
        for log in state.log_history:
            if "completions/mean_length" in log:
                steps, last = log["step"] - last, log["step"]
                self.lengths += [log["completions/mean_length"]] * steps
                self.correct += [log.get("opsd/correct", math.nan)] * steps
        folders = {step: Path(args.output_dir) / f"checkpoint-{step}" for step in range(1, state.global_step + 1)}
        self.checkpoints = [self._measured(str(path), step) for step, path in folders.items() if path.is_dir()]

    def on_step_end(self, args, state, control, **kwargs):
        metrics = self.trainer._metrics["train"]
        is_own = self.trainer._given_completion_ids is None
        self.lengths.append(metrics["completions/mean_length"][-1] if is_own else math.nan)
        self.correct.append(metrics["opsd/correct"][-1] if is_own and "opsd/correct" in metrics else math.nan)
        if args.alarm_correct_drop is not None and len(self.correct) > self.window:
            start, now = self._start_and_now(self.correct)
            if now < start - args.alarm_correct_drop:
                self._stop(
                    control,
                    f"{now:.0%} of the rollouts are correct, at the start they were {start:.0%} "
                    f"(`alarm_correct_drop={args.alarm_correct_drop}`).",
                )

    def check_divergence(self) -> None:
        """
        Checks what the loss has measured. Called by the trainer before backward, because DeepSpeed takes the optimizer
        step in there.

        Raises:
            OPSDAlarm: If the divergence is not finite, or the teacher is dead.
        """
        step = self.trainer.state.global_step + 1
        num_tokens, kl, _, _, teacher_entropy, _ = self.trainer._token_sums["train"].tolist()
        if num_tokens == 0:
            return
        if not math.isfinite(kl):
            raise OPSDAlarm(
                f"The divergence of step {step} is {kl / num_tokens}: the weights of the teacher or of the student are "
                "not finite, or their logits overflow. Nothing was updated in this step."
            )
        entropy = teacher_entropy / num_tokens
        uniform = math.log(self.trainer.valid_vocab or self.trainer.model.config.get_text_config().vocab_size)
        if entropy >= 0.99 * uniform:  # never true where the backend does not measure it (NaN)
            raise OPSDAlarm(
                f"The teacher is dead: in step {step} its entropy is {entropy:.3f} nats, that of the uniform "
                f"distribution {uniform:.3f}. Check that its weights were loaded. Nothing was updated in this step."
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "opsd/kl" not in logs:
            return
        recent = self.kls[-RECENT:]
        kl, truncated = logs["opsd/kl"], logs["completions/clipped_ratio"]
        self.kls.append(kl)
        if kl < 1e-9:
            self._stop(
                control,
                f"The divergence is {kl:.1e} nats, so nothing is learned: the teacher gives what the student gives. "
                "Check that its context says something and that its weights are those you meant.",
            )
        if args.alarm_kl_spike is not None and len(recent) >= 5 and kl > args.alarm_kl_spike * median(recent):
            logger.warning(
                f"Step {state.global_step}: the divergence is {kl:.3g} nats, {kl / median(recent):.1f} times its recent "
                f"median (`alarm_kl_spike={args.alarm_kl_spike}`)."
            )
        if args.alarm_truncated is not None and truncated > args.alarm_truncated:
            logger.warning(
                f"Step {state.global_step}: {truncated:.0%} of the rollouts are truncated "
                f"(`alarm_truncated={args.alarm_truncated}`): raise `max_completion_length`."
            )
        start, now = self._start_and_now(self.lengths)
        if args.alarm_length_floor is not None and now < args.alarm_length_floor * start:
            logger.warning(
                f"Step {state.global_step}: the rollouts are {now:.1f} tokens long, at the start they were {start:.1f} "
                f"(`alarm_length_floor={args.alarm_length_floor}`): what the answers depend on may be gone."
            )

    def on_save(self, args, state, control, **kwargs):
        if not self.correct:
            return
        folder = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.checkpoints.append(self._measured(folder, len(self.correct)))
        best = self.best_checkpoint(args.alarm_correct_drop)
        if best is not None:
            state.best_model_checkpoint = best  # which `save_total_limit` then keeps

    def best_checkpoint(self, margin: float | None) -> str | None:
        """
        The best checkpoint by the stated rule.

        Args:
            margin (`float`, *optional*):
                Share of correct rollouts that it may have lost since the start.

        Returns:
            `str` or `None`: Its folder.
        """
        start = mean(self.correct[: self.window])
        floor = start - (margin or 1.0)
        good = [
            (tokens, folder)
            for folder, correct, tokens in self.checkpoints
            if not correct < floor and not math.isnan(tokens)
        ]
        return min(good)[1] if good else None

    def _start_and_now(self, values: list[float]) -> tuple[float, float]:
        return mean(values[: self.window]), mean(values[-self.window :])

    def _measured(self, folder: str, step: int) -> tuple[str, float, float]:
        """A checkpoint with the share of correct rollouts and the mean length at its step."""
        correct, lengths = (self._start_and_now(values[:step])[1] for values in (self.correct, self.lengths))
        return folder, correct, lengths

    def _stop(self, control, reason: str) -> None:
        best = self.best_checkpoint(self.trainer.args.alarm_correct_drop)
        where = (
            f"The best checkpoint is {best}." if best else "There is no checkpoint to go back to (`save_strategy`)."
        )
        self.stopped_by = f"Stopped at step {self.trainer.state.global_step}: {reason} {where}"
        logger.error(self.stopped_by)
        control.should_training_stop = True
