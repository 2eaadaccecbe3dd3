"""Alarms: what ruins a run, said with its number, and stopped where going on would ruin the model."""

import math
from pathlib import Path
from statistics import fmean, median
from typing import Any

from accelerate.logging import get_logger

from .metrics import DivergenceCallback, OPSDAlarm
from .saved import Saved


logger = get_logger(__name__)

# Rollouts and prompts that a share or a mean is taken over, at least. The rollouts of one prompt are mostly all right or all
# wrong, so that the standard error of a share is up to 4.4 points with this many prompts, and `correct_drop` by default three
# times that of a difference: an alarm is neither raised by chance nor much later than it could be
ROLLOUTS, PROMPTS = 256, 128
# Logs that the divergence is compared with
RECENT = 20


def mean(values: list[float]) -> float:
    """The mean of those that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


class AlarmCallback(DivergenceCallback, Saved):
    """
    Watches a run of [`OPSDTrainer`], which by itself ends on a divergence that is not finite, and on nothing else.

    | alarm | raised when | what happens |
    |---|---|---|
    | dead teacher | its entropy is within 1% of that of the uniform distribution, and the student's is not | [`OPSDAlarm`], before the optimizer step |
    | nothing to learn | the divergence is zero, and not because some batches are anchors alone | the run stops |
    | accuracy falls | the share of correct rollouts is `correct_drop` below that of the start | the run stops |
    | nothing trained on | no rollout of the whole run passed the gate | the run counts as stopped |
    | truncation | the share of truncated rollouts is above `truncated` | warning |
    | length collapse | the mean length is below `length_floor` times that of the start | warning |
    | spike | the divergence is `kl_spike` times its recent median | warning |

    Shares and lengths are means over the last 256 rollouts, or the last 128 prompts where these have more, and over as many
    for the start. When accuracy falls, the run names its best checkpoint and keeps it through rotation: of those whose share
    of correct rollouts was not below the start by the margin, the one with the fewest tokens. What they have seen is in every
    checkpoint (`alarms.json`). A run that goes on from one without takes it from its log, as well as that says it.

    Args:
        trainer ([`OPSDTrainer`]):
            Trainer to watch.
        correct_drop (`float`, *optional*, defaults to `0.2`):
            How far the share of correct rollouts may fall below that of the start. `None` is no limit.
        truncated (`float`, *optional*, defaults to `0.5`):
            Share of truncated rollouts from which on there is a warning. `None` is none.
        length_floor (`float`, *optional*, defaults to `0.2`):
            Share of the mean length of the start below which there is a warning. `None` is none.
        kl_spike (`float`, *optional*, defaults to `10.0`):
            Multiple of the recent median of the divergence from which on there is a warning. `None` is none.

    Example:

    ```python
    >>> from trl_opsd.opsd import AlarmCallback

    >>> trainer.add_callback(AlarmCallback(trainer))
    ```
    """

    file = "alarms.json"

    def __init__(
        self,
        trainer,
        correct_drop: float | None = 0.2,
        truncated: float | None = 0.5,
        length_floor: float | None = 0.2,
        kl_spike: float | None = 10.0,
    ):
        self.trainer = trainer
        self.correct_drop, self.truncated = correct_drop, truncated
        self.length_floor, self.kl_spike = length_floor, kl_spike
        batches = math.ceil(max(ROLLOUTS, PROMPTS * trainer.args.num_generations) / trainer.args.global_batch_size)
        self.window = batches * trainer.args.num_iterations  # in steps
        # One entry for each step: share of correct rollouts, their mean length. NaN where there is none: without a
        # verifier nothing is known to be wrong, and what the data set holds is no rollout of the student's
        self.correct: list[float] = []
        self.lengths: list[float] = []
        self.kls: list[float] = []
        self.kept: list[float] = []
        self.anchored: list[float] = []  # share on the plain prompt, one entry for each log
        self.checkpoints: list[tuple[str, float, float]] = []
        self.stopped_by: str | None = None
        # Of the probe, where there was one: rollouts of the student before training, and how many were correct
        self.probed: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("correct", "lengths", "kls", "kept", "anchored", "probed")},
            "checkpoints": [[Path(folder).name, *measured] for folder, *measured in self.checkpoints],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        folder = Path(self.trainer.args.output_dir)
        self.checkpoints = [(str(folder / name), *measured) for name, *measured in state.pop("checkpoints")]
        vars(self).update(state)

    def load(self, folder: str) -> None:
        if (Path(folder) / self.file).is_file():
            super().load(folder)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            return
        if not self.lengths:
            self._read_log(args, state)
        self._add_checkpoint(args, state)  # the one that the run goes on from, which holds what was before it

    def _read_log(self, args, state) -> None:
        last = 0
        for log in state.log_history:
            if "completions/mean_length" in log:
                steps, last = log["step"] - last, log["step"]
                self.lengths += [log["completions/mean_length"]] * steps
                self.correct += [log.get("opsd/correct", math.nan)] * steps
                self.kept.append(log.get("opsd/kept", 1.0))
            if "opsd/kl" in log:
                self.anchored.append(log.get("opsd/anchored", 0.0))
        folders = {step: Path(args.output_dir) / f"checkpoint-{step}" for step in range(1, state.global_step)}
        self.checkpoints = [self._measured(str(path), step) for step, path in folders.items() if path.is_dir()]

    def on_step_end(self, args, state, control, **kwargs):
        metrics = self.trainer._metrics["train"]
        self.kept.append(metrics["opsd/kept"][-1] if "opsd/kept" in metrics else 1.0)
        is_given = self.trainer.rollouts.given is not None
        self.lengths.append(math.nan if is_given else metrics["completions/mean_length"][-1])
        is_unknown = is_given or "opsd/correct" not in metrics
        self.correct.append(math.nan if is_unknown else metrics["opsd/correct"][-1])
        if self.correct_drop is not None and len(self.correct) > self.window:
            start, now = self._correct_at_start(), self._start_and_now(self.correct)[1]
            if now < start - self.correct_drop:
                self._stop(
                    control,
                    f"{now:.0%} of the last {self.window // args.num_iterations * args.global_batch_size} rollouts are "
                    "correct, at the start they "
                    f"were {start:.0%} "
                    f"(`correct_drop={self.correct_drop}`).",
                )

    def on_divergence(self, args, state, control, metrics, **kwargs):
        means = metrics.means()
        vocab_size = self.trainer.teacher.valid_vocab or self.trainer.model.config.get_text_config().vocab_size
        uniform = math.log(vocab_size)
        teacher, student = means["opsd/teacher_entropy"], means["opsd/student_entropy"]
        # Never true where the backend does not measure it (NaN)
        if metrics.num_tokens > 0 and teacher >= 0.99 * uniform and student < 0.99 * uniform:
            raise OPSDAlarm(
                f"The teacher is dead: in step {state.global_step + 1} its entropy is {teacher:.3f} nats, that of the "
                f"uniform distribution {uniform:.3f} and the student's {student:.3f}. Check that its weights were loaded. "
                "Nothing was updated in this step."
            )

    def on_train_end(self, args, state, control, **kwargs):
        if self.stopped_by is None and self.kept and not any(self.kept):
            self.stopped_by = (
                f"No optimizer step was made: of the rollouts of {len(self.kept)} steps none passed the gate "
                f"`{self.trainer.rollouts.gate}`, and the weights are those that the run began with."
            )
            logger.error(self.stopped_by)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "opsd/kl" not in logs:
            return
        recent = self.kls[-RECENT:]
        kl, truncated = logs["opsd/kl"], logs["completions/clipped_ratio"]
        self.kls.append(kl)
        self.anchored.append(logs.get("opsd/anchored", 0.0))
        if all(share == 1.0 for share in self.anchored):
            # On an anchor the student starts out as its teacher. Some batches may hold nothing else, but not all
            if state.global_step >= self.window and kl < 1e-9:
                self._stop(
                    control,
                    "The divergence is zero, so nothing is learned: in none of its contexts was the teacher right on any "
                    f"prompt so far (`teacher_gate={self.trainer.args.teacher_gate}`).",
                )
        elif kl < 1e-9 and self.anchored[-1] < 1.0:
            self._stop(
                control,
                f"The divergence is {kl:.1e} nats, so nothing is learned: the teacher gives what the student gives. "
                "Check that its context says something and that its weights are those you meant.",
            )
        if self.kl_spike is not None and len(recent) >= 5 and kl > self.kl_spike * median(recent):
            logger.warning(
                f"Step {state.global_step}: the divergence is {kl:.3g} nats, {kl / median(recent):.1f} times its recent "
                f"median (`kl_spike={self.kl_spike}`)."
            )
        if self.truncated is not None and truncated > self.truncated:
            logger.warning(
                f"Step {state.global_step}: {truncated:.0%} of the rollouts are truncated "
                f"(`truncated={self.truncated}`): raise `max_completion_length`."
            )
        start, now = self._start_and_now(self.lengths)
        if self.length_floor is not None and now < self.length_floor * start:
            logger.warning(
                f"Step {state.global_step}: the rollouts are {now:.1f} tokens long, at the start they were {start:.1f} "
                f"(`length_floor={self.length_floor}`): what the answers depend on may be gone."
            )

    def on_save(self, args, state, control, **kwargs):
        self._add_checkpoint(args, state)

    def _add_checkpoint(self, args, state) -> None:
        if not self.correct:
            return
        folder = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.checkpoints.append(self._measured(folder, len(self.correct)))
        best = self.best_checkpoint(self.correct_drop)
        if best is not None and not args.load_best_model_at_end:  # which has a metric of its own to choose by
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
        floor = self._correct_at_start() - (margin or 1.0)
        good = [
            (tokens, folder)
            for folder, correct, tokens in self.checkpoints
            if not correct < floor and not math.isnan(tokens)
        ]
        return min(good)[1] if good else None

    def _correct_at_start(self) -> float:
        """
        Share of correct rollouts at the start: of the first ones, or, where these held a collapse already, the least that
        the probe leaves likely (the lower end of Wilson's 95% interval).
        """
        start = mean(self.correct[: self.window])
        if self.probed is None:
            return start
        number, correct = self.probed
        share, z2 = correct / number, 1.96**2
        half = math.sqrt(z2 * share * (1 - share) / number + (z2 / (2 * number)) ** 2)
        return max((share + z2 / (2 * number) - half) / (1 + z2 / number), start)

    def _start_and_now(self, values: list[float]) -> tuple[float, float]:
        return mean(values[: self.window]), mean(values[-self.window :])

    def _measured(self, folder: str, step: int) -> tuple[str, float, float]:
        """A checkpoint with the share of correct rollouts and the mean length at its step."""
        correct, lengths = (self._start_and_now(values[:step])[1] for values in (self.correct, self.lengths))
        return folder, correct, lengths

    def _stop(self, control, reason: str) -> None:
        best = self.best_checkpoint(self.correct_drop)
        if best is not None:
            where = f"The best checkpoint is {best}."
        elif self.checkpoints:
            where = (
                f"None of its {len(self.checkpoints)} checkpoints is as good as at the start, within `correct_drop`."
            )
        else:
            where = "There is no checkpoint to go back to (`save_strategy`)."
        self.stopped_by = f"Stopped at step {self.trainer.state.global_step}: {reason} {where}"
        logger.error(self.stopped_by)
        control.should_training_stop = True
