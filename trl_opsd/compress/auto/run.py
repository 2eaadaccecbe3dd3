"""A run from its arguments to its exit status: what follows what."""

import time
from pathlib import Path

from rich.console import Console

from ...adapters import merged
from ...cli import make_folder, user_errors
from ...evaluate.compare import Answer
from ...evaluate.results_file import Measurement
from ..auto_config import AutoConfig
from ..config import CompressConfig
from .compaction import choose, train
from .division import write_parquet
from .plan import Plan
from .runner import Runner
from .size import shrink
from .verdict import conclude, leave_nothing


def run(config: CompressConfig, arguments: AutoConfig, began: float) -> None:
    """
    Plans, and unless it is a dry run does it.

    Args:
        config ([`~trl_opsd.compress.config.CompressConfig`]):
            Checkpoint, prompts, folder, launcher and seed.
        arguments ([`~trl_opsd.compress.auto_config.AutoConfig`]):
            The rest.
        began (`float`):
            When the command began, before its imports, by `time.monotonic`.
    """
    with user_errors():
        runner = Runner(Plan(config, arguments))
        runner.say(runner.plan.describe(time.monotonic() - began))
        if arguments.dry_run:
            return
        make_folder(runner.root, "output_dir")
        try:
            status = compress(runner)
        except KeyboardInterrupt:
            Console(stderr=True).print("\nInterrupted: the same command goes on from here.")
            raise SystemExit(130) from None
    if status:
        raise SystemExit(status)


def compress(runner: Runner) -> int:
    """Runs a plan. Returns the exit status: 0 as good, 1 worse, 3 undecided or nothing to be had."""
    plan = runner.plan
    for name, rows in plan.data.items():
        write_parquet(rows, Path(plan.part(name)))
    # They follow from the results again, which are kept
    for name in ("decisions.jsonl", "results.json", "report.html", "report.md"):
        (runner.root / name).unlink(missing_ok=True)
    start = time.monotonic()
    model = plan.config.model_name_or_path
    base = runner.measure("base", model, "guard")
    tell_time(runner, base, time.monotonic() - start)
    promise = choose(runner, base)
    folder = None if promise is None else train(runner, promise, base)
    candidates = [] if folder is None else [folder]
    if plan.ratios and base.row.accuracy > 0:
        teacher = merged(model, str(runner.root / "base-merged")) if folder is None else folder
        candidates = [*shrink(runner, teacher, base), *candidates]
    if candidates:
        status = conclude(runner, candidates).status
    else:
        status = 3 if promise is None and not plan.ratios else Answer.WORSE.status
        leave_nothing(runner)
    runner.say(f"{(time.monotonic() - start) / 60:.1f} minutes in all, what was there from an earlier run not counted")
    return status


def tell_time(runner: Runner, base: Measurement, seconds: float) -> None:
    """Says how long the rest will take, from the stage that has just ended, of so many `seconds`, and the tokens it wrote."""
    row = base.row
    if row.generation_s is None or seconds < row.generation_s:  # they were there already
        return
    speed = row.n * runner.plan.arguments.samples * row.mean_tokens / max(row.generation_s, 1e-3)
    start = seconds - row.generation_s
    left = runner.plan.seconds_left(speed, row.mean_tokens, start)
    runner.decide(
        "time",
        f"{speed:,.0f} tokens a second, and {start:.0f} s of a stage beside them: at most {left / 60:.0f} minutes from here "
        f"in {runner.plan.stages} stages, if replies stay as long as they are",
        tokens_per_s=speed,
        start_s=start,
        stages=runner.plan.stages,
        seconds_at_most=left,
        first_s=seconds,
    )
